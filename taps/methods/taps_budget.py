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
import math
import re
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from taps.core.delta import Encoded
from taps.core.execution import plain_state
from taps.core.method import SETTLED, Defaults, Lengths, Method, Phase
from taps.core.network import Network
from taps.core.unit import GatedUnit
from taps.errors import UserError
from taps.methods.registry import register
from taps.methods.taps import OPTIONS, threshold_gate
from taps.storage.encoding import EncodedDelta, encode_as, estimated_bytes, quick_size, rounding_of
from taps.storage.norms_and_head import encoded_small, set_small, small_tensors
from taps.storage.task_file import active_norms, contents, packed_size

_UNITS = {"": 1, "b": 1, "kb": 1000, "mb": 1000**2, "gb": 1000**3, "kib": 1024, "mib": 1024**2, "gib": 1024**3}


_ENTRY = 28  # about the bytes that a tensor takes in a compact file's deflated header


_SAMPLE = 1 << 16  # number of weights from which size and error of a delta's encodings are estimated


#: levels at which a unit's weights may be stored: the allowed error, from coarse to 0, which is exact
_LEVELS = (2.2, 1.6, 1.2, 0.9, 0.7, 0.55, 0.42, 0.32, 0.24, 0.18, 0.12, 0.08, 0.05, 0.03, 0.015, 0.005, 0.001, 0.0)


#: steps in which norms may be stored, from fine to coarse, in parts of a channel's weight; the head's error follows from them
_STEPS = tuple(0.002 * 2 ** (half / 2) for half in range(16))
#: the coarsest that is planned for, and the part of a budget that norms and head may take if they are stored more finely
_COARSEST, _PART = 0.05, 0.12


#: largest level at which no units must be chosen: when gates are decided, and, with room for changes, when deltas are rounded
_FINE, _STILL_FINE = 0.42, 0.7


def read_size(text: str) -> tuple[float, bool]:
    """Parse a size to (share of the base, True) for ``"5%"`` or (bytes, False) for ``"600KB"``.

    Raises:
        UserError: if the text is neither, or the percentage is not above 0 and at most 100.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(%|[kmg]?i?b?)\s*", text.lower())
    if match is None or (match.group(2) != "%" and match.group(2) not in _UNITS):
        raise UserError(f"budget {text!r} is not a size; write a part of the base (5%) or bytes (600KB, 2MB)")
    value, unit = float(match.group(1)), match.group(2)
    if not unit and value <= 100:
        raise UserError(
            f"budget {text!r} means {value:g} bytes; write {value:g}% for that part of the base, or {value:g}B"
        )
    if unit != "%":
        return float(round(value * _UNITS[unit])), False
    if not 0 < value <= 100:
        raise UserError(f"budget {text!r}: a part of the base must be above 0 % and at most 100 %")
    return value / 100, True


def parse_budget(text: str | int, model: Network) -> int:
    """Return the bytes of a task file for ``"5%"`` of the base's bytes, a size such as ``"600KB"``, or a number of bytes.

    Raises:
        UserError: as :func:`read_size`.
    """
    if isinstance(text, int):
        return text
    value, is_share = read_size(text)
    weights = plain_state(model.backbone, parameters_only=True).values()  # which need not all have one type
    element = sum(own.nbytes for own in weights) / sum(own.numel() for own in weights)
    return int(value * model.base_parameters * element) if is_share else int(value)


def min_bytes(model: Network, task: str) -> int:
    """Return the bytes of the task's smallest compact file: every unit closed, norms that are always stored and head coarse."""
    return _always(model, task, _COARSEST)


def _always(model: Network, task: str, step: float) -> int:
    """Return the bytes of a compact file without open units."""
    norms = [norm for norm in model.task_norms if task in norm.norms and not any(map(norm.follows, model.units))]
    tensors, _ = small_tensors(model, task, norms, compact=True)
    return packed_size({**tensors, **{key: one.data for key, one in encoded_small(model, task, norms, step).items()}})


def _step(model: Network, task: str, budget: int) -> float:
    """Return the step in which to store norms and head: the finest with which they take a small part of the budget."""
    fine = (step for step in _STEPS if step < _COARSEST and _always(model, task, step) <= _PART * budget)
    return next(fine, _COARSEST)


def check_size(model: Network, task: str, budget: int) -> None:
    """Raise a ``UserError`` that names the smallest size and what takes it if a budget does not leave room for norms and head.

    Training may then change them: if they come to need more than planned, they are stored more coarsely.
    """
    needed = min_bytes(model, task)
    if budget < needed:
        head = sum(one.data.numel() for one in encoded_small(model, task, [], _COARSEST).values())
        raise UserError(
            f"task {task}: a budget of {budget:,} bytes is too small; the smallest file takes {needed:,}: "
            f"{head:,} for the head, the rest for norms, scores and header"
        )


