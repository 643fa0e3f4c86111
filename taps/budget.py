"""A size instead of a penalty: the deltas as near to those trained as so many bytes of task file can bring them.

Every unit may be closed (no bytes) or stored with more and more bits a weight (:mod:`taps.encoding`). Bytes go where they
take away most of an error that is left, a sum over units: to all of it coarsely before to any of it finely. For normally
distributed weights and ideal codes that is reverse water-filling (Cover and Thomas, Elements of Information Theory, §10.3.3).

Where every unit can be kept finely, rounding is noise in each layer's answer: the error is Σ ‖δ̂ − δ‖² / ‖W + δ‖², W the
unit's base weights, so that layers of few weights get more bits. Where it cannot, what a task learned has to be chosen from,
by Σ ‖δ̂ − δ‖² / rms(W): first comes what has moved much for its size.
"""

from __future__ import annotations

import heapq
import re
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from taps.encoding import decode, encode_as
from taps.errors import UserError
from taps.files import tensors_size
from taps.taskfile import besides_deltas, compact_norm

if TYPE_CHECKING:
    from taps.layer import GatedUnit
    from taps.model import TaskModel

_UNITS = {"": 1, "b": 1, "kb": 1000, "mb": 1000**2, "gb": 1000**3, "kib": 1024, "mib": 1024**2, "gib": 1024**3}
_TENSOR_HEADER = 84  # bytes that a safetensors header spends on a tensor besides its name, at most
_OFFSETS = 20  # by which its entry in the header may grow behind other tensors
_SAMPLE = 1 << 16  # weights from which size and error of a delta's encodings are estimated
#: how a unit's weights may be stored: by the error that is allowed, from coarse to 0, which is exact
_LEVELS = (1.2, 0.9, 0.7, 0.55, 0.42, 0.32, 0.24, 0.18, 0.12, 0.08, 0.05, 0.03, 0.015, 0.005, 0.001, 0.0)
#: the largest of them at which nothing has to be chosen: when gates are decided, and with room for changes when deltas are rounded
_FINE, _STILL_FINE = 0.42, 0.7


def read_size(text: str) -> tuple[float, bool]:
    """A size as (share of the base, True) for ``"5%"`` or (bytes, False) for ``"600KB"``.

    Raises:
        UserError: if the text is neither or the percentage is not above 0 and at most 100.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(%|[kmg]?i?b?)\s*", text.lower())
    if match is None or (match.group(2) != "%" and match.group(2) not in _UNITS):
        raise UserError(f"--budget {text!r} is not a size; write a part of the base (5%) or bytes (600KB, 2MB)")
    value, unit = float(match.group(1)), match.group(2)
    if unit != "%":
        return float(round(value * _UNITS[unit])), False
    if not 0 < value <= 100:
        raise UserError(f"--budget {text!r}: a part of the base must be above 0 % and at most 100 %")
    return value / 100, True


def parse_budget(text: str, model: TaskModel) -> int:
    """Bytes of a task file: ``"5%"`` of the base's parameters, or a size such as ``"600KB"``.

    Raises:
        UserError: as :func:`read_size`.
    """
    value, is_share = read_size(text)
    element = next(model.backbone.parameters()).element_size()
    return int(value * model.base_parameters * element) if is_share else int(value)


def smallest(model: TaskModel, task: str) -> int:
    """Bytes of the task's compact file with every unit closed: norms that it has all the same, head, scores and the header."""
    return tensors_size(_always_stored(model, task))


def _always_stored(model: TaskModel, task: str) -> dict[str, Tensor]:
    norms = [norm for norm in model.task_norms if task in norm.norms and not any(map(norm.follows, model.units))]
    return besides_deltas(model, task, norms, compact=True)


def _compact_bytes(norm, task: str) -> int:
    return sum(2 * tensor.numel() for tensor in compact_norm(norm.norms[task], norm.base).values())


def check_size(model: TaskModel, task: str, budget: int) -> int:
    """Bytes that a budget leaves for deltas.

    Raises:
        UserError: if not even the head and the norms fit; the smallest possible size is named.
    """
    needed = smallest(model, task)
    if budget < needed:
        raise UserError(
            f"task {task}: a budget of {budget:,} bytes is too small; norms, head and scores need {needed:,}"
        )
    return max(budget - needed - _header_growth(model, task), 0)


