"""Checkpoints of AdaShare and DynaShare."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from taps.errors import UserError
from taps.networks.dense_backbones import create_dense_backbone
from taps.networks.published.result import Published, PublishedTask, State, aspp, check_known, load
from taps.storage.state_dict import listed, read_state_dict

#: larger than the random logits with which policies may start
_UNLEARNED = 0.01


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
        raise UserError(f"{path} is not a checkpoint of {program}: it has no backbone.blocks; it has {listed(state)}")
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
        raise UserError(f"{path} has {'' if gated else 'no '}per-image gates; say --from {_other(program)}")
    tensors, left = _backbone(state)
    depths = [1 + max(int(key.split(".")[1]) for key in tensors if key.startswith(f"layer{s}.")) for s in (1, 2, 3, 4)]
    model = {(2, 2, 2, 2): "resnet18", (3, 4, 6, 3): "resnet34"}.get(tuple(depths))
    if model is None:
        raise UserError(f"{path} has stages of {depths} blocks; import takes ResNet-18 and -34")
    widths = [len(tensors[f"layer{stage}.0.conv1.weight"]) for stage in (1, 2, 3, 4)]
    net = create_dense_backbone(model, channels=None if widths == [64, 128, 256, 512] else widths)
    tensors["conv1.weight"] = tensors["conv1.weight"].flip(1)
    load(net, tensors, path)
    count = len({key.split("_")[0] for key in left if re.match(r"task\d+_fc1_c0\.", key)})
    if not count:
        raise UserError(f"{path} has no ASPP head (task1_fc1_c0); it has {listed(left)}")
    check_known(left, r"task\d+_(logits$|fc1_c[0-3]\.)", path)
    names = _task_names(names, count, path)
    blocks = sum(depths)
    if gated and rates is None:
        raise UserError(f"{path} does not say which blocks have per-image gates: give its --target_rates")
    if rates is not None and len(rates) not in (1, blocks):
        raise UserError(f"--target_rates has {len(rates)} values for {blocks} blocks")
    runs = _policies(path, policy, left, count, blocks)
    tasks = {}
    for index, name in enumerate(names, start=1):
        branches = {f"task{index}_fc1_c{branch}.": f"branches.{branch}." for branch in range(4)}
        tasks[name] = PublishedTask(aspp(left, branches, path), policy=[(run, 0.0) for run in runs[index - 1]])
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


def _task_names(names: Sequence[str] | None, count: int, path: Path) -> list[str]:
    if names is not None and len(names) != count:
        raise UserError(f"{path} has {count} tasks, --tasks names {len(names)}")
    return list(names) if names is not None else [f"task{index}" for index in range(1, count + 1)]


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
    if all(one is not None and (bool((one == one[0]).all()) or float(one.abs().max()) < _UNLEARNED) for one in logits):
        raise UserError(
            f"{path} holds no policy (its logits are as at the start): it was trained under one that lies beside it, "
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
    """Unpickles dicts of tensors, and calls nothing else."""

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
        raise UserError(f"{path} is not a policy of AdaShare ({type(error).__name__}: {str(error)[:80]})") from None
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise UserError(f"{path} is not a policy of AdaShare: it holds no tables by task")
    return {str(key): value for key, value in loaded.items()}