def _left(model: Network, task: str, budget: int, step: float) -> int:
    """Return the bytes that a budget leaves for deltas."""
    return max(budget - _always(model, task, step) - 4 * _ENTRY, 0)


#: encodings by unit, parameter and level; ``None`` where a delta is stored exactly
_Kept = dict[tuple[str, str, float], EncodedDelta | None]


class _Choice(NamedTuple):
    """One way to store a unit: bytes, ‖δ̂ − δ‖², and the level (``None``: closed)."""

    size: int
    error: float
    level: float | None


def _encode(level: float, delta: Tensor) -> EncodedDelta | None:
    """Return a delta encoded at a level, ``None`` if exact; biases, which are few, are stored finely."""
    if level == 0.0:
        return None
    if delta.dim() > 1:
        return encode_as("range_coded", delta, level)
    ways = (encode_as("range_coded", delta, min(level, _NOTICED)), encode_as("float16", delta))
    return min(ways, key=lambda way: len(way.data))


def _choices(unit: GatedUnit, task: str, fixed: int, left: int) -> list[_Choice]:
    """Return the ways to store a unit on the lower convex hull of (bytes, error), closed first; estimated from a sample.

    Args:
        unit: the unit, with deltas for ``task``.
        fixed: bytes that it takes besides its weights.
        left: bytes beyond which a way is of no use.
    """
    deltas = {name: unit.deltas[task][name].detach().cpu() for name in unit.parameter_names}
    hull = [_Choice(0, sum(float(delta.float().square().sum(dtype=torch.float64)) for delta in deltas.values()), None)]
    samples = [
        (delta.numel() / _SAMPLE if delta.numel() > _SAMPLE else 1.0, _sampled(delta)) for delta in deltas.values()
    ]
    for level in _LEVELS:
        size, error = float(fixed), 0.0
        for share, sample in samples:
            if level == 0.0:
                size += share * sample.nbytes
                continue
            needs, decoded = estimated_bytes(sample, level if sample.dim() > 1 else min(level, _NOTICED))
            if sample.dim() < 2 and needs > 2.0 * sample.numel():
                needs, decoded = 2.0 * sample.numel(), sample.half().float()
            size += share * needs
            error += share * float((decoded - sample.float()).square().sum(dtype=torch.float64))
        if size > left:
            break
        new = _Choice(int(size), error, level)
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


def _fixed_bytes(model: Network, unit: GatedUnit, task: str, step: float) -> int:
    """Return the bytes of an open unit besides its weights: its header entries and the norms that follow it."""
    norms = [norm for norm in model.task_norms if norm.follows(unit) and task in norm.norms]
    columns = encoded_small(model, task, norms, step, with_head=False)
    return _ENTRY * len(unit.parameter_names) + sum(one.data.numel() for one in columns.values())


def _measure(
    unit: GatedUnit, task: str, hull: list[_Choice], index: int, fixed: int, known: set[int], kept: _Kept | None = None
) -> None:
    """Replace a choice by one with its measured size, and rescale estimates that are not yet measured by the same ratio; ``kept``
    receives encodings, and without it sizes may be a little too large."""
    choice = hull[index]
    if choice.level is None:
        return
    size = fixed
    for name in unit.parameter_names:
        delta = unit.deltas[task][name].detach().cpu()
        if kept is None and delta.dim() > 1 and choice.level > 0:
            size += quick_size(delta, choice.level)
            continue
        found = _encode(choice.level, delta)
        size += delta.nbytes if found is None else len(found.data)
        if kept is not None:
            kept[unit.name, name, choice.level] = found
    ratio = (size - fixed) / max(choice.size - fixed, 1)
    for other, now in enumerate(hull):
        if other == index:
            hull[other] = now._replace(size=size)
        elif other not in known and now.level:
            hull[other] = now._replace(size=fixed + int(ratio * (now.size - fixed)))


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
def allocate(
    model: Network, task: str, budget: int, fine: float = _FINE, kept: _Kept | None = None
) -> dict[str, float | None]:
    """Return the level at which to store each open unit's deltas so that the task's file stays within the budget.

    Args:
        model: a model with the task.
        task: its name.
        budget: bytes of the compact task file.
        fine: largest error of a unit's deltas that counts as noise; if any exceeds it, units are chosen by change.
        kept: receives the encodings that were made to measure sizes; if ``None``, sizes are measured once and quickly, and their
            sum may differ a little from the budget.

    Returns:
        For each unit the allowed error (as in :func:`taps.storage.encoding.encode_as`), 0.0: exact, ``None``: closed.
        Units whose deltas are zero are left out.
    """
    step = _step(model, task, budget)
    left = _left(model, task, budget, step)
    units = {u.name: u for u in model.units if task in u.deltas and u.gates[task].decide().uses_delta}
    fixed = {name: _fixed_bytes(model, unit, task, step) for name, unit in units.items()}
    hulls = {name: _choices(unit, task, fixed[name], left) for name, unit in units.items()}
    hulls = {name: hull for name, hull in hulls.items() if hull[0].error}
    measured: dict[str, set[int]] = {name: set() for name in hulls}
    levels: dict[str, float | None] = {}
    for scale in (_noise, _motion) if _may_be_fine(hulls, left, fine) else (_motion,):
        scales = {name: scale(units[name], task) for name in hulls}
        while True:
            chosen = _fill(hulls, scales, left)
            late = [(name, index) for name, index in chosen.items() if index not in measured[name]]
            if not late or (kept is None and any(measured.values())):
                break
            for name, index in late:
                _measure(units[name], task, hulls[name], index, fixed[name], measured[name], kept)
                measured[name].add(index)
        levels = {name: hulls[name][index].level for name, index in chosen.items()}
        if _are_fine(levels, fine):
            break
    return levels


