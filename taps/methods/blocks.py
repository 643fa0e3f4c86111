"""Residual blocks that can be skipped, and the shortcuts that replace them.

A block is recognised by its class name, so that blocks of timm, torchvision and user-defined networks are treated alike, in one,
two or three dimensions. :data:`BLOCKS` maps each name to a function that returns how such a block is skipped; to support another
class, set ``taps.methods.blocks.BLOCKS["MyBlock"] = identity``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn

from taps.core.find import Found, find_layers
from taps.errors import UserError

#: a part of a block (``""``: all of it) and its shortcut, ``None`` for the identity
Skips = Mapping[str, nn.Module | None]


def zeros() -> nn.Module:
    """Return a module of zeros in the shape of its first input: the shortcut of a branch that is added to its input elsewhere.

    It is a graph module of torch, so that merged networks need no class of this library.
    """
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.placeholder("*args")
    graph.placeholder("**kwargs")
    graph.output(graph.call_function(torch.zeros_like, (x,)))
    return fx.GraphModule(nn.Module(), graph, "Zeros")


def identity(block: nn.Module) -> Skips:
    """Return how to skip a block that keeps the shape of its input."""
    return {"": None}


def projected(block: Any) -> Skips:
    """Return how to skip a ResNet block; where the shape changes, its ``downsample`` stays as the shortcut (AdaShare §3)."""
    return {"": block.downsample}


def if_it_has_one(block: nn.Module) -> Skips:
    """Return how to skip a MobileNet or EfficientNet block if it adds its input, as only blocks that keep the shape do."""
    has = getattr(block, "has_skip", getattr(block, "use_res_connect", False))
    return {"": None} if has else {}


def convnext(block: nn.Module) -> Skips:
    """Return how to skip a ConvNeXt block; in timm it may have a module on the shortcut."""
    shortcut = getattr(block, "shortcut", None)
    return {"": None if isinstance(shortcut, nn.Identity) else shortcut}


def halves(block: nn.Module) -> Skips:
    """Return how to skip attention and MLP of a transformer block separately; the block adds each to its input."""
    return {"attn": zeros(), "mlp": zeros()}


BLOCKS: dict[str, Callable[[nn.Module], Skips]] = {
    "BasicBlock": projected,
    "Bottleneck": projected,
    "TemporalBlock": projected,
    "InvertedResidual": if_it_has_one,
    "DepthwiseSeparableConv": if_it_has_one,
    "EdgeResidual": if_it_has_one,
    "MBConv": if_it_has_one,
    "FusedMBConv": if_it_has_one,
    "ConvNeXtBlock": convnext,
    "CNBlock": identity,
    "Block": halves,
    "EncoderBlock": identity,
}


#: blocks with channels in the last dimension
_TOKENS = ("Block", "EncoderBlock")


def find_blocks(net: nn.Module) -> list[Found]:
    """Return every residual block that can be skipped, in network order.

    Raises:
        UserError: if there is none.
    """
    found: list[Found] = []
    for name, module in net.named_modules():
        kind = next((base.__name__ for base in type(module).__mro__ if base.__name__ in BLOCKS), None)
        if kind is None or any(unit.module is module for unit in found):
            continue
        try:
            skips = BLOCKS[kind](module)
        except AttributeError:
            continue  # an unrelated class of the same name
        for part, shortcut in skips.items():
            inner = getattr(module, part, None) if part else module
            if not isinstance(inner, nn.Module):
                continue
            where = f"{name}.{part}".strip(".")
            found.append(Found(where, inner, (), shortcut, _channels(inner), -1 if kind in _TOKENS else 1))
    if not found:
        known = ", ".join(BLOCKS)
        raise UserError(
            f"{type(net).__name__} has no residual block that can be skipped; known are {known}, "
            "others are added to taps.methods.blocks.BLOCKS"
        )
    return found


def _channels(block: nn.Module) -> int | None:
    """Return the number of input channels of a block, which is that of its first layer."""
    first = next(iter(find_layers(block)), None)
    for name in ("in_channels", "in_features", "embed_dim"):
        if first is not None and isinstance(getattr(first.module, name, None), int):
            return getattr(first.module, name)
    return None
