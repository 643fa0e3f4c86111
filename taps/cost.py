"""What a task costs to store. Every number is read from the gates' hard decisions."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

if TYPE_CHECKING:
    from taps.model import TaskModel


def is_tuned(row: dict) -> bool:
    """Whether a row of ``model.report`` says that the task uses its own weights there."""
    return row["run"] > 0 and row["specific"] > 0


def norm_tensors(norm) -> dict[str, Tensor]:
    """Affine parameters and running statistics of a norm; the counter of batches is not a weight and is left out."""
    return {name: tensor for name, tensor in norm.state_dict().items() if not name.endswith("num_batches_tracked")}


def accounting(model: TaskModel, task: str) -> dict:
    """Counts of one task.

    Returns:
        ``units`` L; ``tuned_units``; ``tuned_layers`` = tuned_units / L, 0..1; ``delta_parameters`` of the tuned units;
        ``norm_parameters``, affine and statistics of the norms in use; ``parameters``, the sum of the two;
        ``head_parameters``; ``base_parameters`` of the backbone.
    """
    rows = model.report(task)
    tuned = [row for row in rows if is_tuned(row)]
    deltas = sum(row["parameters"] for row in tuned)
    owned = [norm.own(task) for norm in model.task_norms]
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
    """Size of the base and all tasks together as a multiple of the base: 1 + Σ_tasks stored / base.

    Args:
        accounts: what :func:`accounting` returned for each task.
        heads: whether the heads are counted too.
    """
    accounts = list(accounts)
    if not accounts:
        return 1.0
    stored = sum(account["parameters"] + heads * account["head_parameters"] for account in accounts)
    return 1.0 + stored / accounts[0]["base_parameters"]


def macs(function: Callable, *args) -> int:
    """Multiply-accumulate operations of ``function(*args)`` in convolutions, matrix products and attention."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # its fused kernel is not counted
    try:
        with FlopCounterMode(display=False) as counter:
            function(*args)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counter.get_total_flops() // 2
