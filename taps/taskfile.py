"""Task files: ``task.safetensors`` and ``task.json`` are all that has to be shipped to use a task.

Tensors of ``task.safetensors``:

- ``delta/<unit>/<parameter>``: the delta of a unit whose gate is open;
- ``gate/<name>``: the gates' tensors of that name (for TAPS ``score``), all units in network order, concatenated;
- ``norm/<name>``: the task's norms' tensors of that name (``weight``, ``bias``, ``running_mean``, …), concatenated in
  the order that ``task.json`` lists the norms;
- ``head/<name>``: the head.

Few large tensors instead of many small ones keep the header small: the file is as long as what it holds.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from taps.cost import accounting, norm_tensors
from taps.errors import UserError
from taps.files import read_json, read_tensors, write_json, write_tensors

if TYPE_CHECKING:
    from taps.model import TaskModel

FORMAT = 1


def fingerprint(state: dict[str, Tensor]) -> str:
    """SHA-256 over tensors in order of their names: name, type, shape and bytes of each."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save(model: TaskModel, task: str, folder: Path, about: dict) -> Path:
    """Write one task; see :meth:`taps.model.TaskModel.save_task`."""
    tensors: dict[str, Tensor] = {}
    for unit in model.units:
        if task in unit.deltas and unit.gates[task].decide().uses_delta:
            for name in unit.parameter_names:
                tensors[f"delta/{unit.name}/{name}"] = unit.deltas[task][name]
    tensors.update(_pack("gate", [unit.gates[task].state_dict() for unit in model.units]))
    norms = [norm for norm in model.task_norms if norm.own(task) is not None]
    tensors.update(_pack("norm", [norm_tensors(norm.own(task)) for norm in norms]))
    head = model.heads[task]
    tensors.update((f"head/{name}", tensor) for name, tensor in head.state_dict().items())
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UserError(f"task {task!r} is not saved: {name} holds values that are not finite")
    write_tensors(folder / "task.safetensors", tensors)
    linear = (
        {"in_features": head.in_features, "out_features": head.out_features, "bias": head.bias is not None}
        if (type(head) is nn.Linear)
        else None
    )
    write_json(
        folder / "task.json",
        {
            "format": FORMAT,
            "task": task,
            "method": model.method,
            "options": model.options,
            "norm": model.norm,
            "layers": model.layers,
            "base": {
                "name": model.base_name,
                "fingerprint": model.fingerprint(),
                "parameters": model.base_parameters,
            },
            "head": {"type": type(head).__name__, "linear": linear},
            "bytes": (folder / "task.safetensors").stat().st_size,
            "accounting": accounting(model, task),
            "norms": [norm.name for norm in norms],
            "policy": model.policies.get(task),
            "units": model.report(task),
            **about,
        },
    )
    return folder