def _header_growth(model: TaskModel, task: str) -> int:
    """Bytes by which the header may grow with open units, besides their own entries: norms that come with them, and offsets."""
    return 4 * (_TENSOR_HEADER + len("norm/running_mean")) + _OFFSETS * len(_always_stored(model, task))


class _Choice(NamedTuple):
    """One way to store a unit: bytes, ‖δ̂ − δ‖², and the level (``None``: closed)."""

    size: int
    error: float
    level: float | None


def _encode(level: float, delta: Tensor) -> tuple[str, Tensor] | None:
    """The encoding of a delta at a level and its bytes; ``None``: exact. A bias is few numbers: in half precision."""
    if level == 0.0:
        return None
    name = "coded" if delta.dim() > 1 else "float16"
    return name, encode_as(name, delta, level)


def _choices(model: TaskModel, unit: GatedUnit, task: str, left: int) -> list[_Choice]:
    """The ways to store a unit that are on the lower convex hull of (bytes, error), from none on; estimated from a sample."""
    deltas = {name: unit.deltas[task][name].detach().cpu() for name in unit.parameter_names}
    hull = [_Choice(0, sum(float(delta.square().sum()) for delta in deltas.values()), None)]
    samples = [
        (delta.numel() / _SAMPLE if delta.numel() > _SAMPLE else 1.0, _sampled(delta)) for delta in deltas.values()
    ]
    for level in _LEVELS:
        size, error = _fixed_bytes(model, unit, task), 0.0
        for share, sample in samples:
            found = _encode(level, sample)
            size += int(share * (sample.nbytes if found is None else len(found[1])))
            if found is not None:
                error += share * float((decode(*found, sample.shape, sample.dtype) - sample).double().square().sum())
        if size > left:
            break
        new = _Choice(size, error, level)
        if not new.error < hull[-1].error:
            continue
        while len(hull) > 1 and _gain(hull[-2], hull[-1]) <= _gain(hull[-1], new):
            hull.pop()
        hull.append(new)
    return hull


def _sampled(delta: Tensor) -> Tensor:
    """As many of a delta's weights as tell size and error of all to about a per cent, in as many dimensions."""
    if delta.numel() <= _SAMPLE:
        return delta
    where = torch.randint(delta.numel(), (_SAMPLE,), generator=torch.Generator().manual_seed(0))
    return delta.flatten()[where].view(-1, *[1] * (delta.dim() - 1))


def _fixed_bytes(model: TaskModel, unit: GatedUnit, task: str) -> int:
    """What an open unit takes besides its weights: a header, and the norms that follow it."""
    header = sum(_TENSOR_HEADER + len(f"delta/{unit.name}/{name}") for name in unit.parameter_names)
    return header + sum(_compact_bytes(n, task) for n in model.task_norms if n.follows(unit) and task in n.norms)


def _measured(model: TaskModel, unit: GatedUnit, task: str, choice: _Choice) -> _Choice:
    """A choice with the bytes that it really takes."""
    if choice.level is None:
        return choice
    size = _fixed_bytes(model, unit, task)
    for name in unit.parameter_names:
        delta = unit.deltas[task][name].detach().cpu()
        found = _encode(choice.level, delta)
        size += delta.nbytes if found is None else len(found[1])
    return choice._replace(size=size)


def _gain(one: _Choice, other: _Choice) -> float:
    """Error that is taken away by a byte more."""
    return (one.error - other.error) / max(other.size - one.size, 1)


def _noise(unit: GatedUnit, task: str) -> float:
    """‖W + δ‖²: rounding errors of this size are as large as the layer."""
    base, deltas = unit.base_parameters(), unit.deltas[task]
    return (
        sum(float((base[name] + deltas[name]).detach().float().square().sum()) for name in unit.parameter_names) or 1.0
    )


def _motion(unit: GatedUnit, task: str) -> float:
    """rms(W): a weight that moves by so much has moved much."""
    return max(float(base.detach().float().square().mean().sqrt()) for base in unit.base_parameters().values()) or 1.0


