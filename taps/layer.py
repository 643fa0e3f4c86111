r"""The layer: the one equation every method shares.

    y = run · f(x; W + specific ⊙ δ_task) + (1 − run) · shortcut(x)          (run, specific) = gate_task(x)

:class:`GatedUnit` wraps any module ``f`` (a convolution, a linear layer, ``nn.MultiheadAttention``, a residual block)
without knowing its type: the effective parameters are handed to it with ``torch.func.functional_call``.
:class:`TaskNorm` wraps a normalisation layer, whose affine parameters and statistics are copied whole for a task rather
than expressed as deltas.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import SimpleNamespace

import torch
from timm.layers import Conv2dSame
from torch import Tensor, nn
from torch.func import functional_call

from taps.gates import Decision, Gate, State

#: layers whose output is linear in their parameters; not their subclasses, which may standardise weights first
_LINEAR_IN_PARAMETERS = frozenset(
    {nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear, Conv2dSame}
)


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


class _AddDelta(torch.autograd.Function):
    """w = W + specific·δ as one pass over memory that keeps only δ and the gate for the backward pass.

    Gradients: dW = g, dδ = delta_gradient·g, dspecific = Σ g·δ over the broadcast dimensions.
    """

    @staticmethod
    def forward(ctx, base: Tensor, delta: Tensor, specific: Tensor, delta_gradient: Tensor) -> Tensor:
        ctx.save_for_backward(delta, delta_gradient)
        ctx.specific_shape = specific.shape
        if _on_host(specific) == 0.0:
            return base.detach()
        return torch.addcmul(base, delta, specific.to(delta.dtype))

    @staticmethod
    def backward(ctx, gradient: Tensor):
        delta, factor = ctx.saved_tensors
        base_gradient = gradient if ctx.needs_input_grad[0] else None
        delta_gradient = specific_gradient = None
        if ctx.needs_input_grad[1]:
            known = _on_host(factor)
            if known == 1.0:
                delta_gradient = gradient
            elif known == 0.0:
                delta_gradient = torch.zeros_like(delta)
            else:
                delta_gradient = gradient * factor.to(gradient.dtype)
        if ctx.needs_input_grad[2]:
            if len(ctx.specific_shape) == 0 and _same_dense_order(gradient, delta):
                flat = (delta.numel(),), (1,)  # memory order: any order gives the same sum of products
                specific_gradient = torch.dot(gradient.as_strided(*flat), delta.as_strided(*flat))
            else:
                specific_gradient = (gradient * delta).sum_to_size(ctx.specific_shape)
        return base_gradient, delta_gradient, specific_gradient, None


def _on_host(factor: Tensor) -> float | None:
    """A scalar's value where reading it is free, so that whole passes over the weights can be left out."""
    if factor.numel() != 1 or factor.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    return factor.item()


def _any_nonzero(tensor: Tensor) -> bool:
    """Whether anything is not zero; a trained tensor's first few elements tell without reading the others."""
    return bool(tensor[:1].any()) or bool(tensor.any())


def _same_dense_order(a: Tensor, b: Tensor) -> bool:
    dense = a.is_contiguous() or (a.dim() == 4 and a.is_contiguous(memory_format=torch.channels_last))
    return dense and a.stride() == b.stride() and a.dtype == b.dtype


class _TeachGates(torch.autograd.Function):
    """The identity of y with the gradients of closed gates, and zeros for their deltas, which an optimiser's momentum
    goes on moving: see :meth:`GatedUnit.teach_gates`."""

    @staticmethod
    def forward(ctx, y: Tensor, x: Tensor, slope: Callable, rows: list[slice], each: int, *own: Tensor) -> Tensor:
        ctx.save_for_backward(x, *own[len(rows) :])
        ctx.slope, ctx.rows, ctx.each = slope, rows, each
        return y.detach()

    @staticmethod
    def backward(ctx, gradient: Tensor):
        x, *deltas = ctx.saved_tensors
        along = []
        for index, place in enumerate(ctx.rows):
            slope = ctx.slope(x[place], deltas[index * ctx.each : (index + 1) * ctx.each])
            zero = gradient.new_zeros((), dtype=deltas[0].dtype)
            along.append(zero if slope is None else torch.sum(gradient[place] * slope).to(zero.dtype))
        wanted = ctx.needs_input_grad[5 + len(ctx.rows) :]
        still = [torch.zeros_like(delta) if needs else None for delta, needs in zip(deltas, wanted, strict=True)]
        return gradient, None, None, None, None, *along, *still


