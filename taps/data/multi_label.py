"""Data sets whose samples carry the labels of all tasks: tasks, splits, and loaders with reproducible order.

A sample is an input and {task: label}. Missing labels (:data:`IGNORE_INDEX` for class ids, NaN for numbers) are ignored by
losses and metrics, so that tasks may be labelled on different samples, pixels or hours.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from taps.data.seeded import endless, leave_signals_to_the_main_process, mix_seed, planned_loader
from taps.errors import UserError, check_known

#: class id of samples, pixels or hours without a label
IGNORE_INDEX = 255
SPLITS = ("train", "val", "test")
#: prefix of metrics that are reported but do not count, if the benchmark has headline metrics for the task
ALSO = "also/"


@dataclass(frozen=True)
class Task:
    """A quantity to predict for every sample.

    Attributes:
        name: the task's name.
        kind: kind of its labels, which selects loss (:mod:`taps.metrics.losses`) and metrics (:mod:`taps.metrics.dense`).
        channels: channels of the prediction: number of classes or of binary questions, 3 for normals, else 1.
        class_weights: weight of each class in the loss; ``None`` for equal weights.
        published: how the published programs' metrics differ from those of the kind: ``"void"``: their pixel accuracy counts
            unlabelled pixels as wrong; ``"every_class"``: their mean is over all classes; ``"exact"``: no difference; else
            names of the metrics that they report instead.
        positive_weight: weight of positive labels (1) in the loss of binary questions.
        scale: mean and standard deviation that normalise numeric labels.
        names: names of the classes or questions.
        loss: name in :data:`taps.metrics.losses.LOSSES`; ``None``: the loss of the kind.
        headline: the benchmark's main metrics, which alone count for Δ_T and for the choice of epochs. Empty: all that
            :mod:`taps.metrics.relative_gain` counts.
        tolerance: for edges: largest distance between matching predicted and labelled pixels, relative to the image diagonal.
    """

    name: str
    kind: str
    channels: int
    class_weights: tuple[float, ...] | None = None
    published: tuple[str, ...] = ()
    positive_weight: float = 1.0
    scale: tuple[float, float] = (0.0, 1.0)
    names: tuple[str, ...] = ()
    loss: str | None = None
    headline: tuple[str, ...] = ()
    tolerance: float = 0.0075

    def reported(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Metrics in the order of a report: first the ``headline``, then the others with the prefix :data:`ALSO`."""
        first = {name: metrics[name] for name in self.headline if name in metrics}
        prefix = ALSO if first else ""
        return first | {prefix + name: value for name, value in metrics.items() if name not in first}


class Cache:
    """Keeps arrays that were read from disk, up to a total size.

    Args:
        room: bytes in this process.
    """

    def __init__(self, room: int) -> None:
        self.room = room
        self._kept: dict[Hashable, Any] = {}

    def get(self, key: Hashable, read: Callable[[], Any]) -> Any:
        """A tuple or dict of arrays or tensors by key; ``read`` is called if it is not in the cache."""
        if key in self._kept:
            return self._kept[key]
        found = read()
        size = sum(part.nbytes for part in (found.values() if isinstance(found, dict) else found))
        if size <= self.room:
            self.room -= size
            self._kept[key] = found
        return found


@dataclass(frozen=True)
class SharedData:
    """A data set whose samples are labelled for all tasks.

    Attributes:
        name: name for messages.
        tasks: tasks by name.
        splits: samples of ``train``, ``val`` and ``test``, and of ``weights`` and ``policy``, two disjoint parts of ``train``
            on which weights and policies are trained.
        notes: remarks about the data to show to the user, one line each.
    """

    name: str
    tasks: Mapping[str, Task]
    splits: Mapping[str, Sequence]
    notes: tuple[str, ...] = field(default=(), kw_only=True)

    def choose(self, names: Sequence[str]) -> SharedData:
        """The same data with some of the tasks.

        Raises:
            UserError: for an unknown task.
        """
        check_known(f"task of benchmark {self.name}", names, self.tasks)
        return replace(self, tasks={name: self.tasks[name] for name in names})

    def group(self, sample) -> Hashable:
        """Samples of the same group stay together when ``train`` is divided."""
        return id(sample)

    def samples(self, split: str, train: bool, seed: int = 0) -> Dataset:
        """(input, {task: label}) by index; for training by (index, pass), on which random transforms depend with the seed."""
        raise NotImplementedError


