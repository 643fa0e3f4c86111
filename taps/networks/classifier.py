"""The classifier of a network, which tasks replace by heads of their own."""

from __future__ import annotations

import warnings

import torch
from torch import nn

#: classifiers that torchvision's networks have for training from random weights
AUXILIARY = ("AuxLogits", "aux1", "aux2")


def without_classifier(net: nn.Module) -> nn.Module:
    """Drop the classifier of a timm or torchvision network, with a warning that says so; others are returned as they are."""
    family = type(net).__module__.split(".")[0]
    if family == "timm" and getattr(net, "num_classes", 0):
        _say_dropped(net, net.num_classes)  # type: ignore[arg-type]
        net.reset_classifier(0)  # type: ignore[operator]
    elif family == "torchvision":
        classes = drop_last_layer(net)
        if classes is not None:
            _say_dropped(net, classes)
    return net


def classifier_layers(net: nn.Module) -> set[int]:
    """Return the identities of the layers that :func:`without_classifier` would drop."""
    family, found = type(net).__module__.split(".")[0], None
    if family == "timm" and getattr(net, "num_classes", 0):
        found = net.get_classifier()  # type: ignore[operator]
    elif family == "torchvision" and (last := _last_layer(net)) is not None:
        found = net.get_submodule(last)
    parts = found if isinstance(found, (tuple, list)) else [found]
    return {id(module) for part in parts if isinstance(part, nn.Module) for module in part.modules()}


def drop_last_layer(net: nn.Module) -> object:
    """Replace the last layer of a torchvision network by the identity, in place, and return its number of classes."""
    classes, name = None, _last_layer(net)
    if name is not None:
        layer = net.get_submodule(name)
        classes = getattr(layer, "out_features", None) or layer.out_channels
        parent, _, last = name.rpartition(".")
        setattr(net.get_submodule(parent), last, nn.Identity())
    for name in AUXILIARY:
        if getattr(net, name, None) is not None:
            setattr(net, name, None)
            net.aux_logits = False  # type: ignore[assignment]
    return classes


def _last_layer(net: nn.Module) -> str | None:
    """Return the name of the layer that computes a torchvision network's classes, ``None`` if it was dropped before."""
    for name in ("fc", "classifier", "heads", "head"):
        part = getattr(net, name, None)
        inside = [] if part is None else list(part.named_modules(prefix=name))
        layers = [inner for inner, module in inside if _is_layer(module)]
        if layers:
            return None if isinstance(inside[-1][1], nn.Identity) else layers[-1]
    return None


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, nn.Conv2d))


def _say_dropped(net: nn.Module, classes: object) -> None:
    warnings.warn(
        f"the classifier of {type(net).__name__} ({classes} classes) is dropped: each task has a head of its own",
        stacklevel=4,
    )


def attach_head(net: nn.Module, head: nn.Module) -> nn.Module:
    """Combine a backbone and a head to one network; a plain linear head becomes timm's own classifier if it fits."""
    is_plain = (
        type(head) is nn.Linear and head.bias is not None and not head._forward_hooks and not head._forward_pre_hooks
    )
    if is_plain and hasattr(net, "reset_classifier") and getattr(net, "num_classes", None) == 0:
        before = {name for name, _ in net.named_parameters()}
        with torch.random.fork_rng(devices=[]):  # its random weights are replaced at once
            net.reset_classifier(head.out_features)
        own = net.get_classifier()
        made = {id(parameter) for name, parameter in net.named_parameters() if name not in before}
        fits = isinstance(own, nn.Linear) and own.weight.shape == head.weight.shape
        if fits and made <= {id(parameter) for parameter in own.parameters()}:  # VOLO makes a second one beside it
            own.load_state_dict(head.state_dict())
            return net.to(head.weight.device, head.weight.dtype)
        net.reset_classifier(0)
    both = nn.Sequential()
    both.add_module("backbone", net)
    both.add_module("head", head)
    return both
