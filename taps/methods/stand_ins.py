"""Stand-ins for individual layers that a task skips, and the depth of each layer in the network.

AutoMTL (arXiv 2110.13076, §3.1) skips by the identity if the layer keeps the shape, else by a 1×1 convolution with a norm. In
networks made of 1×1 convolutions that costs more than the layer. Here the stand-in is average pooling if the layer has a stride,
and, if it changes the number of channels, a 1×1 convolution in as many groups as both sides allow, which starts as the mean of
each group. All tasks share it, and it is offered only if it has fewer parameters than the layer.

Instead, whole residual blocks can be skipped, with their own shortcuts as stand-ins. On Scenes this was better in both networks
tried, most of all in a MobileNet, whose blocks are narrow outside and wide inside (``docs/multi_task.md``).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, cast

import torch
from timm.layers import Conv2dSame
from torch import fx, nn

from taps.core.find import Found, find_layers, is_norm
from taps.errors import UserError, check_choice
from taps.methods.blocks import find_blocks
from taps.settings.choices import SKIPS

_POOLS = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}


_CONVOLUTIONS = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3, Conv2dSame: 2}


class _Tracer(fx.Tracer):
    """A tracer whose leaves are the wanted modules and those that depend on the training mode: torch's, norms, stochastic depth.

    Args:
        wanted: modules that must appear in the graph, so that modules that contain them are not leaves.
    """

    def __init__(self, wanted: set[nn.Module]) -> None:
        super().__init__()
        self.wanted = wanted

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        kind = type(module).__name__
        if any(inner in self.wanted for inner in module.modules() if inner is not module):
            return False
        return (
            super().is_leaf_module(module, name)
            or module in self.wanted
            or isinstance(module, Conv2dSame)
            or is_norm(module)
            or kind in ("DropPath", "StochasticDepth")
        )


def find_depths(net: nn.Module, names: list[str]) -> dict[str, int] | None:
    """Return, per named module, the number of named modules on the longest path from the input through it, itself included.

    Modules that are never called are left out. The result is ``None`` if the network's code depends on its data, so that its
    graph is not known.
    """
    try:
        graph = _Tracer({net.get_submodule(name) for name in names}).trace(net)
    except Exception:  # arbitrary code can fail to trace in any way
        return None
    depth: dict[fx.Node, int] = {}
    found: dict[str, int] = {}
    wanted = set(names)
    for node in graph.nodes:
        depth[node] = max((depth[before] for before in node.all_input_nodes), default=0)
        if node.op == "call_module" and node.target in wanted:
            depth[node] += 1
            found[node.target] = max(found.get(node.target, 0), depth[node])
    return found


def find_choices(net: nn.Module, skip: str = "layers") -> list[Found]:
    """Return every convolution and linear layer in network order, and how each can be skipped.

    Args:
        net: the network.
        skip: ``"layers"``, individual layers, each with its stand-in or the reason why it has none; ``"blocks"``, only whole
            residual blocks, which precede the layers in them; ``"auto"``, blocks if there are any, else layers.

    Raises:
        UserError: for another ``skip``, or a network without blocks that can be skipped.
    """
    check_choice("skip", skip, SKIPS)
    blocks: list[Found] = []
    try:
        blocks = find_blocks(net) if skip != "layers" else []
    except UserError:
        if skip == "blocks":
            raise
    layers = find_layers(net)
    depths = find_depths(net, [layer.name for layer in layers])
    found = []
    for layer in layers:
        shortcut, unskippable = (None, "only whole blocks are skipped") if blocks else _offered(layer.module)
        if depths is not None and layer.name not in depths:
            unskippable = "its weights are read instead of it being called"
        depth = None if depths is None else depths.get(layer.name, 1)
        inputs = getattr(layer.module, "in_channels", getattr(layer.module, "in_features", None))
        convolves = isinstance(layer.module, nn.modules.conv._ConvNd)
        tokens = 1 if convolves else -1
        stride = math.prod(cast(Any, layer.module).stride) if convolves and not layer.module.transposed else 1
        found.append(
            replace(
                layer,
                shortcut=shortcut,
                channels=inputs,
                channel_dim=tokens,
                depth=depth,
                stride=stride,
                unskippable=unskippable,
            )
        )
    for block in blocks:
        inside = [layer.depth for layer in found if layer.name.startswith(f"{block.name}.") and layer.depth]
        found.append(replace(block, depth=min(inside, default=None)))
    order = {id(module): place for place, module in enumerate(net.modules())}
    return sorted(found, key=lambda unit: order[id(unit.module)])


def _offered(layer: nn.Module) -> tuple[nn.Module | None, str | None]:
    """Return the layer's stand-in, with its device and dtype, or the reason why it has none."""
    try:
        return stand_in(layer).to(next(layer.parameters())), None
    except UserError as error:
        return None, str(error)


