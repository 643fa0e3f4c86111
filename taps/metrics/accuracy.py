"""Accuracy of a classification task, or average precision where images have several labels, in all and per class."""

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
        accuracy: share of the images whose most probable class is right, in percent; for several labels per image, the mean of
            the labels' average precisions.
        top5: share of the images with the right class among the five most probable ones, in percent; ``None`` for at most five
            classes, and for several labels.
        per_class: the same by class; ``None`` for a class without images.
        confusion: number of images by class (row) and predicted class (column); ``None`` for several labels.
    """

    accuracy: float
    top5: float | None
    per_class: list[float | None]
    confusion: list[list[int]] | None

    def describe(self, classes: Sequence[str]) -> dict:
        """Return the contents of ``test.json``."""
        per_class = dict(zip(classes, self.per_class, strict=True))
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

    here = {"sync_on_compute": False}  # every process sees all outputs
    confusion = MulticlassConfusionMatrix(num_classes, **here).to(accelerator.device)
    top5 = None
    if num_classes > 5:
        top5 = MulticlassAccuracy(num_classes, top_k=5, average="micro", **here).to(accelerator.device)
    for output, labels in _outputs(model, task, loader, accelerator, limit_batches, title):
        confusion.update(output.argmax(1), labels)
        if top5 is not None:
            top5.update(output, labels)
    best, found = None if top5 is None else 100.0 * float(top5.compute()), confusion.compute().int().tolist()
    right, images = [row[index] for index, row in enumerate(found)], list(map(sum, found))
    per_class = [100.0 * own / count if count else None for own, count in zip(right, images, strict=True)]
    return Tested(100.0 * sum(right) / max(sum(images), 1), best, per_class, found)


def average_precision(
    model: TaskModel,
    task: str,
    loader: DataLoader,
    accelerator: Accelerator,
    num_classes: int,
    limit_batches: int | None = None,
    title: str = "",
) -> Tested:
    """Average precision of each label, and the mean over the labels that some image has; like :func:`accuracy_by_class` for images
    with several labels."""
    from torchmetrics.functional.classification import binary_average_precision

    found = [
        (output.float().cpu(), labels.cpu())
        for output, labels in _outputs(model, task, loader, accelerator, limit_batches, title)
    ]
    output, labels = torch.cat([o for o, _ in found]), torch.cat([y for _, y in found]).int()
    per_class = [
        100.0 * float(binary_average_precision(output[:, index].sigmoid(), labels[:, index]))
        if labels[:, index].any()
        else None
        for index in range(num_classes)
    ]
    known = [value for value in per_class if value is not None]
    return Tested(sum(known) / len(known) if known else 0.0, None, per_class, None)


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
