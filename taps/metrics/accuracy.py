"""Accuracy of a classification task, over all images and per class."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from taps.task_model import TaskModel


@dataclass(frozen=True)
class Tested:
    """What a task's test found.

    Attributes:
        accuracy: share of the images whose most probable class is right, in percent.
        top5: share of the images with the right class among the five most probable ones, in percent; ``None`` for at most five
            classes.
        confusion: number of images by class (row) and predicted class (column).
    """

    accuracy: float
    top5: float | None
    confusion: list[list[int]]

    def describe(self, classes: Sequence[str]) -> dict:
        """Return the contents of ``test.json``; a class without images has no accuracy."""
        per_class = {
            name: 100.0 * row[index] / sum(row) if sum(row) else None
            for index, (name, row) in enumerate(zip(classes, self.confusion, strict=True))
        }
        return {"accuracy": self.accuracy, "top5": self.top5, "per_class": per_class, "confusion": self.confusion}


def accuracy_by_class(
    model: TaskModel,
    task: str,
    loader: DataLoader,
    accelerator: Accelerator,
    num_classes: int,
    limit_batches: int | None = None,
    title: str = "",
) -> Tested:
    """Accuracy, top-5 accuracy and confusion matrix over the images of a prepared loader, each counted once, in the model's current
    mode."""
    from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

    top1 = MulticlassAccuracy(num_classes=num_classes, average="micro").to(accelerator.device)
    confusion = MulticlassConfusionMatrix(num_classes).to(accelerator.device)
    top5 = (
        MulticlassAccuracy(num_classes=num_classes, average="micro", top_k=5).to(accelerator.device)
        if num_classes > 5
        else None
    )
    for output, labels in _outputs(model, task, loader, accelerator, limit_batches, title):
        top1.update(output.argmax(1), labels)
        confusion.update(output.argmax(1), labels)
        if top5 is not None:
            top5.update(output, labels)
    best = None if top5 is None else 100.0 * float(top5.compute())
    return Tested(100.0 * float(top1.compute()), best, confusion.compute().int().tolist())


@torch.no_grad()
def _outputs(
    model: TaskModel, task: str, loader: DataLoader, accelerator: Accelerator, limit_batches: int | None, title: str
) -> Iterator[tuple[Tensor, Tensor]]:
    count = min(len(loader), limit_batches or len(loader))
    quiet = None if accelerator.is_main_process else True
    for x, labels in tqdm(islice(loader, count), total=count, desc=title or task, disable=quiet, leave=False):
        with accelerator.autocast():
            output = model(x, task=task)
        yield accelerator.gather_for_metrics((output, labels))
