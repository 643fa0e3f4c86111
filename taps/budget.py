"""A size instead of a penalty: keep the layers that moved most, as many as fit into so many bytes of task file."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from taps.cost import norm_tensors
from taps.errors import UserError

if TYPE_CHECKING:
    from taps.model import TaskModel

_UNITS = {"": 1, "b": 1, "kb": 1000, "mb": 1000**2, "gb": 1000**3, "kib": 1024, "mib": 1024**2, "gib": 1024**3}
_TENSOR_HEADER = 110  # bytes that a safetensors header spends on a tensor besides its name, at most


def parse_budget(text: str, model: TaskModel) -> int:
    """Bytes of a task file: ``"5%"`` of the base's parameters, or a size such as ``"600KB"``.

    Raises:
        UserError: if the text is neither or the percentage is not above 0 and at most 100.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(%|[kmg]?i?b?)\s*", text.lower())
    if match is None or (match.group(2) != "%" and match.group(2) not in _UNITS):
        raise UserError(f"--budget {text!r} is not a size; write a part of the base (5%) or bytes (600KB, 2MB)")
    value, unit = float(match.group(1)), match.group(2)
    if unit != "%":
        return int(value * _UNITS[unit])
    if not 0 < value <= 100:
        raise UserError(f"--budget {text!r}: a part of the base must be above 0 % and at most 100 %")
    element = next(model.backbone.parameters()).element_size()
    return int(value / 100 * model.base_parameters * element)


def smallest(model: TaskModel, task: str) -> int:
    """Bytes of the task's file with every unit closed: norms, head, scores and the header."""
    norms = [norm.norms[task] for norm in model.task_norms if model.norm == "task" and task in norm.norms]
    tensors = [tensor for norm in norms for tensor in norm_tensors(norm).values()]
    tensors += [*model.heads[task].state_dict().values()]
    tensors += [tensor for gate in model.gates(task) for tensor in gate.state_dict().values()]
    return _bytes(tensors) + 12 * _TENSOR_HEADER


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


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
    return budget - needed


@torch.no_grad()
def keep_within(model: TaskModel, task: str, budget: int) -> list[str]:
    """Set every gate of a task: open for the units whose deltas are densest, within the budget.

    Density is the mean squared delta per parameter. Closed units return to the base; training goes on with what
    is open.

    Args:
        model: in training.
        task: has been trained with every unit open for a while.
        budget: bytes of the task file.

    Returns:
        Names of the open units.

    Raises:
        UserError: if not even the head and the norms fit; the smallest possible size is named.
    """
    left = check_size(model, task, budget)
    prices, densities = {}, {}
    for unit in model.units:
        deltas = [unit.deltas[task][name] for name in unit.parameter_names]
        followers = [norm.norms[task] for norm in model.task_norms if norm.follows(unit) and task in norm.norms]
        stored = [*deltas, *(tensor for norm in followers for tensor in norm_tensors(norm).values())]
        prices[unit.name] = _bytes(stored) + sum(
            _TENSOR_HEADER + len(unit.name + name) for name in unit.parameter_names
        )
        densities[unit.name] = float(sum(delta.square().sum() for delta in deltas)) / sum(d.numel() for d in deltas)
    kept = []
    for name in sorted(prices, key=lambda name: -densities[name]):
        if prices[name] <= left:
            left -= prices[name]
            kept.append(name)
    for unit in model.units:
        unit.gates[task].set(unit.name in kept)
    return kept
