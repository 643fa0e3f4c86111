"""A size budget instead of a penalty: stored deltas are as close to the trained ones as the bytes of the task file allow.

Every unit is closed (no bytes) or stored with some number of bits per weight (:mod:`taps.storage.encoding`). Bytes go where they
most reduce an error that is summed over units: all units are stored coarsely before any is stored finely. For normally
distributed weights and ideal codes that is reverse water-filling (Cover and Thomas, Elements of Information Theory, §10.3.3).

If every unit can be stored finely, rounding is noise in each layer's output: the error is Σ ‖δ̂ − δ‖² / ‖W + δ‖², W the
unit's base weights, so that layers with few weights get more bits. Otherwise units must be chosen, and the error is
Σ ‖δ̂ − δ‖² / rms(W): units whose weights have changed most relative to their size come first.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from taps.core.method import SETTLED, Lengths, Method, Phase
from taps.core.network import Network
from taps.core.norm import TaskNorm
from taps.core.unit import GatedUnit
from taps.errors import UserError
from taps.methods.registry import register
from taps.methods.taps import OPTIONS, threshold_gate
from taps.storage.encoding import EncodedDelta, encode_as
from taps.storage.files import tensors_size
from taps.storage.task_file import compact_norm, non_delta_tensors

_UNITS = {"": 1, "b": 1, "kb": 1000, "mb": 1000**2, "gb": 1000**3, "kib": 1024, "mib": 1024**2, "gib": 1024**3}


_TENSOR_HEADER = 84  # largest size in bytes of a tensor's entry in a safetensors header, without its name


_OFFSETS = 20  # bytes by which that entry may grow when other tensors precede it


_SAMPLE = 1 << 16  # number of weights from which size and error of a delta's encodings are estimated


#: levels at which a unit's weights may be stored: the allowed error, from coarse to 0, which is exact
_LEVELS = (1.2, 0.9, 0.7, 0.55, 0.42, 0.32, 0.24, 0.18, 0.12, 0.08, 0.05, 0.03, 0.015, 0.005, 0.001, 0.0)


#: largest level at which no units must be chosen: when gates are decided, and, with room for changes, when deltas are rounded
_FINE, _STILL_FINE = 0.42, 0.7


def read_size(text: str) -> tuple[float, bool]:
    """Parse a size to (share of the base, True) for ``"5%"`` or (bytes, False) for ``"600KB"``.

    Raises:
        UserError: if the text is neither, or the percentage is not above 0 and at most 100.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(%|[kmg]?i?b?)\s*", text.lower())
    if match is None or (match.group(2) != "%" and match.group(2) not in _UNITS):
        raise UserError(f"--budget {text!r} is not a size; write a part of the base (5%) or bytes (600KB, 2MB)")
    value, unit = float(match.group(1)), match.group(2)
    if not unit and value <= 100:
        raise UserError(
            f"--budget {text!r} is a size in bytes; write {value:g}% for that part of the base, or {value:g}B"
        )
    if unit != "%":
        return float(round(value * _UNITS[unit])), False
    if not 0 < value <= 100:
        raise UserError(f"--budget {text!r}: a part of the base must be above 0 % and at most 100 %")
    return value / 100, True


def parse_budget(text: str | int, model: Network) -> int:
    """Return the bytes of a task file for ``"5%"`` of the base's parameters, a size such as ``"600KB"``, or a number of bytes.

    Raises:
        UserError: as :func:`read_size`.
    """
    if isinstance(text, int):
        return text
    value, is_share = read_size(text)
    element = next(model.backbone.parameters()).element_size()
    return int(value * model.base_parameters * element) if is_share else int(value)


def min_bytes(model: Network, task: str) -> int:
    """Return the bytes of the task's compact file with every unit closed: norms that are always stored, head, scores and header."""
    return tensors_size(_always_stored(model, task))


def _always_stored(model: Network, task: str) -> dict[str, Tensor]:
    norms = [norm for norm in model.task_norms if task in norm.norms and not any(map(norm.follows, model.units))]
    return non_delta_tensors(model, task, norms, compact=True)


def _compact_bytes(norm: TaskNorm, task: str) -> int:
    return sum(2 * tensor.numel() for tensor in compact_norm(norm.norms[task], norm.base).values())


