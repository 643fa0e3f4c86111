"""Which weights of a network a task changes: decided once, from learned gates or from a number of weights."""

from __future__ import annotations

import torch
from torch import Tensor

from taps.cost import own_norm_parameters
from taps.errors import UserError
from taps.model import TaskModel
from taps.sparse import HardConcreteGate


@torch.no_grad()
def fix_support(model: TaskModel, task: str, density: float | None = None) -> int:
    """Fix a task's support and fold its gates into its deltas: δ ← z̄ · δ inside of it and 0 outside.

    Weights whose gates are open stay the task's own; where these are more than the density allows, those with the largest
    z̄ · abs(δ), whole rows by their root mean square where gates are rows'.

    Args:
        model: of a method with a gate for every weight.
        task: its name.
        density: share of the base's parameters that deltas and the task's own norms may have together, 0..1; ``None``: that
            of the method's options, where 1 is as many as stay open.

    Returns:
        Number of weights in the support.

    Raises:
        UserError: if the task has no gates on single weights, or no weight fits beside its norms.
    """
    model.check_task(task)
    density = model.options.get("density", 1.0) if density is None else density
    allowed = room(model, task, density)
    changes = []  # of every group of weights that share a gate: unit, parameter, size of the change of one, weights of one
    for unit in model.units:
        gate = unit.gates[task]
        if not isinstance(gate, HardConcreteGate) or gate.is_fixed:
            continue
        middle = gate.middle()
        for name in unit.parameter_names:
            delta = unit.deltas[task][name]
            delta.mul_(middle[name])
            each = delta.numel() // middle[name].numel()
            size = delta.square().reshape(middle[name].numel(), each).mean(1).sqrt()
            changes.append((unit, name, size, each, middle[name]))
    level = _level(allowed, changes)
    total = 0
    masks: dict[int, dict[str, Tensor]] = {}
    for unit, name, size, _, middle in changes:
        mask = (size > level).view(middle.shape).expand(unit.deltas[task][name].shape)
        unit.deltas[task][name].mul_(mask)
        masks.setdefault(id(unit), {})[name] = mask
        total += int(mask.sum())
    for unit in model.units:
        if id(unit) in masks:
            unit.gates[task].fix(masks[id(unit)])
    model.policies[task] = tuple((1.0, unit.gates[task].decide().specific) for unit in model.units)
    return total


def room(model: TaskModel, task: str, density: float) -> float:
    """How many weights of the base a task may change.

    Args:
        model, task, density: as in :func:`fix_support`.

    Raises:
        UserError: if the task has no gates on single weights, the density is not above 0 and at most 1, or the task's norms
            alone take all of it.
    """
    if not any(isinstance(unit.gates[task], HardConcreteGate) for unit in model.units):
        raise UserError(
            f"task {task!r} has no gate on single weights: where={model.options.get('where')!r} matches no layer"
        )
    if not 0 < density <= 1:
        raise UserError(f"density must lie in 0..1, above 0 (0.02: 2 % of the weights), not {density!r}")
    norms = own_norm_parameters(model, [task])
    allowed = density * model.base_parameters - norms
    if allowed < 1:
        raise UserError(
            f"a density of {100 * density:g} % has no room for single weights: the task's own norms take "
            f"{100 * norms / model.base_parameters:.2g} % of the base; give a larger density, or norm frozen"
        )
    return allowed


def _level(allowed: float, changes: list) -> float:
    """The size of change above which weights are the task's own, so that they are no more than allowed."""
    size = torch.cat([size for _, _, size, _, _ in changes])
    each = torch.cat([torch.full_like(size, count) for _, _, size, count, _ in changes])
    order = size.argsort(descending=True)
    kept = int((each[order].double().cumsum(0) <= allowed).sum())
    return float(size[order[kept]]) if kept < len(order) else 0.0
