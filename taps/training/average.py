"""An exponential moving average of the weights in training (EMA)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from taps.storage.checkpoint import moving
from taps.task_model import TaskModel


class WeightAverage:
    """The average of all floating-point tensors that training changes, except those of gates.

    After each step, average ← decay · average + (1 − decay) · weights.

    Args:
        model: the model in training.
        tasks: its tasks.
        decay: 0..1.
    """

    def __init__(self, model: TaskModel, tasks: Sequence[str], decay: float) -> None:
        self.model, self.tasks, self.decay = model, tasks, decay
        self.values = {name: tensor.detach().clone() for name, tensor in self._weights().items()}

    def _weights(self) -> dict[str, Tensor]:
        gates = [gate for task in self.tasks for gate in self.model.gates(task)]
        of_gates = {id(tensor) for gate in gates for tensor in (*gate.parameters(), *gate.buffers())}
        tensors = moving(self.model, self.tasks)
        return {name: t for name, t in tensors.items() if t.is_floating_point() and id(t) not in of_gates}

    @torch.no_grad()
    def update(self) -> None:
        weights = self._weights()
        self.values = {
            name: tensor for name, tensor in self.values.items() if name in weights
        }  # some deltas are dropped
        torch._foreach_lerp_(list(self.values.values()), [weights[name] for name in self.values], 1.0 - self.decay)

    @torch.no_grad()
    def load(self, values: Mapping[str, Tensor]) -> None:
        """Continue with stored values."""
        self.values = {name: values[name].to(t) for name, t in self._weights().items() if name in values}

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Exchange the model's weights for the average inside the ``with`` block."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        weights = self._weights()
        for name, value in self.values.items():
            held = weights[name].clone()
            weights[name].copy_(value)
            value.copy_(held)
