"""Labelled images: the data of a classification task, preprocessing, and loaders with reproducible order and transforms.

Every random choice (order of an epoch, crops, flips) is a function of the seed, the epoch and the image alone. Results
therefore do not depend on the number of worker processes, and a run can resume in the middle of an epoch.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, TypeVar

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler
from torchvision.transforms import v2
from tqdm import tqdm

from taps.data.seeded import mix_seed, planned_loader
from taps.errors import UserError, first_line
from taps.networks.preprocessing import ToRGB

#: file name endings of images
EXTENSIONS = (
    ".jpg", ".jpeg", ".jfif", ".jpe", ".jp2", ".j2k", ".png", ".apng", ".bmp", ".dib", ".webp", ".avif", ".heic", ".heif",
    ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".gif", ".tga", ".pcx", ".sgi",
)  # fmt: skip
#: folders that operating systems and notebooks add
_SYSTEM_FOLDERS = ("__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN")

#: a path and its label, or for images with several labels a 0 or 1 for each
Sample = tuple[str, int | tuple[int, ...]]
T = TypeVar("T")


@dataclass(frozen=True)
class TaskData:
    """The images of one task.

    Attributes:
        name: the task's name.
        classes: class names by label.
        train, test: (path, label) pairs; for several labels per image, the label is a tuple with a 0 or 1 for each class.
        val: the same for validation, or ``None`` if the data has no validation split.
        stretch: resize images to the square input without keeping their aspect ratio (sets cropped to objects).
        flip: whether a mirrored image still belongs to its class.
        notes: remarks about the data to show to the user, one line each.
        is_listed: whether the images come from a list, so that some may be missing.
        known_digest: the :meth:`digest` before images were left out.
    """

    name: str
    classes: tuple[str, ...]
    train: tuple[Sample, ...]
    test: tuple[Sample, ...]
    val: tuple[Sample, ...] | None = None
    stretch: bool = False
    flip: bool = True
    notes: tuple[str, ...] = ()
    is_listed: bool = False
    known_digest: str | None = None

    @property
    def has_several_labels(self) -> bool:
        """Whether images may have several labels, or none."""
        return any(isinstance(label, tuple) for _, label in (self.train or self.test)[:1])

    def digest(self) -> str:
        """Return a hash of the names and labels of the images for training and testing, wherever the data lies."""
        if self.known_digest is not None:
            return self.known_digest
        splits = {"train": sorted((*self.train, *(self.val or ()))), "test": self.test}
        root = os.path.commonpath([path for split in splits.values() for path, _ in split])
        names = {
            name: [(path[len(root) :].replace(os.sep, "/"), label) for path, label in split]
            for name, split in splits.items()
        }
        return hashlib.sha256(json.dumps([self.classes, names]).encode()).hexdigest()

    def is_known_as(self, digest: str) -> bool:
        """Return whether a digest is this task's, perhaps as before version 0.17, when columns of labels were in lower case."""
        lower = replace(self, classes=tuple(name.lower() for name in self.classes), known_digest=None)
        return digest in (self.digest(), lower.digest())


def read_image(path: str, convert: Callable[[Image.Image], T] = ToRGB()) -> T:  # noqa: B008 (has no state)
    """An image as RGB, or as ``convert`` makes it.

    Raises:
        UserError: with the path, if the file is missing, truncated, not an image, or one that ``convert`` refuses.
    """
    try:  # not by its name: Pillow would map the file into memory, and turning such an image scrambles it
        file = open(path, "rb")  # noqa: SIM115 (closed below)
    except FileNotFoundError:
        raise UserError(f"image {path} does not exist") from None
    except OSError as error:
        raise _unreadable(path, error.strerror or str(error)) from None
    with file:
        try:
            return decode_image(file, convert)
        except UnreadableImageError as error:
            raise _unreadable(path, str(error)) from None


def _unreadable(path: str, reason: str) -> UserError:
    return UserError(f"image {path} cannot be read ({reason}); remove it, or use --skip_bad_images")


