"""Volumes with a table of targets, in the form of the ABCD study's preprocessed images: one file and one row per subject.

    images/<subject>.npy or .nii.gz                    volumes (D, H, W) of equal shape
    images/image_train_SubjectList.txt, …val…, …test…  names of files, one per line
    labels.csv                                         a column ``subjectkey`` and any others

Targets are categories or numbers. A cell that is empty or "nan" is a missing label, which is ignored. Categories and scales
are those of the training subjects. ``taps data subjects`` divides subjects into the three lists.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import Dataset
from tqdm import tqdm

from taps.data.multi_label import IGNORE_INDEX, SPLITS, Cache, SharedData, Task
from taps.data.reading import mistakes_of
from taps.data.records.subjects import LeftOut, Table, join_groups, list_path, listed, read_lists, read_table
from taps.errors import UserError, first_line
from taps.settings.task_names import file_names

_CACHE_BYTES = 1 << 30


def volume_shape(path: Path) -> tuple[int, ...]:
    """The shape of a volume, from the file's header."""
    stored = _open(path)
    if not hasattr(stored, "shape"):
        raise UserError(f"{path} holds several arrays; a volume is one")
    if isinstance(stored, np.ndarray) or len(stored.shape) != 3:
        return tuple(stored.shape)
    from nibabel.orientations import io_orientation

    axes = io_orientation(stored.affine)[:, 0]  # which canonical axis each is
    return tuple(size for _, size in sorted(zip(axes, stored.shape, strict=True)))


def read_volume(path: Path) -> np.ndarray:
    """A volume (D, H, W) as float32; one of NIfTI with its axes from left to right, back to front and bottom to top.

    Raises:
        UserError: if it cannot be read, has not three dimensions, or holds values that are not finite numbers.
    """
    stored = _open(path)
    try:
        array = np.asarray(stored) if isinstance(stored, np.ndarray) else _canonical(stored).get_fdata(dtype=np.float32)
    except Exception as error:  # decoders of compressed files raise almost anything on damaged ones
        raise _unreadable(path, error) from None
    if array.ndim != 3 or array.dtype.kind not in "uif":
        raise UserError(f"{path} holds {array.dtype} of shape {array.shape}; a volume has three dimensions of numbers")
    array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise UserError(f"{path} holds values that are not finite")
    return array


def _canonical(image):
    """A NIfTI image of three dimensions with its axes in their order and direction; others as they are."""
    import nibabel

    return nibabel.as_closest_canonical(image) if len(image.shape) == 3 else image


def _open(path: Path):
    """A memory-mapped array or a nibabel image; both have a shape."""
    if path.suffix != ".npy":
        try:
            import nibabel
        except ImportError:
            raise UserError(f"{path} needs nibabel: pip install 'taps-vision[nifti]'") from None
    try:
        if path.suffix != ".npy":
            return nibabel.load(path)
        with open(path, "rb") as file:
            magic = file.read(6)[:2]
        if magic in (b"\x93N", b"PK"):  # an .npz file gets a message of its own
            return np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:
        raise _unreadable(path, error) from None
    raise UserError(f"{path} cannot be read: it is not an .npy file")


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} cannot be read: {first_line(error)}")


@dataclass(frozen=True)
class VolumeData(SharedData):
    """The benchmark; a sample is a subject.

    Attributes:
        paths: volumes by subject.
        labels: by subject and task, a class id or :data:`~taps.data.multi_label.IGNORE_INDEX`, or a scaled number or NaN.
        groups: groups by subject.
        size: (D, H, W) that volumes are resized to by trilinear interpolation.
        cache: volumes that were read.
    """

    paths: Mapping[str, Path]
    labels: Mapping[str, Mapping[str, float]]
    groups: Mapping[str, Hashable]
    size: tuple[int, int, int]
    cache: Cache = field(default_factory=lambda: Cache(_CACHE_BYTES))

    def group(self, sample: str) -> Hashable:
        return self.groups[sample]

    def samples(self, split: str, train: bool, seed: int = 0) -> VolumeSet:
        return VolumeSet(self, split)


