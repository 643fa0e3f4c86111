"""Task files: ``task.safetensors`` and ``task.json``, which are all that is needed to use a task on its base.

Tensors of ``task.safetensors``:

- ``delta/<unit>/<parameter>``: the delta of a unit whose gate is open; if it is sparse or compressed, its encoded bytes
  (:mod:`taps.storage.encoding`, ``encodings`` in ``task.json``);
- ``gate/<name>``: the gates' tensors of that name (for TAPS ``score``), concatenated over all units in network order;
- ``norm/<name>``: the task's norms' tensors of that name (``weight``, ``bias``, ``running_mean``, …), concatenated in
  the order of the norms in ``task.json``;
- ``head/<name>``: the head.

A compact file (``compact`` in ``task.json``) holds one tensor, ``packed``: these tensors with a deflated header
(:mod:`taps.storage.packing`). Its norms and head are float16 or encoded (:mod:`taps.storage.norms_and_head`). Its format is 2;
compact files of format 1, which versions before 0.14 wrote, hold such tensors without packing.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from taps.core.accounting import accounting
from taps.core.find import Unit
from taps.core.gate import ConstantGate, Gate
from taps.core.method import Method
from taps.core.network import Network, Origin
from taps.core.norm import TaskNorm
from taps.core.unit import GatedUnit
from taps.errors import UserError, first_line
from taps.storage.encoding import ENCODINGS, EncodedDelta, encode, encode_as, is_sparse
from taps.storage.files import (
    atomic_write_pair,
    json_text,
    pending_path,
    plain_bytes,
    put_tensors,
    read_json,
    read_tensors,
    sha256,
)
from taps.storage.norms_and_head import decoded, fill_columns, small_tensors, stored_norm
from taps.storage.packing import pack, unpack

FORMATS = (1, 2)
#: ``metric`` of a task whose images have several labels: each has a probability of its own
AVERAGE_PRECISION = "mean average precision"


def common_metric(descriptions: Iterable[Mapping]) -> str:
    """Return what the accuracies of these tasks are: ``accuracy``, ``mAP``, or ``score`` if there are both."""
    names = {"mAP" if own.get("metric") == AVERAGE_PRECISION else "accuracy" for own in descriptions}
    return names.pop() if len(names) == 1 else "score"


TENSORS = "task.safetensors"
#: of heads that a description alone makes; ten times that of any head here
_LARGEST_HEAD = 500_000_000
PACKED = "packed"  # the only tensor of a compact file
#: entries of task.json that follow from the model; all others are about the task
STRUCTURE = (
    "format", "task", "method", "options", "norm", "layers", "base", "head", "bytes", "accounting", "norms", "policy",
    "units", "delta_bytes", "max_error", "encodings", "compact", "checksums",
)  # fmt: skip
#: files whose checksum this process has compared, so that a library that loads a task again does not read it whole
_VERIFIED: set[tuple[int, int, int, int, str]] = set()
#: returns the method of a name, or ``None``
FindMethod = Callable[[str], Method | None]
#: returns the head that a description (``type`` and ``arguments``) tells how to make, on the meta device, or ``None``
MakeHead = Callable[[Mapping], nn.Module | None]


def plain_entries(about: Mapping[str, object]) -> dict:
    """Return entries for ``task.json`` as JSON holds them: tuples as lists, scalars of NumPy and torch as numbers.

    Raises:
        UserError: for an entry that follows from the model, or a value that JSON cannot hold.
    """
    taken = sorted(about.keys() & set(STRUCTURE))
    if taken:
        raise UserError(f"task.json has an entry {taken[0]!r} of its own; choose another name")
    plain = {}
    for key, value in about.items():
        try:
            plain[key] = json.loads(json.dumps(_with_names(value), default=_as_number, allow_nan=False))
        except (TypeError, ValueError, AttributeError, RuntimeError) as error:
            number = " (nan or infinity)" if "JSON compliant" in str(error) else ""
            raise UserError(
                f"the entry {key!r} of task.json holds a {type(value).__name__}, which JSON cannot hold{number}"
            ) from None
    return plain


def _as_number(scalar: Any) -> object:
    """A scalar of NumPy or torch as JSON holds it."""
    number = scalar.item()
    if isinstance(number, float) and not math.isfinite(number):
        raise ValueError("not JSON compliant")
    return number


def _with_names(value: object) -> object:
    """The value, if all keys of dicts in it are text; JSON would turn others into text and lose some."""
    if isinstance(value, Mapping):
        if any(not isinstance(key, str) for key in value):
            raise TypeError("keys must be strings")
        return {key: _with_names(inner) for key, inner in value.items()}
    return [_with_names(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def _check_kind(value: object, kind, what: str) -> None:
    try:
        _check_entry(value, kind, "", Path())
    except UserError:
        raise UserError(f"{what} is {str(value)[:40]!r}, which no loader accepts") from None


def origin(model: Network, task: str) -> Origin:
    """Return the method that a task was trained with."""
    units = tuple(unit.name for unit in model.units)
    own = Origin(model.method.name, model.options, model.norm, model.layers, units)
    return model.origins.get(task, own)


def save(
    model: Network,
    task: str,
    folder: Path,
    about: dict,
    max_error: float | None = None,
    compact: bool = False,
    base: dict | None = None,
) -> Path:
    """Write one task; see :meth:`taps.task_model.TaskModel.save_task`."""
    if max_error is not None and not (isinstance(max_error, (int, float)) and 0 <= max_error < 1):
        raise UserError(f"max_error must lie in 0..1, below 1, not {max_error!r}")
    about = plain_entries(about)
    for key in about.keys() & _OPTIONAL.keys():
        if about[key] is not None:
            _check_kind(about[key], _OPTIONAL[key], f"the entry {key!r} of task.json")
    made = origin(model, task)
    units = [unit for unit in model.units if unit.name in made.units]
    norms = active_norms(model, task)
    tensors, encodings = contents(model, task, compact)
    head = model.heads[task]
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UserError(f"task {task!r} is not saved: {name} holds values that are not finite")
    if max_error is not None:
        encodings.update(_encode(tensors, encodings, task, max_error))
    linear = (
        {"in_features": head.in_features, "out_features": head.out_features, "bias": head.bias is not None}
        if (type(head) is nn.Linear)
        else None
    )
    description = {
        "format": 2 if compact else 1,
        "task": task,
        "method": made.method,
        "options": made.options,
        "norm": made.norm,
        "layers": made.layers,
        "base": {
            "name": model.base_name,
            "fingerprint": model.fingerprint(),
            "parameters": model.base_parameters,
            **(base or {}),
        },
        "head": {"type": type(head).__name__, "linear": linear, **_arguments(head)},
        "bytes": 0,
        "accounting": accounting(model, task),
        "norms": [norm.name for norm in norms],
        "policy": model.policies.get(task),
        "delta_bytes": {unit.name: _delta_bytes(tensors, unit) for unit in units if _delta_bytes(tensors, unit)},
        "units": [row for row in model.report(task) if row["name"] in made.units],
        **({"max_error": max_error} if max_error is not None else {}),
        **({"encodings": encodings} if encodings else {}),
        **({"compact": True} if compact else {}),
        **about,
    }
    with atomic_write_pair(folder / TENSORS, folder / "task.json") as (tensors_file, json_file):
        put_tensors(tensors_file, {PACKED: pack(tensors)} if compact else tensors)
        description["bytes"] = tensors_file.stat().st_size
        description["checksums"] = {
            "tensors": sha256(tensors_file),
            "description": _checksum(description),
            "metric": _checksum_of_metric(description),
        }
        json_file.write_text(json_text(description), encoding="utf-8", errors="backslashreplace")
    return folder


def _arguments(head: nn.Module) -> dict:
    """What a head of this library was made with, for :data:`MakeHead`; nothing for others."""
    made_with = getattr(head, "taps_arguments", None)
    return {} if made_with is None else {"arguments": dict(made_with)}


def contents(model: Network, task: str, compact: bool) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a task's file, and the names of their encodings by key."""
    tensors: dict[str, Tensor] = {}
    encodings: dict[str, str] = {}
    units = [unit for unit in model.units if unit.name in origin(model, task).units]
    for unit in units:
        if task in unit.deltas and unit.gates[task].decide().uses_delta:
            deltas = unit.deltas[task]
            for name in unit.parameter_names:
                key, encoded = f"delta/{unit.name}/{name}", deltas.encoded(name)
                if encoded is None:
                    used = deltas.used(name)  # in the middle of training it may be rounded
                    if unit.gates[task].is_sparse and used.dtype == torch.float32 and is_sparse(used):
                        encoded = encode_as("sparse32", used)  # exact
                tensors[key] = used if encoded is None else encoded.data
                encodings.update({} if encoded is None else {key: encoded.name})
    small, small_encodings = small_tensors(model, task, active_norms(model, task), compact, units)
    return {**tensors, **small}, {**encodings, **small_encodings}