def _part(samples: Sequence, count: int, group: Callable) -> tuple[list, list]:
    """Split off about ``count`` of the first samples in whole groups."""
    taken: set[Hashable] = set()
    size = 0
    for own, members in Counter(map(group, samples)).items():
        if size + members / 2 <= count:
            taken.add(own)
            size += members
    return [s for s in samples if group(s) in taken], [s for s in samples if group(s) not in taken]


def split_train(data: SharedData, val_fraction: float, policy_fraction: float, seed: int) -> SharedData:
    """Divide ``train`` into the splits that the data does not define itself.

    Args:
        data: with ``train`` and ``test``; existing ``val``, ``weights`` and ``policy`` are kept, except that samples chosen
            for validation are removed.
        val_fraction: share of ``train`` in 0..1; 0 validates on ``test``, as published.
        policy_fraction: share of the remaining training samples for ``policy``, in 0..1.
        seed: seed of the random choice; groups stay together.

    Raises:
        UserError: if a part would be empty.
    """
    splits = dict(data.splits)
    size = len(splits["train"])
    order = torch.randperm(size, generator=torch.Generator().manual_seed(mix_seed(seed, size))).tolist()
    samples = [splits["train"][index] for index in order]
    if "val" not in splits:
        count = round(val_fraction * size)
        if val_fraction and not 0 < count < size:
            raise UserError(f"{data.name}: val_fraction {val_fraction} of {size} training samples leaves a part empty")
        val, samples = _part(samples, count, data.group)
        splits["val"] = val or list(splits["test"])
        held = {data.group(sample) for sample in val}
        for name in ("train", "weights", "policy"):
            if name in splits:
                splits[name] = [sample for sample in splits[name] if data.group(sample) not in held]
    if "weights" not in splits or "policy" not in splits:
        count = round(policy_fraction * len(samples))
        splits["policy"], splits["weights"] = _part(samples, count, data.group)
    for name in (*SPLITS, "weights", "policy"):
        if not splits[name]:
            raise UserError(f"{data.name}: no sample is left in {name}")
    return replace(data, splits=splits)


class StreamSampler:
    """``batches`` batches per epoch from an endless stream of passes over the data, whose order depends on the seed alone.

    Passes continue from epoch to epoch: every sample occurs once before any is repeated. Set ``epoch`` before iterating.

    Args:
        size: number of samples, at least ``batch_size``.
        batch_size: samples per batch.
        batches: batches per epoch.
        seed: seed of the order.
    """

    drop_last = True  # every batch is full

    def __init__(self, size: int, batch_size: int, batches: int, seed: int = 0) -> None:
        self.size, self.batch_size, self.batches, self.seed = size, batch_size, batches, seed
        self.epoch = 0

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        stream = endless(self.size, self.epoch * self.batches * self.batch_size, self.seed)
        for _ in range(self.batches):
            yield [next(stream) for _ in range(self.batch_size)]


def make_stream(
    data: SharedData, split: str, batch_size: int, batches: int, *, seed: int = 0, workers: int = 0, processes: int = 1
) -> tuple[DataLoader, StreamSampler]:
    """A training loader over one split and its sampler; batches are (inputs, {task: labels}).

    Args:
        data: data with the chosen tasks.
        split: name of the split.
        batch_size: samples per batch.
        batches: batches per epoch and process.
        seed: seed of the order and of the random transforms.
        workers: number of loader processes.
        processes: number of training processes.

    Raises:
        UserError: if the split is smaller than a batch.
    """
    samples = data.samples(split, True, seed)
    if len(samples) < batch_size:
        raise UserError(f"{data.name}: --batch_size {batch_size} is larger than the {len(samples)} samples of {split}")
    sampler = StreamSampler(len(samples), batch_size, batches * processes, seed)
    return planned_loader(samples, sampler, workers, seed), sampler


def make_evaluation(data: SharedData, split: str, batch_size: int, workers: int = 0) -> DataLoader:
    """A loader of all samples of a split in order, without random transforms. Samples of a batch need the same size."""
    return DataLoader(
        data.samples(split, False),
        batch_size=batch_size,
        num_workers=workers,
        worker_init_fn=leave_signals_to_the_main_process,
    )


def first_inputs(data: SharedData, split: str, count: int) -> Tensor:
    """The first inputs of a split as a batch (B, ...)."""
    samples = data.choose([]).samples(split, False)
    return torch.stack([samples[index][0] for index in range(min(count, len(samples)))])
