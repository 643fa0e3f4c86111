"""The classifier of a network, which tasks replace by heads of their own."""

from __future__ import annotations

import warnings

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


def drop_last_layer(net: nn.Module) -> object:
    """Replace the last layer of a torchvision network by the identity, in place, and return its number of classes."""
    classes = None
    for name in ("fc", "classifier", "heads", "head"):
        part = getattr(net, name, None)
        layers = [] if part is None else [(inner, m) for inner, m in part.named_modules() if _is_layer(m)]
        if layers:
            inner, layer = layers[-1]
            classes = getattr(layer, "out_features", None) or layer.out_channels
            parent, _, last = f"{name}.{inner}".strip(".").rpartition(".")
            setattr(net.get_submodule(parent), last, nn.Identity())
            break
    for name in AUXILIARY:
        if getattr(net, name, None) is not None:
            setattr(net, name, None)
            net.aux_logits = False  # type: ignore[assignment]
    return classes


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, nn.Conv2d))


def _say_dropped(net: nn.Module, classes: object) -> None:
    warnings.warn(
        f"the classifier of {type(net).__name__} ({classes} classes) is dropped: each task has a head of its own",
        stacklevel=4,
    )


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
