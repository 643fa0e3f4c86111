r"""The layer: the one equation every method shares.

    y = run · f(x; W + specific ⊙ δ_task) + (1 − run) · shortcut(x)          (run, specific) = gate_task(x)

:class:`GatedUnit` wraps any module ``f`` (a convolution, a linear layer, ``nn.MultiheadAttention``, a residual block)
without knowing its type: the effective parameters are handed to it with ``torch.func.functional_call``.
:class:`TaskNorm` wraps a normalisation layer, whose affine parameters and statistics are copied whole for a task rather
than expressed as deltas.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map

from taps.delta import Deltas, TeachGates, add_delta, any_nonzero, is_linear_in_parameters
from taps.errors import UserError
from taps.gates import Decision, Gate, State, first_input


class TaskDict(nn.Module):
    """Modules by task name. Unlike ``nn.ModuleDict`` it takes every name, ``items`` and ``train`` included."""

    def __getitem__(self, task: str) -> nn.Module:
        return self._modules[task]

    def __setitem__(self, task: str, module: nn.Module) -> None:
        self._modules[task] = module

    def __delitem__(self, task: str) -> None:
        del self._modules[task]

    def __contains__(self, task: object) -> bool:
        return task in self._modules

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)

    def get(self, task: str | None) -> nn.Module | None:
        return self._modules.get(task)


class TaskModule(nn.Module):
    """A place in the network that computes different things for different tasks.

    What it does for one task is an *answer*, found by :meth:`ask` and done by :meth:`carry_out`. When the state holds
    several tasks at once, the call goes to them (:mod:`taps.mixed`, :mod:`taps.together`), and they use the same
    methods: tasks whose answers are :meth:`shared` get one call.
    """

    state: State

    def forward(self, *args, **kwargs):
        task = self.state.task
        if task is None or isinstance(task, str):
            return self.carry_out(task, self.ask(task, first_input(args, kwargs)), args, kwargs)
        return task.run(self, args, kwargs)

    def ask(self, task: str | None, x: Tensor | None):
        """The answer for a task (``None``: the base alone) and the first input."""
        raise NotImplementedError

    def shared(self, answer) -> Hashable | None:
        """A name for what every task with such an answer shares, ``None`` where this task differs from all others."""
        raise NotImplementedError

    def looks_at_batch(self) -> bool:
        """Whether a sample's output depends on the samples beside it, so that each task's must be run by themselves."""
        return False

    def is_closed(self, answer) -> bool:
        """Whether the answer computes what the base does although its gate still learns: see ``teach_gates``."""
        return False

    def carry_out(self, task: str | None, answer, args: tuple, kwargs: dict):
        """Compute what the answer says."""
        raise NotImplementedError

    def merged(self, task: str, memo: dict) -> nn.Module:
        """An ordinary module that does what this does for ``task``. ``memo`` as in ``copy.deepcopy``."""
        raise NotImplementedError

    def for_current_task(self, value: Callable[[str | None], object]):
        """A value that depends on the task: an attribute that other modules read."""
        task = self.state.task
        return value(task) if task is None or isinstance(task, str) else task.read(value)


class GatedUnit(TaskModule):
    """A module of the base network with, for each task, a gate and (where the gate can ask for them) deltas.

    It stands where the base module stood. Without a task it *is* the base module, and so it is wherever the gate's
    decision leaves nothing to change: the base is then called directly and costs nothing extra.

    Code that reads attributes of the base module (``conv.stride``, ``qkv.weight``) finds them here; parameters that
    carry deltas are answered with their effective value for the current task, so layers that other modules read
    instead of call are adapted all the same.

    Args:
        name: the unit's dotted name in the unwrapped network.
        base: the module.
        parameter_names: which of its parameters (dotted, relative to it) get deltas.
        state: shared by all units of the model.
        shortcut: maps the input to the output where the unit is not run; the identity by default.
    """

    def __init__(
        self,
        name: str,
        base: nn.Module,
        parameter_names: tuple[str, ...],
        state: State,
        shortcut: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.parameter_names = parameter_names
        self.state = state
        self.base = base
        self.shortcut = shortcut if shortcut is not None else nn.Identity()
        self.gates = TaskDict()
        self.deltas = TaskDict()

    def base_parameters(self) -> dict[str, Tensor]:
        return {name: self.base.get_parameter(name) for name in self.parameter_names}

    def weights(self) -> dict[str, Tensor]:
        """The base's parameters that a task may have of its own here; of a unit without deltas, those that it may leave out."""
        return self.base_parameters() if self.parameter_names else plain_state(self.base, parameters_only=True)

    @property
    def size(self) -> int:
        """Number of :meth:`weights`."""
        return sum(parameter.numel() for parameter in self.weights().values())

    def stand_in(self) -> dict[str, Tensor]:
        """The shortcut's own parameters: those that are none of the base module's."""
        own = {id(parameter) for parameter in self.base.parameters()}
        return {name: parameter for name, parameter in self.shortcut.named_parameters() if id(parameter) not in own}

    def add_task(
        self, task: str, gate: Gate, with_deltas: bool | None = None, values: Mapping[str, Tensor] | None = None
    ) -> None:
        """Give ``task`` a gate and, if the gate ``needs_delta`` (or as told), deltas: zeros, or ``values`` by parameter."""
        like = next(iter(self.base.parameters()), None)
        if like is not None:
            # A score in half precision could not move by the small steps that decide it.
            wide = like.dtype if like.dtype in (torch.float32, torch.float64) else torch.float32
            gate = gate.to(device=like.device, dtype=wide)
        self.gates[task] = gate.train(self.training)
        if gate.needs_delta if with_deltas is None else with_deltas:
            self.deltas[task] = Deltas(self.base_parameters(), values).train(self.training)

    def own(self, task: str) -> int:
        """How many of the unit's parameters are the task's own, by its gate and by what its deltas hold."""
        if not self.parameter_names:
            return 0
        count = self.gates[task].own(self.size)
        return min(count, self.deltas[task].count()) if count and task in self.deltas else count

    def change_gate(self, task: str, gate: Gate) -> None:
        """Give the task another gate; its deltas stay where that can ask for them, and start at zero where there were none."""
        held = self.deltas.get(task)
        self.remove_task(task)
        self.add_task(task, gate, values=held and {name: held[name].detach() for name in self.parameter_names})

    def release(self, task: str) -> None:
        """Drop the task's deltas if its gate, which has been decided, leaves them unused."""
        if task in self.deltas and not self.gates[task].decide().uses_delta:
            del self.deltas[task]

    def remove_task(self, task: str) -> None:
        for modules in (self.gates, self.deltas):
            if task in modules:
                del modules[task]

    def effective_parameters(self, task: str | None, decision: Decision) -> dict[str, Tensor]:
        """The parameters that differ from the base's under ``decision``, by name: W + specific ⊙ δ."""
        deltas = self.deltas.get(task)
        specific = decision.specific
        if deltas is None or not decision.uses_delta:
            return {}
        return {
            name: add_delta(
                parameter,
                deltas[name],
                specific[name] if isinstance(specific, Mapping) else specific,
                decision.delta_gradient,
            )
            for name, parameter in self.base_parameters().items()
        }

    def ask(self, task: str | None, x: Tensor | None) -> Decision:
        """The gate's decision; a task without a gate here runs the base."""
        gate = self.gates.get(task)
        return Decision() if gate is None else gate(x, self.state)

    def shared(self, decision: Decision) -> str | None:
        """``"base"`` or ``"skip"`` where every task that decides so computes the same, ``None`` where this one differs."""
        if isinstance(decision.run, Tensor):
            return None
        if decision.run == 0.0:
            return "skip"
        return "base" if decision.run == 1.0 and not decision.uses_delta else None

    def is_closed(self, decision: Decision) -> bool:
        """Whether a relaxed decision computes the base's output and only its gate learns from it: see :meth:`teach_gates`."""
        specific = decision.specific
        return (
            is_linear_in_parameters(self.base)
            and decision.delta_gradient is None
            and not isinstance(decision.run, Tensor)
            and decision.run == 1.0
            and isinstance(specific, Tensor)
            and specific.dim() == 0
            and bool(specific.detach() == 0)
        )

    def teach_gates(self, y: Tensor, x: Tensor, rows: Mapping[str, slice], decisions: Mapping[str, Decision]) -> Tensor:
        """``y`` = f(x; W) unchanged, with the gradients of closed gates added.

        A closed unit's output is the base's, so tasks can share it, but each gate's specific·δ is still part of the
        graph: dL/dspecific = ⟨dL/dy, ∂y/∂specific⟩ with ∂y/∂specific = f(x_task; δ_task), since f is linear in its
        parameters. That is one more run of the layer on the task's rows, in the backward pass.
        """
        learning = [
            task for task, decision in decisions.items() if task in self.deltas and decision.specific.requires_grad
        ]
        if not learning:
            return y
        deltas = [self.deltas[task][name] for task in learning for name in self.parameter_names]
        specifics = [decisions[task].specific for task in learning]
        places = [rows[task] for task in learning]
        return TeachGates.apply(y, x.detach(), self._slope, places, len(self.parameter_names), *specifics, *deltas)

    def _slope(self, x: Tensor, deltas: Sequence[Tensor]) -> Tensor | None:
        """∂y/∂specific = f(x; δ); ``None`` where δ is zero."""
        if not any(map(any_nonzero, deltas)):
            return None
        values = {name: delta.to(x.dtype) for name, delta in zip(self.parameter_names, deltas, strict=True)}
        return functional_call(self.base, values, (x,), tie_weights=False)

    def carry_out(self, task: str | None, decision: Decision, args: tuple, kwargs: dict):
        """The equation."""
        x = first_input(args, kwargs)
        run = decision.run
        if isinstance(run, Tensor):
            return self._blend(task, x, run, decision, args, kwargs)
        if run == 0.0:
            return self.shortcut(x)
        y = self._call(task, decision, args, kwargs)
        return y if run == 1.0 else run * y + (1.0 - run) * self.shortcut(x)

    def _call(self, task: str | None, decision: Decision, args: tuple, kwargs: dict):
        effective = self.effective_parameters(task, decision)
        if not effective:
            return self.base(*args, **kwargs)
        return functional_call(self.base, effective, args, kwargs, tie_weights=False)

    def _blend(self, task: str | None, x: Tensor, run: Tensor, decision: Decision, args: tuple, kwargs: dict) -> Tensor:
        """The equation with a tensor ``run``: one value for all, or one a sample, shape (B,)."""
        relaxed = self.training and (run.requires_grad or not bool(((run == 0) | (run == 1)).all()))
        if run.dim() == 0 or relaxed:
            y = self._call(task, decision, args, kwargs)
            run = run.reshape(-1, *[1] * (y.dim() - 1)) if run.dim() else run
            return run * y + (1 - run) * self.shortcut(x)
        y = self.shortcut(x)
        rows = run.nonzero().flatten()  # rows that are not kept are never computed
        if rows.numel() == 0:
            return y
        kept = self._call(task, decision, (x[rows], *args[1:]), kwargs)
        return y.index_copy(0, rows, kept.to(y.dtype))

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            modules = self.__dict__.get("_modules", {})
            if "base" not in modules:
                raise
        if name in self.parameter_names:
            return self._parameter(name)
        inner = [parameter for parameter in self.parameter_names if parameter.startswith(f"{name}.")]
        if inner and self.state.task is not None:  # e.g. attention.out_proj.weight, which fast paths read
            return SimpleNamespace(**{parameter[len(name) + 1 :]: self._parameter(parameter) for parameter in inner})
        return getattr(self.base, name)

    def _parameter(self, name: str) -> Tensor:
        """One parameter as the current task sees it.

        Raises:
            UserError: where the gate may skip the unit, which nobody can do who reads weights instead of calling it.
        """

        def value(task: str | None) -> Tensor:
            base = self.base.get_parameter(name)
            if task not in self.gates:
                return base
            decision = self.gates[task](None, self.state)
            if isinstance(decision.run, Tensor) or decision.run != 1.0:
                raise UserError(
                    f"unit {self.name!r} ({type(self.base).__name__}) cannot be skipped: the module around it reads its "
                    f"{name} instead of calling it; leave it out with layers="
                )
            return self.effective_parameters(task, decision).get(name, base)

        return self.for_current_task(value)

    def merged(self, task: str, memo: dict) -> nn.Module:
        """An ordinary copy of the base with ``task``'s decision carried out. ``memo`` as in ``copy.deepcopy``.

        Raises:
            ValueError: where the decision depends on the input, so no fixed network equals it.
        """
        decision = self.gates[task].decide() if task in self.gates else Decision()
        if isinstance(decision.run, Tensor) or decision.run not in (0.0, 1.0):
            raise ValueError(f"unit {self.name!r} is run or skipped for each sample, so it cannot be merged")
        if decision.run == 0.0:
            return copy.deepcopy(self.shortcut, memo)
        plain = copy.deepcopy(self.base, memo)
        for name, value in self.effective_parameters(task, decision).items():
            plain.get_parameter(name).data = value.detach().clone()
        return plain


