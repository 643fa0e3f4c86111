"""Multi-task benchmarks: data, network, heads, losses, metrics and pictures of all tasks behind one interface.

Each kind of data (maps, series, volumes, images of several domains) adds its network, heads and pictures to :class:`Benchmark`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from taps.data.multi_label import SPLITS, SharedData, first_inputs, make_evaluation, make_stream
from taps.metrics.losses import make_loss
from taps.metrics.relative_gain import Metrics
from taps.settings.multi_task import MultiTaskSettings
from taps.task_model import TaskModel

_CHECKED = 1000  # samples per split


@dataclass(frozen=True)
class Benchmark:
    """A benchmark whose samples are labelled for all tasks, unless a kind of benchmark says otherwise.

    Each kind has to add ``backbone()``, the network with random weights from the seed or with pretrained weights;
    ``head(task, features)``, a new head; and ``picture(shown)`` if it has :meth:`shown`.

    Attributes:
        data: the chosen tasks and all splits.
        options: settings of the command.
        on_one_image: whether each sample is for all tasks, so that they can share a pass over it.
    """

    data: SharedData
    options: MultiTaskSettings
    on_one_image = True

    @property
    def tasks(self) -> list[str]:
        """Names of the chosen tasks."""
        return list(self.data.tasks)

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes on the data for the user, one line each."""
        return self.data.notes

    def size(self, split: str) -> int:
        """Return the number of samples of ``train``, ``val``, ``test``, or of the parts ``weights`` and ``policy`` of train."""
        return len(self.data.splits[split])

    def without_frames(self) -> Benchmark:
        """Return the benchmark without the frames around its images."""
        return self

    def check(self) -> None:
        """Read samples of every split; small splits are read in full.

        Raises:
            UserError: for mistakes in the data that can be found before training.
        """
        for split in SPLITS:
            samples = self.data.samples(split, split == "train")
            step = max(len(samples) // _CHECKED, 1)
            for index in tqdm(range(0, len(samples), step), desc=f"checking {split}", disable=None, leave=False):
                self.check_sample(samples, index, split)

    def check_sample(self, samples: Dataset, index: int, split: str) -> None:
        """Read a sample of a split; raise a ``UserError`` for a mistake in it."""
        samples[index]

    def criteria(self) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
        """Return the losses by task."""
        labels = "nearest" if self.options.metrics == "published" else "nearest-exact"
        at_output = self.options.loss_at == "output"
        return {name: make_loss(task, labels if at_output else None) for name, task in self.data.tasks.items()}

    def stream(self, split: str, batches: int, seed: int, processes: int, tasks: Sequence[str]):
        """Return a training loader and its sampler."""
        data, size, workers = self.data.choose(tasks), self.options.batch_size, self.options.workers
        return make_stream(data, split, size, batches, seed=seed, workers=workers, processes=processes)

    def match(self, output: Tensor, target: Tensor) -> Tensor:
        """Return a prediction at the size of its labels."""
        return output

    def evaluate(self, model: TaskModel, split: str, accelerator: Accelerator, limit: int | None = None) -> Metrics:
        """Return the metrics of every task of the model on a split, in the model's current mode."""
        from taps.metrics.dense import make_metric  # torchmetrics takes a second to import; --help need not wait

        tasks = model.tasks
        published = self.options.metrics == "published"
        device = "cpu" if accelerator.device.type == "mps" else accelerator.device  # mps has no float64
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
        """Return a batch of inputs from a split."""
        return first_inputs(self.data, split, count or self.options.batch_size)

    def shown(self, model: TaskModel) -> list[dict]:
        """Return some test samples with their labels and, by task, the ``predicted`` values."""
        return []

    def answers(self, model: TaskModel, x: Tensor) -> dict[str, Tensor]:
        """Return every task's output for one input, on the CPU."""
        device = next(model.parameters()).device
        return {task: output.float().cpu()[0] for task, output in model.predict(x[None].to(device)).items()}


def progress(loader: DataLoader, limit: int | None, title: str, accelerator: Accelerator):
    """Iterate over at most ``limit`` batches of a loader with a progress bar."""
    count = min(len(loader), limit or len(loader))
    quiet = None if accelerator.is_main_process else True
    return tqdm(islice(loader, count), total=count, desc=title, disable=quiet, leave=False)
