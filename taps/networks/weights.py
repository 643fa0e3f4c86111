"""Loading of weight files with timm's or torchvision's names."""

from __future__ import annotations

import re
from pathlib import Path

from torch import Tensor, nn

from taps.errors import UserError
from taps.storage.files import read_state_dict

#: torchvision's names in a vision transformer -> timm's
_TORCHVISION_VIT = (
    (r"^class_token$", "cls_token"),
    (r"^encoder\.pos_embedding$", "pos_embed"),
    (r"^conv_proj\.", "patch_embed.proj."),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
    (r"^encoder\.ln\.", "norm."),
    (r"^heads\.head\.", "head."),
    (r"\.ln_(\d)\.", r".norm\1."),
    (r"\.self_attention\.in_proj_(weight|bias)$", r".attn.qkv.\1"),
    (r"\.self_attention\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.(?:linear_1|0)\.", ".mlp.fc1."),
    (r"\.mlp\.(?:linear_2|3)\.", ".mlp.fc2."),
)


def load_weights(net: nn.Module, path: str | Path) -> None:
    """Load a local file with timm's or torchvision's names into a backbone; every tensor has to match.

    A classifier in the file is ignored, since tasks have their own heads. Torchvision's names of vision transformers are
    renamed. A file with the same sequence of tensors as the network (same shapes, last parts of names and order) under other
    names is matched by position.

    Args:
        net: a backbone without classifier, which is not changed if the file does not fit.
        path: a ``.safetensors`` file, or a ``.pth`` file with plain tensors.

    Raises:
        UserError: with all missing keys, unexpected keys and keys of another shape in one message.
    """
    state = read_state_dict(Path(path))
    wanted = net.state_dict()
    state = _without_classifier(net, state, wanted)
    if set(state) != set(wanted):
        renamed = {_rename(name): tensor for name, tensor in state.items()}
        if "blocks.0.attn.qkv.weight" in renamed:
            state = _without_classifier(net, renamed, wanted)
        else:
            state = _by_position(state, wanted) or state
    missing = [name for name in wanted if name not in state and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in state if name not in wanted]
    shapes = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(wanted[name].shape)}"
        for name in wanted
        if name in state and state[name].shape != wanted[name].shape
    ]
    if missing or unexpected or shapes:
        parts = [
            f"{title} ({len(names)}): {', '.join(names)}"
            for title, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
            if names
        ]
        raise UserError(f"{path} does not fit {type(net).__name__}; {'; '.join(parts)}")
    net.load_state_dict(state, strict=False)


def _rename(name: str) -> str:
    for pattern, replacement in _TORCHVISION_VIT:
        name = re.sub(pattern, replacement, name)
    return name


def _without_classifier(net: nn.Module, state: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    classifier = (getattr(net, "pretrained_cfg", None) or {}).get("classifier") or ()
    prefixes = [classifier] if isinstance(classifier, str) else list(classifier)
    extra = {name for name in state if name not in wanted and any(name.startswith(f"{p}.") for p in prefixes)}
    return {name: tensor for name, tensor in state.items() if name not in extra}


def _by_position(state: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """``state`` with the names of ``wanted`` if both are the same sequence of tensors, else ``None``."""
    given, names = list(state.items()), list(wanted)
    if len(given) - len(names) in (1, 2) and all(tensor.dim() <= 2 for _, tensor in given[len(names) :]):
        given = given[: len(names)]  # the classifier at the end
    if len(given) != len(names):
        return None
    for (theirs, tensor), ours in zip(given, names, strict=True):
        if theirs.rsplit(".", 1)[-1] != ours.rsplit(".", 1)[-1] or tensor.shape != wanted[ours].shape:
            return None
    return {ours: tensor for (_, tensor), ours in zip(given, names, strict=True)}