@torch.no_grad()
def allocate(model: TaskModel, task: str, budget: int, fine: float = _FINE) -> dict[str, float | None]:
    """The level at which each open unit's deltas are to be stored so that the task's file keeps the budget.

    Args:
        model: has the task.
        task: its name.
        budget: bytes of the compact task file.
        fine: the largest error of a unit's deltas that is taken for noise, else units have to be chosen.

    Returns:
        By unit the error that rounding to steps is allowed (as in :func:`taps.encoding.encode_as`), 0.0: exact, ``None``: closed.
        Units that have not moved are left out.

    Raises:
        UserError: if not even the head and the norms fit; the smallest possible size is named.
    """
    left = check_size(model, task, budget)
    units = {u.name: u for u in model.units if task in u.deltas and u.gates[task].decide().uses_delta}
    hulls = {name: _choices(model, unit, task, left) for name, unit in units.items()}
    hulls = {name: hull for name, hull in hulls.items() if hull[0].error}
    units = {name: units[name] for name in hulls}
    measured: set[tuple[str, int]] = set()
    levels: dict[str, float | None] = {}
    for scale in (_noise, _motion):
        scales = {name: scale(unit, task) for name, unit in units.items()}
        while not measured.issuperset((chosen := _fill(hulls, scales, left)).items()):  # sizes are estimates until then
            for name, index in chosen.items() - measured:
                hulls[name][index] = _measured(model, units[name], task, hulls[name][index])
            measured |= chosen.items()
        levels = {name: hulls[name][index].level for name, index in chosen.items()}
        if _are_fine(levels, fine):
            break
    return levels


def _are_fine(levels: dict[str, float | None], fine: float) -> bool:
    return all(level is not None and level <= fine for level in levels.values())


def _fill(hulls: dict[str, list[_Choice]], scales: dict[str, float], left: int) -> dict[str, int]:
    """By unit the index of its choice: bytes go where the next ones take away most error, as long as there are any."""
    chosen = dict.fromkeys(hulls, 0)
    queue = [(-_gain(*hull[:2]) / scales[name], name) for name, hull in hulls.items() if len(hull) > 1]
    heapq.heapify(queue)
    while queue:
        _, name = heapq.heappop(queue)
        now, more = hulls[name][chosen[name] : chosen[name] + 2]
        if more.size - now.size > left:
            continue
        left -= more.size - now.size
        chosen[name] += 1
        if chosen[name] + 1 < len(hulls[name]):
            heapq.heappush(queue, (-_gain(more, hulls[name][chosen[name] + 1]) / scales[name], name))
    return chosen


def keep_within(model: TaskModel, task: str, budget: int) -> list[str]:
    """Close the gates of the units for which a budget has no bytes; what is open goes on learning.

    Args:
        model: in training.
        task: has been trained with every unit open for a while.
        budget: bytes of the compact task file.

    Returns:
        Names of the open units.

    Raises:
        UserError: if not even the head and the norms fit; the smallest possible size is named.
    """
    kept = [name for name, level in allocate(model, task, budget).items() if level is not None]
    for unit in model.units:
        unit.gates[task].set(unit.name in kept)
        if task in unit.deltas:
            unit.deltas[task].let_go()
    return kept


def hold_within(model: TaskModel, task: str, budget: int, beyond: float = -1.0) -> list[str]:
    """Replace a task's deltas by what a budget lets its file store of them; see :func:`keep_within`.

    What is stored is then what is trained on and validated: norms and head can still make up for the rounding. A task whose
    deltas are held already, which :func:`keep_within` ends, stays as it is.

    Args:
        beyond: change nothing where no unit is rounded by a larger error than this, if it is at least 0.

    Returns:
        Names of the units that are stored, or none where nothing was changed.
    """
    held = [unit.name for unit in model.units if task in unit.deltas and unit.deltas[task].held()]
    levels = {} if held else allocate(model, task, budget, _STILL_FINE)
    if held or (beyond >= 0 and _are_fine(levels, beyond)):
        return held
    return _hold(model, task, levels)


def _hold(model: TaskModel, task: str, levels: dict[str, float | None]) -> list[str]:
    for unit in model.units:
        level = levels.get(unit.name)
        unit.gates[task].set(level is not None)
        for name in unit.parameter_names if level is not None else ():
            found = _encode(level, unit.deltas[task][name].detach())
            if found is not None:
                unit.deltas[task].hold(name, *found)
    return [name for name, level in levels.items() if level is not None]
