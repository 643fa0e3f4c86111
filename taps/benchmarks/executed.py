"""Shares of samples for which gates execute each unit, counted while a benchmark is evaluated."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack

import torch
from accelerate import Accelerator
from torch import Tensor

from taps.benchmarks.base import Benchmark
from taps.core.modules import evaluating
from taps.metrics.relative_gain import Metrics
from taps.task_model import TaskModel


class Executed:
    """A counter of the share of samples for which each task's gates run each unit, inside a ``with`` block."""

    def __init__(self, model: TaskModel, tasks: Iterable[str]) -> None:
        self.model, self.tasks = model, tuple(tasks)
        self.sums = {task: [0.0] * len(model.units) for task in self.tasks}
        self.calls = {task: [0] * len(model.units) for task in self.tasks}

    def __enter__(self) -> Executed:
        self._hooks = [
            gate.register_forward_hook(self._counter(task, index))
            for task in self.tasks
            for index, gate in enumerate(self.model.gates(task))
        ]
        return self

    def __exit__(self, *error) -> None:
        for hook in self._hooks:
            hook.remove()

    def _counter(self, task: str, index: int) -> Callable:
        def count(gate, args, decision) -> None:
            run = decision.run
            size = len(args[0]) if isinstance(args[0], Tensor) else 1
            self.sums[task][index] += float(run.float().mean() if isinstance(run, Tensor) else run) * size
            self.calls[task][index] += size

        return count

    def rates(self, accelerator: Accelerator) -> dict[str, list[float]]:
        """Return for each task the share of its samples, over all processes, that ran each unit: 0..1."""
        found = {}
        for task in self.tasks:
            both = torch.tensor([self.sums[task], self.calls[task]], dtype=torch.float32, device=accelerator.device)
            total, count = accelerator.reduce(both, "sum").cpu()
            counted = (total / count.clamp(min=1)).tolist()
            rows = zip(self.model.gates(task), counted, self.model.report(task), strict=True)
            # A constant gate is not called for every sample, and not at all if two tasks share its decision.
            found[task] = [share if gate.uses_input else row["run"] for gate, share, row in rows]
        return found


def measure_executed(
    benchmark: Benchmark, model: TaskModel, split: str, accelerator: Accelerator, limit: int | None = None
) -> tuple[Metrics, Mapping[str, list[float]]]:
    """Return the metrics on a split, and for each task the share of samples that ran each unit."""
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        counts = stack.enter_context(Executed(model, model.tasks))
        metrics = benchmark.evaluate(model, split, accelerator, limit)
    return metrics, counts.rates(accelerator)
