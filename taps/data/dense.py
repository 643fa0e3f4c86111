"""Images with maps as labels: what a dense benchmark is, how it is read and prepared, and loaders of exact order.

Whatever a benchmark's files look like, a sample is a dict of arrays in one encoding:

=============  =========================================  ==========================
kind           array                                      where there is no label
=============  =========================================  ==========================
``image``      uint8 or float 0..255, (H, W, 3), RGB
``classes``    int64, (H, W)                              :data:`VOID`
``normals``    float32, (3, H, W), unit vectors           NaN
``depth``      float32, (1, H, W), > 0                    NaN
``disparity``  float32, (1, H, W), > 0, inverse depth     NaN
``map``        float32, (1, H, W)                         NaN
=============  =========================================  ==========================
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad
from torch.utils.data import DataLoader, Dataset

from taps.data.images import endless, leave_signals_to_the_main_process, mix_seed, planned_loader
from taps.errors import UserError, unknown

VOID = 255
KINDS = ("classes", "normals", "depth", "disparity", "map")
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CACHE_BYTES = 1 << 30


@dataclass(frozen=True)
class DenseTask:
    """One map to predict for every image.

    Attributes:
        name: the task's name.
        kind: one of :data:`KINDS`.
        channels: of the prediction: the number of classes, 3 for normals, else 1.
        class_weights: of the loss, one a class; ``None`` for equal ones.
        published: names of what the published programs measure of it, where that is not what is measured of its kind;
            ``"void"`` where their pixel accuracy counts pixels without a label as wrong.
    """

    name: str
    kind: str
    channels: int
    class_weights: tuple[float, ...] | None = None
    published: tuple[str, ...] = ()


@dataclass(frozen=True)
class DenseData:
    """A dense benchmark.

    Attributes:
        name: for messages.
        tasks: by name.
        splits: lists of samples, each the paths of its files by column: ``train``, ``val``, ``test``, and ``weights`` and
            ``policy``, two disjoint parts of ``train`` that learn the weights and the policies.
        read: from a sample to its image and the label arrays of some tasks.
        crop: side of the training crops in pixels, or (height, width).
        zoom: range of a random scale of training samples; (1, 1) for none.
    """

    name: str
    tasks: Mapping[str, DenseTask]
    splits: Mapping[str, Sequence[Mapping[str, Path]]]
    read: Callable[[Mapping[str, Path], Sequence[DenseTask]], dict[str, np.ndarray]]
    crop: int | tuple[int, int] = 321
    zoom: tuple[float, float] = (1.0, 1.0)

    def choose(self, names: Sequence[str]) -> DenseData:
        """The same with some of the tasks.

        Raises:
            UserError: if the benchmark lacks one.
        """
        for name in names:
            if name not in self.tasks:
                raise unknown(f"task of benchmark {self.name}", name, self.tasks)
        return replace(self, tasks={name: self.tasks[name] for name in names})


def split_train(data: DenseData, val_fraction: float, policy_fraction: float, seed: int) -> DenseData:
    """Take validation samples out of ``train`` and divide the rest, where the data does not do so itself.

    Args:
        data: has ``train`` and ``test``; a ``val``, ``weights`` and ``policy`` that it brings are kept, less the
            samples that go to validation.
        val_fraction: 0..1 of ``train``; 0 validates on ``test``, as published.
        policy_fraction: 0..1 of the training samples that learn the policies.
        seed: chooses the samples.

    Raises:
        UserError: if a part would be empty.
    """
    splits = dict(data.splits)
    order = torch.randperm(
        len(splits["train"]), generator=torch.Generator().manual_seed(mix_seed(seed, len(splits["train"])))
    ).tolist()
    samples = [splits["train"][index] for index in order]
    if "val" not in splits:
        count = round(val_fraction * len(samples))
        if val_fraction and not 0 < count < len(samples):
            raise UserError(
                f"{data.name}: val_fraction {val_fraction} of {len(samples)} training samples leaves a part empty"
            )
        splits["val"], samples = (samples[:count] or list(splits["test"])), samples[count:]
        held = {sample["image"] for sample in splits["val"]}
        for name in ("train", "weights", "policy"):
            if name in splits:
                splits[name] = [sample for sample in splits[name] if sample["image"] not in held]
    if "weights" not in splits or "policy" not in splits:
        count = round(policy_fraction * len(samples))
        splits["policy"], splits["weights"] = samples[:count], samples[count:]
    for name in ("train", "val", "test", "weights", "policy"):
        if not splits[name]:
            raise UserError(f"{data.name}: no sample is left in {name}")
    return replace(data, splits=splits)


class DenseSet(Dataset):
    """Images and targets by index, or for training by (index, pass), which with the seed choose the random transform.

    Args:
        data: the benchmark with the tasks wanted.
        split: name of the split.
        train: crop, zoom and mirror at random.
        seed: of the random transforms.
    """

    def __init__(self, data: DenseData, split: str, train: bool, seed: int = 0) -> None:
        self.data, self.samples, self.train, self.seed = data, data.splits[split], train, seed
        self._kept: dict[int, dict[str, np.ndarray]] = {}
        self._room = _CACHE_BYTES

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, index: int) -> dict[str, np.ndarray]:
        """A sample's arrays; small data sets are read from disk once."""
        if index not in self._kept:
            arrays = self.data.read(self.samples[index], list(self.data.tasks.values()))
            size = sum(array.nbytes for array in arrays.values())
            if size > self._room:
                return arrays
            self._room -= size
            self._kept[index] = arrays
        return self._kept[index]

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, dict[str, Tensor]]:
        index, number = key if isinstance(key, tuple) else (key, 0)
        arrays = self.read(index)
        image = torch.as_tensor(arrays["image"]).permute(2, 0, 1).float() / 255.0
        image = (image - torch.tensor(_MEAN).view(3, 1, 1)) / torch.tensor(_STD).view(3, 1, 1)
        targets = {name: torch.as_tensor(arrays[name]) for name in self.data.tasks}
        if self.train:
            generator = torch.Generator().manual_seed(mix_seed(self.seed, index, number))
            image, targets = self._transform(image, targets, generator)
        return image, targets

    def _transform(self, image: Tensor, targets: dict[str, Tensor], generator: torch.Generator):
        """A random zoom, mirror and crop of the image and, in step with it, of every target."""
        kinds = {name: task.kind for name, task in self.data.tasks.items()}
        random = torch.rand(4, generator=generator).tolist()
        low, high = self.data.zoom
        zoom = low + (high - low) * random[0]
        if zoom != 1.0:
            size = [round(side * zoom) for side in image.shape[1:]]
            image = interpolate(image[None], size, mode="bilinear", align_corners=False)[0]
            for name, target in targets.items():
                flat = target[None, None].float() if target.dim() == 2 else target[None]
                zoomed = interpolate(flat, size, mode="nearest-exact")[0]
                if kinds[name] == "depth":
                    zoomed = zoomed / zoom  # what looks larger is nearer
                elif kinds[name] == "disparity":
                    zoomed = zoomed * zoom
                targets[name] = zoomed[0].to(target.dtype) if target.dim() == 2 else zoomed
        if random[1] < 0.5:
            image = image.flip(-1)
            for name, target in targets.items():
                target = target.flip(-1)
                if kinds[name] == "normals":
                    target = target * torch.tensor([-1.0, 1.0, 1.0]).view(3, 1, 1)
                targets[name] = target
        height, width = (self.data.crop, self.data.crop) if isinstance(self.data.crop, int) else self.data.crop
        missing = [
            max(0, want - have) for want, have in zip((width, height), (image.shape[2], image.shape[1]), strict=True)
        ]
        border = [side for gap in missing for side in (gap // 2, gap - gap // 2)]
        top = int(random[2] * (image.shape[1] + missing[1] - height + 1))
        left = int(random[3] * (image.shape[2] + missing[0] - width + 1))

        def cut(tensor: Tensor, empty: float) -> Tensor:
            tensor = pad(tensor, border, value=empty) if any(missing) else tensor
            return tensor[..., top : top + height, left : left + width].contiguous()

        empty = {name: VOID if kind == "classes" else float("nan") for name, kind in kinds.items()}
        return cut(image, 0.0), {name: cut(target, empty[name]) for name, target in targets.items()}


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
    data: DenseData, split: str, batch_size: int, batches: int, *, seed: int = 0, workers: int = 0, processes: int = 1
) -> tuple[DataLoader, StreamSampler]:
    """A training loader over one split and its sampler; batches are (images, {task: target}).

    Args:
        data: the benchmark with the tasks wanted.
        split: name of the split.
        batch_size: samples a batch.
        batches: steps of an epoch of the loop.
        seed: of the order and of the random transforms.
        workers: processes that load.
        processes: the number of batches is a multiple of it.

    Raises:
        UserError: if the split is smaller than a batch.
    """
    samples = DenseSet(data, split, True, seed)
    if len(samples) < batch_size:
        raise UserError(f"{data.name}: --batch_size {batch_size} is larger than the {len(samples)} samples of {split}")
    sampler = StreamSampler(len(samples), batch_size, batches * processes, seed)
    return planned_loader(samples, sampler, workers, seed), sampler


def make_evaluation(data: DenseData, split: str, batch_size: int, workers: int = 0) -> DataLoader:
    """Every sample of a split once and whole, in order. Samples of one batch have to be of one size."""
    return DataLoader(
        DenseSet(data, split, False),
        batch_size=batch_size,
        num_workers=workers,
        worker_init_fn=leave_signals_to_the_main_process,
    )
