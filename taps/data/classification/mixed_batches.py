"""Batches that mix the images of several tasks.

An epoch has as many batches as are needed to hold all images of all tasks once. The sampling decides how many images each
task contributes: a task with N_t images gets a share proportional to N_t^(1/T). With ``"proportional"`` (T = 1) every image
occurs once per epoch. With ``"equal"`` (T = ∞) every batch has the same number of images per task, so that small tasks are
repeated and large ones are seen in part. ``"temperature"`` lies in between. A task's images are drawn without replacement
until all have been seen; the next pass has a new order and continues into the next epoch if necessary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from taps.data.classification.images import ImageSet, Sample
from taps.data.seeded import endless, mix_seed, planned_loader
from taps.errors import UserError, unknown
from taps.settings.choices import IMAGE_SAMPLINGS

_FEWEST = 2  # images per task in a batch, if any: batch normalisation needs two


def check_batch_size(batch_size: int, tasks: int) -> None:
    """Raise a ``UserError`` if a batch of several tasks would be too small."""
    if batch_size < _FEWEST * tasks:
        raise UserError(f"a batch of {batch_size} images is too small for {tasks} tasks; use at least two per task")


class TaskSampler:
    """Batches of (task, index, pass) that depend on the seed and the epoch alone. Set ``epoch`` before iterating.

    Args:
        sizes: number of images per task, > 0.
        batch_size: images per batch over all tasks, at least two per task.
        sampling: one of :data:`IMAGE_SAMPLINGS`.
        temperature: T > 0 for ``"temperature"``.
        seed: seed of the order.
        processes: the number of batches per epoch is a multiple of this number of processes.
        batches: batches per epoch; ``None``: as many as hold all images once.

    Raises:
        UserError: for an unknown sampling, or a batch that is too small.
    """

    drop_last = True  # every batch is full

    def __init__(
        self,
        sizes: Sequence[int],
        batch_size: int,
        sampling: str = "equal",
        temperature: float = 2.0,
        seed: int = 0,
        processes: int = 1,
        batches: int | None = None,
    ) -> None:
        if sampling not in IMAGE_SAMPLINGS:
            raise unknown("sampling", sampling, IMAGE_SAMPLINGS)
        check_batch_size(batch_size, len(sizes))
        self.sizes, self.batch_size, self.seed = tuple(sizes), batch_size, seed
        power = {"equal": 0.0, "proportional": 1.0, "temperature": 1.0 / temperature}[sampling]
        weights = [size**power for size in sizes]
        self.shares = [weight / sum(weights) for weight in weights]
        self.batches = batches or processes * math.ceil(sum(sizes) / (batch_size * processes))
        # Processes take the batches in turn, and statistics of norms are those of the first: each sees the same tasks.
        rows = list(self._counts(math.ceil(self.batches / processes)))
        self.plan = [counts for counts in rows for _ in range(processes)][: self.batches]
        self.epoch = 0

    def _counts(self, batches: int) -> Iterator[list[int]]:
        """Images per task for each batch; fractions of an image are carried over to the next batch."""
        owed = [0.0] * len(self.sizes)
        for _ in range(batches):
            owed = [credit + share * self.batch_size for credit, share in zip(owed, self.shares, strict=True)]
            counts = [int(credit + 1e-9) if credit + 1e-9 >= _FEWEST else 0 for credit in owed]
            while sum(counts) < self.batch_size:
                takes_part = [task for task, count in enumerate(counts) if count]
                counts[max(takes_part, key=lambda task: owed[task] - counts[task])] += 1
            owed = [credit - count for credit, count in zip(owed, counts, strict=True)]
            yield counts

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        totals = [sum(counts[task] for counts in self.plan) for task in range(len(self.sizes))]
        streams = [
            endless(size, self.epoch * total, self.seed, task)
            for task, (size, total) in enumerate(zip(self.sizes, totals, strict=True))
        ]
        for counts in self.plan:
            yield [(task, *next(streams[task])) for task, count in enumerate(counts) for _ in range(count)]


class TaskSets(Dataset):
    """(image, label, task) by (task, index, pass), with tasks as indices."""

    def __init__(self, sets: Sequence[ImageSet]) -> None:
        self.sets = sets

    def __len__(self) -> int:
        return sum(map(len, self.sets))

    def __getitem__(self, key: tuple[int, int, int]) -> tuple[Tensor, int, int]:
        task, index, number = key
        image, label = self.sets[task][index, number]
        return image, label, task


def make_task_loader(
    samples: Mapping[str, Sequence[Sample]],
    transforms: Mapping[str, v2.Compose],
    batch_size: int,
    *,
    sampling: str = "equal",
    temperature: float = 2.0,
    seed: int = 0,
    workers: int = 0,
    processes: int = 1,
    batches: int | None = None,
) -> tuple[DataLoader, TaskSampler]:
    """A training loader over several tasks and its sampler; batches are (images, labels, indices of their tasks).

    Args:
        samples: training images by task.
        transforms: transform of each task's images.
        batch_size: average number of images per task in a batch.
        sampling, temperature, seed, processes, batches: as in :class:`TaskSampler`.
        workers: number of loader processes.
    """
    sizes = [len(own) for own in samples.values()]
    sampler = TaskSampler(sizes, batch_size * len(sizes), sampling, temperature, seed, processes, batches)
    sets = [ImageSet(own, transforms[task], mix_seed(seed, n)) for n, (task, own) in enumerate(samples.items())]
    return planned_loader(TaskSets(sets), sampler, workers, seed), sampler