class VolumeSet(Dataset):
    """(1, D, H, W) volumes scaled to 0..1, and {task: label}; up to 1 GiB over all processes is read from disk only once.

    Args:
        data: the benchmark with the chosen tasks.
        split: name of the split.
    """

    def __init__(self, data: VolumeData, split: str) -> None:
        self.data, self.subjects = data, data.splits[split]

    def __len__(self) -> int:
        return len(self.subjects)

    def _volume(self, subject: str) -> Tensor:
        def read() -> tuple[Tensor]:
            array = torch.from_numpy(read_volume(self.data.paths[subject]))
            low, high = array.aminmax()
            volume = ((array - low) / (high - low).clamp(min=1e-12))[None]
            if tuple(volume.shape[1:]) != self.data.size:
                volume = interpolate(volume[None], self.data.size, mode="trilinear", align_corners=False)[0]
            return (volume,)

        return self.data.cache.get(subject, read)[0]

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, dict[str, Tensor]]:
        index = key[0] if isinstance(key, tuple) else key
        own = self.data.labels[self.subjects[index]]
        labels = {
            name: torch.tensor(int(own[name])) if task.kind == "category" else torch.tensor([own[name]])
            for name, task in self.data.tasks.items()
        }
        return self._volume(self.subjects[index]), labels


def _sorted(categories: set[str]) -> list[str]:
    """Categories in numerical order if all are numbers, else in alphabetical order."""
    try:
        return sorted(categories, key=float)
    except ValueError:
        return sorted(categories)


def _categories(table: Table, name: str, splits: Mapping[str, Sequence[str]], found: LeftOut):
    """The task of a categorical target, and the class id of every subject."""
    cells = {subject: table.cell(subject, name) for subjects in splits.values() for subject in subjects}
    known = _sorted({cells[subject] for subject in splits["train"] if cells[subject] is not None})
    if len(known) >= IGNORE_INDEX:
        raise UserError(f"{table.path}: {name} has {len(known)} values; is it a number (--num_target)?")
    ids: dict[str, float] = {}
    for split, subjects in splits.items():
        for subject in subjects:
            cell = cells[subject]
            if cell is not None and cell not in known:
                found.leave_out(
                    f"values of {name} in {split} are in no training row and are left out",
                    f"{cell!r} in {table.path.name} row {table.rows[subject][0]}",
                )
            ids[subject] = known.index(cell) if cell in known else IGNORE_INDEX
        present = {ids[subject] for subject in subjects} - {IGNORE_INDEX}
        if len(present) < 2:
            only = "has no value that training subjects have"
            if present:
                only = f"has only {known[int(min(present))]!r}"
            raise UserError(
                f"{table.path}: {name} {only} among the {len(subjects)} subjects of "
                f"{list_path(Path(), split).name}; divide them again with --stratify {name}, or leave {name} out"
            )
    return Task(name, "category", len(known), names=tuple(known)), ids


def _scaled(table: Table, name: str, splits: Mapping[str, Sequence[str]]):
    """The task of a numeric target, and the value of every subject, standardised by the training subjects."""
    values = {subject: table.number(subject, name) for subjects in splits.values() for subject in subjects}
    for split, subjects in splits.items():
        if len({values[subject] for subject in subjects if not math.isnan(values[subject])}) < 2:
            raise UserError(
                f"{table.path}: {name} has fewer than two different values among the {len(subjects)} subjects of {split}: "
                "divide again, or leave it out"
            )
    known = np.array([values[subject] for subject in splits["train"]])
    mean, std = float(np.nanmean(known)), float(np.nanstd(known))
    return Task(name, "number", 1, scale=(mean, std)), {s: (value - mean) / std for s, value in values.items()}


def _size(paths: Mapping[str, Path], side: int | None, mixed: bool) -> tuple[int, int, int]:
    """The common size of the volumes.

    Raises:
        UserError: if a volume has not three dimensions, or shapes differ and ``mixed`` is false.
    """
    files = tqdm(paths.items(), desc="shapes", disable=None, leave=False)
    shapes = {subject: volume_shape(path) for subject, path in files}
    usual = Counter(shapes.values()).most_common(1)[0][0]
    for subject, shape in shapes.items():
        if len(shape) != 3:
            raise UserError(f"{paths[subject]} has shape {shape}; a volume has three dimensions")
        if shape != usual and not mixed:
            raise UserError(
                f"{paths[subject]} has shape {shape}, the others {usual}: resample it, take it out of its list, or allow it with "
                "--mixed_shapes"
            )
    return (side, side, side) if side else usual


