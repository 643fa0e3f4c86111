"""Residual blocks: what a network can leave out, and what takes the place of a block that is not run.

A block is known by its class's name, so that those of timm, torchvision and anybody's own networks count alike, in one,
two or three dimensions. :data:`BLOCKS` maps a name to a function that says how such a block is skipped; a network of
another kind becomes known with ``taps.blocks.BLOCKS["MyBlock"] = identity``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import fx, nn

from taps.adapt import Found, find_layers
from taps.errors import UserError

#: a part of a block (``""``: all of it) and its shortcut, ``None`` for the identity
Skips = Mapping[str, nn.Module | None]


def zeros() -> nn.Module:
    """Zeros in the shape of the first input: the shortcut of a branch that is added to its input elsewhere.

    A graph of torch's own, so that merged networks need no class of this library.
    """
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.placeholder("*args")
    graph.placeholder("**kwargs")
    graph.output(graph.call_function(torch.zeros_like, (x,)))
    return fx.GraphModule(nn.Module(), graph, "Zeros")


def identity(block: nn.Module) -> Skips:
    """A block that keeps the shape of its input."""
    return {"": None}


def projected(block: nn.Module) -> Skips:
    """ResNet's: where the shape changes, ``downsample`` is on the shortcut (AdaShare §3: it stays when a block is skipped)."""
    return {"": block.downsample}


def if_it_has_one(block: nn.Module) -> Skips:
    """MobileNet's and EfficientNet's: only blocks that keep the shape add their input."""
    has = getattr(block, "has_skip", getattr(block, "use_res_connect", False))
    return {"": None} if has else {}


def convnext(block: nn.Module) -> Skips:
    """ConvNeXt's: timm's may hold a module on the shortcut."""
    shortcut = getattr(block, "shortcut", None)
    return {"": None if isinstance(shortcut, nn.Identity) else shortcut}


def halves(block: nn.Module) -> Skips:
    """A transformer's: attention and perceptron are skipped each by itself; both are added to their input in the block."""
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
#: blocks whose channels come last
_TOKENS = ("Block", "EncoderBlock")


def find_blocks(net: nn.Module) -> list[Found]:
    """Every residual block that can be skipped, in network order.

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
            continue  # another class of that name
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
            "others are added to taps.blocks.BLOCKS"
        )
    return found


def _channels(block: nn.Module) -> int | None:
    """Channels of a block's input: those of its first layer."""
    first = next(iter(find_layers(block)), None)
    for name in ("in_channels", "in_features", "embed_dim"):
        if first is not None and isinstance(getattr(first.module, name, None), int):
            return getattr(first.module, name)
    return None
