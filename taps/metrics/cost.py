"""Cost of a multi-task model relative to one network per task: operations, parameters and time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from taps.core.accounting import accounting, own_norm_parameters
from taps.core.modules import evaluating
from taps.multitask.macs import macs

if TYPE_CHECKING:
    from taps.task_model import TaskModel


def seconds(function: Callable[[], object], device: torch.device) -> float:
    """The time that a function's work on a device takes."""
    started = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


@torch.no_grad()
def relative_cost(model: TaskModel, x: Tensor, on_one_image: bool = True) -> dict:
    """Cost of a model with all its tasks, and its ratio to the cost of one complete network per task.

    Args:
        model: a model with its gates' hard decisions. Base units that no task runs with shared weights are not counted as
            stored; stand-ins of skipped units are.
        x: a batch (B, ...).
        on_one_image: whether all tasks are wanted of each sample, so that one pass computes what they share once; otherwise each
            task has samples of its own, as domains have.

    Returns:
        ``macs`` and ``macs_heads`` per sample, ``parameters`` and ``parameters_heads``, and the ratios ``macs_x_single``,
        ``parameters_x_single`` and ``time_x_single`` of the backbone, and ``…_with_heads`` including the heads.
    """
    tasks = model.tasks
    with evaluating(model), model.state.running(None):
        full = len(tasks) * macs(model.backbone, x)
    own = model.predict_cost(x)
    run = own["macs" if on_one_image else "macs_separate"]
    used = model.base_parameters + own_norm_parameters(model, tasks)
    used += sum(accounting(model, task)["delta_parameters"] for task in tasks)
    if model.policies and model.method.learns_policy:
        unused: dict[int, int] = {}  # by address, since a layer may be part of a block
        for index, unit in enumerate(model.units):
            gates = [gate for task in tasks for gate in unit.gates[task].parameters()]
            used += sum(parameter.numel() for parameter in gates)
            decisions = [model.policies[task][index] for task in tasks]
            if (1.0, 0.0) not in decisions:  # no task shares it; its shortcut is still needed
                stays = {parameter.data_ptr() for parameter in unit.shortcut.parameters()}
                held = {tensor.data_ptr(): tensor.numel() for tensor in unit.weights().values()}
                unused.update((place, size) for place, size in held.items() if place not in stays)
            if any(run == 0.0 for run, _ in decisions):
                used += sum(parameter.numel() for parameter in unit.stand_in().values())
        used -= sum(unused.values())
    heads = sum(parameter.numel() for task in tasks for parameter in model.heads[task].parameters())
    single = len(tasks) * model.base_parameters
    return {
        "macs": run // len(x),
        "macs_heads": own["macs_heads"] // len(x),
        "macs_x_single": run / full,
        "macs_x_single_with_heads": (run + own["macs_heads"]) / (full + own["macs_heads"]),
        "parameters": used,
        "parameters_heads": heads,
        "parameters_x_single": used / single,
        "parameters_x_single_with_heads": (used + heads) / (single + heads),
        **_time_beside_single(model, x, on_one_image),
    }


def _time_beside_single(model: TaskModel, x: Tensor, on_one_image: bool, rounds: int = 5) -> dict[str, float]:
    """Time of one pass for all tasks relative to one full pass per task: medians over several alternating rounds.

    If the gates do not depend on samples, the predictor is measured, which has no gates. Without ``on_one_image``, one pass per
    task is timed.
    """
    ratios: dict[str, list[float]] = {"time_x_single": [], "time_x_single_with_heads": []}
    tasks = model.tasks

    def full() -> None:
        for _ in tasks:
            with model.state.running(None):
                model.backbone(x)

    with evaluating(model):

        def run(*names: str) -> Callable:
            try:
                return model.predictor(names)
            except ValueError:  # gates that depend on the sample
                return partial(model, tasks=names)

        parts = [run(*tasks)] if on_one_image else [run(task) for task in tasks]

        def together(x: Tensor) -> None:
            for part in parts:
                part(x)

        together(x)
        with model.state.running(None):
            features = model.backbone(x)
        for _ in range(rounds):
            everything, single = seconds(lambda: together(x), x.device), seconds(full, x.device)
            heads = seconds(lambda: [model.heads[task](features) for task in tasks], x.device)
            ratios["time_x_single"].append((everything - heads) / single)
            ratios["time_x_single_with_heads"].append(everything / (single + heads))
    return {name: statistics.median(values) for name, values in ratios.items()}