def decode_image(
    file: IO[bytes],
    convert: Callable[[Image.Image], T],
    max_pixels: float = math.inf,
    formats: Sequence[str] | None = None,
) -> T:
    """An image as ``convert`` makes it, in one of Pillow's ``formats``, or in any.

    Raises:
        UnreadableImageError: with the reason, if the data are not an image, are damaged, or ``convert`` refuses them.
        LargeImageError: if there are more than ``max_pixels``; they are then not decoded.
    """
    is_loaded = False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's warnings about metadata do not concern the pixels
            with Image.open(file, formats=formats) as image:
                if image.width * image.height > max_pixels:
                    raise LargeImageError(
                        f"{image.width} × {image.height} pixels, at most {max_pixels:,.0f} are allowed"
                    )
                image.load()
                is_loaded = True
                return convert(image)
    except Image.DecompressionBombError as error:
        raise LargeImageError(str(error)) from None
    except UnidentifiedImageError:
        raise UnreadableImageError("not an image of a known format") from None
    except Exception as error:  # Pillow's decoders raise almost anything on damaged files
        if isinstance(error, UnreadableImageError) or (is_loaded and not isinstance(error, UserError)):
            raise
        raise UnreadableImageError(first_line(error)) from None


class UnreadableImageError(UserError):
    """Data that are no image, or a damaged one; the message is the reason."""


class LargeImageError(UnreadableImageError):
    """An image with more pixels than are allowed."""


class ImageSet(Dataset):
    """Images and labels by (index, epoch); the random transform of an image depends on the seed and the epoch. Several labels are
    a tensor of zeros and ones, shape (classes,)."""

    def __init__(self, samples: Sequence[Sample], transform: v2.Compose, seed: int = 0) -> None:
        self.samples, self.transform, self.seed = samples, transform, seed

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, int | Tensor]:
        index, epoch = key if isinstance(key, tuple) else (key, 0)
        path, label = self.samples[index]
        with torch.random.fork_rng(devices=[]):
            # only the CPU's generator: torch.manual_seed would also reset the accelerator's
            torch.default_generator.manual_seed(mix_seed(self.seed, epoch, index))
            image = read_image(path, self.transform)
        return image, torch.tensor(label, dtype=torch.float32) if isinstance(label, tuple) else label


class EpochSampler(Sampler):
    """(index, epoch) pairs in an order that depends on the seed and the epoch alone. Set ``epoch`` before iterating."""

    def __init__(self, size: int, seed: int, shuffle: bool) -> None:
        self.size, self.seed, self.shuffle = size, seed, shuffle
        self.epoch = 0

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = torch.arange(self.size)
        if self.shuffle:
            order = torch.randperm(self.size, generator=torch.Generator().manual_seed(mix_seed(self.seed, self.epoch)))
        return iter([(index, self.epoch) for index in order.tolist()])


def make_loader(
    samples: Sequence[Sample],
    transform: v2.Compose,
    batch_size: int,
    *,
    train: bool,
    seed: int = 0,
    workers: int = 0,
    processes: int = 1,
) -> tuple[DataLoader, EpochSampler]:
    """A loader and its sampler.

    A training epoch uses every image once in random order, except that a last batch of a single image is dropped, because
    batch normalisation needs two (it is a different image each epoch). With several ``processes`` short batches are filled up
    instead.
    """
    sampler = EpochSampler(len(samples), seed, shuffle=train)
    single_left = train and processes == 1 and len(samples) % batch_size == 1 and len(samples) > 1
    batches = BatchSampler(sampler, batch_size, drop_last=single_left)
    keep = train  # a validation loader is used too rarely to keep its processes
    return planned_loader(ImageSet(samples, transform, seed), batches, workers, seed, keep), sampler


def choose_stratified(samples: Sequence[Sample], fraction: float, seed: int) -> set[Sample]:
    """Choose a random share of the samples, the same in each class; each class keeps at least one sample that is not chosen.

    A sample with several labels counts for the rarest of them.
    """
    counts = Counter(
        index for _, label in samples if isinstance(label, tuple) for index, own in enumerate(label) if own
    )
    by_class: dict[int, list[Sample]] = {}
    for sample in samples:
        label = sample[1]
        if isinstance(label, tuple):
            label = min((index for index, own in enumerate(label) if own), key=lambda index: counts[index], default=-1)
        by_class.setdefault(label, []).append(sample)
    generator = torch.Generator().manual_seed(mix_seed(seed, len(samples)))
    chosen: set[Sample] = set()
    owed = 0.0  # the remainder is carried over to the next class, so that many small classes add up to the right number
    for _, members in sorted(by_class.items()):
        owed += fraction * len(members)
        take = min(round(owed), len(members) - 1)
        owed -= take
        order = torch.randperm(len(members), generator=generator).tolist()
        chosen.update(members[index] for index in order[: max(take, 0)])
    return chosen