def stand_in(layer: Any) -> nn.Module:
    """Return the layer's stand-in.

    Raises:
        UserError: if there is none; the message gives the reason.
    """
    if type(layer) is nn.Linear:
        inputs, outputs, groups = layer.in_features, layer.out_features, math.gcd(layer.in_features, layer.out_features)
        if inputs == outputs:
            return copied()
        _check_saves(layer, inputs * outputs // groups)
        return grouped_linear(inputs, outputs, groups)
    dimensions = _CONVOLUTIONS.get(type(layer))
    if dimensions is None:
        raise UserError(f"nothing is known to stand in for a {type(layer).__name__}")
    inputs, outputs = layer.in_channels, layer.out_channels
    parts = [*_pool(layer, dimensions)]
    if inputs != outputs:
        groups = math.gcd(inputs, outputs)
        _check_saves(layer, inputs * outputs // groups)
        adapter = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dimensions](inputs, outputs, 1, groups=groups, bias=False)
        nn.init.constant_(adapter.weight, groups / inputs)
        parts.append(adapter)
    return copied() if not parts else parts[0] if len(parts) == 1 else nn.Sequential(*parts)


def _check_saves(layer: Any, size: int) -> None:
    own = sum(parameter.numel() for parameter in layer.parameters())
    if size >= own:
        raise UserError(f"its stand-in would have {size} parameters, no fewer than its own {own}")


def _pool(layer: Any, dimensions: int) -> list[nn.Module]:
    """Return pooling to the size of the layer's output; empty if that is the size of the input."""
    strides, kernels = layer.stride, layer.kernel_size
    whole = layer.padding == "same" or type(layer) is Conv2dSame or all(
        2 * padding == dilation * (kernel - 1)
        for padding, dilation, kernel in zip(layer.padding, layer.dilation, kernels, strict=True)
    )  # fmt: skip
    patches = layer.padding != "same" and not any(layer.padding) and kernels == strides
    if not whole and not patches:
        raise UserError("no stand-in gives an output of the same size")
    if all(stride == 1 for stride in strides):
        return []
    return [_POOLS[dimensions](strides, strides, ceil_mode=not patches)]


def copied() -> nn.Module:
    """Return the identity as a copy, because the next module may modify in place what other modules still need."""
    graph = fx.Graph()
    graph.output(graph.call_method("clone", (graph.placeholder("x"),)))
    return fx.GraphModule(nn.Module(), graph, "Copied")


def grouped_linear(inputs: int, outputs: int, groups: int) -> nn.Module:
    """Return a map from (…, inputs) to (…, outputs) in groups of inputs and outputs; it starts as the mean of each group.

    It is a graph module of torch, so that merged networks need no class of this library.
    """
    root = nn.Module()
    root.weight = nn.Parameter(torch.full((groups, inputs // groups, outputs // groups), groups / inputs))
    graph = fx.Graph()
    x = graph.placeholder("x")
    split = graph.call_method("unflatten", (x, -1, (groups, inputs // groups)))
    weight = graph.get_attr("weight")
    product = graph.call_function(torch.einsum, ("...gi,gio->...go", split, weight))
    graph.output(graph.call_method("flatten", (product, -2)))
    return fx.GraphModule(root, graph, "GroupedLinear")
