"""The table that laws run over: networks × methods × options."""

import timm
import torchvision
from torch import nn

import taps


def resnet():
    return timm.create_model("resnet18", num_classes=0)


def lite():
    return timm.create_model("tf_efficientnet_lite0", num_classes=0)


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


def torchvision_vit():
    net = torchvision.models.VisionTransformer(32, 16, 2, 2, 24, 48)
    net.heads = nn.Identity()
    return net


def torchvision_swin():
    """Its attention reads ``qkv.weight`` instead of calling ``qkv``."""
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


def perceptron():
    return nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.ReLU(), nn.Linear(7, 6))


#: network -> (maker, shape of one input, number of layers)
NETWORKS = {
    "resnet": (resnet, (3, 40, 40), 20),
    "lite": (lite, (3, 40, 40), 49),
    "vit": (vit, (3, 32, 32), 9),
    "swin": (swin, (3, 56, 56), 10),
    "convnext": (convnext, (3, 64, 64), 16),
    "densenet": (densenet, (3, 40, 40), 10),
    "torchvision_resnet": (torchvision_resnet, (3, 40, 40), 20),
    "torchvision_vit": (torchvision_vit, (3, 32, 32), 7),
    "torchvision_swin": (torchvision_swin, (3, 32, 32), 10),
    "series": (series, (3, 12), 2),
    "volumes": (volumes, (1, 6, 6, 6), 2),
    "perceptron": (perceptron, (5,), 2),
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
}
#: every network with the main method, every method with two networks
CASES = [(network, "taps") for network in NETWORKS]
CASES += [(network, method) for network in ("resnet", "vit") for method in METHODS if method != "taps"]
CASES += [("torchvision_vit", "finetune"), ("convnext", "finetune"), ("swin", "taps_follow"), ("series", "taps_follow")]


def make(network: str, method: str, tasks: tuple[str, ...] = ("a", "b")) -> "taps.TaskModel":
    name, options = METHODS[method]
    model = taps.adapt(NETWORKS[network][0](), name, **options)
    for index, task in enumerate(tasks):
        model.add_task(task, num_classes=3 + index)
    return model
