"""Volumes with a table of targets, as the ABCD study's images are prepared: one file a subject, one row a subject.

    images/<subject>.npy or .nii.gz                    one volume (D, H, W) each, all of one shape
    images/image_train_SubjectList.txt, …val…, …test…  names of files, one a line
    labels.csv                                         a column ``subjectkey``, and any others

Targets are categories or numbers, in any mix. A cell that is empty or "nan" is a label that is not there: the subject takes no
part in that target. Categories and scales are those of the training subjects.

``python -m taps.data.subjects`` divides the subjects into the three lists.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import Dataset
from tqdm import tqdm

from taps.data.shared import VOID, Cache, SharedData, Task
from taps.data.subjects import LeftOut, Table, join_groups, list_path, listed, read_lists, read_table
from taps.errors import UserError

_CACHE_BYTES = 1 << 30


def volume_shape(path: Path) -> tuple[int, ...]:
    """The shape of a volume, from its header."""
    stored = _open(path)
    if not hasattr(stored, "shape"):
        raise UserError(f"{path} holds several arrays; a volume is one")
    return tuple(stored.shape)


def read_volume(path: Path) -> np.ndarray:
    """A volume (D, H, W) as float32.

    Raises:
        UserError: if it cannot be read, has no three dimensions, or holds something else than finite numbers.
    """
    stored = _open(path)
    try:
        array = np.asarray(stored if isinstance(stored, np.ndarray) else stored.get_fdata(dtype=np.float32))
    except Exception as error:  # a decoder of compressed files raises almost anything on damaged ones
        raise UserError(f"{path} cannot be read: {(str(error).splitlines() or [type(error).__name__])[0]}") from None
    if array.ndim != 3 or array.dtype.kind not in "uif":
        raise UserError(f"{path} holds {array.dtype} of shape {array.shape}; a volume has three dimensions of numbers")
    array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise UserError(f"{path} holds values that are not finite")
    return array


def _open(path: Path):
    """A memory-mapped array, or an image of nibabel; both have a shape."""
    try:
        if path.suffix == ".npy":
            with open(path, "rb") as file:
                if file.read(6)[:2] not in (b"\x93N", b"PK"):  # an .npz is told what is wrong with it below
                    raise UserError(f"{path} cannot be read: it is no .npy file")
            return np.load(path, mmap_mode="r", allow_pickle=False)
        try:
            import nibabel
        except ImportError:
            raise UserError(f"{path} needs nibabel: pip install 'taps-vision[nifti]'") from None
        return nibabel.load(path)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path} cannot be read: {(str(error).splitlines() or [type(error).__name__])[0]}") from None


@dataclass(frozen=True)
class VolumeData(SharedData):
    """The benchmark; a sample is a subject.

    Attributes:
        paths: the volume of each subject.
        labels: by subject and task: a class id or :data:`~taps.data.shared.VOID`, a scaled number or NaN.
        groups: of each subject.
        size: (D, H, W) that volumes are brought to, trilinearly.
        cache: of volumes that were read.
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
    """(1, D, H, W) volumes, each scaled to 0..1, and {task: label}; read from disk once, up to 1 GiB of them in all processes.

    Args:
        data: the benchmark with the tasks wanted.
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
    """Categories in the order of their numbers if they all are numbers, else of the alphabet."""
    try:
        return sorted(categories, key=float)
    except ValueError:
        return sorted(categories)


def _categories(table: Table, name: str, splits: Mapping[str, Sequence[str]], found: LeftOut):
    """A category as a task, and the class id of every subject."""
    cells = {subject: table.cell(subject, name) for subjects in splits.values() for subject in subjects}
    known = _sorted({cells[subject] for subject in splits["train"] if cells[subject] is not None})
    if len(known) >= VOID:
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
            ids[subject] = known.index(cell) if cell in known else VOID
        present = {ids[subject] for subject in subjects} - {VOID}
        if len(present) < 2:
            only = (
                f"has only {known[int(next(iter(present)))]!r}"
                if present
                else "has no value that training subjects have"
            )
            raise UserError(
                f"{table.path}: {name} {only} among the {len(subjects)} subjects of "
                f"{list_path(Path(), split).name}; divide them again with --stratify {name}, or leave {name} out"
            )
    return Task(name, "category", len(known), names=tuple(known)), ids


def _scaled(table: Table, name: str, splits: Mapping[str, Sequence[str]]):
    """A number as a task, and the scaled value of every subject; the scale is that of the training subjects."""
    values = {subject: table.number(subject, name) for subjects in splits.values() for subject in subjects}
    for split, subjects in splits.items():
        if len({values[subject] for subject in subjects if not math.isnan(values[subject])}) < 2:
            raise UserError(
                f"{table.path}: {name} has less than two different values among the {len(subjects)} subjects of {split}: "
                "divide again, or leave it out"
            )
    known = np.array([values[subject] for subject in splits["train"]])
    mean, std = float(np.nanmean(known)), float(np.nanstd(known))
    return Task(name, "number", 1, scale=(mean, std)), {s: (value - mean) / std for s, value in values.items()}


def _size(paths: Mapping[str, Path], side: int | None, mixed: bool) -> tuple[int, int, int]:
    """The size that volumes are brought to.

    Raises:
        UserError: if a volume has no three dimensions, or their shapes differ and that is not allowed.
    """
    shapes = {
        subject: volume_shape(path) for subject, path in tqdm(paths.items(), desc="shapes", disable=None, leave=False)
    }
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
    """The benchmark from its files.

    Args:
        images: folder of volumes and lists.
        labels: the CSV.
        cat_target, num_target: columns that are categories and numbers; the tasks, in this order.
        side: of the cube that volumes are brought to; ``None``: as they are.
        subject_column: column of the subjects.
        group: columns; subjects alike in one of them stay together when the training subjects are divided, and may not
            be in different lists.
        mixed: whether volumes may have different shapes.
        workers: processes that will read, which share the room for what is kept.

    Raises:
        UserError: for no or unknown targets, a wrong row (named by file and row), a target with one value in a split,
            or a volume of another shape.
    """
    targets = [*cat_target, *num_target]
    if not targets:
        raise UserError("name what is to be predicted with --cat_target, --num_target or both")
    for name in targets:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise UserError(f"target {name!r} of {labels}: rename the column to letters, digits, '_' and '-'")
    if len(set(targets)) != len(targets):
        raise UserError(f"target {Counter(targets).most_common(1)[0][0]!r} is named twice")
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
    for name in targets:
        tasks[name], values[name] = (
            _categories(table, name, splits, found) if name in cat_target else _scaled(table, name, splits)
        )
    own = {subject: {name: values[name][subject] for name in targets} for subject in paths}
    groups = dict(zip(paths, join_groups(table, list(paths), group), strict=True))
    _check_groups(splits, groups, group)
    size = _size(paths, side, mixed)
    return VolumeData(
        "volumes", tasks, splits, paths, own, groups, size, Cache(_CACHE_BYTES // max(workers, 1)), notes=found.notes()
    )


def _check_groups(splits: Mapping[str, Sequence[str]], groups: Mapping[str, Hashable], columns: Sequence[str]) -> None:
    """Refuse groups with subjects in two lists."""
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
    """Read every volume of the lists: lines for a person, and how many are wrong."""
    names = {
        split: [name for _, _, name in listed(list_path(images, split))]
        for split in ("train", "val", "test")
        if list_path(images, split).is_file()
    }
    lines = [f"{images}: volumes, {', '.join(f'{len(own)} {split}' for split, own in names.items())}"]
    wrong = 3 - len(names)
    lines += [f"  no list of {split}" for split in ("train", "val", "test") if split not in names]
    twice = [name for name, count in Counter(name for own in names.values() for name in own).items() if count > 1]
    wrong += len(twice)
    lines += [f"  {name} is listed twice" for name in twice]
    shapes: Counter = Counter()
    for name in tqdm([name for own in names.values() for name in own], desc="reading", disable=None, leave=False):
        try:
            if not (images / name).is_file():
                raise UserError(f"{images / name} does not exist")
            shapes[read_volume(images / name).shape] += 1
        except UserError as error:
            wrong += 1
            lines.append(f"  {error}")
    if len(shapes) > 1:
        wrong += sum(shapes.values()) - shapes.most_common(1)[0][1]
        lines.append(f"  volumes differ in shape: {', '.join(f'{n} of {shape}' for shape, n in shapes.items())}")
    return lines, wrong