def active_norms(model: Network, task: str) -> list[TaskNorm]:
    """Return the norms of which the task uses its own copy."""
    return [norm for norm in model.task_norms if norm.active(task) is not None]


def packed_size(tensors: Mapping[str, Tensor]) -> int:
    """Return the size in bytes of a compact file with these tensors."""
    return len(plain_bytes({PACKED: pack(tensors)}))


def _checksum(description: Mapping[str, object]) -> str:
    """Return the SHA-256 of the entries on which outputs depend; names of classes and the like may be edited by hand."""
    known = {
        key: description[key] for key in (*STRUCTURE, "preprocessing") if key in description and key != "checksums"
    }
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def _checksum_of_metric(description: Mapping[str, object]) -> str:
    """Return the SHA-256 of the metric, by which classes exclude each other or not; files before 0.18 lack it."""
    return hashlib.sha256(json.dumps(description.get("metric")).encode()).hexdigest()


def tensors_path(folder: Path, description: Mapping) -> Path:
    """Return the file with a task's tensors: the one that belongs to its description, should a crash have left two."""
    path = folder / TENSORS
    left = pending_path(path)
    try:
        known = (description.get("checksums") or {}).get("tensors")
        return left if known is not None and left.is_file() and sha256(left) == known else path
    except FileNotFoundError:  # another process has just finished saving
        return path


