"""The table of cases for the laws: networks × methods × options."""

from collections.abc import Callable
from typing import NamedTuple

import timm
import torchvision
from torch import nn

import taps
from taps.networks.origin import checked, described


def origin_of(net: nn.Module) -> dict:
    """Return how a network was made, as a task file says it."""
    return checked(*described(net))


def resnet():
    """Return a ResNet-18 with fewer channels."""
    return timm.create_model("resnet18", channels=(64, 40, 48, 56), num_classes=0)


def narrow():
    return timm.create_model("resnet18", channels=(8, 8, 12, 12), num_classes=0)


def bottleneck():
    return timm.create_model("resnet26", channels=(4, 4, 8, 8), num_classes=0)


def lite():
    return timm.create_model("tf_efficientnet_lite0", num_classes=0)


def mobilenet():
    return timm.create_model("mobilenetv2_035", num_classes=0)


def vit():
    return timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=0)


def swin():
    return timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=56, embed_dim=32, depths=(1, 1), num_heads=(1, 2), num_classes=0
    )


def convnext():
    return timm.create_model("convnext_atto", depths=(1, 1, 1, 1), num_classes=0)


def densenet():
    return timm.create_model("densenet121", block_config=(2, 2), growth_rate=8, num_classes=0)


def torchvision_resnet():
    net = torchvision.models.resnet18()
    net.fc = nn.Identity()
    return net


def torchvision_mobilenet():
    net = torchvision.models.mobilenet_v2(width_mult=0.35)
    net.classifier = nn.Identity()
    return net


def torchvision_vit():
    net = torchvision.models.VisionTransformer(32, 16, 2, 2, 24, 48)
    net.heads = nn.Identity()
    return net


def torchvision_swin():
    """Return a Swin of torchvision, whose attention reads ``qkv.weight`` instead of calling ``qkv``."""
    net = torchvision.models.SwinTransformer([4, 4], 16, [1, 1], [1, 2], [4, 4])
    net.head = nn.Identity()
    return net


def series():
    return nn.Sequential(
        nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8, 6)
    )


def volumes():
    return nn.Sequential(
        nn.Conv3d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv3d(4, 6, 1), nn.AdaptiveAvgPool3d(1), nn.Flatten()
    )


class BasicBlock(nn.Module):
    """A user-defined residual block in any number of dimensions."""

    def __init__(self, dimensions: int, channels: int, out: int) -> None:
        super().__init__()
        convolution = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dimensions]
        norm = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[dimensions]
        self.conv1, self.bn1 = convolution(channels, out, 3, padding=1), norm(out)
        self.conv2, self.bn2 = convolution(out, out, 3, padding=1), norm(out)
        self.downsample = nn.Sequential(convolution(channels, out, 1), norm(out)) if channels != out else None

    def forward(self, x):
        shortcut = x if self.downsample is None else self.downsample(x)
        return (shortcut + self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))).relu()


def residual(dimensions: int) -> nn.Module:
    pool = {1: nn.AdaptiveAvgPool1d, 3: nn.AdaptiveAvgPool3d}[dimensions](1)
    return nn.Sequential(
        BasicBlock(dimensions, 2, 4), BasicBlock(dimensions, 4, 4), pool, nn.Flatten(), nn.Linear(4, 6)
    )


def perceptron():
    return nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.ReLU(), nn.Linear(7, 6))


