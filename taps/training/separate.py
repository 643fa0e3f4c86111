"""Tasks with loaders of their own, as in AutoMTL's programs: batches are ``{"input", "label"}``, perhaps with a ``"mask"``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from taps.errors import UserError


@dataclass(frozen=True)
class Masked:
    """Labels with a mask of those that count, which the task's loss and metric take as a third argument."""

    label: Tensor
    mask: Tensor

    def __len__(self) -> int:
        return len(self.label)

    def to(self, device: torch.device) -> Masked:
        return Masked(self.label.to(device), self.mask.to(device))


def with_mask(function: Callable) -> Callable:
    """Return a loss or metric that also takes :class:`Masked` labels."""

    def call(output: Tensor, labels: Tensor | Masked):
        return function(output, labels.label, labels.mask) if isinstance(labels, Masked) else function(output, labels)

    return call


def inputs_and_labels(batch: object, task: str) -> tuple[Tensor, Tensor | Masked]:
    """Return the inputs and the labels of a batch, a pair or a dict.

    Raises:
        UserError: if it is neither.
    """
    if isinstance(batch, Mapping) and {"input", "label"} <= set(batch):
        label, mask = batch["label"], batch.get("mask")
        return batch["input"], label if mask is None else Masked(label, mask)
    if isinstance(batch, (list, tuple)) and len(batch) == 2:
        return batch[0], batch[1]
    found = f"a dict of {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
    raise UserError(f"the loader of {task!r} gives {found}; it has to give {{'input', 'label'}} or (inputs, labels)")


class SeparateLoaders:
    """One batch per task and step, ``{task: (inputs, labels)}``, from loaders that are read in step.

    Args:
        loaders: by task.
        device: where batches are needed.
    """

    def __init__(self, loaders: Mapping[str, DataLoader], device: torch.device) -> None:
        self.loaders, self.device = dict(loaders), device

    def __len__(self) -> int:
        return min(map(len, self.loaders.values()))

    def __iter__(self) -> Iterator[dict[str, tuple[Tensor, Tensor | Masked]]]:
        return self.skipping(0)

    def skipping(self, count: int) -> Iterator[dict[str, tuple[Tensor, Tensor | Masked]]]:
        """Iterate over the batches after the first ``count``."""
        for index, batches in enumerate(zip(*self.loaders.values(), strict=False)):
            if index >= count:
                pairs = (inputs_and_labels(batch, task) for task, batch in zip(self.loaders, batches, strict=True))
                moved = ((x.to(self.device), labels.to(self.device)) for x, labels in pairs)
                yield dict(zip(self.loaders, moved, strict=True))


class Samplers:
    """Samplers of several loaders, whose ``epoch`` is set together."""

    def __init__(self, samplers: list) -> None:
        self.samplers = samplers

    @property
    def epoch(self) -> int:
        return self.samplers[0].epoch

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        for sampler in self.samplers:
            sampler.epoch = epoch
