"""Images with maps as labels: what a dense benchmark is, how it is read and prepared.

Whatever a benchmark's files look like, a sample is a dict of arrays in one encoding:

=============  =========================================  ==========================
kind           array                                      where there is no label
=============  =========================================  ==========================
``image``      uint8 or float 0..255, (H, W, 3), RGB
``classes``    int64, (H, W)                              ``VOID``
``normals``    float32, (3, H, W), unit vectors           NaN
``depth``      float32, (1, H, W), > 0                    NaN
``disparity``  float32, (1, H, W), > 0, inverse depth     NaN
``map``        float32, (1, H, W)                         NaN
=============  =========================================  ==========================
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad
from torch.utils.data import Dataset

from taps.data.images import mix_seed
from taps.data.shared import VOID, SharedData, Task

KINDS = ("classes", "normals", "depth", "disparity", "map")
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CACHE_BYTES = 1 << 30


@dataclass(frozen=True)
class DenseData(SharedData):
    """A dense benchmark; a sample is the paths of its files by column.

    Attributes:
        read: from a sample to its image and the label arrays of some tasks.
        crop: side of the training crops in pixels, or (height, width).
        zoom: range of a random scale of training samples; (1, 1) for none.
    """

    read: Callable[[Mapping[str, Path], Sequence[Task]], dict[str, np.ndarray]]
    crop: int | tuple[int, int] = 321
    zoom: tuple[float, float] = (1.0, 1.0)

    def group(self, sample: Mapping[str, Path]) -> Hashable:
        return sample["image"]

    def samples(self, split: str, train: bool, seed: int = 0) -> DenseSet:
        return DenseSet(self, split, train, seed)


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
