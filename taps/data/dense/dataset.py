"""Dense benchmarks: images labelled with maps, their random transforms, and the common encoding of labels.

Every benchmark's files are decoded to a dict of arrays per sample:

=============  =========================================  ==================
kind           array                                      missing label
=============  =========================================  ==================
``image``      uint8 or float 0..255, (H, W, 3), RGB
``classes``    int64, (H, W)                              ``IGNORE_INDEX``
``normals``    float32, (3, H, W), unit vectors           NaN
``depth``      float32, (1, H, W), > 0                    NaN
``disparity``  float32, (1, H, W), > 0, inverse depth     NaN
``map``        float32, (1, H, W)                         NaN
``saliency``   int64, (H, W), 0 or 1                      ``IGNORE_INDEX``
``edges``      float32, (1, H, W), 0 or 1                 NaN
=============  =========================================  ==================
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad
from torch.utils.data import Dataset
from torchvision.transforms.functional import adjust_hue, adjust_saturation

from taps.data.multi_label import IGNORE_INDEX, Cache, SharedData, Task
from taps.data.seeded import mix_seed
from taps.settings.task_names import NEIGHBOUR

#: range of the logarithms of Taskonomy's depths
LOG_RANGE = math.log(2.0**16)
KINDS = ("classes", "normals", "depth", "disparity", "log_depth", "map", "saliency", "edges")
#: kinds whose labels are class ids
CLASS_KINDS = ("classes", "saliency")
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CACHE_BYTES = 1 << 30
#: column with the frames around an image, (frames, H, W, 3), of which training takes one
FRAMES = "frames"
_TRIES = 10  # crops drawn until one is varied enough


@dataclass(frozen=True)
class DenseData(SharedData):
    """A dense benchmark; a sample is a mapping from columns to paths of files.

    Attributes:
        read: function from a sample to its image and the label arrays of some tasks.
        crop: side of the training crops in pixels, or (height, width).
        zoom: range of the random scale of training samples; (1, 1) for none.
        varied: (task, share): a crop in which one class of this task covers at least this share of the labelled pixels is
            drawn again, up to ten times; no effect if the task is not chosen.
        distort: randomly change brightness, contrast, saturation and hue of training images.
        published_resize: how the published programs upsample predictions to the labels: ``nearest`` or ``bilinear``.
        frames: columns of the frames around an image, of which training takes one.
        padded: pad samples to at least the crop size in evaluation too, with an unlabelled border.
    """

    read: Callable[[Mapping[str, Path], Sequence[Task]], dict[str, np.ndarray]]
    crop: int | tuple[int, int] = 321
    zoom: tuple[float, float] = (1.0, 1.0)
    varied: tuple[str, float] | None = None
    distort: bool = False
    published_resize: str = "nearest"
    padded: bool = False
    frames: tuple[str, ...] = ()

    @property
    def crop_size(self) -> tuple[int, int]:
        """(height, width) of a crop."""
        return (self.crop, self.crop) if isinstance(self.crop, int) else self.crop

    def size_of(self, image: np.ndarray) -> tuple[int, int]:
        """(height, width) of an image (H, W, 3) in evaluation, with padding."""
        least = self.crop_size if self.padded else (0, 0)
        return max(image.shape[0], least[0]), max(image.shape[1], least[1])

    def group(self, sample: Mapping[str, Path]) -> Hashable:
        return sample["image"]

    def samples(self, split: str, train: bool, seed: int = 0) -> DenseSet:
        return DenseSet(self, split, train, seed)


class DenseSet(Dataset):
    """Images and targets by index; for training by (index, pass), on which the random transform depends with the seed.

    Args:
        data: the benchmark with the chosen tasks.
        split: name of the split.
        train: apply random zooms, flips and crops.
        seed: seed of the random transforms.
    """

    def __init__(self, data: DenseData, split: str, train: bool, seed: int = 0) -> None:
        self.data, self.samples, self.train, self.seed = data, data.splits[split], train, seed
        self._cache = Cache(_CACHE_BYTES)

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, index: int) -> dict[str, np.ndarray]:
        """A sample's arrays; small data sets are read from disk once."""
        return self._cache.get(index, lambda: self.data.read(self._columns(index), list(self.data.tasks.values())))

    def _columns(self, index: int) -> Mapping[str, Path]:
        """The files of a sample; frames are only read for training that uses them."""
        frames = () if self.train else self.data.frames
        return {column: path for column, path in self.samples[index].items() if column not in frames}

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, dict[str, Tensor]]:
        index, number = key if isinstance(key, tuple) else (key, 0)
        arrays = self.read(index)
        image = torch.as_tensor(arrays["image"]).permute(2, 0, 1).float() / 255.0
        generator = torch.Generator().manual_seed(mix_seed(self.seed, index, number))
        random = torch.rand(4, generator=generator).tolist()
        frames = arrays.get(FRAMES) if self.train else None
        if frames is not None:  # beside the image, so that both are distorted alike
            chosen = int(torch.randint(len(frames), (), generator=generator))
            image = torch.cat([image, torch.as_tensor(frames[chosen]).permute(2, 0, 1).float() / 255.0], dim=2)
        if self.train and self.data.distort:
            image = distort(image, generator)
        image = (image - torch.tensor(_MEAN).view(3, 1, 1)) / torch.tensor(_STD).view(3, 1, 1)
        targets = {name: torch.as_tensor(arrays[name]) for name in self.data.tasks}
        if frames is not None:
            image, targets = self._transform(torch.cat(image.chunk(2, dim=2)), targets, random, generator)
            return image[:3], {**targets, NEIGHBOUR: image[3:]}
        if self.train:
            return self._transform(image, targets, random, generator)
        if self.data.padded:
            return self._padded(image, targets)
        return image, targets

    def _transform(self, image: Tensor, targets: dict[str, Tensor], random: list[float], generator: torch.Generator):
        """Apply the same random zoom, flip and crop to the image and every target."""
        kinds = {name: task.kind for name, task in self.data.tasks.items()}
        low, high = self.data.zoom
        zoom = low + (high - low) * random[0]
        if zoom != 1.0:
            size = [round(side * zoom) for side in image.shape[1:]]
            image = interpolate(image[None], size, mode="bilinear", align_corners=False)[0]
            for name, target in targets.items():
                flat = target[None, None].float() if target.dim() == 2 else target[None]
                zoomed = interpolate(flat, size, mode="nearest-exact")[0]
                if kinds[name] == "depth":
                    zoomed = zoomed / zoom  # an enlarged object is nearer
                elif kinds[name] == "disparity":
                    zoomed = zoomed * zoom
                elif kinds[name] == "log_depth":  # log(1 + depth) / log 2¹⁶
                    zoomed = (zoomed * LOG_RANGE).expm1().div(zoom).log1p() / LOG_RANGE
                targets[name] = zoomed[0].to(target.dtype) if target.dim() == 2 else zoomed
        if random[1] < 0.5:
            image = image.flip(-1)
            for name, target in targets.items():
                target = target.flip(-1)
                if kinds[name] == "normals":
                    target = target * torch.tensor([-1.0, 1.0, 1.0]).view(3, 1, 1)
                targets[name] = target
        image, targets = self._padded(image, targets)
        height, width = self.data.crop_size
        place = random[2:]
        for _ in range(_TRIES):
            top, left = int(place[0] * (image.shape[1] - height + 1)), int(place[1] * (image.shape[2] - width + 1))
            window = np.s_[..., top : top + height, left : left + width]
            if self._is_varied(targets, window):
                break
            place = torch.rand(2, generator=generator).tolist()
        return image[window].contiguous(), {name: target[window].contiguous() for name, target in targets.items()}

    def _padded(self, image: Tensor, targets: dict[str, Tensor]):
        """Pad image and targets with an unlabelled border to at least the crop size."""
        gaps = [max(0, want - have) for want, have in zip(self.data.crop_size, image.shape[1:], strict=True)]
        if not any(gaps):
            return image, targets
        border = [side for gap in reversed(gaps) for side in (gap // 2, gap - gap // 2)]
        empty = {
            name: IGNORE_INDEX if task.kind in CLASS_KINDS else float("nan") for name, task in self.data.tasks.items()
        }
        return pad(image, border), {name: pad(target, border, value=empty[name]) for name, target in targets.items()}

    def _is_varied(self, targets: dict[str, Tensor], window: tuple) -> bool:
        """Whether no class covers too much of a crop."""
        if self.data.varied is None or self.data.varied[0] not in targets:
            return True
        name, share = self.data.varied
        labels = targets[name][window]
        counts = torch.bincount(labels[labels != IGNORE_INDEX])
        return len(counts) > 0 and float(counts.max() / counts.sum()) < share


def distort(image: Tensor, generator: torch.Generator) -> Tensor:
    """Photometric distortion (SSD, arXiv 1512.02325, §2.2): brightness, contrast, saturation and hue, each with probability 0.5.

    Brightness is shifted by up to 32 / 255, contrast and saturation are scaled by 0.5 to 1.5, hue is rotated by up to 18°.

    Args:
        image: (3, H, W), RGB in 0..1.
        generator: source of randomness.
    """
    chosen = (torch.rand(4, generator=generator) < 0.5).tolist()
    amount = (2.0 * torch.rand(4, generator=generator) - 1.0).tolist()
    if chosen[0]:
        image = (image + amount[0] * 32.0 / 255.0).clamp(0, 1)
    if chosen[1]:
        image = (image * (1.0 + 0.5 * amount[1])).clamp(0, 1)
    if chosen[2]:
        image = adjust_saturation(image, 1.0 + 0.5 * amount[2])
    if chosen[3]:
        image = adjust_hue(image, 0.05 * amount[3])
    return image
