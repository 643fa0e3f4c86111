"""Benchmarks of classification tasks, each with its own images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from taps.benchmarks.base import Benchmark
from taps.data import opening
from taps.data.classification.images import ImageSet, TaskData, split_validation
from taps.data.classification.mixed_batches import make_task_loader
from taps.errors import UserError, check_known
from taps.metrics.accuracy import accuracy_by_class
from taps.metrics.relative_gain import Metrics
from taps.settings.multi_task import MultiTaskSettings
from taps.task_model import TaskModel


@dataclass(frozen=True)
class ClassBenchmark(Benchmark):
    """A benchmark of classification tasks, each with its own images (DomainNet and any image folders).

    Attributes:
        data: the tasks by name, with validation images.
        options: settings of the command.
        parts: the same tasks, with the images on which policies are learned instead of validation images.
    """

    data: Mapping[str, TaskData]
    parts: Mapping[str, TaskData]
    notes = ()

    on_one_image = False

    @property
    def tasks(self) -> list[str]:
        return list(self.data)

    def _samples(self, task: str, split: str):
        whole, parts = self.data[task], self.parts[task]
        validation = whole.val if whole.val is not None else whole.test
        by_split = {"train": whole.train, "val": validation, "test": whole.test}
        return {**by_split, "weights": parts.train, "policy": parts.val}[split]

    def size(self, split: str) -> int:
        """Return the mean number of images per task."""
        return sum(len(self._samples(task, split)) for task in self.tasks) // len(self.tasks)

    def check(self) -> None:
        """Do nothing: images are read on demand, and ``taps data check`` checks their number."""

    def backbone(self) -> nn.Module:
        return opening.make_base(self.options)

    def head(self, task: str, features: int) -> nn.Module:
        return nn.Linear(features, len(self.data[task].classes))

    def criteria(self) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
        return dict.fromkeys(self.tasks, nn.functional.cross_entropy)

    def _prepare(self):
        return opening.make_preprocessing(
            self.options,
            opening.make_base(replace(self.options, pretrained=False, model_path=None)),
        )

    def stream(self, split: str, batches: int, seed: int, processes: int, tasks: Sequence[str]):
        prepare = self._prepare()
        return make_task_loader(
            {task: self._samples(task, split) for task in tasks},
            {task: prepare.transform(True, self.data[task].stretch, self.data[task].flip) for task in tasks},
            self.options.batch_size,
            seed=seed,
            workers=self.options.workers,
            processes=processes,
            batches=batches * processes,
        )

    def evaluate(self, model: TaskModel, split: str, accelerator: Accelerator, limit: int | None = None) -> Metrics:
        prepare, found = self._prepare(), {}
        for task in model.tasks:
            whole, own = self.data[task], self._samples(task, split)
            # Mixed, for files come by class, and statistics of a batch of one class would not be those of training.
            order = torch.randperm(len(own), generator=torch.Generator().manual_seed(0)).tolist()
            samples = ImageSet([own[index] for index in order], prepare.transform(False, whole.stretch))
            size = self.options.batch_size  # a last batch of one image would have no batch statistics
            size += len(samples) % size == 1
            loader = accelerator.prepare_data_loader(DataLoader(samples, size, num_workers=self.options.workers))
            with torch.no_grad():
                result = accuracy_by_class(model, task, loader, accelerator, len(whole.classes), limit, split)
            found[task] = {"accuracy": result.accuracy}
        return found

    def example(self, split: str = "test", count: int | None = None) -> Tensor:
        task, whole = next(iter(self.data.items()))
        samples = ImageSet(self._samples(task, split), self._prepare().transform(False, whole.stretch))
        count = min(count or self.options.batch_size, len(samples))
        return torch.stack([samples[index][0] for index in range(count)])


def open_classes(options: MultiTaskSettings, accelerator: Accelerator) -> ClassBenchmark:
    with accelerator.local_main_process_first():
        tasks = opening.read_data(options.dataset, options)
    several = [task.name for task in tasks if task.has_several_labels]
    if several:
        raise UserError(f"task {several[0]}: images with several labels are for train_sequential.py")
    if options.tasks:
        check_known("task of benchmark domainnet", options.tasks, [task.name for task in tasks])
        tasks = [task for task in tasks if task.name in options.tasks]
    whole = {task.name: split_validation(task, options.val_fraction, options.seed) for task in tasks}
    parts = {
        name: split_validation(replace(task, val=None), options.policy_fraction, options.seed + 1)
        for name, task in whole.items()
    }
    return ClassBenchmark(whole, options, parts)
