"""Labelled images: what a task's data is, how images are prepared, and loaders whose order and randomness are exact.

Every random choice (order of an epoch, crops, flips) is a function of the seed, the epoch and the image alone. So a run
gives the same numbers for any count of worker processes, and continues in the middle of an epoch as if never stopped.
"""

from __future__ import annotations

import signal
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler
from torchvision.transforms import v2
from torchvision.transforms.functional import InterpolationMode
from tqdm import tqdm

from taps.errors import UserError

#: file name endings that count as images
EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".gif")

Sample = tuple[str, int]


@dataclass(frozen=True)
class TaskData:
    """One task's images.

    Attributes:
        name: the task's name.
        classes: class names by label.
        train, test: (path, label) pairs.
        val: the same for validation, or ``None`` if the data brings none.
        squash: images are scaled to the input size without regard to their proportions (sets cropped to objects).
        flip: whether a mirrored image is still of its class.
        notes: things a person should know of this data, one line each.
    """

    name: str
    classes: tuple[str, ...]
    train: tuple[Sample, ...]
    test: tuple[Sample, ...]
    val: tuple[Sample, ...] | None = None
    squash: bool = False
    flip: bool = True
    notes: tuple[str, ...] = field(default=())


@dataclass(frozen=True)
class Preprocessing:
    """From an image to the backbone's input.

    Attributes:
        input_size: side of the square input in pixels.
        resize: the shorter side is scaled to this many pixels before the centre is cut out for evaluation.
        mean, std: of RGB in 0..1, as the backbone was trained with.
        interpolation: ``"bilinear"`` or ``"bicubic"``.
    """

    input_size: int = 224
    resize: int = 256
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    interpolation: str = "bilinear"

    def transform(self, train: bool, squash: bool = False, flip: bool = True) -> v2.Compose:
        """The transform of a PIL image to a (3, input_size, input_size) float tensor.

        Training: a random resized crop and a mirror; a squashed set is only mirrored. Evaluation: the centre, or the
        whole image for a squashed set.
        """
        mode = InterpolationMode(self.interpolation)
        size = (self.input_size, self.input_size)
        if squash:
            geometry = [v2.Resize(size, mode, antialias=True)]
        elif train:
            geometry = [v2.RandomResizedCrop(size, interpolation=mode, antialias=True)]
        else:
            geometry = [v2.Resize(self.resize, mode, antialias=True), v2.CenterCrop(size)]
        mirror = [v2.RandomHorizontalFlip()] if train and flip else []
        finish = [
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(list(self.mean), list(self.std)),
        ]
        return v2.Compose([*geometry, *mirror, *finish])


