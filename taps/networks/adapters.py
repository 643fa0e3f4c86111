"""Other programs' tuned networks as changes of a base: what each weight gained, which norms and which head it has."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from taps.errors import UserError
from taps.networks.weights import without_prefix
from taps.storage.files import read_json, read_tensors
from taps.storage.state_dict import listed, read_state_dict, without_counters

State = Mapping[str, Tensor]
#: ways of PEFT to start LoRA's factors that leave the base as it is
_STARTS = ("gaussian", "eva", "orthogonal")


@dataclass
class Changes:
    """What distinguishes a tuned network from its base.

    Attributes:
        deltas: W' − W by the parameter's name, for those that differ.
        values: tensors that replace the base's, by name: those of norms.
        head: ``weight`` and ``bias`` of a linear classifier; empty if there is none.
        scores: scores of TAPS by layer; empty: gates are open where a delta differs from zero.
    """

    deltas: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)
    head: dict[str, Tensor] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)


def split_head(state: State, classifiers: Collection[str], path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the tensors of the network and those of its classifier, the first of ``classifiers`` that is there.

    Raises:
        UserError: if the classifier is not one linear layer.
    """
    prefix, head = "", {}
    for prefix in classifiers:
        head = {key[len(prefix) + 1 :]: tensor for key, tensor in state.items() if key.startswith(f"{prefix}.")}
        if head:
            break
    if head and (not set(head) <= {"weight", "bias"} or "weight" not in head or head["weight"].dim() != 2):
        raise UserError(f"{path}: the classifier {prefix} is not a single linear layer ({listed(head)})")
    rest = {key: tensor for key, tensor in state.items() if not head or not key.startswith(f"{prefix}.")}
    return rest, head


def state_dict_changes(path: Path, base: State, norms: Collection[str], classifiers: Collection[str]) -> Changes:
    """Return the changes of a network that was fine-tuned as a whole.

    Args:
        path: its state dict, with the base's names, perhaps below a prefix.
        base: the base's tensors.
        norms: names of the base's norms.
        classifiers: names that a classifier may have.

    Raises:
        UserError: if names or shapes are not the base's.
    """
    whole = read_state_dict(path)
    inner = without_prefix(whole, dict(base), path.name)
    state, head = split_head(inner, classifiers, path)
    head = head or _head_beside(whole, inner)
    state, held = without_counters(state), without_counters(base)
    wrong = [key for key in held if key not in state or state[key].shape != held[key].shape]
    more = [key for key in state if key not in base]
    if wrong or more:
        raise UserError(
            f"{path} is not a fine-tuned version of this network: {len(wrong)} tensors are missing or of another shape "
            f"({listed(wrong)}), {len(more)} have no place ({listed(more)})"
        )
    return _differences(state, base, norms, head)


def _head_beside(whole: State, inner: State) -> dict[str, Tensor]:
    """Return the classifier that lies beside the network in a state dict, if it is a single linear layer there."""
    network = {id(tensor) for tensor in inner.values()}
    others = {key: tensor for key, tensor in whole.items() if id(tensor) not in network}
    layers = [key.removesuffix(".weight") for key, one in others.items() if key.endswith(".weight") and one.dim() == 2]
    if len(layers) != 1 or {key.rpartition(".")[0] for key in others} != set(layers):
        return {}
    return {key.rpartition(".")[2]: tensor for key, tensor in others.items()}


def _differences(state: State, base: State, norms: Collection[str], head: dict[str, Tensor]) -> Changes:
    """Return the changes of tensors that replace the base's: those of norms as they are, others as deltas where they differ."""
    changes = Changes(head=head)
    for key, tensor in state.items():
        if any(key.startswith(f"{norm}.") for norm in norms):
            changes.values[key] = tensor
        elif not key.endswith("num_batches_tracked") and not torch.equal(
            tensor, base[key].to(tensor.dtype)
        ):  # may be rounded
            changes.deltas[key] = (tensor.double() - base[key].double()).to(base[key].dtype)
    return changes