class TaskNorm(TaskModule):
    """A normalisation layer of the base, with a whole copy (affine and running statistics) for each task that wants one.

    Policies: ``"task"`` every task uses its copy; ``"follow"`` it uses its copy only while the unit that feeds the norm
    is tuned, so what is shared is shared exactly, and where tasks skip blocks, tasks that have come the same way have a
    copy in common; ``"frozen"`` every task uses the base's. The base's own norm is always in evaluation mode while the
    base is frozen: its statistics never move.

    Args:
        name: the norm's dotted name in the unwrapped network.
        base: the norm.
        state: shared by all units of the model.
        policy: ``"task"``, ``"follow"`` or ``"frozen"``.
        feeder: the layer that comes before it in network order, if that is a unit.
        frozen: whether the base is frozen.
        position: number of units that begin before it, in network order.
        inside: index of the unit that holds it, ``None`` if there is none.
    """

    def __init__(
        self,
        name: str,
        base: nn.Module,
        state: State,
        policy: str,
        feeder: GatedUnit | None,
        frozen: bool,
        position: int = 0,
        inside: int | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.policy = policy
        self.state = state
        self.frozen = frozen
        self.position, self.inside = position, inside
        self.base = base
        self.norms = TaskDict()
        self._contents: dict[int, tuple] = {}
        self._feeder = (feeder,)  # in a tuple, so that it is not registered here a second time

    def add_task(self, *tasks: str, always: bool = False) -> None:
        """Give ``tasks`` a copy, one that they have in common, if the policy says so or ``always``."""
        if not always and (self.policy == "frozen" or (self.policy == "follow" and self._feeder[0] is None)):
            return
        own = copy.deepcopy(self.base)
        own.requires_grad_(True)
        for task in tasks:
            self.norms[task] = own.train(self.training)

    def remove_task(self, task: str) -> None:
        if task in self.norms:
            del self.norms[task]

    def share(self, groups: list[list[str]]) -> None:
        """Give each group of tasks a copy of its own, none where there is one group; a group that has one keeps it."""
        for tasks in groups:
            others = {id(self.norms[task]) for task in self.norms if task not in tasks}
            held = {id(self.norms.get(task)) for task in tasks}
            if len(groups) > 1 and len(held) == 1 and tasks[0] in self.norms and not held & others:
                continue
            for task in tasks:
                self.remove_task(task)
            if len(groups) > 1:
                self.add_task(*tasks, always=True)

    def hold(self, held: bool, tasks: bool = True) -> None:
        """While held, norms use the statistics of the batch and leave their running ones as they are.

        Args:
            held: whether to.
            tasks: the tasks' norms too, not only the base's.
        """
        for norm in (self.base, *(self.norms[task] for task in self.norms if tasks)):
            for inner in norm.modules():
                if isinstance(inner, nn.modules.batchnorm._BatchNorm):
                    momentum = inner.__dict__.setdefault("_momentum", inner.momentum)
                    inner.momentum = 0.0 if held else momentum

    def follows(self, unit: GatedUnit) -> bool:
        """Whether this norm is the task's own only while ``unit`` is tuned."""
        return self.policy == "follow" and self._feeder[0] is unit

    def own(self, task: str | None) -> nn.Module | None:
        """The task's copy if it is in use, else ``None``."""
        norm = self.norms.get(task)
        if norm is None or self.policy == "task" or self._feeder[0] is None:
            return norm
        return norm if self._feeder[0].gates[task].decide().uses_delta else None

    def ask(self, task: str | None, x: Tensor | None) -> nn.Module | None:
        return self.own(task)

    def shared(self, own: nn.Module | None) -> Hashable | None:
        """``"base"``, else a name for the copy, in evaluation mode one that copies of the same contents have in common."""
        if own is None:
            return "base"
        if own.training:
            return id(own)
        tensors = [tensor for tensor in (*own.parameters(), *own.buffers()) if tensor.dim()]
        version = tuple((id(tensor), tensor._version) for tensor in tensors)
        known = self._contents.get(id(own))
        if known is None or known[0] != version:
            contents = hash(tuple(tensor.detach().float().cpu().numpy().tobytes() for tensor in tensors))
            known = self._contents[id(own)] = (version, contents)
        return known[1]

    def looks_at_batch(self) -> bool:
        return self.base.training and next(self.base.buffers(), None) is not None

    def carry_out(self, task: str | None, own: nn.Module | None, args: tuple, kwargs: dict):
        return (self.base if own is None else own)(*args, **kwargs)

    def train(self, mode: bool = True) -> TaskNorm:
        super().train(mode)
        if self.frozen:
            self.base.eval()
        return self

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            modules = self.__dict__.get("_modules", {})
            if "base" not in modules:
                raise

        def value(task: str | None):
            own = self.own(task)
            return getattr(self.base if own is None else own, name)

        return self.for_current_task(value)

    def merged(self, task: str, memo: dict) -> nn.Module:
        norm = self.own(task)
        return copy.deepcopy(self.base if norm is None else norm, memo)


def inner_first(modules: Iterable[GatedUnit | TaskNorm]) -> list[GatedUnit | TaskNorm]:
    """In an order in which those inside others come before these; the network itself comes last."""
    return sorted(modules, key=lambda module: -len(module.name.split(".")) * bool(module.name))


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode for the ``with`` block; afterwards each module is in the mode it was in."""
    modes = {inner: inner.training for inner in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for inner, mode in modes.items():
            inner.training = mode


@contextmanager
def batch_statistics(module: nn.Module, wanted: bool = True) -> Iterator[None]:
    """Inside the ``with`` block norms use the statistics of each batch, if ``wanted``, and leave their running ones."""
    norms = [inner for inner in module.modules() if isinstance(inner, TaskNorm)] if wanted else []
    modes = {inner: inner.training for norm in norms for inner in norm.modules()}
    for norm in norms:
        norm.train()
        norm.hold(True)
    try:
        yield
    finally:
        for norm in norms:
            norm.hold(False)
        for inner, mode in modes.items():
            inner.training = mode


def run_head(head: nn.Module, features):
    """A head's output; one that may work in place gets a copy of its own, since tasks can see the same features."""
    if type(head) not in (nn.Linear, nn.Identity):
        features = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, features)
    return head(features)


def plain_state(module: nn.Module, prefix: str = "", parameters_only: bool = False) -> dict[str, Tensor]:
    """A wrapped network's base tensors under the names they had before it was wrapped, and its units' stand-ins."""
    added: dict[str, Tensor] = {}
    while isinstance(module, (GatedUnit, TaskNorm)):
        if isinstance(module, GatedUnit):
            added.update((f"{prefix}shortcut.{name}", p.detach()) for name, p in module.stand_in().items())
        module = module.base
    state = {prefix + name: tensor.detach() for name, tensor in module._parameters.items() if tensor is not None}
    state.update(added)
    for name, tensor in module._buffers.items() if not parameters_only else ():
        if tensor is not None and name not in module._non_persistent_buffers_set:
            state[prefix + name] = tensor.detach()
    for name, child in module.named_children():
        state.update(plain_state(child, f"{prefix}{name}.", parameters_only))
    return state