def check_size(model: Network, task: str, budget: int) -> int:
    """Return the bytes that a budget leaves for deltas.

    Raises:
        UserError: if not even the head and the norms fit; the smallest possible size is named.
    """
    needed = min_bytes(model, task)
    if budget < needed:
        raise UserError(
            f"task {task}: a budget of {budget:,} bytes is too small; norms, head and scores need {needed:,}"
        )
    return max(budget - needed - _header_growth(model, task), 0)


def _header_growth(model: Network, task: str) -> int:
    """Return the bytes by which open units may grow the header besides their own entries, by norms that follow and by offsets."""
    return 4 * (_TENSOR_HEADER + len("norm/running_mean")) + _OFFSETS * len(_always_stored(model, task))


class _Choice(NamedTuple):
    """One way to store a unit: bytes, ‖δ̂ − δ‖², and the level (``None``: closed)."""

    size: int
    error: float
    level: float | None


def _encode(level: float, delta: Tensor) -> EncodedDelta | None:
    """Return a delta encoded at a level, ``None`` if exact; biases, which are small, are stored in half precision."""
    if level == 0.0:
        return None
    name = "coded" if delta.dim() > 1 else "float16"
    return encode_as(name, delta, level)


def _choices(model: Network, unit: GatedUnit, task: str, left: int) -> list[_Choice]:
    """Return the ways to store a unit on the lower convex hull of (bytes, error), closed first; estimated from a sample."""
    deltas = {name: unit.deltas[task][name].detach().cpu() for name in unit.parameter_names}
    hull = [_Choice(0, sum(float(delta.square().sum()) for delta in deltas.values()), None)]
    samples = [
        (delta.numel() / _SAMPLE if delta.numel() > _SAMPLE else 1.0, _sampled(delta)) for delta in deltas.values()
    ]
    for level in _LEVELS:
        size, error = _fixed_bytes(model, unit, task), 0.0
        for share, sample in samples:
            found = _encode(level, sample)
            size += int(share * (sample.nbytes if found is None else len(found.data)))
            if found is not None:
                error += share * float((found.decode(sample.shape, sample.dtype) - sample).double().square().sum())
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
    """Return a sample of a delta's weights that gives size and error of all to about one per cent, with as many dimensions."""
    if delta.numel() <= _SAMPLE:
        return delta
    where = torch.randint(delta.numel(), (_SAMPLE,), generator=torch.Generator().manual_seed(0))
    return delta.flatten()[where].view(-1, *[1] * (delta.dim() - 1))


def _fixed_bytes(model: Network, unit: GatedUnit, task: str) -> int:
    """Return the bytes of an open unit besides its weights: its header entries and the norms that follow it."""
    header = sum(_TENSOR_HEADER + len(f"delta/{unit.name}/{name}") for name in unit.parameter_names)
    return header + sum(_compact_bytes(n, task) for n in model.task_norms if n.follows(unit) and task in n.norms)


def _measured(model: Network, unit: GatedUnit, task: str, choice: _Choice) -> _Choice:
    """Return the choice with its measured size in bytes."""
    if choice.level is None:
        return choice
    size = _fixed_bytes(model, unit, task)
    for name in unit.parameter_names:
        delta = unit.deltas[task][name].detach().cpu()
        found = _encode(choice.level, delta)
        size += delta.nbytes if found is None else len(found.data)
    return choice._replace(size=size)


def _gain(one: _Choice, other: _Choice) -> float:
    """Return the reduction of the error per additional byte."""
    return (one.error - other.error) / max(other.size - one.size, 1)


def _noise(unit: GatedUnit, task: str) -> float:
    """Return ‖W + δ‖², the scale of rounding errors as noise in the layer."""
    base, deltas = unit.base_parameters(), unit.deltas[task]
    return (
        sum(float((base[name] + deltas[name]).detach().float().square().sum()) for name in unit.parameter_names) or 1.0
    )


def _motion(unit: GatedUnit, task: str) -> float:
    """Return rms(W), the scale on which a change of a weight is large."""
    return max(float(base.detach().float().square().mean().sqrt()) for base in unit.base_parameters().values()) or 1.0


