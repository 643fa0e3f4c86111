"""torchvision's weights in timm's networks: other names, and a check that both networks compute the same."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping

import timm
import torch
from torch import Tensor, nn
from torchvision import models

from taps.errors import UserError
from taps.networks.classifier import AUXILIARY, drop_last_layer

#: outputs are the same if they differ by less than this share of their size; float32 rounding stays below a tenth of it
_TOLERANCE = 1e-3

#: timm's name of an architecture -> torchvision's, where they differ
_ARCHITECTURES = {
    "mobilenetv2_100": "mobilenet_v2",
    "mobilenetv3_large_100": "mobilenet_v3_large",
    "mobilenetv3_small_100": "mobilenet_v3_small",
    "mnasnet_050": "mnasnet0_5",
    "mnasnet_075": "mnasnet0_75",
    "mnasnet_100": "mnasnet1_0",
    "efficientnetv2_s": "efficientnet_v2_s",
    "efficientnetv2_m": "efficientnet_v2_m",
    "efficientnetv2_l": "efficientnet_v2_l",
    **{f"swin_{size}_patch4_window7_224": f"swin_{size[0]}" for size in ("tiny", "small", "base")},
    **{f"swinv2_{size}_window8_256": f"swin_v2_{size[0]}" for size in ("tiny", "small", "base")},
    **{
        f"vit_{size}_patch{patch}_224": f"vit_{size[0]}_{patch}"
        for size, patch in (("base", 16), ("base", 32), ("large", 16), ("large", 32), ("huge", 14))
    },
    **{
        f"regnet{kind}_{flops:03d}": f"regnet_{kind}_{text}"
        for kind in "xy"
        for flops, text in (
            (4, "400mf"), (8, "800mf"), (16, "1_6gf"), (32, "3_2gf"), (80, "8gf"), (160, "16gf"), (320, "32gf"),
            (1280, "128gf"),
        )
    },
}  # fmt: skip

Replacement = str | Callable[[re.Match], str]
_REGNET: tuple[tuple[str, Replacement], ...] = (
    (r"^stem\.0\.", "stem.conv."),
    (r"^stem\.1\.", "stem.bn."),
    (r"^trunk_output\.block(\d+)\.block\d+-(\d+)\.", lambda m: f"s{m[1]}.b{int(m[2]) + 1}."),
    (r"\.proj\.0\.", ".downsample.conv."),
    (r"\.proj\.1\.", ".downsample.bn."),
    (r"\.f\.([abc])\.([01])\.", lambda m: f".conv{'abc'.index(m[1]) + 1}.{('conv', 'bn')[int(m[2])]}."),
    (r"\.f\.se\.", ".se."),
)
_SWIN: tuple[tuple[str, Replacement], ...] = (
    (r"^features\.0\.0\.", "patch_embed.proj."),
    (r"^features\.0\.2\.", "patch_embed.norm."),
    (r"^features\.([1357])\.(\d+)\.", lambda m: f"layers.{int(m[1]) // 2}.blocks.{m[2]}."),
    (r"^features\.([246])\.", lambda m: f"layers.{int(m[1]) // 2}.downsample."),
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.3\.", ".mlp.fc2."),
)
_VIT: tuple[tuple[str, Replacement], ...] = (
    (r"^class_token$", "cls_token"),
    (r"^encoder\.pos_embedding$", "pos_embed"),
    (r"^conv_proj\.", "patch_embed.proj."),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
    (r"^encoder\.ln\.", "norm."),
    (r"\.ln_(\d)\.", r".norm\1."),
    (r"\.self_attention\.in_proj_(weight|bias)$", r".attn.qkv.\1"),
    (r"\.self_attention\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.(?:linear_1|0)\.", ".mlp.fc1."),
    (r"\.mlp\.(?:linear_2|3)\.", ".mlp.fc2."),
)
_VGG: tuple[tuple[str, Replacement], ...] = (
    (r"^classifier\.0\.", "pre_logits.fc1."),
    (r"^classifier\.3\.", "pre_logits.fc2."),
)
_RENAMES = {"regnet": _REGNET, "swin": _SWIN, "vit": _VIT, "vgg": _VGG}
#: tensors of torchvision's that timm computes
_COMPUTED = ("relative_position_index", "relative_coords_table", "num_batches_tracked")


def counterpart(net: nn.Module) -> str | None:
    """The name of torchvision's network with the architecture of one of timm's, or ``None``."""
    name = (getattr(net, "pretrained_cfg", None) or {}).get("architecture", "").removeprefix("tf_").removesuffix("_tv")
    name = _ARCHITECTURES.get(name, name)
    return name if name in models.list_models(module=models) else None


def from_torchvision(net: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Weights of a timm network from those of torchvision's network of the same architecture.

    Both architectures then run on the same input. Where the epsilon of batch norms differs, the difference goes into the running
    variances, which in evaluation mode is the same function.

    Args:
        net: a timm network without classifier.
        state: tensors with torchvision's names.

    Returns:
        Tensors with timm's names, for the architecture's usual image size, or ``None`` if ``state`` is not that of the
        counterpart in torchvision.

    Raises:
        UserError: if the two networks compute something different with these weights.
    """
    name = counterpart(net)
    theirs = None if name is None else _build(name, state)
    if theirs is None:
        return None
    drop_last_layer(theirs)
    architecture = net.pretrained_cfg["architecture"]  # type: ignore[index]
    with torch.random.fork_rng(devices=[]):
        ours = timm.create_model(architecture, num_classes=0)  # the network itself may have another size or stride
    renamed = _renamed(str(name), theirs.state_dict(), ours.state_dict())
    if renamed is None:
        if timm.is_model(f"{architecture}_tv"):
            raise UserError(
                f"these are the weights of torchvision's {name}, which is not built like {architecture}; use {architecture}_tv"
            )
        return None
    epsilons = {
        place.rpartition(".")[0]: theirs.get_submodule(source.rpartition(".")[0]).eps
        for place, (source, _) in renamed.items()
        if hasattr(theirs.get_submodule(source.rpartition(".")[0]), "eps")
    }
    tensors = {place: tensor for place, (_, tensor) in renamed.items()}
    for place, epsilon in epsilons.items():  # √(v + ε) with the other network's ε, so that the weights fit it as it is
        if f"{place}.running_var" in tensors:
            tensors[f"{place}.running_var"] += epsilon - ours.get_submodule(place).eps
    ours.load_state_dict(tensors, strict=False)
    difference = max(
        _compare(ours, theirs, own_statistics=False), _compare(_with_epsilons(ours, epsilons), theirs, True)
    )
    if not difference < _TOLERANCE:
        hint = f"; use {architecture[3:]}" if architecture.startswith("tf_") else ""
        raise UserError(
            f"these are the weights of torchvision's {name}, with which {architecture} computes something else: its outputs differ "
            f"by {difference:.1%}{hint}"
        )
    return tensors