def _delta_bytes(tensors: dict[str, Tensor], unit: GatedUnit) -> int:
    """Return the size of a unit's stored deltas."""
    own = [tensors.get(f"delta/{unit.name}/{name}") for name in unit.parameter_names]
    return sum(tensor.nbytes for tensor in own if tensor is not None)


def _encode(tensors: dict[str, Tensor], held: dict[str, str], task: str, max_error: float) -> dict[str, str]:
    """Replace unencoded deltas by the bytes of their smallest encoding; return encodings by key, and warn of exact deltas."""
    encodings, exact = {}, []
    for key in [key for key in tensors if key.startswith("delta/") and key not in held]:
        found = encode(tensors[key].detach().cpu(), max_error)
        if found is None:
            exact.append(key.removeprefix("delta/"))
            continue
        encodings[key], tensors[key] = found.name, found.data
    if exact:
        warnings.warn(
            f"task {task!r}: {len(exact)} deltas are stored exactly, no smaller encoding is within max_error {max_error:g}, "
            f"e.g. {exact[0]}",
            stacklevel=4,
        )
    return encodings


def read_description(folder: Path) -> dict:
    """Return the contents of ``folder/task.json``, checked for format and completeness.

    Raises:
        UserError: if it is missing, damaged or of another format version.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder with a task.json and a task.safetensors")
    path = folder / "task.json"
    description = read_json(path)
    if description.get("format") not in FORMATS:
        raise UserError(
            f"{path} has format version {description.get('format')!r}; this version reads formats 1 and 2; upgrade taps-vision"
        )
    for key, kind in _ENTRIES.items():
        if key not in description:
            raise UserError(f"{path} is damaged: it lacks the entry {key!r}")
        _check_entry(description[key], kind, key, path)
    for key, kind in _OPTIONAL.items():
        if description.get(key) is not None:
            _check_entry(description[key], kind, key, path)
    return description


#: entries of task.json: a type, a dict of entries, or a list with the one of its members
_ENTRIES = {
    "task": str,
    "method": str,
    "options": dict,
    "norm": str,
    "base": {"name": str, "fingerprint": str, "parameters": int},
    "head": {"type": str},
    "bytes": int,
    "accounting": {"units": int, "tuned_units": int, "tuned_layers": float, "parameters": int, "base_parameters": int},
    "norms": [str],
    "units": [{"name": str, "kind": str, "parameters": int, "run": float, "specific": float}],
}
_OPTIONAL = {
    "layers": str,
    "policy": list,
    "encodings": dict,
    "classes": [str],
    "accuracy": float,
    "metric": str,
    "preprocessing": dict,
    "delta_bytes": dict,
    "provenance": dict,
    "checksums": {"tensors": str, "description": str},
}


def _check_entry(value: object, kind, key: str, path: Path) -> None:
    if isinstance(kind, dict):
        _check_entry(value, dict, key, path)
        for inner, inner_kind in kind.items():
            _check_entry(value.get(inner), inner_kind, f"{key}.{inner}", path)  # type: ignore[attr-defined]
    elif isinstance(kind, list):
        _check_entry(value, list, key, path)
        for one in value:  # type: ignore[attr-defined]
            _check_entry(one, kind[0], f"an entry of {key}", path)
    elif not isinstance(value, (int, float) if kind is float else kind) or (
        isinstance(value, bool) and kind is not bool
    ):
        raise UserError(f"{path} is damaged: {key} is {str(value)[:40]!r}")


def read_stored(folder: Path) -> tuple[dict, dict[str, Tensor], Path]:
    """Return a task's description, its tensors and the file that holds them, all of one save.

    Raises:
        UserError: if either is missing or cannot be read, or they do not belong together.
    """
    for attempt in range(3):
        description = read_description(folder)
        try:
            path = tensors_path(folder, description)
            tensors = read_tensors(path)
            size = path.stat().st_size
            if size != description["bytes"]:
                raise UserError(
                    f"{path} has {size} bytes, task.json says {description['bytes']}: the two do not belong together"
                )
            if attempt == 2 or read_description(folder) == description:  # else it was replaced meanwhile
                return description, _unpacked(tensors, description, path), path
        except (UserError, FileNotFoundError):
            if attempt == 2 or read_description(folder) == description:
                raise
    raise UserError(f"{folder} was replaced at every attempt to read it; try again when writing has ended")


def _unpacked(tensors: dict[str, Tensor], description: Mapping, path: Path) -> dict[str, Tensor]:
    if description["format"] == 1:
        return tensors
    packed = tensors.get(PACKED)
    if len(tensors) != 1 or packed is None or packed.dtype != torch.uint8:
        raise UserError(f"{path} does not hold the packed tensors of format version 2")
    try:
        return unpack(packed)
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from None


def read_head(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of a stored task's linear head, by name."""
    description, tensors, path = read_stored(folder)
    encodings, linear = description.get("encodings", {}), description["head"].get("linear") or {}
    shape = torch.Size([linear.get("out_features", 0), linear.get("in_features", 0)])
    head = {key: tensor for key, tensor in tensors.items() if key.startswith("head/")}
    for key in head.keys() & encodings.keys():
        head[key] = _decoded([], "", key, EncodedDelta(encodings[key], head[key]), shape, path)
    return {key.removeprefix("head/"): tensor for key, tensor in head.items()}