def split_validation(task: TaskData, fraction: float, seed: int) -> TaskData:
    """Move a random stratified part of the training images to validation, if the data has no validation split.

    Args:
        task: returned unchanged if it has validation images.
        fraction: share of the training images in 0..1; each class keeps at least one for training.
        seed: seed of the random choice.

    Raises:
        UserError: if the validation split would be empty.
    """
    if task.val is not None or fraction == 0:
        return task
    chosen = choose_stratified(task.train, fraction, seed)
    if not chosen:
        raise UserError(
            f"task {task.name}: --val_fraction {fraction:g} of {len(task.train)} training images leaves none to validate on; add "
            "images, give a larger fraction, or 0 to select on the test images"
        )
    train = tuple(sample for sample in task.train if sample not in chosen)
    return replace(task, train=train, val=tuple(sample for sample in task.train if sample in chosen))


def without_bad_images(
    task: TaskData,
    workers: int = 8,
    convert: Callable[[Image.Image], Image.Image] = ToRGB(),  # noqa: B008 (has no state)
) -> tuple[TaskData, list[str]]:
    """Decode every image once and leave out those that cannot be read, or that ``convert`` refuses.

    Returns:
        The task, and the paths that were left out.

    Raises:
        UserError: if a split has no image left.
    """
    splits = {name: getattr(task, name) for name in ("train", "val", "test") if getattr(task, name) is not None}
    samples = [sample for split in splits.values() for sample in split]
    with ThreadPoolExecutor(max_workers=max(workers, 1)) as pool:
        checks = pool.map(partial(_is_readable, convert), [path for path, _ in samples])
        try:
            readable = list(tqdm(checks, total=len(samples), desc=f"checking {task.name}", disable=None, leave=False))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    bad = {path for (path, _), good in zip(samples, readable, strict=True) if not good}
    kept = {name: tuple(sample for sample in split if sample[0] not in bad) for name, split in splits.items()}
    for name, split in kept.items():
        if splits[name] and not split:
            raise UserError(f"task {task.name}: none of the {len(splits[name])} images in {name} can be read")
    return replace(task, **kept), sorted(bad)


def _is_readable(convert: Callable[[Image.Image], Image.Image], path: str) -> bool:
    try:
        read_image(path, convert)
    except UserError:
        return False
    return True


def list_images(folder: Path) -> list[str]:
    """Sorted paths of all images below a folder, without hidden files and those of hidden folders."""
    return [str(path) for path in _images_below(folder) if not is_hidden(path, folder)]


def direct_images(folder: Path) -> list[str]:
    """Sorted paths of the images in a folder that are in none of its folders."""
    return [str(path) for path in sorted(folder.iterdir()) if _is_image(path) and not is_hidden(path, folder)]


def hidden_images(folder: Path) -> list[str]:
    """The images below a folder that :func:`list_images` leaves out."""
    return [str(path) for path in _images_below(folder) if is_hidden(path, folder)]


def _images_below(folder: Path) -> list[Path]:
    """Sorted paths of all images below a folder, also in linked folders, each folder once."""
    found, seen = [], set()
    for inner, folders, names in os.walk(folder, followlinks=True):
        place = os.path.realpath(inner)
        if place in seen:
            folders.clear()
            continue
        seen.add(place)
        folders.sort()  # so that of two links to a folder the same one counts everywhere
        found += [path for path in (Path(inner, name) for name in names) if _is_image(path)]
    return sorted(found)


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in EXTENSIONS and path.is_file()


def is_hidden(path: Path, folder: Path) -> bool:
    """Whether a path below ``folder`` is hidden, or in a folder that an operating system has added."""
    return any(part.startswith(".") or part in _SYSTEM_FOLDERS for part in path.relative_to(folder).parts)