def peft_changes(folder: Path, base: State, norms: Collection[str], classifiers: Collection[str]) -> Changes:
    """Return the changes of a LoRA adapter of PEFT (linear layers and convolutions), δ = scale · B A.

    Modules that were trained as a whole (``modules_to_save``) are the classifier, norms, or further changes.

    Raises:
        UserError: for an adapter of another kind, with options that are more than a delta, or of another network.
    """
    config_path = folder / "adapter_config.json"
    if not config_path.is_file():
        raise UserError(f"{folder} is not the folder of a PEFT adapter: it has no adapter_config.json")
    config = read_json(config_path)
    if config.get("peft_type") != "LORA":
        raise UserError(
            f"{config_path}: adapters of type {config.get('peft_type')} are not changes of weights; only LORA is"
        )
    for option in ("use_dora", "lora_bias", "layer_replication", "megatron_config", "alora_invocation_tokens"):
        if config.get(option):
            raise UserError(
                f"{config_path}: {option} makes the adapter more than a delta; merge it with PEFT and use state_dict"
            )
    if config.get("bias", "none") != "none":
        raise UserError(
            f"{config_path}: bias={config['bias']!r} is not stored with the factors; merge it with PEFT and use state_dict"
        )
    start = config.get("init_lora_weights", True)
    if not isinstance(start, bool) and start not in (None, *_STARTS):
        raise UserError(
            f"{config_path}: init_lora_weights={start!r} changes the base's weights too; merge it with PEFT and use state_dict"
        )
    path = folder / "adapter_model.safetensors"
    state = read_tensors(path) if path.is_file() else read_state_dict(folder / "adapter_model.bin")
    state = {key.removeprefix("base_model.model."): tensor for key, tensor in state.items()}
    rest, head = split_head({k: t for k, t in state.items() if ".lora_" not in k}, classifiers, folder)
    for key, tensor in rest.items():
        if key not in base or base[key].shape != tensor.shape:
            raise UserError(f"{folder}: {key} {tuple(tensor.shape)} has no place in this network")
    changes = _differences(rest, base, norms, head)
    downs = {
        key.removesuffix(".lora_A.weight"): tensor for key, tensor in state.items() if key.endswith(".lora_A.weight")
    }
    ups = {
        key.removesuffix(".lora_B.weight"): tensor for key, tensor in state.items() if key.endswith(".lora_B.weight")
    }
    factors = {key for key in state if ".lora_" in key}
    if not downs or downs.keys() != ups.keys() or len(factors) != 2 * len(downs):
        raise UserError(f"{folder}: {listed(sorted(factors))} are not pairs of lora_A.weight and lora_B.weight")
    for name, down in downs.items():
        weight, rank = f"{name}.weight", len(down)
        if weight not in base:
            raise UserError(f"{folder}: {name} is not a layer of this network; its layers are e.g. {listed(base)}")
        alpha = _by_pattern(config.get("alpha_pattern"), name, config.get("lora_alpha", 8))
        scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
        if ups[name].shape[1] != rank:
            raise UserError(f"{folder}: {name} is a grouped convolution, whose factors PEFT cannot merge either")
        product = ups[name].double().flatten(1) @ down.double().flatten(1)
        if config.get("fan_in_fan_out"):
            product = product.T
        if product.numel() != base[weight].numel():
            raise UserError(
                f"{folder}: the factors of {name} give {tuple(product.shape)}, the layer has {tuple(base[weight].shape)}"
            )
        changes.deltas[weight] = (scale * product).reshape(base[weight].shape).to(base[weight].dtype)
    return changes


def _by_pattern(patterns: Mapping | None, name: str, otherwise: float) -> float:
    for pattern, value in (patterns or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", name):
            return float(value)
    return float(otherwise)


def taps_checkpoint(path: Path) -> tuple[dict[str, Tensor], Changes]:
    """Return the base and the changes in a checkpoint of the published program of TAPS.

    Each convolution there has its frozen ``weight``, its ``residual`` and its score, ``indicator``. The norms of the base are the
    task's, since the file has no others; tasks have their own.

    Raises:
        UserError: if the file is another one.
    """
    state = read_state_dict(path)
    state = {key.removeprefix("module."): tensor for key, tensor in state.items()}
    layers = [key.removesuffix(".indicator") for key in state if key.endswith(".indicator")]
    lacking = [f"{name}.{part}" for name in layers for part in ("weight", "residual") if f"{name}.{part}" not in state]
    if not layers or lacking:
        raise UserError(
            f"{path} is not a checkpoint of TAPS: it has {len(layers)} layers with an indicator and lacks {listed(lacking)}; "
            f"its tensors are {listed(state)}"
        )
    rest, head = split_head(state, ("fc",), path)
    own = {key: tensor for key, tensor in rest.items() if not key.endswith((".residual", ".indicator"))}
    changes = Changes(head=head)
    changes.values = {key: tensor for key, tensor in own.items() if key.removesuffix(".weight") not in layers}
    for name in layers:
        sizes = [state[f"{name}.{part}"].shape for part in ("weight", "residual")]
        if sizes[0] != sizes[1] or state[f"{name}.indicator"].numel() != 1:
            raise UserError(
                f"{path} is damaged: {name} has a residual of shape {tuple(sizes[1])} for weights of {tuple(sizes[0])}"
            )
        changes.scores[name] = float(state[f"{name}.indicator"])
        changes.deltas[f"{name}.weight"] = state[f"{name}.residual"]
    return own, changes