def _decoded(
    norms: Sequence[TaskNorm], task: str, key: str, encoded: EncodedDelta, shape: torch.Size | None, path: Path
) -> Tensor:
    try:
        return decoded(norms, task, key, encoded, shape)
    except (RuntimeError, ValueError, KeyError) as error:
        raise UserError(f"{path}: {key} is damaged: {first_line(error)}") from None


def _check_sums(description: Mapping, path: Path) -> None:
    """Raise a ``UserError`` if the tensors in ``path`` or the entries of ``task.json`` are not those that were saved.

    Comes after the checks that can say what is wrong. Files of versions before 0.12 have no checksums.
    """
    known = description.get("checksums") or {}
    if known:
        file = path.stat()
        seen = (file.st_dev, file.st_ino, file.st_mtime_ns, file.st_size, known["tensors"])
        if seen not in _VERIFIED and known["tensors"] != sha256(path):
            raise UserError(f"{path} is damaged: its checksum is not the one in task.json")
        _VERIFIED.add(seen)
    if known and known["description"] != _checksum(description):
        raise UserError(
            f"{path.parent / 'task.json'} is damaged, or an entry that affects outputs was edited; save the task again"
        )
    if known.get("metric", _checksum_of_metric(description)) != _checksum_of_metric(description):
        raise UserError(f"{path.parent / 'task.json'} is damaged, or its metric was edited; save the task again")


