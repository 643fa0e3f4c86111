"""Checkpoints of the published programs of AdaShare, DynaShare, AutoMTL and efficient computation sharing.

Each reader returns a :class:`Published` network: a base in this library's names, and what each task changes of it. Names and
orders of tensors were read in the programs; outputs were compared with theirs on random weights (``docs/published.md``).
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from taps.errors import UserError
from taps.networks.dense_backbones import create_dense_backbone
from taps.networks.heads import ASPP, ConvNeXtHead
from taps.networks.multimae import WITHOUT_NORM, from_multimae, is_multimae
from taps.storage.state_dict import listed, read_plain, read_state_dict

State = dict[str, Tensor]
#: mean of the pixels 0..255 in RGB that the programs subtract; they do not divide by a standard deviation
CAFFE = {"mean": tuple(value / 255 for value in (122.67891434, 116.66876762, 104.00698793)), "std": (1 / 255,) * 3}
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
_RATES = (6, 12, 18, 24)


@dataclass
class PublishedTask:
    """What one task adds to a published network.

    Attributes:
        head: the head with its weights.
        deltas: W' − W by the parameter's name.
        norms: tensors of the task's own norms by name.
        policy: (run, specific) of each unit; ``None`` for methods without policies.
        gates: tensors of the gates that choose for each image, by unit and name.
    """

    head: nn.Module
    deltas: State = field(default_factory=dict)
    norms: State = field(default_factory=dict)
    policy: list[tuple[float, float]] | None = None
    gates: dict[str, State] = field(default_factory=dict)


@dataclass
class Published:
    """A published network in this library's terms.

    Attributes:
        net: the base with its weights.
        method, norm, options: arguments of :func:`taps.adapt`.
        tasks: the tasks by name.
        pixels: ``mean`` and ``std`` of RGB in 0..1 with which images are normalised.
    """

    net: nn.Module
    method: str
    norm: str
    tasks: dict[str, PublishedTask]
    options: dict[str, object] = field(default_factory=dict)
    pixels: Mapping[str, tuple[float, ...]] = field(default_factory=lambda: CAFFE)


def read_block_policies(
    path: Path, policy: Path | None, names: Sequence[str] | None, rates: Sequence[float] | None, program: str
) -> Published:
    """Read a checkpoint of AdaShare or DynaShare (``*_model.pth.tar``).

    Images are BGR there, so the first layer's input channels are turned round.

    Args:
        path: the checkpoint.
        policy: the file of the policy that the network was trained under (``policyIter*_rs*.pickle``); ``None``: the most
            probable one of the logits in the checkpoint.
        names: the tasks' names in the program's order; ``None``: ``task1`` and so on.
        rates: DynaShare's ``target_rates``; blocks with 1 have no gates.
        program: ``"adashare"`` or ``"dynashare"``.

    Raises:
        UserError: if the file is another one, or a network that this library does not have.
    """
    state = {key.removeprefix("module."): tensor for key, tensor in read_state_dict(path).items()}
    first = state.get("backbone.conv1.weight")
    if first is None or not any(key.startswith("backbone.blocks.0.") for key in state):
        raise UserError(f"{path} is no checkpoint of {program}: it has no backbone.blocks; it has {listed(state)}")
    if first.dim() == 5:
        raise UserError(f"{path} is of the fork for ABCD, which adds every residual twice; no network here does")
    if first.dim() == 3:
        raise UserError(
            f"{path} is a network for hospital stays, in which hours and features are exchanged; no network here does that"
        )
    if "backbone.blocks.0.0.conv3.weight" in state:
        raise UserError(f"{path} has bottlenecks with the stride in their first layer; import takes ResNet-18 and -34")
    gated = "backbone.blocks.0.0.fc1.weight" in state
    if gated != (program == "dynashare"):
        raise UserError(f"{path} has {'' if gated else 'no '}gates for single images; say --from {_other(program)}")
    tensors, left = _backbone(state)
    depths = [1 + max(int(key.split(".")[1]) for key in tensors if key.startswith(f"layer{s}.")) for s in (1, 2, 3, 4)]
    model = {(2, 2, 2, 2): "resnet18", (3, 4, 6, 3): "resnet34"}.get(tuple(depths))
    if model is None:
        raise UserError(f"{path} has stages of {depths} blocks; import takes ResNet-18 and -34")
    widths = [len(tensors[f"layer{stage}.0.conv1.weight"]) for stage in (1, 2, 3, 4)]
    net = create_dense_backbone(model, channels=None if widths == [64, 128, 256, 512] else widths)
    tensors["conv1.weight"] = tensors["conv1.weight"].flip(1)
    _load(net, tensors, path)
    count = len({key.split("_")[0] for key in left if re.match(r"task\d+_fc1_c0\.", key)})
    names = _task_names(names, count, path)
    blocks = sum(depths)
    if gated and rates is None:
        raise UserError(f"{path} does not say which blocks choose for single images: give its --target_rates")
    if rates is not None and len(rates) not in (1, blocks):
        raise UserError(f"--target_rates has {len(rates)} values for {blocks} blocks")
    runs = _policies(path, policy, left, count, blocks)
    tasks = {}
    for index, name in enumerate(names, start=1):
        branches = {f"task{index}_fc1_c{branch}.": f"branches.{branch}." for branch in range(4)}
        tasks[name] = PublishedTask(_aspp(left, branches, path), policy=[(run, 0.0) for run in runs[index - 1]])
        if gated:
            tasks[name].gates = _instance_gates(state)
    options: dict[str, object] = {} if rates is None else {"target_rates": list(rates)}
    return Published(net, program, "frozen", tasks, options)


def _other(program: str) -> str:
    return {"adashare": "dynashare", "dynashare": "adashare"}[program]


def _backbone(state: Mapping[str, Tensor]) -> tuple[State, State]:
    """Return the tensors of the Deeplab-ResNet in timm's names, and those outside of it."""
    found, left = {}, {}
    for key, tensor in state.items():
        _, _, name = key.partition("backbone.")
        parts = name.split(".")
        if not key.startswith("backbone."):
            left[key] = tensor
        elif parts[0] == "blocks" and parts[3] in ("conv1", "bn1", "conv2", "bn2"):
            found[f"layer{int(parts[1]) + 1}.{'.'.join(parts[2:])}"] = tensor
        elif parts[0] == "ds":
            found[f"layer{int(parts[1]) + 1}.0.downsample.{'.'.join(parts[2:])}"] = tensor
        elif parts[0] != "blocks":  # what is left in blocks are gates, and shortcuts that the program never calls
            found[name] = tensor
    return found, left


