"""Weights of MultiMAE (ECCV 2022, arXiv 2204.01678), from which efficient computation sharing starts."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

#: options with which timm's vision transformer computes what MultiMAE's does for maps
WITHOUT_NORM = {"no_embed_class": True, "final_norm": False}


def is_multimae(state: Mapping[str, Tensor]) -> bool:
    """Return whether these are tensors of a MultiMAE network that sees RGB images, perhaps below a prefix."""
    names = ("input_adapters.rgb.proj.weight", "encoder.0.attn.qkv.weight")
    return all(any(key.endswith(name) for key in state) for name in names)


def from_multimae(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the encoder in timm's names; other inputs, decoders and heads are left out.

    The global token sees and is seen like timm's class token, though it stands behind the patches. Position embeddings belong to
    patches alone.
    """
    renamed = {}
    for key, tensor in state.items():
        if key.startswith("encoder."):
            renamed[f"blocks.{key.removeprefix('encoder.')}"] = tensor
        elif key.startswith("input_adapters.rgb.proj."):
            renamed[key.replace("input_adapters.rgb.", "patch_embed.")] = tensor
        elif key == "input_adapters.rgb.pos_emb":
            renamed["pos_embed"] = tensor.flatten(2).transpose(1, 2)
        elif key == "global_tokens":
            renamed["cls_token"] = tensor
    return renamed


def for_network(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], embeds_class: bool) -> dict[str, Tensor]:
    """Return :func:`from_multimae` for a network of timm's with a last norm or a position embedding of its class token.

    Args:
        state: MultiMAE's tensors.
        wanted: the network's tensors; its last norm stays as it is, since MultiMAE has none.
        embeds_class: whether the class token has a position embedding; it becomes zero.
    """
    found = from_multimae(state)
    if embeds_class and "pos_embed" in found:
        found["pos_embed"] = torch.cat([torch.zeros_like(found["pos_embed"][:, :1]), found["pos_embed"]], dim=1)
    return {**found, **{key: tensor for key, tensor in wanted.items() if key in ("norm.weight", "norm.bias")}}
