"""Checkpoints of efficient computation sharing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from taps.errors import UserError
from taps.networks.dense_backbones import create_dense_backbone
from taps.networks.heads import ConvNeXtHead
from taps.networks.multimae import WITHOUT_NORM, from_multimae, is_multimae
from taps.networks.published.result import IMAGENET, Published, PublishedTask, State, check_known, load, part
from taps.storage.state_dict import listed, read_plain, read_state_dict

#: name of timm's network by width and number of blocks
_TRANSFORMERS = {(192, 12): "vit_tiny", (384, 12): "vit_small", (768, 12): "vit_base", (1024, 24): "vit_large"}


def read_efficient_mtl(paths: Sequence[Path], names: Sequence[str] | None) -> Published:
    """Read checkpoints of efficient computation sharing (``checkpoint-last-info.pt`` of steps 1 to 3), one for each sub-task.

    A file without ``depth_params`` is the base task's network.

    Raises:
        UserError: if a file is another one, or two have different bases.
    """
    base: State = {}
    tasks: dict[str, PublishedTask] = {}
    sizes = None
    for index, path in enumerate(paths):
        state, before = _efficient_file(path)
        own = from_multimae(state)
        frozen = {**own, **from_multimae(before)}
        heads = sorted({key.split(".")[1] for key in state if key.startswith("output_adapters.")})
        if len(heads) != 1:
            raise UserError(f"{path} has {len(heads)} heads ({listed(heads)}); a file of one task has one")
        if index == 0:
            base, sizes = frozen, state["input_adapters.rgb.pos_emb"].shape
        other = [key for key in base if key not in frozen or not torch.equal(base[key], frozen[key])]
        if other:
            raise UserError(f"{path} has another base than {paths[0]}: {len(other)} tensors differ, e.g. {other[0]}")
        name = names[index] if names is not None else heads[0]
        if name in tasks:
            raise UserError(f"{path} holds a second task {name!r}; give names with --tasks")
        tasks[name] = PublishedTask(_convnext(part(state, f"output_adapters.{heads[0]}.", ""), path))
        for key, tensor in own.items():
            if torch.equal(tensor, base[key]):
                continue
            if ".norm" in key:
                tasks[name].norms[f"net.{key}"] = tensor
            else:
                tasks[name].deltas[f"net.{key}"] = (tensor.double() - base[key].double()).to(tensor.dtype)
    width, patch = base["patch_embed.proj.weight"].shape[0], base["patch_embed.proj.weight"].shape[-1]
    depth = 1 + max(int(key.split(".")[1]) for key in base if key.startswith("blocks."))
    model = _TRANSFORMERS.get((width, depth))
    if model is None or base["cls_token"].shape[1] != 1 or sizes is None:
        raise UserError(
            f"{paths[0]} has {depth} blocks of width {width}; import takes ViT-Tiny to -Large with one global token"
        )
    image = [patch * side for side in sizes[2:]]
    net = create_dense_backbone(f"{model}_patch16_224", image_size=image, patch_size=patch, **WITHOUT_NORM)
    load(net, {f"net.{key}": tensor for key, tensor in base.items()}, paths[0])
    return Published(net, "sparse_delta", "task", tasks, pixels=IMAGENET)


def _efficient_file(path: Path) -> tuple[State, State]:
    """Return a file's tensors as its task uses them, and those of its base."""
    loaded = read_plain(path)
    state = loaded.get("model") if isinstance(loaded, Mapping) else None
    if not isinstance(state, Mapping):
        state = read_state_dict(path)
    state = {
        str(key).removeprefix("module."): value.detach() for key, value in state.items() if isinstance(value, Tensor)
    }
    if not is_multimae(state):
        raise UserError(f"{path} is not a checkpoint of efficient computation sharing: it has {listed(state)}")
    check_known(state, r"encoder\.|(in|out)put_adapters\.|global_tokens$", path)
    before = {}
    for key, parts in (loaded.get("depth_params") or {}).items() if isinstance(loaded, Mapping) else ():
        if not isinstance(parts, (list, tuple)) or not parts or not isinstance(parts[0], Tensor):
            raise UserError(f"{path}: depth_params of {key} are not tensors")
        before[str(key).removeprefix("module.")] = parts[0].detach()
    return state, before


def _convnext(own: State, path: Path) -> ConvNeXtHead:
    """Return the head with these tensors; there a token's outputs are ordered by place and channel, here by channel and place."""
    kinds = {"dwconv": "conv_dw", "norm": "norm", "pwconv1": "mlp.fc1", "pwconv2": "mlp.fc2"}
    if "proj_dec.weight" not in own or "final_layer.weight" not in own:
        raise UserError(
            f"{path}: the head is not a ConvNeXt head, the only kind that the program's scripts use; it has {listed(own)}"
        )
    width, features = own["proj_dec.weight"].shape
    depth = len({key.split(".")[1] for key in own if key.startswith("blocks.")})
    head = ConvNeXtHead(features, len(own["final_layer.weight"]), width, depth)
    turned = {
        "project.weight": own["proj_dec.weight"].unflatten(0, (16, -1)).transpose(0, 1).flatten(0, 1)[..., None, None],
        "project.bias": own["proj_dec.bias"].unflatten(0, (16, -1)).transpose(0, 1).flatten(),
        **part(own, "final_layer.", "answer."),
    }
    for key, tensor in own.items():
        parts = key.split(".")
        if parts[0] == "blocks" and parts[2] in kinds:
            turned[f"blocks.{parts[1]}.{kinds[parts[2]]}.{parts[3]}"] = tensor
    for index in range(depth):  # there is no scale there
        turned[f"blocks.{index}.gamma"] = torch.ones(width // 16)
    try:
        head.load_state_dict(turned)
    except RuntimeError as error:
        raise UserError(f"{path}: the head has other tensors ({str(error).splitlines()[-1].strip()[:120]})") from None
    return head