def _load(net: nn.Module, tensors: State, path: Path) -> None:
    wanted = net.state_dict()
    lacking = [key for key in wanted if key not in tensors and not key.endswith("num_batches_tracked")]
    wrong = [key for key, value in tensors.items() if key not in wanted or wanted[key].shape != value.shape]
    if lacking or wrong:
        raise UserError(
            f"{path}: {len(lacking)} tensors are missing ({listed(lacking)}), {len(wrong)} unknown ({listed(wrong)})"
        )
    net.load_state_dict(tensors, strict=False)


def _task_names(names: Sequence[str] | None, count: int, path: Path) -> list[str]:
    if names is not None and len(names) != count:
        raise UserError(f"{path} has {count} tasks, --tasks names {len(names)}")
    return list(names) if names is not None else [f"task{index}" for index in range(1, count + 1)]


def _aspp(state: State, branches: Mapping[str, str], path: Path) -> ASPP:
    """Return the head whose branches have these prefixes; its tensors are taken out of ``state``."""
    own = {}
    for theirs, ours in branches.items():
        for layer, place in (("conv1", 0), ("conv2", 3), ("conv3", 6)):
            for part in ("weight", "bias"):
                tensor = state.get(f"{theirs}{layer}.{part}")
                if tensor is None:
                    raise UserError(f"{path}: {theirs}{layer}.{part} is missing")
                own[f"{ours}{place}.{part}"] = tensor
    first, last = own["branches.0.0.weight"], own["branches.0.6.weight"]
    head = ASPP(first.shape[1], len(last), len(first), _RATES)
    try:
        head.load_state_dict(own)
    except RuntimeError as error:
        raise UserError(
            f"{path}: a head has tensors of other shapes ({str(error).splitlines()[-1].strip()[:120]})"
        ) from None
    return head