def add_delta(
    base: Tensor, delta: Tensor, specific: float | Tensor, delta_gradient: float | Tensor | None = None
) -> Tensor:
    """The effective parameter W + specific ⊙ δ, with the gradient convention of the decision."""
    if isinstance(specific, Tensor):
        factor = specific.detach() if delta_gradient is None else torch.as_tensor(delta_gradient, device=delta.device)
        return _AddDelta.apply(base, delta, specific, factor)
    if specific == 0.0:
        return base
    return base + delta if specific == 1.0 else base + specific * delta


class Deltas(nn.Module):
    """One task's deltas of one unit, each named ``<parameter>.delta``: given values, or zeros like the unit's parameters."""

    def __init__(self, parameters: Mapping[str, Tensor], values: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        for name, parameter in parameters.items():
            holder: nn.Module = self
            for part in name.split("."):
                holder = holder._modules.setdefault(part, nn.Module())
            value = (
                torch.zeros_like(parameter) if values is None else values[name].to(parameter.device, parameter.dtype)
            )
            holder.delta = nn.Parameter(value)

    def __getitem__(self, name: str) -> nn.Parameter:
        return self.get_submodule(name).delta


class GatedUnit(nn.Module):
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

    def remove_task(self, task: str) -> None:
        for modules in (self.gates, self.deltas):
            if task in modules:
                del modules[task]

    def effective_parameters(self, task: str, decision: Decision) -> dict[str, Tensor]:
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

    def forward(self, *args, **kwargs):
        task = self.state.task
        if task is None:
            return self.base(*args, **kwargs)
        if not isinstance(task, str):
            return task.run(self, args, kwargs)
        x = args[0] if args else next(iter(kwargs.values()), None)
        return self.carry_out(task, self.ask(task, x), args, kwargs)

    def ask(self, task: str, x: Tensor | None) -> Decision:
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
            type(self.base) in _LINEAR_IN_PARAMETERS
            and not self.base._forward_pre_hooks  # weight normalisation as a hook
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
        return _TeachGates.apply(y, x.detach(), self._slope, places, len(self.parameter_names), *specifics, *deltas)

    def _slope(self, x: Tensor, deltas: Sequence[Tensor]) -> Tensor | None:
        """∂y/∂specific = f(x; δ); ``None`` where δ is zero."""
        if not any(map(_any_nonzero, deltas)):
            return None
        values = {name: delta.to(x.dtype) for name, delta in zip(self.parameter_names, deltas, strict=True)}
        return functional_call(self.base, values, (x,), tie_weights=False)

    def carry_out(self, task: str, decision: Decision, args: tuple, kwargs: dict):
        """The equation."""
        x = args[0] if args else next(iter(kwargs.values()), None)
        run = decision.run
        if isinstance(run, Tensor):
            return self._blend(task, x, run, decision, args, kwargs)
        if run == 0.0:
            return self.shortcut(x)
        y = self._call(task, decision, args, kwargs)
        return y if run == 1.0 else run * y + (1.0 - run) * self.shortcut(x)

    def _call(self, task: str, decision: Decision, args: tuple, kwargs: dict):
        effective = self.effective_parameters(task, decision)
        if not effective:
            return self.base(*args, **kwargs)
        return functional_call(self.base, effective, args, kwargs, tie_weights=False)

    def _blend(self, task: str, x: Tensor, run: Tensor, decision: Decision, args: tuple, kwargs: dict) -> Tensor:
        """The equation with a tensor ``run``: one value for all, or one a sample, shape (B,)."""
        if self.training or run.dim() == 0:
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
        """One parameter as the current task sees it."""

        def value(task: str | None) -> Tensor:
            base = self.base.get_parameter(name)
            if task not in self.gates:
                return base
            return self.effective_parameters(task, self.gates[task](None, self.state)).get(name, base)

        task = self.state.task
        return value(task) if task is None or isinstance(task, str) else task.read(value)

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


class TaskNorm(nn.Module):
    """A normalisation layer of the base, with a whole copy (affine and running statistics) for each task that wants one.

    Policies: ``"task"`` every task uses its copy; ``"follow"`` it uses its copy only while the unit that feeds the norm
    is tuned, so what is shared is shared exactly; ``"frozen"`` every task uses the base's. The base's own norm is
    always in evaluation mode while the base is frozen: its statistics never move.

    Args:
        name: the norm's dotted name in the unwrapped network.
        base: the norm.
        state: shared by all units of the model.
        policy: ``"task"``, ``"follow"`` or ``"frozen"``.
        feeder: the unit that comes before it in network order, or ``None``.
        frozen: whether the base is frozen.
    """

    def __init__(
        self, name: str, base: nn.Module, state: State, policy: str, feeder: GatedUnit | None, frozen: bool
    ) -> None:
        super().__init__()
        self.name = name
        self.policy = policy
        self.state = state
        self.frozen = frozen
        self.base = base
        self.norms = TaskDict()
        self._feeder = (feeder,)  # in a tuple, so that it is not registered here a second time

    def add_task(self, task: str) -> None:
        if self.policy == "frozen" or (self.policy == "follow" and self._feeder[0] is None):
            return
        own = copy.deepcopy(self.base)
        own.requires_grad_(True)
        self.norms[task] = own.train(self.training)

    def remove_task(self, task: str) -> None:
        if task in self.norms:
            del self.norms[task]

    def follows(self, unit: GatedUnit) -> bool:
        """Whether this norm is the task's own only while ``unit`` is tuned."""
        return self.policy == "follow" and self._feeder[0] is unit

    def own(self, task: str | None) -> nn.Module | None:
        """The task's copy if it is in use, else ``None``."""
        norm = self.norms.get(task)
        if norm is None or self.policy == "task":
            return norm
        return norm if self._feeder[0].gates[task].decide().uses_delta else None

    def forward(self, *args, **kwargs):
        task = self.state.task
        if task is None:
            return self.base(*args, **kwargs)
        if not isinstance(task, str):
            return task.run(self, args, kwargs)
        return self.carry_out(task, self.own(task), args, kwargs)

    def ask(self, task: str, x: Tensor | None) -> nn.Module | None:
        return self.own(task)

    def shared(self, own: nn.Module | None) -> str | None:
        """``"base"`` where tasks can share one call: not where each task's samples make statistics of their own."""
        makes_statistics = self.base.training and next(self.base.buffers(), None) is not None
        return "base" if own is None and not makes_statistics else None

    def is_closed(self, own: nn.Module | None) -> bool:
        return False

    def carry_out(self, task: str, own: nn.Module | None, args: tuple, kwargs: dict):
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
        task = self.state.task
        if task is None or isinstance(task, str):
            return self._attribute(name, task)
        return task.read(functools.partial(self._attribute, name))

    def _attribute(self, name: str, task: str | None):
        norm = self.own(task)
        return getattr(self.base if norm is None else norm, name)

    def merged(self, task: str, memo: dict) -> nn.Module:
        norm = self.own(task)
        return copy.deepcopy(self.base if norm is None else norm, memo)


def plain_state(module: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """A wrapped network's base tensors under the names they had before it was wrapped."""
    while isinstance(module, (GatedUnit, TaskNorm)):
        module = module.base
    state = {prefix + name: tensor.detach() for name, tensor in module._parameters.items() if tensor is not None}
    for name, tensor in module._buffers.items():
        if tensor is not None and name not in module._non_persistent_buffers_set:
            state[prefix + name] = tensor.detach()
    for name, child in module.named_children():
        state.update(plain_state(child, f"{prefix}{name}."))
    return state
