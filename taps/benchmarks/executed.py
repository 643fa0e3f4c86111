"""Shares of samples for which gates execute each unit, counted while a benchmark is evaluated."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import Tensor

from taps.benchmarks.base import Benchmark
from taps.core.modules import evaluating
from taps.metrics.relative_gain import Metrics
from taps.task_model import TaskModel


@contextmanager
def counting(model: TaskModel) -> Iterator[Mapping[str, Tensor]]:
    """Count, in the ``with`` block, by task the samples that ran each unit and those that its gate was asked for, (2, units)."""
    counts = {task: torch.zeros(2, len(model.units), dtype=torch.float64) for task in model.tasks}

    def counter(task: str, index: int) -> Callable:
        def count(gate, args, decision) -> None:
            run = decision.run
            size = len(args[0]) if isinstance(args[0], Tensor) else 1
            counts[task][0, index] += size * float(run.float().mean() if isinstance(run, Tensor) else run)
            counts[task][1, index] += size

        return count

    hooks = [
        gate.register_forward_hook(counter(task, index))
        for task in model.tasks
        for index, gate in enumerate(model.gates(task))
    ]
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()


def measure_executed(
    benchmark: Benchmark, model: TaskModel, split: str, accelerator: Accelerator, limit: int | None = None
) -> tuple[Metrics, Mapping[str, list[float]]]:
    """Return the metrics on a split, and for each task the share of samples, over all processes, that ran each unit: 0..1."""
    with evaluating(model), counting(model) as counts:
        metrics = benchmark.evaluate(model, split, accelerator, limit)
    rates = {}
    for task, both in counts.items():
        total, asked = accelerator.reduce(both.float().to(accelerator.device), "sum").cpu()
        rows = zip(model.gates(task), (total / asked.clamp(min=1)).tolist(), model.report(task), strict=True)
        # A constant gate is not called for every sample, and not at all if two tasks share its decision.
        rates[task] = [share if gate.uses_input else row["run"] for gate, share, row in rows]
    return metrics, rates