def _policies(path: Path, policy: Path | None, state: State, count: int, blocks: int) -> list[list[float]]:
    """Return for each task 1.0 for each block that it runs, else 0.0."""
    logits = [state.get(f"task{index}_logits") for index in range(1, count + 1)]
    if policy is not None:
        tables = read_policy_pickle(policy)
        found = [tables.get(f"task{index}_policy") for index in range(1, count + 1)]
        if any(one is None or one.shape != (blocks, 2) or not bool((one.sum(1) == 1).all()) for one in found):
            raise UserError(f"{policy} holds no policy of {count} tasks and {blocks} blocks; it has {listed(tables)}")
        return [[float(run) for run in one[:, 0]] for one in found if one is not None]
    if any(one is None or one.shape != (blocks, 2) for one in logits):
        raise UserError(f"{path} has no logits of {blocks} blocks for each of its {count} tasks")
    if all(one is not None and bool((one == one[0, 0]).all()) for one in logits):
        raise UserError(
            f"{path} holds no policy (its logits are all equal): it was trained under one that lies beside it, "
            "policyIter…_rs….pickle; give that as --policy"
        )
    return [[float(select >= skip) for select, skip in one.tolist()] for one in logits if one is not None]


def _instance_gates(state: Mapping[str, Tensor]) -> dict[str, State]:
    """Return DynaShare's gates by block; there the second logit means to run the block, here the first."""
    gates: dict[str, State] = {}
    for key, tensor in state.items():
        match = re.fullmatch(r"backbone\.blocks\.(\d+)\.(\d+)\.(fc1|fc1bn|fc2)\.(\w+)", key)
        if match is None:
            continue
        stage, block, layer, part = match.groups()
        name = {"fc1": "reduce", "fc1bn": "normalize", "fc2": "choose"}[layer]
        value = tensor.flatten(1) if tensor.dim() == 4 else tensor
        own = gates.setdefault(f"layer{int(stage) + 1}.{block}", {})
        own[f"{name}.{part}"] = value.flip(0) if layer == "fc2" else value
    return gates