def open_volumes(
    images: Path,
    labels: Path,
    cat_target: Sequence[str] = (),
    num_target: Sequence[str] = (),
    side: int | None = None,
    subject_column: str = "subjectkey",
    group: Sequence[str] = (),
    mixed: bool = False,
    workers: int = 0,
) -> VolumeData:
    """Open the benchmark's files.

    Args:
        images: folder of volumes and lists.
        labels: the CSV table.
        cat_target, num_target: columns with categories and with numbers; the tasks, in this order. Their names are free text;
            tasks have names fit for files (:func:`taps.settings.task_names.file_names`).
        side: side of the cube that volumes are resized to; ``None``: their own size.
        subject_column: column of the subjects.
        group: columns of groups, as in :func:`taps.data.records.subjects.join_groups`; a group has to be in one list, and stays
            together when the training subjects are divided.
        mixed: whether volumes may have different shapes.
        workers: number of loader processes, which share the memory for cached volumes.

    Raises:
        UserError: for no or unknown targets, a wrong row (with file and row), a target with a single value in a split, or a
            volume of another shape.
    """
    targets = [*cat_target, *num_target]
    if not targets:
        raise UserError("choose the targets with --cat_target, --num_target or both")
    if len(set(targets)) != len(targets):
        raise UserError(f"target {Counter(targets).most_common(1)[0][0]!r} is given twice")
    table = read_table(labels, subject_column)
    table.need([*targets, *group])
    found = LeftOut()
    splits, paths = read_lists(images, table, found)
    tasks: dict[str, Task] = {}
    values: dict[str, dict[str, float]] = {}
    for split, subjects in splits.items():
        for subject in list(subjects):
            cells = {name: table.cell(subject, name) for name in targets}
            row = f"{table.path.name} row {table.rows[subject][0]}"
            for name in [name for name, cell in cells.items() if cell is None]:
                found.leave_out(f"subjects have no value of {name} and take no part in it", row)
            if not any(cell is not None for cell in cells.values()):
                found.leave_out("subjects have no value of any target and are left out", row)
                subjects.remove(subject)
                del paths[subject]
        if not subjects:
            raise UserError(f"{list_path(images, split)} leaves no subject with a volume and a label")
    own_names = file_names(targets)
    for name in cat_target:
        task, values[own_names[name]] = _categories(table, name, splits, found)
        tasks[own_names[name]] = replace(task, name=own_names[name])
    for name in num_target:
        task, values[own_names[name]] = _scaled(table, name, splits)
        tasks[own_names[name]] = replace(task, name=own_names[name])
    own = {subject: {name: values[name][subject] for name in tasks} for subject in paths}
    groups = dict(zip(paths, join_groups(table, list(paths), group), strict=True))
    _check_groups(splits, groups, group)
    size, cache = _size(paths, side, mixed), Cache(_CACHE_BYTES // max(workers, 1))
    return VolumeData("volumes", tasks, splits, paths, own, groups, size, cache, notes=found.notes())


def _check_groups(splits: Mapping[str, Sequence[str]], groups: Mapping[str, Hashable], columns: Sequence[str]) -> None:
    """Raise a ``UserError`` for a group with subjects in two lists."""
    home: dict[Hashable, tuple[str, str]] = {}
    for split, subjects in splits.items():
        for subject in subjects:
            other, first = home.setdefault(groups[subject], (split, subject))
            if other != split:
                raise UserError(
                    f"{first} of {list_path(Path(), other).name} and {subject} of {list_path(Path(), split).name} are alike in "
                    f"{' or '.join(columns)}: divide the subjects again with --group, or leave --group out"
                )


def check_volumes(images: Path) -> tuple[list[str], int]:
    """Read every listed volume; returns the lines of a report and the number of mistakes."""
    lists = {split: list_path(images, split) for split in SPLITS}
    names = {split: [name for _, _, name in listed(path)] for split, path in lists.items() if path.is_file()}
    every = Counter(name for own in names.values() for name in own)
    mistakes = [f"  no list of {split}" for split in SPLITS if split not in names]
    mistakes += [f"  {name} is listed twice" for name, count in every.items() if count > 1]
    shapes: Counter = Counter()

    def read(name: str) -> None:
        if not (images / name).is_file():
            raise UserError(f"{images / name} does not exist")
        shapes[read_volume(images / name).shape] += 1

    mistakes += mistakes_of(read, list(every.elements()), "reading")
    lines = [f"{images}: volumes, {', '.join(f'{len(own)} {split}' for split, own in names.items())}", *mistakes]
    wrong = len(mistakes)
    if len(shapes) > 1:
        wrong += shapes.total() - max(shapes.values())
        lines.append(f"  volumes differ in shape: {', '.join(f'{n} of {shape}' for shape, n in shapes.items())}")
    return lines, wrong
