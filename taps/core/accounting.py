"""Parameter and size accounting. Every count is derived from the gates' hard decisions."""

from __future__ import annotations

from collections.abc import Iterable

from taps.core.network import Network
from taps.core.norm import norm_tensors
from taps.core.unit import GatedUnit


def is_tuned(row: dict) -> bool:
    """Return whether a row of ``model.report`` shows a unit that is run with the task's delta."""
    return row["run"] > 0 and row["specific"] > 0


def task_parameters(unit: GatedUnit, task: str) -> int:
    """Return how many of a unit's parameters are task-specific, given its gate and the contents of its deltas."""
    count = unit.gates[task].task_parameters(unit.size) if unit.parameter_names else 0
    return min(count, unit.deltas[task].count()) if count and task in unit.deltas else count


def accounting(model: Network, task: str) -> dict:
    """Return the parameter counts of one task.

    Returns:
        ``units`` L; ``tuned_units``; ``tuned_layers`` = tuned_units / L, 0..1; ``delta_parameters`` of the tuned units;
        ``norm_parameters``, affine parameters and statistics of the norms in use; ``parameters``, the sum of both;
        ``head_parameters``; ``base_parameters`` of the backbone.
    """
    rows = model.report(task)
    tuned = [row for row in rows if is_tuned(row)]
    deltas = sum(task_parameters(unit, task) for unit, row in zip(model.units, rows, strict=True) if is_tuned(row))
    owned = [norm.active(task) for norm in model.task_norms]
    norms = sum(tensor.numel() for norm in owned if norm is not None for tensor in norm_tensors(norm).values())
    return {
        "units": len(rows),
        "tuned_units": len(tuned),
        "tuned_layers": len(tuned) / len(rows),
        "delta_parameters": deltas,
        "norm_parameters": norms,
        "parameters": deltas + norms,
        "head_parameters": sum(parameter.numel() for parameter in model.heads[task].parameters()),
        "base_parameters": model.base_parameters,
    }


def parameters_x_base(accounts: Iterable[dict], heads: bool = False) -> float:
    """Return the size of the base and all tasks together as a multiple of the base: 1 + Σ_tasks stored / base.

    Args:
        accounts: results of :func:`accounting`, one per task.
        heads: whether to count the heads too.
    """
    accounts = list(accounts)
    if not accounts:
        return 1.0
    stored = sum(account["parameters"] + heads * account["head_parameters"] for account in accounts)
    return 1.0 + stored / accounts[0]["base_parameters"]


def bytes_x_base(accounts: Iterable[dict], sizes: Iterable[int]) -> float:
    """Return the size of the float32 base and all task files (``sizes``, in bytes) together as a multiple of the base."""
    return 1.0 + sum(sizes) / (4 * next(iter(accounts))["base_parameters"])


def own_norm_parameters(model: Network, tasks: Iterable[str]) -> int:
    """Return the number of values in the tasks' own norms; norms that tasks share count once."""
    tasks, total = list(tasks), 0
    for norm in model.task_norms:
        owned = {norm.sharing_key(copy): copy for copy in map(norm.active, tasks) if copy is not None}
        total += sum(tensor.numel() for copy in owned.values() for tensor in norm_tensors(copy).values())
    return total