class _TensorsOnly(pickle.Unpickler):
    """Unpickles dicts of tensors and arrays, and calls nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            return lambda data: torch.load(BytesIO(data), map_location="cpu", weights_only=True)
        if (module, name) in (("torch._utils", "_rebuild_tensor_v2"), ("collections", "OrderedDict")):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name}")


def read_policy_pickle(path: Path) -> dict[str, Tensor]:
    """Return the tables that AdaShare's program has pickled; nothing but tensors in a dict is unpickled.

    Raises:
        UserError: if the file is missing, damaged or holds anything else.
    """
    try:
        with path.open("rb") as file:
            loaded = _TensorsOnly(file).load()
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except Exception as error:  # whatever a damaged file makes the unpickler raise
        raise UserError(f"{path} is no policy of AdaShare ({type(error).__name__}: {str(error)[:80]})") from None
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise UserError(f"{path} is no policy of AdaShare: it holds no tables by task")
    return {str(key): value for key, value in loaded.items()}


# -- AutoMTL -----------------------------------------------------------------------------------------------------


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
            f"{path} is no checkpoint of AutoMTL: it has no net.N.basicOp and headsDict.TASK; it has {listed(state)}"
        )
    layers = [node for node in nodes if state[f"net.{node}.basicOp.weight"].dim() == 4]
    norms = [node for node in nodes if state[f"net.{node}.basicOp.weight"].dim() == 1]
    net, places, norm_places = _automtl_network([state[f"net.{node}.basicOp.weight"].shape for node in layers], path)
    base = {f"{name}.weight": state[f"net.{node}.basicOp.weight"] for name, node in zip(places, layers, strict=True)}
    if len(norms) != len(norm_places):
        raise UserError(f"{path} has {len(norms)} norms, the network has {len(norm_places)}")
    for name, node in zip(norm_places, norms, strict=True):
        base.update(_part(state, f"net.{node}.basicOp.", f"{name}."))
    base[f"{places[0]}.weight"] = base[f"{places[0]}.weight"].flip(1)  # images are BGR there
    _load(net, base, path)
    for name in names or ():
        if name not in inside:
            raise UserError(f"{path} has no task {name!r}; it has {', '.join(inside)}")
    tasks = {}
    order = {name: index for index, name in enumerate(places)}
    units = [name for name, module in net.named_modules() if isinstance(module, nn.Conv2d)]
    for task in names or inside:
        branches = {f"headsDict.{task}.fc{index + 1}.": f"branches.{index}." for index in range(4)}
        own = PublishedTask(_aspp(state, branches, path), policy=[])
        for name, node in zip(norm_places, norms, strict=True):
            own.norms.update(_part(state, f"net.{node}.taskOp.{task}.", f"{name}."))
        for name in units:
            node = layers[order[name]]
            choice = int(_needed(state, f"net.{node}.policy.{task}", path).argmax())
            if choice == 2 and any(key.startswith(f"net.{node}.dsOp.{task}.0.") for key in state):
                raise UserError(
                    f"{path}: task {task!r} replaces {name} by a convolution of its own, for which no network here has a place"
                )
            if choice == 1:
                mine = _needed(state, f"net.{node}.taskOp.{task}.weight", path)
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


def _part(state: Mapping[str, Tensor], prefix: str, ours: str) -> State:
    return {ours + key[len(prefix) :]: tensor for key, tensor in state.items() if key.startswith(prefix)}


def _needed(state: Mapping[str, Tensor], key: str, path: Path) -> Tensor:
    if key not in state:
        raise UserError(f"{path}: {key} is missing")
    return state[key]


# -- efficient computation sharing -------------------------------------------------------------------------------

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
        tasks[name] = PublishedTask(_convnext(_part(state, f"output_adapters.{heads[0]}.", ""), path))
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
    _load(net, {f"net.{key}": tensor for key, tensor in base.items()}, paths[0])
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
        raise UserError(f"{path} is no checkpoint of efficient computation sharing: it has {listed(state)}")
    before = {}
    for key, parts in (loaded.get("depth_params") or {}).items() if isinstance(loaded, Mapping) else ():
        if not isinstance(parts, (list, tuple)) or not parts or not isinstance(parts[0], Tensor):
            raise UserError(f"{path}: depth_params of {key} are no tensors")
        before[str(key).removeprefix("module.")] = parts[0].detach()
    return state, before


def _convnext(own: State, path: Path) -> ConvNeXtHead:
    """Return the head with these tensors; there a token's outputs are ordered by place and channel, here by channel and place."""
    kinds = {"dwconv": "conv_dw", "norm": "norm", "pwconv1": "mlp.fc1", "pwconv2": "mlp.fc2"}
    if "proj_dec.weight" not in own or "final_layer.weight" not in own:
        raise UserError(
            f"{path}: the head is no ConvNeXt head, the only kind that the program's scripts use; it has {listed(own)}"
        )
    width, features = own["proj_dec.weight"].shape
    depth = len({key.split(".")[1] for key in own if key.startswith("blocks.")})
    head = ConvNeXtHead(features, len(own["final_layer.weight"]), width, depth)
    turned = {
        "project.weight": own["proj_dec.weight"].unflatten(0, (16, -1)).transpose(0, 1).flatten(0, 1)[..., None, None],
        "project.bias": own["proj_dec.bias"].unflatten(0, (16, -1)).transpose(0, 1).flatten(),
        **_part(own, "final_layer.", "answer."),
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
