r"""The equation that every method shares.

    y = run · f(x; W + specific ⊙ δ_task) + (1 − run) · shortcut(x)          (run, specific) = gate_task(x)

:class:`GatedUnit` wraps any module ``f`` (a convolution, a linear layer, ``nn.MultiheadAttention``, a residual block) without
knowing its type: it calls a shallow copy of the module with other parameters. The module itself is never changed.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from operator import attrgetter
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from taps.core.delta import Deltas, add_delta
from taps.core.execution import Place, State, plain_state
from taps.core.gate import Decision, Gate
from taps.core.modules import TaskDict, as_function, at_rows, first_input, keeps_state, with_tensors, without_caches
from taps.errors import UserError


class GatedUnit(Place):
    """A module of the base network with one gate per task and, where the gate may use them, deltas.

    It replaces the base module, and calls it directly without a task or where the gate's decision changes nothing. Its attributes
    (``conv.stride``, ``qkv.weight``) can be read here, parameters with their effective value for the current task.

    Args:
        name: the unit's dotted name in the unwrapped network.
        base: the module.
        names: dotted names, relative to the module, of the parameters that get deltas.
        state: shared by all places of the model.
        shortcut: maps the input to the output if the unit is skipped; the identity by default.
    """

    def compute(self, task: str | None, decision: Decision, args: tuple, kwargs: dict):
        """Evaluate the equation."""
        x, run = first_input(args, kwargs), decision.run
        if isinstance(run, Tensor):
            return self._blend(task, x, run, decision, args, kwargs)
        if run == 0.0:
            return self.shortcut(x)
        y = self._effective(task, decision, as_function)(*args, **kwargs)
        return y if run == 1.0 else run * y + (1.0 - run) * self.state.again(self.shortcut, x)

    def _blend(self, task: str | None, x: Tensor, run: Tensor, decision: Decision, args: tuple, kwargs: dict) -> Tensor:
        """Evaluate the equation with a tensor ``run``: one value for all samples, or one value per sample, shape (B,)."""
        f = self._effective(task, decision, as_function)
        if run.dim() == 0 or (self.training and (run.requires_grad or not bool(((run == 0) | (run == 1)).all()))):
            y = f(*args, **kwargs)
            run = run.reshape(-1, *[1] * (y.dim() - 1)) if run.dim() else run
            return run * y + (1 - run) * self.state.again(self.shortcut, x)
        y = self.shortcut(x)
        rows = run.nonzero().flatten()  # the unit is not computed for samples that skip it
        args, kwargs = at_rows(args, kwargs, rows)
        return y.index_copy(0, rows, f(*args, **kwargs).to(y.dtype)) if rows.numel() else y

    def __init__(
        self, name: str, base: nn.Module, names: tuple[str, ...], state: State, shortcut: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.name, self.parameter_names, self.state = name, names, state
        self.base, self.shortcut = base, shortcut if shortcut is not None else nn.Identity()
        self.gates, self.deltas = TaskDict(), TaskDict()
        self.ready: dict[str | None, nn.Module] = {}
        self.changes_itself = False  # whether calls change its buffers, as those of spectral norm do
        self._is_made = True

    def _effective(self, task: str | None, decision: Decision, make: Callable = with_tensors):
        """Return f(·; W + specific ⊙ δ)."""
        tensors = self.effective_parameters(task, decision)
        if not tensors and not (self.changes_itself or self.base._forward_pre_hooks):
            return self.base
        return make(self.base, tensors, copy_buffers=self.changes_itself)

    def effective_parameters(self, task: str | None, decision: Decision) -> dict[str, Tensor]:
        """Return the parameters that differ from the base's under ``decision``, by name: W + specific ⊙ δ."""
        deltas: Deltas | None = self.deltas.get(task)
        if deltas is None or not decision.uses_delta:
            return {}
        specific = decision.specific
        if deltas.holds_sums and specific == 1.0:
            return deltas.sums() or {}
        factors = specific if isinstance(specific, Mapping) else dict.fromkeys(self.parameter_names, specific)
        return {
            name: add_delta(parameter, deltas.used(name), factors[name], decision.delta_gradient)
            for name, parameter in self.base_parameters().items()
        }

    def decision_for(self, task: str | None, x: Tensor | None) -> Decision:
        """Return the gate's decision; without a task, the base runs."""
        gate: Gate | None = self.gates.get(task)
        if gate is None and task is not None:
            raise UserError(f"task {task!r} was removed while it ran")
        return Decision() if gate is None else gate(x, self.state)

    def settled_decision(self, task: str | None) -> Decision | None:
        gate: Gate | None = self.gates.get(task)
        return Decision() if gate is None else gate.settled()

    def sharing_key(self, decision: Decision) -> str | None:
        """Return ``"base"`` or ``"skip"``, shared by all tasks with that decision, or ``None`` if this task differs."""
        if isinstance(decision.run, Tensor) or decision.run not in (0.0, 1.0):
            return None
        return "skip" if decision.run == 0.0 else None if decision.uses_delta else "base"

    def base_parameters(self) -> dict[str, Tensor]:
        return {name: attrgetter(name)(self.base) for name in self.parameter_names}

    def weights(self) -> dict[str, Tensor]:
        """Return the base's parameters that a task may replace here; without deltas, those that it may skip."""
        return self.base_parameters() if self.parameter_names else plain_state(self.base, parameters_only=True)

    @property
    def size(self) -> int:
        """Number of :meth:`weights`."""
        return sum(parameter.numel() for parameter in self.weights().values())

    def stand_in(self) -> dict[str, Tensor]:
        """Return the shortcut's own parameters, those that are not in the base module."""
        own = {id(parameter) for parameter in self.base.parameters()}
        return {name: parameter for name, parameter in self.shortcut.named_parameters() if id(parameter) not in own}

    def add_task(self, task: str, gate: Gate, with_deltas: bool | None = None, values: Mapping | None = None) -> None:
        """Give ``task`` a gate and, if it ``needs_delta`` or ``with_deltas`` says so, deltas: zeros, or ``values`` by parameter."""
        like = next(iter(self.base.parameters()), None)
        if like is not None:  # half precision would lose the small updates of a score
            gate = gate.to(like.device, like.dtype if like.dtype.itemsize >= 4 else torch.float32)
        self.gates[task] = gate.train(self.training)
        if gate.needs_delta if with_deltas is None else with_deltas:
            self.deltas[task] = Deltas(self.base_parameters(), values).train(self.training)

    def change_gate(self, task: str, gate: Gate) -> None:
        """Replace the task's gate; its deltas are kept if the new gate needs them, and missing ones start at zero."""
        deltas: Deltas | None = self.deltas.get(task)
        values = {name: deltas[name].detach() for name in self.parameter_names} if deltas is not None else None
        self.remove_task(task)
        self.add_task(task, gate, values=values)

    def remove_task(self, task: str) -> None:
        self.ready.pop(task, None)
        for modules in (self.gates, self.deltas):
            if task in modules:
                del modules[task]

    def settle(self, task: str) -> None:
        """Prepare for a task that is no longer trained: hold W + δ instead of δ and stop evaluating a constant gate."""
        if task in self.deltas:
            self.deltas[task].hold_sums(self.base_parameters())
        self.prepare(task)

    def prepare(self, task: str) -> None:
        self.ready.pop(task, None)
        gate = self.gates[task]
        decision = Decision(run=0.5) if gate.uses_input else gate.decide()
        made = self._effective(task, decision) if decision.run == 1.0 and isinstance(decision.specific, float) else None
        if made is not None and (made is self.base or not keeps_state(made)):
            self.ready[task] = made
            made.training &= made is self.base  # a copy is used only in evaluation mode

    def merged(self, task: str, memo: dict) -> nn.Module:
        """Return an ordinary copy of the base with ``task``'s decision; raise ``ValueError`` if that depends on the input."""
        gate: Gate | None = self.gates.get(task)
        decision = Decision() if gate is None else gate.decide()
        if isinstance(decision.run, Tensor) or decision.run not in (0.0, 1.0) or (gate is not None and gate.uses_input):
            raise ValueError(f"unit {self.name!r} is run or skipped for each sample, so it cannot be merged")
        if decision.run == 0.0:
            return copy.deepcopy(self.shortcut, memo)
        plain = without_caches(copy.deepcopy(self.base, memo))
        for name, value in self.effective_parameters(task, decision).items():
            owner, _, last = name.rpartition(".")  # a new parameter, since the base's may be tied to another unit's
            setattr(plain.get_submodule(owner), last, nn.Parameter(value.detach().clone()))
        return plain

    def attribute(self, name: str):
        """Return an attribute of the base; parameters with deltas have their effective value for the current task."""
        read = self.state.reading.read
        if name in self.parameter_names or (len(self.deltas) and inspect.ismethod(getattr(self.base, name, None))):
            return read(partial(self._read, name=name))
        inner = [own.removeprefix(f"{name}.") for own in self.parameter_names if own.startswith(f"{name}.")]
        if inner and self.state.call is not None:  # e.g. attention.out_proj.weight, which fast paths read
            return SimpleNamespace(**{own: read(partial(self._read, name=f"{name}.{own}")) for own in inner})
        return getattr(self.base, name)

    def _read(self, task: str | None, name: str):
        if task is None or task not in self.gates:
            return attrgetter(name)(self.base)
        decision = self.gates[task](None, self.state)
        if isinstance(decision.run, Tensor) or decision.run != 1.0:
            raise UserError(
                f"unit {self.name!r} ({type(self.base).__name__}) cannot be skipped: the module around it reads its "
                f"{name} instead of calling it; leave it out with layers="
            )
        return attrgetter(name)(self._effective(task, decision))
