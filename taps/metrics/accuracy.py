"""Top-1 accuracy of a classification task."""

from __future__ import annotations

from itertools import islice

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from tqdm import tqdm

from taps.task_model import TaskModel


@torch.no_grad()
def accuracy(
    model: TaskModel,
    task: str,
    loader: DataLoader,
    accelerator: Accelerator,
    num_classes: int,
    limit_batches: int | None = None,
    title: str = "",
) -> float:
    """Top-1 accuracy in percent over the images of a prepared loader, each counted once, in the model's current mode."""
    from torchmetrics.classification import MulticlassAccuracy  # slow to import

    metric = MulticlassAccuracy(num_classes=num_classes, average="micro").to(accelerator.device)
    count = min(len(loader), limit_batches or len(loader))
    quiet = None if accelerator.is_main_process else True
    batches = tqdm(islice(loader, count), total=count, desc=title or task, disable=quiet, leave=False)
    for x, labels in batches:
        with accelerator.autocast():
            output = model(x, task=task)
        metric.update(*accelerator.gather_for_metrics((output.argmax(1), labels)))
    return 100.0 * float(metric.compute())
