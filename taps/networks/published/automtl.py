"""Checkpoints of AutoMTL."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from taps.errors import UserError
from taps.networks.dense_backbones import create_dense_backbone
from taps.networks.published.result import Published, PublishedTask, aspp, check_known, load, needed, part
from taps.storage.state_dict import listed, read_state_dict


def read_automtl(path: Path, names: Sequence[str] | None) -> Published:
    """Read a checkpoint of AutoMTL, of one of its three networks with ASPP heads: Deeplab-ResNet-34, MobileNetV2, MNasNet.

    Every task has its own norms, and for each convolution the choice of largest logit: the shared weights, its own, or none.

    Args:
        path: the checkpoint.
        names: the tasks that are taken; ``None``: all in the file.

    Raises:
        UserError: if the file is another one, or a task skips a convolution by another one, which this library does not have.
    """
    state = {key.removeprefix("module."): tensor for key, tensor in read_state_dict(path).items()}
    inside = sorted({match[1] for key in state if (match := re.match(r"headsDict\.([^.]+)\.fc1\.", key))})
    nodes = sorted({int(key.split(".")[1]) for key in state if re.match(r"net\.\d+\.basicOp\.weight", key)})
    if not nodes or not inside:
        raise UserError(
            f"{path} is not a checkpoint of AutoMTL: it has no net.N.basicOp and headsDict.TASK; it has {listed(state)}"
        )
    check_known(state, r"headsDict\.|net\.\d+\.(basicOp|taskOp|dsOp|policy)\.", path)
    layers = [node for node in nodes if state[f"net.{node}.basicOp.weight"].dim() == 4]
    norms = [node for node in nodes if state[f"net.{node}.basicOp.weight"].dim() == 1]
    net, places, norm_places = _automtl_network([state[f"net.{node}.basicOp.weight"].shape for node in layers], path)
    base = {f"{name}.weight": state[f"net.{node}.basicOp.weight"] for name, node in zip(places, layers, strict=True)}
    if len(norms) != len(norm_places):
        raise UserError(f"{path} has {len(norms)} norms, the network has {len(norm_places)}")
    for name, node in zip(norm_places, norms, strict=True):
        base.update(part(state, f"net.{node}.basicOp.", f"{name}."))
    base[f"{places[0]}.weight"] = base[f"{places[0]}.weight"].flip(1)  # images are BGR there
    load(net, base, path)
    for name in names or ():
        if name not in inside:
            raise UserError(f"{path} has no task {name!r}; it has {', '.join(inside)}")
    tasks = {}
    order = {name: index for index, name in enumerate(places)}
    units = [name for name, module in net.named_modules() if isinstance(module, nn.Conv2d)]
    for task in names or inside:
        branches = {f"headsDict.{task}.fc{index + 1}.": f"branches.{index}." for index in range(4)}
        own = PublishedTask(aspp(state, branches, path), policy=[])
        for name, node in zip(norm_places, norms, strict=True):
            own.norms.update(part(state, f"net.{node}.taskOp.{task}.", f"{name}."))
        for name in units:
            node = layers[order[name]]
            choice = int(needed(state, f"net.{node}.policy.{task}", path).argmax())
            if choice == 2 and any(key.startswith(f"net.{node}.dsOp.{task}.0.") for key in state):
                raise UserError(
                    f"{path}: task {task!r} replaces {name} by a convolution of its own, for which no network here has a place"
                )
            if choice == 1:
                mine = needed(state, f"net.{node}.taskOp.{task}.weight", path)
                mine = mine.flip(1) if name == places[0] else mine
                own.deltas[f"{name}.weight"] = (mine.double() - base[f"{name}.weight"].double()).to(mine.dtype)
            own.policy.append(((1.0, 0.0), (1.0, 1.0), (0.0, 0.0))[choice])  # type: ignore[union-attr]
        tasks[task] = own
    return Published(net, "automtl", "task", tasks)


def _automtl_network(shapes: Sequence[torch.Size], path: Path) -> tuple[nn.Module, list[str], list[str]]:
    """Return the network whose convolutions have these shapes, and names of convolutions and norms in the program's order."""
    for model, options in (
        ("resnet34", {}),
        ("mobilenetv2_100", {"output_stride": 32, "act_layer": "relu"}),  # relu there, not relu6
        ("mnasnet_100", {"output_stride": 32}),
    ):
        net = create_dense_backbone(model, **options)  # type: ignore[arg-type]
        layers = _in_order([name for name, module in net.named_modules() if isinstance(module, nn.Conv2d)])
        if [net.get_submodule(name).weight.shape for name in layers] == list(shapes):
            norms = _in_order([name for name, module in net.named_modules() if isinstance(module, nn.BatchNorm2d)])
            return net, layers, norms
    raise UserError(
        f"{path} has {len(shapes)} convolutions, which are not those of Deeplab-ResNet-34, MobileNetV2 or MNasNet"
    )


def _in_order(names: list[str]) -> list[str]:
    """The names with the projection of a block's shortcut before the block's layers."""
    return sorted(names, key=lambda name: _place(name, names))


def _place(name: str, names: list[str]) -> tuple[int, int]:
    head, _, _ = name.partition(".downsample.")
    if head == name:
        return names.index(name), 1
    return next(index for index, other in enumerate(names) if other.startswith(f"{head}.")), 0
