"""How a network was made, so that stored tasks find their base again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import timm
import torch
from torch import nn

from taps.errors import UserError, first_line
from taps.networks.backbones import create_backbone, structure_of
from taps.networks.dense_backbones import create_dense_backbone
from taps.networks.resnet_nd import create_volume_backbone
from taps.networks.series import create_series_backbone
from taps.networks.weights import load_weights
from taps.storage.hub import PREFIX


def _create(make: Callable[..., nn.Module], name: str, path: str | Path | None, options: Mapping) -> nn.Module:
    net = make(name, **options)
    if path is not None:
        load_weights(net, path)
    return net


#: maker of each kind of network: from its name, whether its weights are downloaded, a file of weights and options
_KINDS: Mapping[object, Callable[[str, bool, str | Path | None, Mapping], nn.Module]] = {
    None: lambda name, pretrained, path, options: create_backbone(name, pretrained, path, **options),
    "maps": lambda name, pretrained, path, options: create_dense_backbone(name, pretrained, path, **options),
    "series": lambda name, pretrained, path, options: _create(create_series_backbone, name, path, options),
    "volumes": lambda name, pretrained, path, options: _create(create_volume_backbone, name, path, options),
}


def described(net: nn.Module) -> tuple[dict, str | None]:
    """Return how a network seems to be made, for :func:`rebuild`, and its structure if that has to be :func:`checked`.

    The description is empty for a network that is not one of timm's. Keys: ``model``, its name, ``None`` for a network that was
    changed since, or made with options that a file cannot hold, such as another activation; ``kind``, in multi-task benchmarks
    ``"maps"``, ``"series"`` or ``"volumes"``; ``weights``: ``"pretrained"``, ``"random"`` (with a ``seed``) or ``"file"`` (with
    its ``file`` name); ``options`` of the function that makes it.
    """
    if "taps_origin" in net.__dict__:
        is_unchanged = net.__dict__.get("taps_structure") in (None, structure_of(net))
        return dict(net.taps_origin) if is_unchanged else {"model": None}, None  # type: ignore[arg-type]
    config = getattr(net, "pretrained_cfg", None) or {}
    if not config.get("architecture") or not type(net).__module__.startswith("timm."):
        return {}, None
    name = config["architecture"] + (f".{config['tag']}" if config.get("tag") else "")
    size = getattr(getattr(net, "patch_embed", None), "img_size", None)
    resized = isinstance(size, tuple) and size[-1] != config["input_size"][-1]
    options = {"img_size": size[-1]} if resized else {}
    return {"model": name, "weights": "pretrained", "options": options}, structure_of(net)


def checked(origin: dict, structure: str | None) -> dict:
    """Return a description, or one of an unknown network if timm makes another one under its name."""
    if structure is None:
        return origin
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            plain = timm.create_model(origin["model"].split(".")[0], **origin["options"])
        found = structure_of(plain)
        plain.reset_classifier(0)
    except Exception:  # a name that this version of timm does not know, as on the hub
        return origin
    return origin if structure in (found, structure_of(plain)) else {"model": None}


def rebuild(origin: Mapping, path: str | Path | None = None, is_empty: bool = False) -> nn.Module:
    """Make the backbone that :func:`described` describes, or one of its kind with the weights in ``path``, or with any if
    ``is_empty``.

    Raises:
        UserError: if the description is incomplete, or the weights are neither here nor can be downloaded.
    """
    name, weights, options = origin.get("model"), origin.get("weights"), origin.get("options") or {}
    if (
        not isinstance(name, str)
        or not isinstance(options, Mapping)
        or not all(isinstance(key, str) for key in options)
    ):
        raise UserError("the task does not say which network it was made for; give base= with that network")
    if is_empty:
        with torch.random.fork_rng(devices=[]):
            return _made(origin, name, False, None, options)
    if path is None and weights == "file" and str(origin.get("file")).startswith((PREFIX, "https://")):
        path = str(origin["file"])
    if path is None and weights == "file":
        raise UserError(
            f"the base is {name} with the weights in {origin.get('file')}, a file that is not part of the task; "
            "give base= with that file or the network"
        )
    if path is None and weights == "random" and not isinstance(origin.get("seed"), int):
        raise UserError(f"the base is {name} with random weights that no seed repeats; give base= with the network")
    with torch.random.fork_rng(devices=[]):
        if weights == "random" and path is None:
            torch.default_generator.manual_seed(origin["seed"])
        return _made(origin, name, weights != "random" and path is None, path, options)


def _made(origin: Mapping, name: str, pretrained: bool, path: str | Path | None, options: Mapping) -> nn.Module:
    kind = origin.get("kind")
    make = _KINDS.get(kind) if kind is None or isinstance(kind, str) else None
    if make is None:
        raise UserError(f"networks of kind {kind!r} are unknown; a newer version of this library is needed")
    try:
        return make(name, pretrained, path, options)
    except UserError:
        raise
    except (TypeError, ValueError, RuntimeError, ZeroDivisionError) as error:
        reason = first_line(error, 120)
        raise UserError(
            f"the task's description of its network is damaged ({type(error).__name__}: {reason})"
        ) from None