def _build(name: str, state: Mapping[str, Tensor]) -> nn.Module | None:
    """torchvision's network with these weights, in evaluation mode, or ``None`` if they are not its own."""
    state = {key: tensor for key, tensor in state.items() if not key.startswith(AUXILIARY)}
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # inception's, on its initial weights
        net = models.get_model(name, weights=None)
    own = {key: tensor for key, tensor in net.state_dict().items() if not key.startswith(AUXILIARY)}
    last = list(own)[-1].rpartition(".")[0] + "."  # the classifier may have another width, or be left out
    wrong = [
        key for key in own if not key.startswith(last) and (key not in state or state[key].shape != own[key].shape)
    ]
    wrong = [key for key in wrong if not key.endswith(_COMPUTED)]
    if wrong or set(state) - set(own):
        return None
    with torch.no_grad():  # not load_state_dict, since MNASNet's asks for a version that plain tensors lack
        for key, tensor in own.items():
            if key in state and not key.startswith(last):
                tensor.copy_(state[key])
    return net.eval()


def _renamed(
    name: str, state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]
) -> dict[str, tuple[str, Tensor]] | None:
    """torchvision's names and tensors by timm's names: by rules, else by order; ``None`` if shapes differ."""
    rules = next((rules for family, rules in _RENAMES.items() if name.startswith(family)), ())
    given = {key: tensor for key, tensor in state.items() if not key.endswith(_COMPUTED)}
    names = [key for key in wanted if not key.endswith(_COMPUTED)]
    pairs: dict[str, tuple[str, Tensor]] = {}
    if rules:
        for key, tensor in given.items():
            place = key
            for pattern, replacement in rules:
                place = re.sub(pattern, replacement, place)
            if place not in wanted and place.endswith("qkv.bias"):  # Swin v2 in timm has no bias of keys
                for part, chunk in zip("qkv", tensor.chunk(3), strict=True):
                    pairs[place.replace("qkv.bias", f"{part}_bias")] = (key, chunk)
            else:
                pairs[place] = (key, tensor)
    elif len(given) == len(names):
        pairs = dict(zip(names, given.items(), strict=True))
    if any(place not in pairs or pairs[place][1].numel() != wanted[place].numel() for place in names):
        return None
    return {
        place: (key, tensor.reshape(wanted[place].shape).clone())
        for place, (key, tensor) in pairs.items()
        if place in wanted
    }


def _with_epsilons(net: nn.Module, epsilons: Mapping[str, float]) -> nn.Module:
    for place, value in epsilons.items():
        norm = net.get_submodule(place)
        if isinstance(getattr(norm, "eps", None), float):
            norm.eps = value  # type: ignore[assignment]
    return net


@torch.no_grad()
def _compare(ours: nn.Module, theirs: nn.Module, own_statistics: bool) -> float:
    """The largest difference of two networks' outputs for noise, relative to the largest output.

    Batch norms run on their stored statistics or, with ``own_statistics``, on those of the batch, which changes both networks:
    whatever the weights are, some signal then reaches the output, so that other padding shows.
    """
    channels, height, width = ours.pretrained_cfg["input_size"]  # type: ignore[index]
    x = torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(0))
    ours.eval()
    for module in (*ours.modules(), *theirs.modules()):
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train(own_statistics)
    one, other = ours(x), theirs(x)
    if one.shape != other.shape:
        return float("inf")
    return float((one - other).abs().max() / other.abs().max().clamp(min=1e-12))