def _may_be_fine(hulls: dict[str, list[_Choice]], left: int, fine: float) -> bool:
    """Return whether all units might be stored finely; estimated sizes are too large by up to a ninth."""
    least = [
        [choice.size for choice in hull if choice.level is not None and choice.level <= fine] for hull in hulls.values()
    ]
    return all(least) and 0.8 * sum(map(min, least)) <= left


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


@torch.no_grad()
def keep_within(model: Network, task: str, budget: int, fine: float = _FINE) -> list[str]:
    """Close the gates of the units for which a budget has no bytes; open units keep learning, with deltas rounded as they will be
    stored (straight-through) where that is noticeable.

    Args:
        model: the model in training.
        task: name of a task that has been trained with every unit open for a while.
        budget: bytes of the compact task file.
        fine: as in :func:`allocate`.

    Returns:
        Names of the open units.
    """
    levels = allocate(model, task, budget, fine)
    kept = [name for name, level in levels.items() if level is not None]
    for unit in model.units:
        unit.gates[task].set(unit.name in kept)
        if task in unit.deltas:
            deltas, level = unit.deltas[task], levels.get(unit.name) or 0.0
            deltas.drop_encodings()
            for name in unit.parameter_names:
                rounds = level > _NOTICED and deltas[name].dim() > 1
                deltas.set_rounding(name, rounding_of(deltas[name], level) if rounds else None)
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
    kept: _Kept = {}
    levels = {} if held else allocate(model, task, budget, _STILL_FINE, kept)
    if held or (beyond >= 0 and _are_fine(levels, beyond)):
        return held
    return _round(model, task, levels, kept)


def _round(model: Network, task: str, levels: dict[str, float | None], kept: _Kept) -> list[str]:
    for unit in model.units:
        level = levels.get(unit.name)
        unit.gates[task].set(level is not None)
        if level is None:
            continue
        for name in unit.parameter_names:
            place = unit.name, name, level
            found = kept[place] if place in kept else _encode(level, unit.deltas[task][name].detach())
            if found is None:
                unit.deltas[task].set_rounding(name, None)
            else:
                unit.deltas[task].set_encoded(name, found)
    return [name for name, level in levels.items() if level is not None]


def store(model: Network, task: str, budget: int) -> Callable[[], None]:
    """Give a task's norms and head the values that its file will hold within a budget, which its rounded deltas leave room for.

    Returns:
        A function that gives them back their own.
    """
    norms = active_norms(model, task)
    tensors, encodings = contents(model, task, compact=True)
    are_finite = all(bool(one.isfinite().all()) for one in tensors.values() if one.is_floating_point())
    if are_finite and packed_size(tensors) <= budget:
        known = model.encoded.get(task, {})
        return set_small(model, task, norms, {key: known[key] for key in encodings.keys() & known.keys()})
    encoded: dict[str, Encoded] = {}
    for step in _STEPS:
        encoded = encoded_small(model, task, norms, step)
        if packed_size({**tensors, **{key: one.data for key, one in encoded.items()}}) <= budget:
            break
    else:
        raise UserError(
            f"task {task}: after training, norms and head need more than the budget of {budget:,} bytes; give a larger one"
        )
    return set_small(model, task, norms, encoded)


def _stored(model: Network, task: str, budget: int, always: bool = False) -> Callable[[], None]:
    return store(model, task, budget) if always or _is_stored(model, task) else lambda: None


def _is_stored(model: Network, task: str) -> bool:
    """Return whether the task's deltas are already the values that its file will hold."""
    return any(task in unit.deltas and bool(unit.deltas[task].encodings) for unit in model.units)


#: bits per weight of the base from which rounding leaves nothing to learn
_MANY_BITS = 2.0


#: factors on learning rates, by the bits per weight below which they apply
_RATES = {0.2: 1.0, 0.6: 0.7, _MANY_BITS: 0.5}


