"""Find a network's units and norms, for any ``nn.Module``."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from taps.errors import UserError

_LAYERS = (nn.modules.conv._ConvNd, nn.Linear, nn.MultiheadAttention)


_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


@dataclass(frozen=True)
class Unit:
    """The description of a unit from which a method makes gates: everything except the weights.

    Attributes:
        name: dotted name in the network; empty for the network itself.
        kind: class name of the module, e.g. ``"Conv2d"``.
        shapes: shape of each parameter that can have a delta, by dotted name relative to the module.
        index: 0-based position in network order.
        count: number of units in the network.
        channels: number of input channels, ``None`` if unknown.
        channel_dim: channel dimension of the input: 1, or -1 for tokens.
        depth: l, number of units on the longest path from the network's input through this unit; ``depths`` is L, the largest.
        stand_in_size: number of parameters of the module that replaces the unit if skipped; ``None`` if it cannot be skipped.
        stride: input positions per output position.
        parent: index of the enclosing unit, whose skipping also skips this one; ``None`` if there is none.
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
    stand_in_size: int | None = 0
    stride: int = 1
    parent: int | None = None

    @property
    def size(self) -> int:
        """Number of parameters that can have a delta."""
        return sum(shape.numel() for shape in self.shapes.values())


@dataclass(frozen=True)
class Found:
    """A module to wrap: its name, the parameters that get deltas, its shortcut (``None``: identity), the number and dimension
    of its input channels, its depth and stride as in :class:`Unit`, and ``unskippable``, the reason why it cannot be skipped
    (``None`` if it can)."""

    name: str
    module: nn.Module
    parameter_names: tuple[str, ...]
    shortcut: nn.Module | None = None
    channels: int | None = None
    channel_dim: int = 1
    depth: int | None = None
    stride: int = 1
    unskippable: str | None = None

    def describe(self, index: int, found: Sequence[Found]) -> Unit:
        """Return the description of this module as unit ``index`` of ``found``."""
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
            None if self.unskippable else sum(p.numel() for p in adapter if id(p) not in outside),
            self.stride,
            max((place for place in range(index) if found[place].contains(self)), default=None),
        )

    def contains(self, other: Found) -> bool:
        """Return whether ``other`` is inside this module and outside its shortcut, which runs when the module is skipped."""
        within = other.name.startswith(f"{self.name}.") if self.name else other is not self
        shortcut = self.shortcut.modules() if within and isinstance(self.shortcut, nn.Module) else ()
        return within and all(module is not other.module for module in shortcut)


def is_norm(module: nn.Module) -> bool:
    """Return whether ``module`` is a norm with something to copy: affine parameters or running statistics."""
    if next(module.parameters(), None) is None and next(module.buffers(), None) is None:
        return False
    if isinstance(module, _NORMS):
        return True
    holds_layers = any(isinstance(inner, _LAYERS) for inner in module.modules())
    # Norms of other libraries are known by their names; a matrix of weights is not a norm's.
    vectors = all(sum(size > 1 for size in parameter.shape) <= 1 for parameter in module.parameters())
    return "norm" in type(module).__name__.lower() and not holds_layers and vectors


def find_layers(net: nn.Module) -> list[Found]:
    """Return every convolution, linear layer and ``nn.MultiheadAttention`` in network order; a bias belongs to its layer."""
    found: list[Found] = []
    seen: set[int] = set()

    def visit(name: str, module: nn.Module) -> None:
        if id(module) in seen:
            return
        seen.add(id(module))
        if isinstance(module, _LAYERS):
            norms = [
                inner_name for inner_name, inner in module.named_modules() if inner is not module and is_norm(inner)
            ]
            own = tuple(
                parameter
                for parameter, _ in module.named_parameters()
                if not any(parameter.startswith(f"{norm}.") for norm in norms)  # these belong to the norm
            )
            found.append(Found(name, module, own))
            return
        for child_name, child in module.named_children():
            visit(f"{name}.{child_name}" if name else child_name, child)

    visit("", net)
    return found


def find_everything(net: nn.Module) -> list[Found]:
    """Return the layers and all other modules with direct parameters (class tokens, position embeddings, layer scales)."""
    layers = find_layers(net)
    inside = {id(module) for layer in layers for module in layer.module.modules()}
    inside |= {id(inner) for module in net.modules() if is_norm(module) for inner in module.modules()}
    loose = []
    lists = (nn.ParameterList, nn.ParameterDict)
    for name, module in net.named_modules():
        own = tuple(parameter for parameter, _ in module.named_parameters(recurse=False))
        for child_name, child in module.named_children() if not isinstance(module, lists) else ():
            if isinstance(child, lists):  # not called, but read by the module that holds it
                own += tuple(f"{child_name}.{parameter}" for parameter, _ in child.named_parameters())
        if own and id(module) not in inside and not isinstance(module, lists):
            loose.append(Found(name, module, own))
    order = {id(module): position for position, module in enumerate(net.modules())}
    return sorted(layers + loose, key=lambda unit: order[id(unit.module)])


def choose(found: list[Found], pattern: str | None) -> list[Found]:
    """Return the units whose name matches the regular expression ``pattern`` anywhere (``None``: all).

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


def declared_features(net: nn.Module) -> int | None:
    """Return the feature width that timm's networks declare, ``head_hidden_size`` or ``num_features``, else ``None``."""
    for name in ("head_hidden_size", "num_features"):
        value = getattr(net, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def measured_features(net: nn.Module, run: Callable[[Tensor], object]) -> tuple[int | None, torch.dtype | None]:
    """Return width and type of the features that ``run`` returns for a small batch, or the last layer's if no batch fits."""
    layers = [found.module for found in find_layers(net)]
    if not layers:
        return None, None
    first: nn.Module = layers[0]
    shapes: list[tuple[int, ...]] = [(1, width) for width in (getattr(first, "in_features", None),) if width]
    if isinstance(first, nn.modules.conv._ConvNd):
        dims = len(first.kernel_size)
        shapes = [(1, first.in_channels, *[side] * dims) for side in ((64, 224) if dims < 3 else (32,))]
    like = next(first.parameters())
    for shape in shapes:
        try:
            with torch.random.fork_rng(devices=[]), torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a trial, whose warnings would concern no call of the user's
                features = run(torch.zeros(shape, dtype=like.dtype, device=like.device))
        except Exception:  # a network may refuse an input in any way
            continue
        if isinstance(features, Tensor) and features.dim() == 2:
            return features.shape[1], features.dtype
        if not isinstance(features, Tensor) or features.dim() > 3:
            return None, None
    for layer in reversed(layers):
        for name in ("out_features", "out_channels", "embed_dim"):
            if isinstance(getattr(layer, name, None), int):
                return getattr(layer, name), next(layer.parameters()).dtype
    return None, None
