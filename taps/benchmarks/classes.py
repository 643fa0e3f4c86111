"""Classification tasks with images of their own as a benchmark."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from taps import commands
from taps.benchmarks.shared import Benchmark, Metrics
from taps.data import TaskData, split_validation
from taps.data.images import ImageSet
from taps.data.tasks import make_task_loader
from taps.errors import UserError
from taps.metrics import accuracy
from taps.model import TaskModel


@dataclass(frozen=True)
class ClassBenchmark(Benchmark):
    """Classification tasks, each with images of its own (DomainNet and any image folders).

    Attributes:
        data: the tasks, with validation images.
        policies: the images of each task that learn the policies, a part of its training images.
        options: of the command.
    """

    data: tuple[TaskData, ...]
    policies: tuple[TaskData, ...]
    options: Namespace

    @property
    def tasks(self) -> list[str]:
        return [task.name for task in self.data]

    def _samples(self, task: str, split: str):
        whole = next(one for one in self.data if one.name == task)
        parts = next(one for one in self.policies if one.name == task)
        validation = whole.val if whole.val is not None else whole.test
        by_split = {"train": whole.train, "val": validation, "test": whole.test}
        return {**by_split, "weights": parts.train, "policy": parts.val}[split]

    def size(self, split: str) -> int:
        """Number of images, a task in the mean."""
        return sum(len(self._samples(task, split)) for task in self.tasks) // len(self.tasks)

    def check(self) -> None:
        """Images are read when they are needed; ``python -m taps.data`` checks their number."""

    def backbone(self) -> nn.Module:
        return commands.make_base(self.options)

    def head(self, task: str, features: int) -> nn.Module:
        return nn.Linear(features, len(next(one for one in self.data if one.name == task).classes))

    def criteria(self) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
        return dict.fromkeys(self.tasks, nn.functional.cross_entropy)

    def _prepare(self):
        return commands.make_preprocessing(
            self.options,
            commands.make_base(Namespace(**{**vars(self.options), "pretrained": False, "model_path": None})),
        )

    def stream(self, split: str, batches: int, seed: int, processes: int, tasks: Sequence[str]):
        prepare = self._prepare()
        whole = {one.name: one for one in self.data}
        return make_task_loader(
            {task: self._samples(task, split) for task in tasks},
            {task: prepare.transform(True, whole[task].squash, whole[task].flip) for task in tasks},
            self.options.batch_size,
            seed=seed,
            workers=self.options.workers,
            processes=processes,
            batches=batches * processes,
        )

    def evaluate(self, model: TaskModel, split: str, accelerator: Accelerator, limit: int | None = None) -> Metrics:
        prepare, found = self._prepare(), {}
        for task in model.tasks:
            whole = next(one for one in self.data if one.name == task)
            samples = ImageSet(self._samples(task, split), prepare.transform(False, whole.squash))
            size = self.options.batch_size  # a last batch of one image would have no statistics of its own
            size += len(samples) % size == 1
            loader = accelerator.prepare_data_loader(DataLoader(samples, size, num_workers=self.options.workers))
            with torch.no_grad():
                value = accuracy(model, task, loader, accelerator, len(whole.classes), limit, split)
            found[task] = {"accuracy": value}
        return found

    def example(self, split: str = "test", count: int | None = None) -> Tensor:
        whole = self.data[0]
        samples = ImageSet(self._samples(whole.name, split), self._prepare().transform(False, whole.squash))
        count = min(count or self.options.batch_size, len(samples))
        return torch.stack([samples[index][0] for index in range(count)])


def open_classes(options: Namespace, accelerator: Accelerator) -> ClassBenchmark:
    with accelerator.local_main_process_first():
        tasks = commands.read_data(options.dataset, options)
    if options.tasks:
        known = [task.name for task in tasks]
        wrong = [name for name in options.tasks if name not in known]
        if wrong:
            raise UserError(f"benchmark domainnet has no task {wrong[0]!r}; it has {', '.join(known)}")
        tasks = [task for task in tasks if task.name in options.tasks]
    whole = [split_validation(task, options.val_fraction, options.seed) for task in tasks]
    parts = [split_validation(replace(task, val=None), options.policy_fraction, options.seed + 1) for task in whole]
    return ClassBenchmark(tuple(whole), tuple(parts), options)