#: number of epochs from which rates follow a cosine
_MANY_EPOCHS = 12


#: parts of the epochs in which chosen units learn, and in which they are rounded
_SETTLE, _ROUND = 1 / 2, 1 / 6


#: errors of rounding, ‖δ̂ − δ‖ / ‖δ‖ of a layer, beyond which norms and head have much, or anything, to compensate
_COARSE, _NOTICED = 0.7, 0.05


def open_choose_round(model: Network, lengths: Lengths) -> tuple[Phase, ...]:
    """Return the phases: a third of the epochs with every unit open, then training of the units that fit the budget (settle),
    then rounding, for which norms and head compensate: in the last sixth of the epochs if it is coarse, in the last twelfth if
    it is noticeable, else in the last step."""
    size, epochs = _size(model, lengths), lengths.epochs
    if size is None:
        return (Phase("train", epochs, penalty=0.0, trains=SETTLED),)

    def choose(model: Network, task: str, fine: float) -> Iterable[Tensor]:
        keep_within(model, task, size, fine)
        return ()

    def settle(begins: float, ends: float, **options) -> Phase:
        fade = partial(fade_norms, begins=begins, ends=ends)
        return Phase("settle", _SETTLE * epochs / 3, penalty=0.0, trains=SETTLED, each_step=fade, **options)

    def round_phase(length: float, trains: tuple[str, ...], beyond: float) -> Phase:
        begin = partial(_begin_rounding, budget=size, beyond=beyond)
        # The last epoch is stored even if no delta is left to round.
        stored = partial(_stored, budget=size, always=length == 0.0)
        return Phase("round", length, penalty=0.0, trains=trains, competes=_is_stored, begin=begin, stored=stored)

    return (
        Phase("open", epochs / 3, penalty=0.0, trains=SETTLED, begin=_open_all),
        settle(0.0, 0.5, begin=partial(choose, fine=_FINE), forks=True),
        settle(0.5, 1.0, begin=partial(choose, fine=_STILL_FINE)),
        settle(1.0, 1.0, begin=partial(choose, fine=_STILL_FINE)),
        round_phase(_ROUND * epochs / 2, SETTLED, _COARSE),
        round_phase(_ROUND * epochs / 2, SETTLED, _NOTICED),
        round_phase(0.0, ("norm", "head"), -1.0),
    )


def _open_all(model: Network, task: str) -> Iterable[Tensor]:
    """Open every unit, also those that an earlier training has closed."""
    for unit in model.units:
        if task in unit.deltas:
            unit.gates[task].set(True)
    return ()


def _size(model: Network, lengths: Lengths) -> int | None:
    """Return the bytes that a run has to keep, or the method's."""
    asked = lengths.budget if lengths.budget is not None else model.method.budget
    return None if asked is None else parse_budget(asked, model)


def by_bits(model: Network, lengths: Lengths) -> Defaults:
    """Return how to train for a size: for few bits per weight, deltas of which few weights change much; for many, by Adam as
    in full fine-tuning.

    Coarse rounding drops what a high rate overfits, and needs it for deltas to reach their first step; finer rounding keeps it.
    In few epochs rates fall late, since norms and head learn while deltas are rounded.
    """
    size = _size(model, lengths)
    bits = math.inf if size is None else 8 * size / model.base_parameters
    if bits >= _MANY_BITS:
        return Defaults("split", "cosine", ("delta", "norm", "head"))
    rate = next(factor for below, factor in _RATES.items() if bits < below)
    return Defaults("split", "poly" if lengths.epochs < _MANY_EPOCHS else "cosine", rate=rate)


def fade_norms(model: Network, task: str, part: float, begins: float = 1.0, ends: float = 1.0) -> None:
    """Let the norms of closed units give way to the base's, which the layers after them have not seen.

    Without this the training loss jumps when units are chosen, by up to 5.7 × at 1 % of the base's bytes, and the accuracies of
    seeds spread.

    Args:
        model: the model.
        task: the task.
        part: the part of a phase that is done.
        begins, ends: the part of the way to the base's norms that is done at the beginning and the end of the phase.
    """
    share = (1.0 - begins - part * (ends - begins)) ** 2
    for norm in model.task_norms:
        norm.fade(task, share)


def _begin_rounding(model: Network, task: str, budget: int, beyond: float) -> Iterable[Tensor]:
    fade_norms(model, task, 1.0)
    round_within(model, task, budget, beyond)
    return ()


register(
    "taps_budget",
    Method(
        summary="every layer learns, then the file's bytes go to the layers where they preserve most of it",
        source="this library; bits by reverse water-filling",
        gate=threshold_gate,
        phases=open_choose_round,
        options=OPTIONS,
        norms=("follow", "task", "frozen"),
        budget="10%",
        defaults=by_bits,
    ),
)