def _pack(prefix: str, states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    columns: dict[str, list[Tensor]] = {}
    for state in states:
        for name, tensor in state.items():
            columns.setdefault(f"{prefix}/{name}", []).append(tensor.flatten())
    return {name: torch.cat(parts) for name, parts in columns.items()}


def _unpack(prefix: str, tensors: dict[str, Tensor], states: list[dict[str, Tensor]], path: Path) -> None:
    """Fill the tensors of ``states`` from their packed columns, which are taken out of ``tensors``."""
    columns: dict[str, list[Tensor]] = {}
    for state in states:
        for name, tensor in state.items():
            columns.setdefault(f"{prefix}/{name}", []).append(tensor)
    for name, parts in columns.items():
        packed = tensors.pop(name, None)
        size = sum(part.numel() for part in parts)
        if packed is None or packed.numel() != size:
            raise UserError(
                f"{path}: {name} should hold {size} values, it holds {0 if packed is None else packed.numel()}"
            )
        for part, values in zip(parts, packed.split([part.numel() for part in parts]), strict=True):
            part.copy_(values.view_as(part))


def read_description(folder: Path) -> dict:
    """The contents of ``folder/task.json``, checked for format and completeness.

    Raises:
        UserError: if it is missing, damaged or of another format version.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder with a task.json and a task.safetensors")
    path = folder / "task.json"
    description = read_json(path)
    if description.get("format") != FORMAT:
        raise UserError(f"{path} has format version {description.get('format')!r}; this library reads version {FORMAT}")
    for key in ("task", "method", "options", "norm", "base", "head", "norms", "units", "accounting", "bytes"):
        if key not in description:
            raise UserError(f"{path} is damaged: it lacks the entry {key!r}")
    return description


def load(model: TaskModel, folder: Path, task: str, head: nn.Module | None, trainable: bool) -> str:
    """Read one task; see :meth:`taps.model.TaskModel.load_task`."""
    description = read_description(folder)
    path = folder / "task.safetensors"
    model._check_new(task)
    check_fits(model, description, folder / "task.json")
    tensors = read_tensors(path)
    if path.stat().st_size != description["bytes"]:
        raise UserError(
            f"{path} has {path.stat().st_size} bytes, task.json says {description['bytes']}: the two do not belong together"
        )
    for (
        key,
        tensor,
    ) in (
        tensors.items()
    ):  # not the deltas: they were checked when they were written, and are read from disk when first used
        if not key.startswith("delta/") and tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UserError(f"{path}: {key} holds values that are not finite")
    if head is None:
        linear = description["head"]["linear"]
        if linear is None:
            raise UserError(
                f"{folder}: the head is a {description['head']['type']}; give load_task a head= of its shape"
            )
        head = nn.Linear(**linear)
    try:
        _fill(model, task, head, description, tensors, path, trainable)
    except BaseException:
        model.forget(task)
        raise
    return task


def check_fits(model: TaskModel, description: dict, path: Path) -> None:
    """Raise a ``UserError`` unless the task was made for the model's base, method, norm policy and options."""
    stored, own = description["base"]["fingerprint"], model.fingerprint()
    if stored != own:
        raise UserError(
            f"{path} was made for another base: {description['base']['name']} with fingerprint {stored[:16]}…, "
            f"this one is {model.base_name} with {own[:16]}…"
        )
    for key, value in (("method", model.method), ("norm", model.norm), ("layers", model.layers)):
        if description.get(key) != value:
            raise UserError(
                f"{path} was made with {key}={description.get(key)!r}, this model has {key}={value!r}: "
                f"adapt the base with {key}={description.get(key)!r}"
            )
    if description["options"] != json.loads(json.dumps(model.options)):
        raise UserError(f"{path} was made with options {description['options']}, this model has {model.options}")


@torch.no_grad()
def _fill(
    model: TaskModel, task: str, head: nn.Module, description: dict, tensors: dict, path: Path, trainable: bool
) -> None:
    stored_norms = set(description["norms"])
    like = next(model.backbone.parameters())
    gates = model.make_gates(description.get("policy"))
    for unit, unit_description, gate in zip(model.units, model._descriptions, gates, strict=True):
        used = any(key.startswith(f"delta/{unit.name}/") for key in tensors)
        values = {}
        for parameter, shape in unit_description.shapes.items() if used else ():
            key = f"delta/{unit.name}/{parameter}"
            value = values[parameter] = tensors.pop(key, None)
            if value is None or value.shape != shape:
                found = "missing" if value is None else f"of shape {tuple(value.shape)}"
                raise UserError(f"{path}: {key} is {found}, the base needs {tuple(shape)}")
        unit.add_task(task, gate, with_deltas=used or (trainable and gate.needs_delta), values=values or None)
    if description.get("policy") is not None:
        model.policies[task] = tuple(description["policy"])
    norms = []
    for norm in model.task_norms:
        if norm.name in stored_norms or trainable:
            norm.add_task(task, always=norm.name in stored_norms)
        if norm.name in stored_norms:
            norms.append(norm)
    model.heads[task] = head.to(like.device, like.dtype).train(model.training)
    _unpack("gate", tensors, [unit.gates[task].state_dict() for unit in model.units], path)
    _unpack("norm", tensors, [norm_tensors(norm.norms[task]) for norm in norms], path)
    for unit in model.units:
        if task not in unit.deltas and unit.gates[task].decide().uses_delta:
            raise UserError(f"{path} lacks the delta of {unit.name}, whose gate is open")
    for key, target in head.state_dict().items():
        value = tensors.pop(f"head/{key}", None)
        if value is None or value.shape != target.shape:
            raise UserError(f"{path}: head/{key} is missing or of another shape than {tuple(target.shape)}")
        target.copy_(value)
    if tensors:
        raise UserError(f"{path} holds tensors this base has no place for: {', '.join(sorted(tensors)[:5])}")
    if not trainable:
        for module in model._task_modules(task):
            module.requires_grad_(False)