def load(
    model: Network,
    folder: Path,
    task: str,
    head: nn.Module | None,
    trainable: bool,
    find: FindMethod,
    make_head: MakeHead,
) -> dict:
    """Read one task and return its description; see :meth:`taps.task_model.TaskModel.load_task`."""
    model.check_new_task(task)
    description, tensors, path = read_stored(folder)
    check_fits(model, description, folder / "task.json", None if trainable else find)
    encodings = description.get("encodings", {})
    for key, name in encodings.items():
        if name not in ENCODINGS or key not in tensors or tensors[key].dtype != torch.uint8:
            raise UserError(f"{path}: {key} is stored as {name!r}, which this library or this file does not know")
    # Deltas are skipped: they were checked when written, and are read from disk on first use.
    for key, tensor in tensors.items():
        if not key.startswith("delta/") and tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UserError(f"{path}: {key} holds values that are not finite")
    # Before memory is taken for a head, of which a range code need not show the size.
    checksums = description.get("checksums") or {}
    if head is None and "head/weight" in encodings and checksums.get("description") != _checksum(description):
        raise UserError(f"{folder / 'task.json'} is damaged: its checksum is not that of its entries")
    if head is None:
        head = _linear(description, tensors, folder, path) or make_head(description["head"])
    if head is None:
        raise UserError(f"{folder}: the head is a {description['head']['type']}; give load_task a head= of its shape")
    if any(parameter.is_meta for parameter in head.parameters()):
        wrong = [
            key
            for key, value in head.state_dict().items()
            if f"head/{key}" not in encodings and tensors.get(f"head/{key}", torch.empty(0)).shape != value.shape
        ]
        if wrong:
            raise UserError(f"{path}: head/{wrong[0]} is missing or of another shape than task.json says")
        if sum(parameter.numel() for parameter in head.parameters()) > _LARGEST_HEAD:
            raise UserError(f"{folder / 'task.json'} describes a head of more than {_LARGEST_HEAD:,} parameters")
        head = head.to_empty(device="cpu")
    try:
        _fill(model, task, head, description, tensors, path, trainable, find(description["method"]) or model.method)
        _check_sums(description, path)
    except UserError:
        model.forget(task)
        raise
    except (TypeError, ValueError, KeyError, AttributeError) as error:  # an option or a policy of another type
        model.forget(task)
        raise UserError(f"{folder / 'task.json'} is damaged: {type(error).__name__}: {str(error)[:120]}") from None
    except BaseException:
        model.forget(task)
        raise
    return description


def _linear(description: Mapping, tensors: Mapping[str, Tensor], folder: Path, path: Path) -> nn.Linear | None:
    """Return a linear head of the described shape, or ``None`` if the head is another module."""
    linear = description["head"].get("linear")
    if linear is None:
        return None
    _check_entry(linear, {"in_features": int, "out_features": int, "bias": bool}, "head.linear", folder / "task.json")
    encoded, shape = "head/weight" in description.get("encodings", {}), (linear["out_features"], linear["in_features"])
    if not encoded and tensors.get("head/weight", torch.empty(0)).shape != shape:
        raise UserError(f"{path}: head/weight is missing or of another shape than task.json says")
    if min(shape) < 0 or math.prod(shape) > _LARGEST_HEAD:
        raise UserError(f"{folder / 'task.json'} is damaged: a head of {shape[1]} inputs and {shape[0]} outputs")
    return nn.Linear(linear["in_features"], linear["out_features"], linear["bias"])


def check_fits(model: Network, description: dict, path: Path, find: FindMethod | None = None) -> None:
    """Raise a ``UserError`` unless the task was made for the model's base, method, norm policy and options.

    With ``find``, a task of another method is accepted if the model has the units that its method gates; such a task can be run,
    though not trained.
    """
    stored, present = description["base"]["fingerprint"], model.fingerprint()
    if stored != present:
        types = {str(p.dtype).removeprefix("torch.") for p in model.backbone.parameters()} - {"float32"}
        hint = f"; a base in {', '.join(sorted(types))} is known if it is converted after adapt" if types else ""
        raise UserError(
            f"{path} was made for another base: {description['base']['name']} with fingerprint {stored[:16]}…, "
            f"this one is {model.base_name} with {present[:16]}…{hint}"
        )
    problem = _difference(model, description)
    if problem is None:
        return
    known = {unit.name: unit.shapes for unit in model.descriptions}
    missing = [row["name"] for row in description["units"] if row["name"] not in known]
    method = find(description["method"]) if find is not None else None
    if method is not None and not description["options"].keys() <= method.options.keys():
        raise UserError(
            f"{path} has options {description['options']}, which method {description['method']!r} does not have"
        )
    if method is None or description.get("policy") is not None or model.method.learns_policy or missing:
        raise UserError(
            f"{path} was made with {problem}: adapt the base as for that task, with method={description['method']!r}"
        )


def _difference(model: Network, description: dict) -> str | None:
    """Return how a task's method differs from the model's, or ``None``."""
    for key, value in (("method", model.method.name), ("norm", model.norm), ("layers", model.layers)):
        if description.get(key) != value:
            return f"{key}={description.get(key)!r}, this model has {key}={value!r}"
    made = {**model.method.options, **description["options"]}  # options newer than the file: defaults
    if json.loads(json.dumps(made)) != json.loads(json.dumps(model.options)):
        return f"options {description['options']}, this model has {model.options}"
    return None


