"""Multi-task benchmarks: data, network, heads, losses, metrics and pictures of all tasks behind one face.

:class:`Benchmark` is that face. :class:`SharedBenchmark` serves every benchmark whose samples are labelled for all tasks; a
family of data (maps, series, volumes) adds its network, its heads and its pictures.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from taps.data.shared import SharedData, first_inputs, make_evaluation, make_stream
from taps.losses import make_loss
from taps.model import TaskModel

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Metrics = dict[str, dict[str, float]]
_CHECKED = 1000  # samples of a split


class Benchmark:
    """What a multi-task run asks of its data."""

    options: Namespace

    @property
    def tasks(self) -> list[str]:
        """Names of the chosen tasks."""
        raise NotImplementedError

    @property
    def notes(self) -> tuple[str, ...]:
        """What a person should know of the data, one line each."""
        return ()

    def size(self, split: str) -> int:
        """Number of samples of ``train``, ``val``, ``test``, or of the parts ``weights`` and ``policy`` of train."""
        raise NotImplementedError

    def check(self) -> None:
        """Raise a ``UserError`` for what can be known to be wrong before anything is trained."""

    def backbone(self) -> nn.Module:
        """The network, from its seed or its weights."""
        raise NotImplementedError

    def head(self, task: str, features: int) -> nn.Module:
        """A fresh head."""
        raise NotImplementedError

    def criteria(self) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
        """The losses by task."""
        raise NotImplementedError

    def stream(self, split: str, batches: int, seed: int, processes: int, tasks: Sequence[str]):
        """A training loader and its sampler."""
        raise NotImplementedError

    def evaluate(self, model: TaskModel, split: str, accelerator: Accelerator, limit: int | None = None) -> Metrics:
        """The metrics of every task of the model, in the mode it is in, on a split."""
        raise NotImplementedError

    def example(self, split: str = "test", count: int | None = None) -> Tensor:
        """A batch of inputs of a split."""
        raise NotImplementedError

    def shown(self, model: TaskModel) -> list[dict]:
        """Some test samples with what is labelled and, by task, what is ``predicted``."""
        return []

    def picture(self, shown: list[dict]) -> Figure:
        """A picture of what :meth:`shown` returned."""
        raise NotImplementedError


@dataclass(frozen=True)
class SharedBenchmark(Benchmark):
    """Tasks that label the same samples.

    Attributes:
        data: the chosen tasks and all splits.
        options: of the command.
    """

    data: SharedData
    options: Namespace

    @property
    def tasks(self) -> list[str]:
        return list(self.data.tasks)

    @property
    def notes(self) -> tuple[str, ...]:
        return self.data.notes

    def size(self, split: str) -> int:
        return len(self.data.splits[split])

    def check(self) -> None:
        """Read samples of every split, all of them where there are few.

        Raises:
            UserError: if a file holds what it should not.
        """
        for split in ("train", "val", "test"):
            samples = self.data.samples(split, False)
            step = max(len(samples) // _CHECKED, 1)
            for index in tqdm(range(0, len(samples), step), desc=f"checking {split}", disable=None, leave=False):
                samples[index]

    def criteria(self) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
        return {name: make_loss(task, self.options.loss_at == "output") for name, task in self.data.tasks.items()}

    def stream(self, split: str, batches: int, seed: int, processes: int, tasks: Sequence[str]):
        data, size, workers = self.data.choose(tasks), self.options.batch_size, self.options.workers
        return make_stream(data, split, size, batches, seed=seed, workers=workers, processes=processes)

    def match(self, output: Tensor, target: Tensor) -> Tensor:
        """A prediction at its labels' size."""
        return output

    def evaluate(self, model: TaskModel, split: str, accelerator: Accelerator, limit: int | None = None) -> Metrics:
        from taps.meters import make_metric  # torchmetrics: a second of import that --help need not wait for

        tasks = model.tasks
        published = self.options.metrics == "published"
        device = "cpu" if accelerator.device.type == "mps" else accelerator.device  # which has no float64
        meters = {task: make_metric(self.data.tasks[task], published).to(device) for task in tasks}
        loader = make_evaluation(self.data.choose(tasks), split, self.options.batch_size, self.options.workers)
        for x, targets in progress(accelerator.prepare_data_loader(loader), limit, split, accelerator):
            with torch.no_grad(), accelerator.autocast():
                outputs = model(x, tasks=tasks)
            for task in tasks:
                output = self.match(outputs[task].float(), targets[task])
                output, target = accelerator.gather_for_metrics((output, targets[task]))
                meters[task].update(output.to(device), target.to(device))
        return {task: self.data.tasks[task].reported(meter.compute()) for task, meter in meters.items()}

    def example(self, split: str = "test", count: int | None = None) -> Tensor:
        return first_inputs(self.data, split, count or self.options.batch_size)

    def answers(self, model: TaskModel, x: Tensor) -> dict[str, Tensor]:
        """Every task's output for one input, on the CPU."""
        device = next(model.parameters()).device
        return {task: output.float().cpu()[0] for task, output in model.predict(x[None].to(device)).items()}


def progress(loader: DataLoader, limit: int | None, title: str, accelerator: Accelerator):
    """The batches of a loader, ``limit`` at most, with a bar."""
    count = min(len(loader), limit or len(loader))
    quiet = None if accelerator.is_main_process else True
    return tqdm(islice(loader, count), total=count, desc=title, disable=quiet, leave=False)