class Row(NamedTuple):
    """A network: its constructor, the shape of one input, and the numbers of layers and of residual blocks."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    layers: int
    blocks: int = 0


NETWORKS = {
    "resnet": Row(resnet, (3, 40, 40), 20, 8),
    "narrow": Row(narrow, (3, 40, 40), 21, 8),
    "bottleneck": Row(bottleneck, (3, 40, 40), 29, 8),
    "lite": Row(lite, (3, 40, 40), 49, 9),
    "mobilenet": Row(mobilenet, (3, 64, 64), 52, 10),
    "vit": Row(vit, (3, 32, 32), 9, 4),
    "swin": Row(swin, (3, 56, 56), 10),
    "convnext": Row(convnext, (3, 64, 64), 16, 4),
    "densenet": Row(densenet, (3, 40, 40), 10),
    "torchvision_resnet": Row(torchvision_resnet, (3, 40, 40), 20, 8),
    "torchvision_mobilenet": Row(torchvision_mobilenet, (3, 40, 40), 52, 10),
    "torchvision_vit": Row(torchvision_vit, (3, 32, 32), 7, 2),
    "torchvision_swin": Row(torchvision_swin, (3, 32, 32), 10),
    "series": Row(series, (3, 12), 2),
    "volumes": Row(volumes, (1, 6, 6, 6), 2),
    "residual_series": Row(lambda: residual(1), (2, 20), 6, 2),
    "residual_volumes": Row(lambda: residual(3), (2, 6, 6, 6), 6, 2),
    "perceptron": Row(perceptron, (5,), 2),
}
METHODS = {
    "taps": ("taps", {}),
    "taps_paper": ("taps", {"ste": "paper"}),
    "taps_follow": ("taps", {"norm": "follow"}),
    "taps_frozen": ("taps", {"norm": "frozen"}),
    "taps_budget": ("taps_budget", {}),
    "finetune": ("finetune", {}),
    "norm_only": ("norm_only", {}),
    "linear_probe": ("linear_probe", {}),
    "sparse_delta": ("sparse_delta", {}),
    "sparse_rows": ("sparse_delta", {"structure": "row", "norm": "follow"}),
    "hard_sharing": ("hard_sharing", {}),
    "adashare": ("adashare", {}),
    "dynashare": ("dynashare", {"target_rates": 0.5}),
    "automtl": ("automtl", {}),
    "automtl_blocks": ("automtl", {"skip": "blocks"}),
}
#: every network with the main method, every method with two networks, networks of blocks with a method that skips them
CASES = [(network, "taps") for network in NETWORKS]
CASES += [(network, method) for network in ("resnet", "vit") for method in METHODS if method != "taps"]
CASES += [("torchvision_vit", "finetune"), ("convnext", "finetune"), ("swin", "taps_follow"), ("series", "taps_follow")]
BLOCK_NETWORKS = ("narrow", "bottleneck", "mobilenet", "convnext", "torchvision_vit")
BLOCK_NETWORKS += ("residual_series", "residual_volumes")
CASES += [(network, "adashare") for network in BLOCK_NETWORKS]
CASES += [(network, "automtl") for network in ("lite", "swin", "torchvision_swin", "densenet", "perceptron")]
CASES += [("convnext", "automtl_blocks"), ("residual_series", "dynashare")]


def alternating(units: int, first: int) -> list[float]:
    """Return a policy that skips every second unit."""
    return [float((index + first) % 2) for index in range(units)]


def make(network: str, method: str, tasks: tuple[str, ...] = ("a", "b")) -> taps.TaskModel:
    """Return a model with tasks of 3, 4, … classes; methods that learn policies get policies that skip or own units."""
    name, options = METHODS[method]
    model = taps.adapt(NETWORKS[network].make(), name, **options)
    for index, task in enumerate(tasks):
        model.add_task(task, num_classes=3 + index)
    if model.method.learns_policy and tasks:
        model.follow({task: some_policy(model, index) for index, task in enumerate(tasks)})
    return model


def some_policy(model: taps.TaskModel, first: int) -> list:
    """Return a policy that skips every second unit if it can be replaced, and makes the others the task's own if possible."""
    pairs = zip(model.descriptions, alternating(len(model.units), first), strict=True)
    if model.method.name != "automtl":
        return [1.0 if unit.stand_in_size is None else run for unit, run in pairs]
    return [(1.0, 1.0) if run or unit.stand_in_size is None else (0.0, 0.0) for unit, run in pairs]
