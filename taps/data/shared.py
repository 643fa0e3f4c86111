"""Samples that carry the labels of all tasks: what a task is, how a data set is divided, and loaders of exact order.

A sample is an input and {task: label}. A label that is not there (:data:`VOID` among class ids, NaN among numbers) takes no
part in losses and metrics, so that tasks may be labelled on different samples, pixels or hours.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from taps.data.images import endless, leave_signals_to_the_main_process, mix_seed, planned_loader
from taps.errors import UserError, unknown

VOID = 255
#: before the names of metrics that are shown and not counted, beside the headline of a task's benchmark
ALSO = "also/"


@dataclass(frozen=True)
class Task:
    """One thing to predict of every sample.

    Attributes:
        name: the task's name.
        kind: of its labels; losses (:mod:`taps.losses`) and metrics (:mod:`taps.meters`) follow from it.
        channels: of the prediction: the number of classes or of yes-or-no questions, 3 for normals, else 1.
        class_weights: of the loss, one a class; ``None`` for equal ones.
        published: names of what the published programs measure of it, where that is not what is measured of its kind;
            ``"void"`` where their pixel accuracy counts pixels without a label as wrong, ``"every_class"`` where their mean
            is over all classes, ``"exact"`` where they measure what the names say.
        positive_weight: factor of the loss of what is there (label 1), for yes-or-no questions.
        scale: mean and standard deviation by which labels were divided, for numbers.
        names: of the classes or questions.
        loss: name in :data:`taps.losses.LOSSES`, where it is not that of the kind.
        headline: the metrics by which the benchmark judges the task; those alone count for Δ_T and for the choice of epochs.
            Empty: what :mod:`taps.scores` counts.
        tolerance: of edges: how far from a labelled one a predicted pixel may lie, in diagonals of the image.
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
        """Metrics as they are reported: those of the ``headline`` first, then the others, set apart by :data:`ALSO`."""
        first = {name: metrics[name] for name in self.headline if name in metrics}
        apart = ALSO if first else ""
        return first | {apart + name: value for name, value in metrics.items() if name not in first}


class Cache:
    """What was read from disk once, up to a size.

    Args:
        room: bytes in this process.
    """

    def __init__(self, room: int) -> None:
        self.room = room
        self._kept: dict[Hashable, tuple] = {}

    def get(self, key: Hashable, read: Callable[[], tuple]) -> tuple:
        """Arrays or tensors by key, read where they are not kept."""
        if key in self._kept:
            return self._kept[key]
        found = read()
        size = sum(part.nbytes for part in found)
        if size <= self.room:
            self.room -= size
            self._kept[key] = found
        return found


@dataclass(frozen=True)
class SharedData:
    """A data set whose samples are labelled for all tasks.

    Attributes:
        name: for messages.
        tasks: by name.
        splits: lists of samples: ``train``, ``val``, ``test``, and ``weights`` and ``policy``, two disjoint parts of
            ``train`` that learn the weights and the policies.
        notes: what a person should know of it, one line each.
    """

    name: str
    tasks: Mapping[str, Task]
    splits: Mapping[str, Sequence]
    notes: tuple[str, ...] = field(default=(), kw_only=True)

    def choose(self, names: Sequence[str]) -> SharedData:
        """The same with some of the tasks.

        Raises:
            UserError: if one is not there.
        """
        for name in names:
            if name not in self.tasks:
                raise unknown(f"task of benchmark {self.name}", name, self.tasks)
        return replace(self, tasks={name: self.tasks[name] for name in names})

    def group(self, sample) -> Hashable:
        """Samples with equal groups stay in one part when ``train`` is divided."""
        return id(sample)

    def samples(self, split: str, train: bool, seed: int = 0) -> Dataset:
        """(input, {task: label}) by index, or for training by (index, pass), which with the seed choose random transforms."""
        raise NotImplementedError


def _part(samples: Sequence, count: int, group: Callable) -> tuple[list, list]:
    """The first samples, about ``count`` of them in whole groups, and the others."""
    taken: set[Hashable] = set()
    size = 0
    members: dict[Hashable, int] = {}
    for sample in samples:
        members[group(sample)] = members.get(group(sample), 0) + 1
    for sample in samples:
        own = group(sample)
        if own not in taken and size + members[own] / 2 <= count:
            taken.add(own)
            size += members[own]
    return [s for s in samples if group(s) in taken], [s for s in samples if group(s) not in taken]


def split_train(data: SharedData, val_fraction: float, policy_fraction: float, seed: int) -> SharedData:
    """Take validation samples out of ``train`` and divide the rest, where the data does not do so itself.

    Args:
        data: has ``train`` and ``test``; a ``val``, ``weights`` and ``policy`` that it brings are kept, less the
            samples that go to validation.
        val_fraction: 0..1 of ``train``; 0 validates on ``test``, as published.
        policy_fraction: 0..1 of the training samples that learn the policies.
        seed: chooses the samples; groups stay together.

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
    for name in ("train", "val", "test", "weights", "policy"):
        if not splits[name]:
            raise UserError(f"{data.name}: no sample is left in {name}")
    return replace(data, splits=splits)


class StreamSampler:
    """``batches`` batches an epoch out of an endless stream, pass after pass, that depends on the seed alone.

    Every sample comes once before any comes again, whatever the length of an epoch. Set ``epoch`` before iterating.

    Args:
        size: number of samples, at least ``batch_size``.
        batch_size: samples a batch.
        batches: of an epoch.
        seed: chooses the order.
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
        data: with the tasks wanted.
        split: name of the split.
        batch_size: samples a batch.
        batches: steps of an epoch of the loop.
        seed: of the order and of the random transforms.
        workers: processes that load.
        processes: the number of batches is a multiple of it.

    Raises:
        UserError: if the split is smaller than a batch.
    """
    samples = data.samples(split, True, seed)
    if len(samples) < batch_size:
        raise UserError(f"{data.name}: --batch_size {batch_size} is larger than the {len(samples)} samples of {split}")
    sampler = StreamSampler(len(samples), batch_size, batches * processes, seed)
    return planned_loader(samples, sampler, workers, seed), sampler


def make_evaluation(data: SharedData, split: str, batch_size: int, workers: int = 0) -> DataLoader:
    """Every sample of a split once and whole, in order. Samples of one batch have to be of one size."""
    return DataLoader(
        data.samples(split, False),
        batch_size=batch_size,
        num_workers=workers,
        worker_init_fn=leave_signals_to_the_main_process,
    )


def first_inputs(data: SharedData, split: str, count: int) -> Tensor:
    """A batch of the first inputs of a split, (B, ...)."""
    samples = data.choose([]).samples(split, False)
    return torch.stack([samples[index][0] for index in range(min(count, len(samples)))])
