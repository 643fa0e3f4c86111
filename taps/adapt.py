"""Find a network's units and norms and wrap them in place, for any ``nn.Module``."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from taps.errors import UserError
from taps.gates import State
from taps.layer import GatedUnit, TaskNorm

_LAYERS = (nn.modules.conv._ConvNd, nn.Linear, nn.MultiheadAttention)
_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


@dataclass(frozen=True)
class Unit:
    """What a method may know of a unit when it makes a gate for it: everything but the weights.

    Attributes:
        name: dotted name in the network; empty for the network itself.
        kind: class name of the module, e.g. ``"Conv2d"``.
        shapes: shape of each parameter that can have a delta, by dotted name relative to the module.
        index: 0-based position in network order.
        count: number of units of the network.
        channels: of the unit's input, ``None`` where unknown.
        channel_dim: where they lie: 1, or -1 for tokens.
        depth: l, units on the longest way from the input through this one, and ``depths`` L, the largest.
        skip: parameters of what takes its place where it is not run; ``None`` where it always has to be.
        stride: positions of the input by one of the output.
        inside: index of the unit that holds it, without which it is not run; ``None`` if there is none.
    """

    name: str
    kind: str
    shapes: dict[str, torch.Size]
    index: int = 0
    count: int = 1
    channels: int | None = None
    channel_dim: int = 1
    depth: int = 1
    depths: int = 1
    skip: int | None = 0
    stride: int = 1
    inside: int | None = None

    @property
    def size(self) -> int:
        """Number of parameters that can have a delta."""
        return sum(shape.numel() for shape in self.shapes.values())


@dataclass(frozen=True)
class Found:
    """One module to wrap: its name, the module, the parameters that get deltas, its shortcut (``None``: identity), the
    channels of its input and where they lie, and for layers that can be skipped, as in :class:`Unit`, its depth, stride and
    ``kept``: why it cannot be skipped, if so."""

    name: str
    module: nn.Module
    parameter_names: tuple[str, ...]
    shortcut: Callable | None = None
    channels: int | None = None
    channel_dim: int = 1
    depth: int | None = None
    stride: int = 1
    kept: str | None = None

    def describe(self, index: int, found: Sequence[Found]) -> Unit:
        """What a method may know of it as the unit ``index`` of those found."""
        outside = {id(p) for p in self.module.parameters()}
        adapter = self.shortcut.parameters() if isinstance(self.shortcut, nn.Module) else ()
        return Unit(
            self.name,
            type(self.module).__name__,
            {name: self.module.get_parameter(name).shape for name in self.parameter_names},
            index,
            len(found),
            self.channels,
            self.channel_dim,
            self.depth or index + 1,
            max(one.depth or place + 1 for place, one in enumerate(found)),
            None if self.kept else sum(p.numel() for p in adapter if id(p) not in outside),
            self.stride,
            max((place for place in range(index) if found[place].holds(self)), default=None),
        )

    def holds(self, other: Found) -> bool:
        """Whether the other is a part of it, and none of its shortcut, which is run where it is not."""
        within = other.name.startswith(f"{self.name}.") if self.name else other is not self
        shortcut = self.shortcut.modules() if within and isinstance(self.shortcut, nn.Module) else ()
        return within and all(module is not other.module for module in shortcut)


def is_norm(module: nn.Module) -> bool:
    """Whether ``module`` normalises and has something to copy: affine parameters or running statistics."""
    if next(module.parameters(), None) is None and next(module.buffers(), None) is None:
        return False
    if isinstance(module, _NORMS):
        return True
    return "norm" in type(module).__name__.lower() and not any(isinstance(inner, _LAYERS) for inner in module.modules())


def find_layers(net: nn.Module) -> list[Found]:
    """Every convolution, linear layer and ``nn.MultiheadAttention`` in network order; a bias goes with its weight."""
    found: list[Found] = []
    seen: set[int] = set()

    def visit(name: str, module: nn.Module) -> None:
        if id(module) in seen:
            return
        seen.add(id(module))
        if isinstance(module, _LAYERS):
            found.append(Found(name, module, tuple(parameter for parameter, _ in module.named_parameters())))
            return
        for child_name, child in module.named_children():
            visit(f"{name}.{child_name}" if name else child_name, child)

    visit("", net)
    return found


def find_everything(net: nn.Module) -> list[Found]:
    """The layers, and every module that holds parameters of its own (class tokens, position embeddings, layer scales)."""
    layers = find_layers(net)
    inside = {id(module) for layer in layers for module in layer.module.modules()}
    inside |= {id(inner) for module in net.modules() if is_norm(module) for inner in module.modules()}
    loose = []
    for name, module in net.named_modules():
        own = tuple(parameter for parameter, _ in module.named_parameters(recurse=False))
        if own and id(module) not in inside:
            loose.append(Found(name, module, own))
    order = {id(module): position for position, module in enumerate(net.modules())}
    return sorted(layers + loose, key=lambda unit: order[id(unit.module)])


def choose(found: list[Found], pattern: str | None) -> list[Found]:
    """The units whose name matches the regular expression ``pattern`` anywhere (``None``: all).

    Raises:
        UserError: if the expression is not valid or nothing matches.
    """
    if not found:
        raise UserError("the network has no convolution, linear or attention layer to adapt")
    if pattern is None:
        return found
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise UserError(f"layers={pattern!r} is not a valid regular expression: {error}") from None
    chosen = [unit for unit in found if expression.search(unit.name)]
    if not chosen:
        names = [unit.name for unit in found]
        example = ", ".join([*names[:3], "…", *names[-2:]]) if len(names) > 6 else ", ".join(names)
        raise UserError(f"layers={pattern!r} matches none of the {len(found)} layers ({example})")
    return chosen


def wrap(
    net: nn.Module, found: list[Found], state: State, norm: str, frozen: bool, by_policy: bool = False
) -> tuple[nn.Module, list[GatedUnit], list[TaskNorm]]:
    """Put a :class:`GatedUnit` in the place of each module found and a :class:`TaskNorm` in that of each norm.

    Args:
        net: changed in place; what it computes without a task does not change.
        found: the units, in network order.
        state: shared by everything that is wrapped.
        norm: norm policy.
        frozen: whether the base is frozen.
        by_policy: whether norms follow the ways that policies send tasks, not whether the layer before them is tuned.

    Returns:
        The network (a new object only if the network itself is a unit), its units and its norms in network order.

    Raises:
        UserError: if the network is wrapped already.
    """
    if any(isinstance(module, (GatedUnit, TaskNorm)) for module in net.modules()):
        raise UserError("this network is adapted already: add tasks to its model, or adapt a fresh network")
    for unit in found:
        for name in unit.parameter_names:
            parameter = unit.module.get_parameter(name)
            if not parameter.is_floating_point():
                raise UserError(
                    f"unit {unit.name!r}: parameter {name!r} is {parameter.dtype}, deltas need floating point"
                )
    by_module = {id(unit.module): unit for unit in found}
    replacement: dict[int, nn.Module] = {}
    units: list[GatedUnit] = []
    norms: list[TaskNorm] = []
    inside_norm: set[int] = set()
    layers = {id(layer.module) for layer in find_layers(net)}
    feeder: GatedUnit | None = None  # of the next norm; a layer that is no unit feeds norms that stay shared
    for name, module in net.named_modules():
        if id(module) in layers and id(module) not in by_module:
            feeder = None
        if id(module) in by_module:
            unit = by_module[id(module)]
            wrapper = GatedUnit(name, module, unit.parameter_names, state, unit.shortcut)
            units.append(wrapper)
            feeder = wrapper if unit.parameter_names and not by_policy else None
            replacement[id(module)] = wrapper
        elif id(module) not in inside_norm and is_norm(module):
            around = [index for index, unit in enumerate(found) if unit.holds(Found(name, module, ()))]
            wrapper = TaskNorm(name, module, state, norm, feeder, frozen, len(units), max(around, default=None))
            inside_norm.update(id(inner) for inner in module.modules())
            norms.append(wrapper)
            replacement[id(module)] = wrapper
    for parent in list(net.modules()):
        for child_name, child in list(parent._modules.items()):
            if id(child) in replacement:
                parent._modules[child_name] = replacement[id(child)]
    for wrapper in units:
        wrapper.shortcut = replacement.get(id(wrapper.shortcut), wrapper.shortcut)
    return replacement.get(id(net), net), units, norms


def out_features(net: nn.Module) -> int | None:
    """Width of the features: timm's ``head_hidden_size``/``num_features``, else that of the network's last layer."""
    for name in ("head_hidden_size", "num_features"):
        value = getattr(net, name, None)
        if isinstance(value, int) and value > 0:
            return value
    for layer in reversed(find_layers(net)):
        for name in ("out_features", "out_channels", "embed_dim"):
            if isinstance(getattr(layer.module, name, None), int):
                return getattr(layer.module, name)
    return None