def read_image(path: str) -> Image.Image:
    """An image as RGB.

    Raises:
        UserError: if the file is missing, truncated or no image; it is named.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks about metadata do not concern the pixels
            with Image.open(path) as image:
                has_alpha = image.mode == "P" and "transparency" in image.info
                return (image.convert("RGBA") if has_alpha else image).convert("RGB")
    except FileNotFoundError:
        raise UserError(f"image {path} does not exist") from None
    except Exception as error:  # Pillow's decoders raise almost anything on damaged files
        reason = (str(error).splitlines() or [type(error).__name__])[0].replace(repr(path), "the file")
        raise UserError(f"image {path} cannot be read ({reason}); remove it, or use --skip_bad_images") from None


class ImageSet(Dataset):
    """Images and labels by (index, epoch); the epoch and the seed choose the random transform of each image."""

    def __init__(self, samples: Sequence[Sample], transform: v2.Compose, seed: int = 0) -> None:
        self.samples = samples
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, int]:
        index, epoch = key if isinstance(key, tuple) else (key, 0)
        path, label = self.samples[index]
        image = read_image(path)
        with torch.random.fork_rng(devices=[]):
            # the CPU's generator alone: torch.manual_seed would also set back the accelerator's
            torch.default_generator.manual_seed(mix_seed(self.seed, epoch, index))
            return self.transform(image), label


def mix_seed(*numbers: int) -> int:
    """One seed out of several numbers."""
    value = 0
    for number in numbers:
        value = (value * 6364136223846793005 + number + 1442695040888963407) % 2**63
    return value


def endless(size: int, start: int, *seed: int) -> Iterator[tuple[int, int]]:
    """(index, pass) from a position on: every index once in a pass, each pass in an order of its own."""
    number, skip = divmod(start, size)
    while True:
        generator = torch.Generator().manual_seed(mix_seed(*seed, number))
        for index in torch.randperm(size, generator=generator).tolist()[skip:]:
            yield index, number
        number, skip = number + 1, 0


class EpochSampler(Sampler):
    """(index, epoch) pairs in an order that depends on the seed and the epoch alone. Set ``epoch`` before iterating."""

    def __init__(self, size: int, seed: int, shuffle: bool) -> None:
        self.size, self.seed, self.shuffle = size, seed, shuffle
        self.epoch = 0

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        if self.shuffle:
            order = torch.randperm(self.size, generator=torch.Generator().manual_seed(mix_seed(self.seed, self.epoch)))
        else:
            order = torch.arange(self.size)
        return iter([(index, self.epoch) for index in order.tolist()])


def make_loader(
    samples: Sequence[Sample],
    transform: v2.Compose,
    batch_size: int,
    *,
    train: bool,
    seed: int = 0,
    workers: int = 0,
    pin_memory: bool = False,
    processes: int = 1,
) -> tuple[DataLoader, EpochSampler]:
    """A loader and its sampler.

    Training shuffles and uses every image of an epoch once; only a last batch of a single image, which batch
    normalisation cannot take, is left out (a different image each epoch). With several ``processes`` short batches are
    filled up instead.
    """
    sampler = EpochSampler(len(samples), seed, shuffle=train)
    single_left = train and processes == 1 and len(samples) % batch_size == 1 and len(samples) > 1
    batches = BatchSampler(sampler, batch_size, drop_last=single_left)
    keep = train  # evaluation is over before its processes would be used again
    return planned_loader(ImageSet(samples, transform, seed), batches, workers, seed, keep, pin_memory), sampler


def planned_loader(
    samples: Dataset, batches, workers: int, seed: int, keep_workers: bool = True, pin_memory: bool = False
) -> DataLoader:
    """A loader of the batches that a sampler has planned; what it gives does not depend on the number of workers."""
    return DataLoader(
        samples,
        batch_sampler=batches,
        num_workers=workers,
        persistent_workers=keep_workers and workers > 0,
        pin_memory=pin_memory,
        worker_init_fn=leave_signals_to_the_main_process,
        generator=torch.Generator().manual_seed(seed),  # else each epoch would draw from the global one
    )


def leave_signals_to_the_main_process(worker: int) -> None:
    """Ctrl-C reaches every process of a terminal; the main one finishes its step and ends the workers itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def split_validation(task: TaskData, fraction: float, seed: int) -> TaskData:
    """Move a stratified, seeded part of the training images to validation if the data brings no validation split.

    Args:
        task: unchanged if it has validation images.
        fraction: 0..1 of the training images; each class keeps at least one for training.
        seed: chooses the images.

    Raises:
        UserError: if nothing would be left to validate on.
    """
    if task.val is not None or fraction == 0:
        return task
    by_class: dict[int, list[Sample]] = {}
    for sample in task.train:
        by_class.setdefault(sample[1], []).append(sample)
    generator = torch.Generator().manual_seed(mix_seed(seed, len(task.train)))
    chosen: set[Sample] = set()
    owed = 0.0  # carried from class to class, so that many small classes add up to the right number
    for label in sorted(by_class):
        members = by_class[label]
        owed += fraction * len(members)
        take = min(round(owed), len(members) - 1)
        owed -= take
        order = torch.randperm(len(members), generator=generator).tolist()
        chosen.update(members[index] for index in order[: max(take, 0)])
    if not chosen:
        raise UserError(
            f"task {task.name}: val_fraction {fraction} of {len(task.train)} training images leaves none to validate on"
        )
    return replace(
        task,
        train=tuple(sample for sample in task.train if sample not in chosen),
        val=tuple(sample for sample in task.train if sample in chosen),
    )


def without_bad_images(task: TaskData, workers: int = 8) -> tuple[TaskData, list[str]]:
    """Decode every image once and leave out those that cannot be read.

    Returns:
        The task and the paths that were left out.

    Raises:
        UserError: if a split has no image left.
    """
    splits = {name: getattr(task, name) for name in ("train", "val", "test") if getattr(task, name) is not None}
    samples = [sample for split in splits.values() for sample in split]
    with ThreadPoolExecutor(max_workers=max(workers, 1)) as pool:
        checks = pool.map(_is_readable, [path for path, _ in samples])
        try:
            readable = list(tqdm(checks, total=len(samples), desc=f"checking {task.name}", disable=None, leave=False))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    bad = {path for (path, _), good in zip(samples, readable, strict=True) if not good}
    kept = {name: tuple(sample for sample in split if sample[0] not in bad) for name, split in splits.items()}
    for name, split in kept.items():
        if not split:
            raise UserError(f"task {task.name}: none of the {len(splits[name])} images in {name} can be read")
    return replace(task, **kept), sorted(bad)


def _is_readable(path: str) -> bool:
    try:
        read_image(path)
    except UserError:
        return False
    return True


def list_images(folder: Path) -> list[str]:
    """Paths of the images anywhere below a folder, sorted; hidden files are left out."""
    found = []
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in EXTENSIONS and not path.name.startswith("."):
            found.append(str(path))
    return found