@torch.no_grad()
def _fill(
    model: Network,
    task: str,
    head: nn.Module,
    description: dict,
    tensors: dict,
    path: Path,
    trainable: bool,
    method: Method,
) -> None:
    encodings = description.get("encodings", {})
    gates = _gates(model, task, description, method)
    for unit, about, gate in zip(model.units, model.descriptions, gates, strict=True):
        _fill_unit(model, task, unit, about, gate, tensors, encodings, path, trainable)
    if description.get("policy") is not None:
        model.policies[task] = tuple(map(tuple, description["policy"]))
    norms = _own_norms(model, task, set(description["norms"]), trainable)
    device = next(model.backbone.parameters()).device
    head = head.to(device, model.head_type(is_own=False)).train(model.training)
    by_name = {unit.name: unit for unit in model.units}
    gate_states = [by_name[row["name"]].gates[task].state_dict() for row in description["units"]]
    fill_columns("gate", tensors, gate_states, path)
    small = {key: EncodedDelta(name, tensors[key]) for key, name in encodings.items() if not key.startswith("delta/")}
    for key, one in small.items():
        shape = head.state_dict()[key[5:]].shape if key[5:] in head.state_dict() else None
        tensors[key] = _decoded(norms, task, key, one, shape, path)
    model.encoded[task] = small
    fill_columns("norm", tensors, [stored_norm(norm, task, description.get("compact", False)) for norm in norms], path)
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
        for module in (*model.task_modules(task), head):
            module.requires_grad_(False)
        if not model.train_base:
            model.settle(task)
    model.heads[task] = head  # last, so that no call begins that finds only parts of the task


def _gates(model: Network, task: str, description: dict, method: Method) -> Sequence[Gate]:
    """Return a gate for each unit; those of another method are noted with the task's origin."""
    if _difference(model, description) is None:
        return model.make_gates(description.get("policy"))
    options = {**method.options, **description["options"]}
    listed = [row["name"] for row in description["units"]]
    model.origins[task] = Origin(method.name, options, description["norm"], description.get("layers"), tuple(listed))
    return [
        method.gate(unit, **options) if unit.name in listed else ConstantGate(specific=0.0)
        for unit in model.descriptions
    ]


def _fill_unit(
    model: Network,
    task: str,
    unit: GatedUnit,
    about: Unit,
    gate: Gate,
    tensors: dict,
    encodings: Mapping[str, str],
    path: Path,
    trainable: bool,
) -> None:
    """Give a unit the task's gate and its deltas, which are taken out of ``tensors``."""
    used = any(key.startswith(f"delta/{unit.name}/") for key in tensors)
    values, encoded = {}, {}
    for parameter, shape in about.shapes.items() if used else ():
        key = f"delta/{unit.name}/{parameter}"
        value = tensors.pop(key, None)
        if key in encodings and value is not None:
            encoded[parameter] = EncodedDelta(encodings[key], value)
            continue
        values[parameter] = value
        if value is None or value.shape != shape:
            found = "missing" if value is None else f"of shape {tuple(value.shape)}"
            raise UserError(f"{path}: {key} is {found}, the base needs {tuple(shape)}")
    unit.add_task(task, gate, with_deltas=used or (trainable and gate.needs_delta), values=values)
    for parameter, one in encoded.items():
        try:
            unit.deltas[task].set_encoded(parameter, one)
        except (RuntimeError, ValueError) as error:
            reason = first_line(error)
            raise UserError(f"{path}: delta/{unit.name}/{parameter} is damaged: {reason}") from None
    if trainable and encoded and all(one.name == "sparse32" for one in encoded.values()):
        inside = {parameter: unit.deltas[task][parameter] != 0 for parameter in unit.parameter_names}
        learner = model.method.gate(about, **model.options)
        if learner.fix_support(inside):  # training continues inside the stored support
            unit.gates[task] = learner.to(next(model.backbone.parameters()).device).train(model.training)


def _own_norms(model: Network, task: str, stored: Collection[str], trainable: bool) -> list[TaskNorm]:
    """Give the task norms of its own, and return those that its file holds."""
    found = []
    for norm in model.task_norms:
        if norm.name in stored or trainable:
            norm.add_task(task, always=norm.name in stored)
        if norm.name in stored:
            found.append(norm)
            if not trainable:
                norm.use_always(task)
    return found