@torch.no_grad()
def allocate(model: Network, task: str, budget: int, fine: float = _FINE) -> dict[str, float | None]:
    """Return the level at which to store each open unit's deltas so that the task's file stays within the budget.

    Args:
        model: a model with the task.
        task: its name.
        budget: bytes of the compact task file.
        fine: largest error of a unit's deltas that counts as noise; if any exceeds it, units are chosen by change.

    Returns:
        For each unit the allowed error (as in :func:`taps.storage.encoding.encode_as`), 0.0: exact, ``None``: closed.
        Units whose deltas are zero are left out.

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
        while not measured.issuperset((chosen := _fill(hulls, scales, left)).items()):  # until all sizes are measured
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
    """Return the index of each unit's choice, giving bytes where the next ones reduce the error most, while any are left."""
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


def keep_within(model: Network, task: str, budget: int) -> list[str]:
    """Close the gates of the units for which a budget has no bytes; open units keep learning.

    Args:
        model: the model in training.
        task: name of a task that has been trained with every unit open for a while.
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
            unit.deltas[task].drop_encodings()
    return kept


def round_within(model: Network, task: str, budget: int, beyond: float = -1.0) -> list[str]:
    """Round a task's deltas to the values that its file will hold within a budget; see :func:`keep_within`.

    Training and validation then use the stored values: norms and head can still compensate for the rounding. A task whose deltas
    are rounded already, until :func:`keep_within` releases them, is not changed.

    Args:
        beyond: if at least 0, change nothing unless some unit's rounding error exceeds this.

    Returns:
        Names of the stored units, or none if nothing was changed.
    """
    held = [unit.name for unit in model.units if task in unit.deltas and unit.deltas[task].unmoved()]
    levels = {} if held else allocate(model, task, budget, _STILL_FINE)
    if held or (beyond >= 0 and _are_fine(levels, beyond)):
        return held
    return _round(model, task, levels)


def _round(model: Network, task: str, levels: dict[str, float | None]) -> list[str]:
    for unit in model.units:
        level = levels.get(unit.name)
        unit.gates[task].set(level is not None)
        for name in () if level is None else unit.parameter_names:
            found = None if level is None else _encode(level, unit.deltas[task][name].detach())
            if found is not None:
                unit.deltas[task].set_encoded(name, found)
    return [name for name, level in levels.items() if level is not None]


def _is_stored(model: Network, task: str) -> bool:
    """Return whether the task's deltas are already the values that its file will hold."""
    return any(task in unit.deltas and bool(unit.deltas[task].encodings) for unit in model.units)


#: errors of rounding, ‖δ̂ − δ‖ / ‖δ‖ of a layer, beyond which norms and head have much, or anything, to compensate
_COARSE, _NOTICED = 0.7, 0.05


def open_choose_round(model: Network, lengths: Lengths) -> tuple[Phase, ...]:
    """Return the phases: a third of the epochs with every unit open, then training of the units that fit the budget (settle),
    then rounding, for which norms and head compensate: in the last sixth of the epochs if it is coarse, in the last twelfth if
    it is noticeable, else in the last step."""
    asked = lengths.budget if lengths.budget is not None else model.method.budget
    size = None if asked is None else parse_budget(asked, model)
    epochs = lengths.epochs
    if size is None:
        return (Phase("train", epochs, penalty=0.0, trains=SETTLED),)

    def choose(model: Network, task: str) -> Iterable[Tensor]:
        keep_within(model, task, size)
        return ()

    def round_phase(length: float, trains: tuple[str, ...], beyond: float) -> Phase:
        begin = partial(_begin_rounding, budget=size, beyond=beyond)
        return Phase("round", length, penalty=0.0, trains=trains, competes=_is_stored, begin=begin)

    return (
        Phase("open", epochs / 3, penalty=0.0, trains=SETTLED),
        Phase("settle", epochs / 2, penalty=0.0, trains=SETTLED, begin=choose, forks=True),
        round_phase(epochs / 12, SETTLED, _COARSE),
        round_phase(epochs / 12, SETTLED, _NOTICED),
        round_phase(0.0, ("norm", "head"), -1.0),
    )


def _begin_rounding(model: Network, task: str, budget: int, beyond: float) -> Iterable[Tensor]:
    round_within(model, task, budget, beyond)
    return ()


register(
    "taps_budget",
    Method(
        summary="every layer learns, then the file's bytes go to the layers and bits that keep most of it",
        source="this library; bits by reverse water-filling",
        gate=threshold_gate,
        phases=open_choose_round,
        options=OPTIONS,
        norms=("follow", "task", "frozen"),
        budget="10%",
    ),
)
