"""What a task costs to store. Every number is read from the gates' hard decisions."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from taps.layer import evaluating

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
    deltas = sum(unit.own(task) for unit, row in zip(model.units, rows, strict=True) if is_tuned(row))
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


def bytes_x_base(accounts: Iterable[dict], sizes: Iterable[int]) -> float:
    """Size of the base in float32 and all task files together as a multiple of the base; ``sizes``: of the files, in bytes."""
    return 1.0 + sum(sizes) / (4 * next(iter(accounts))["base_parameters"])


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


def own_norm_parameters(model: TaskModel, tasks: Iterable[str]) -> int:
    """Numbers in the tasks' own norms; those that tasks have in common count once."""
    tasks, total = list(tasks), 0
    for norm in model.task_norms:
        owned = {norm.shared(own): own for own in map(norm.own, tasks) if own is not None}
        total += sum(tensor.numel() for own in owned.values() for tensor in norm_tensors(own).values())
    return total


@torch.no_grad()
def beside_single(model: TaskModel, x: Tensor) -> dict:
    """What all tasks of a model cost, and that divided by the cost of one network a task that runs everything.

    Args:
        model: units that its policies share between no tasks are not counted as stored, stand-ins of skipped ones are.
        x: a batch, (B, ...).

    Returns:
        ``macs`` and ``macs_heads`` a sample; ``parameters`` and ``parameters_heads``; and ``macs_x_single``,
        ``parameters_x_single``, ``time_x_single`` of the backbone, and with the heads under ``…_with_heads``.
    """
    tasks = model.tasks
    with evaluating(model), model.state.running(None):
        full = len(tasks) * macs(model.backbone, x)
    own = model.predict_cost(x)
    used = model.base_parameters + own_norm_parameters(model, tasks)
    used += sum(accounting(model, task)["delta_parameters"] for task in tasks)
    if model.policies and model.row.learns_policy:
        unused: dict[int, int] = {}  # a layer may be part of a block
        for index, unit in enumerate(model.units):
            gates = [gate for task in tasks for gate in unit.gates[task].parameters()]
            used += sum(parameter.numel() for parameter in gates)
            decisions = [model.policies[task][index] for task in tasks]
            if (1.0, 0.0) not in decisions:  # nobody shares it; the shortcut that is a part of it stays
                stays = {parameter.data_ptr() for parameter in unit.shortcut.parameters()}
                held = {tensor.data_ptr(): tensor.numel() for tensor in unit.weights().values()}
                unused.update((place, size) for place, size in held.items() if place not in stays)
            if any(run == 0.0 for run, _ in decisions):
                used += sum(parameter.numel() for parameter in unit.stand_in().values())
        used -= sum(unused.values())
    heads = sum(parameter.numel() for task in tasks for parameter in model.heads[task].parameters())
    single = len(tasks) * model.base_parameters
    return {
        "macs": own["macs"] // len(x),
        "macs_heads": own["macs_heads"] // len(x),
        "macs_x_single": own["macs"] / full,
        "macs_x_single_with_heads": (own["macs"] + own["macs_heads"]) / (full + own["macs_heads"]),
        "parameters": used,
        "parameters_heads": heads,
        "parameters_x_single": used / single,
        "parameters_x_single_with_heads": (used + heads) / (single + heads),
        **_time_beside_single(model, x),
    }


def _time_beside_single(model: TaskModel, x: Tensor, rounds: int = 5) -> dict[str, float]:
    """Medians over several rounds of the time of one pass for all tasks ÷ that of one full pass a task, run in turn.

    Where the gates are decided it is that of the predictor, which has none.
    """
    ratios: dict[str, list[float]] = {"time_x_single": [], "time_x_single_with_heads": []}
    tasks = model.tasks

    def seconds(function: Callable) -> float:
        started = time.perf_counter()
        function()
        if x.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    def full() -> None:
        for _ in tasks:
            with model.state.running(None):
                model.backbone(x)

    with evaluating(model):
        try:
            together = model.predictor(tasks)
        except ValueError:  # gates that look at every sample

            def together(x: Tensor) -> dict[str, Tensor]:
                return model(x, tasks=tasks)

        together(x)
        with model.state.running(None):
            features = model.backbone(x)
        for _ in range(rounds):
            everything = seconds(lambda: together(x))
            single, heads = seconds(full), seconds(lambda: [model.heads[task](features) for task in tasks])
            ratios["time_x_single"].append((everything - heads) / single)
            ratios["time_x_single_with_heads"].append(everything / (single + heads))
    return {name: statistics.median(values) for name, values in ratios.items()}
