r"""Hospital stays as mimic3-benchmarks lays them out for its multitask setting (Harutyunyan et al., Scientific Data 2019).

    train_listfile.csv, val_listfile.csv, test_listfile.csv      a row a stay, see below
    train/<patient>_episode<n>_timeseries.csv                    Hours and 17 channels, a cell for each measurement
    test/…
    discretizer_config.json                                      the channels, their categories and their normal values
    normalizer.json or .npz                                      means and stds of the 76 columns

A row of a list holds ``filename, length of stay, pos;mask;label, m1;…;mT;y1;…;yT, y1;…;y25, m1;…;mT;y1;…;yT``: the hours of
the stay, in-hospital mortality, remaining hours at each hour, phenotypes, and whether the patient dies within 24 hours.

A stay becomes hourly bins of 59 values and 17 flags "measured in this hour"; what was not measured is the value before it, or
the channel's normal value. All four tasks are asked per hour: mortality at hour 47, the phenotypes at the last hour, the
others at every hour of the masks. Everything else is NaN. ``python -m taps.data.mimic3 ROOT`` fits the normaliser.
"""

from __future__ import annotations

import csv
import math
import os
import sys
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from taps.arguments import Parser
from taps.data.shared import SharedData, Task
from taps.errors import UserError, unknown
from taps.files import read_json, write_json

PHENOTYPES = 25
TASKS = {
    "ihm": Task("ihm", "binary", 1),
    "decomp": Task("decomp", "binary", 1),
    "los": Task("los", "duration", 10),
    "pheno": Task("pheno", "binary", PHENOTYPES),
}
ALIASES = {
    "mortality": "ihm", "decompensation": "decomp", "length_of_stay": "los", "phenotypes": "pheno", "phenotyping": "pheno",
}  # fmt: skip
_COLUMNS = ("filename", "length of stay", "mortality", "remaining hours", "phenotypes", "decompensation")
_EPSILON = 1e-6  # of an hour: a measurement on the hour belongs to the hour before, as in the benchmark
_CACHE_BYTES = 1 << 29


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError
    return value


class Discretizer:
    """From measurements to hourly bins.

    Args:
        path: ``discretizer_config.json``: ``id_to_channel``, ``is_categorical_channel``, ``possible_values``,
            ``normal_values``.

    Raises:
        UserError: if the file is missing or lacks something.
    """

    def __init__(self, path: Path) -> None:
        config = read_json(path)
        try:
            self.channels = [str(name) for name in config["id_to_channel"]]
            self.values = {
                name: {str(value): index for index, value in enumerate(config["possible_values"][name])}
                if config["is_categorical_channel"][name]
                else None
                for name in self.channels
            }
            self.normal = [self.encode(name, str(config["normal_values"][name]), str(path)) for name in self.channels]
        except (KeyError, TypeError) as error:
            raise UserError(f"{path} lacks {error}; it should be mimic3-benchmarks' discretizer_config.json") from None
        self._parsers = [_finite if own is None else own.__getitem__ for own in self.values.values()]
        self.widths = [1 if own is None else len(own) for own in self.values.values()]
        names = [[name] if own is None else [f"{name}->{value}" for value in own] for name, own in self.values.items()]
        self.header = [name for own in names for name in own] + [f"mask->{name}" for name in self.channels]
        self.continuous = [index for index, name in enumerate(self.header) if "->" not in name]

    def encode(self, channel: str, text: str, where: str) -> float:
        """A cell as a number: the measurement, or the index of its category."""
        known = self.values[channel]
        if known is not None:
            if text not in known:
                raise UserError(f"{where}: {text!r} is no value of {channel}; known are {', '.join(known)}")
            return float(known[text])
        try:
            return _finite(text)
        except ValueError:
            raise UserError(f"{where}: {channel} is {text!r}, not a number") from None

    def read(self, path: Path, hours: float) -> tuple[np.ndarray, np.ndarray]:
        """The bins of a stay.

        Args:
            path: the time series.
            hours: length of the stay; later measurements are left out, as in the benchmark.

        Returns:
            Values (T, channels) float32, categories by index; and whether each was measured, (T, channels) bool.

        Raises:
            UserError: naming file and row, for a missing or unknown column, an unknown category, a value that is no
                number, or hours out of order.
        """
        count = int(hours + 1.0 - _EPSILON)
        values = np.zeros((count, len(self.channels)), np.float32)
        measured = np.zeros((count, len(self.channels)), bool)
        try:
            with open(path, newline="", encoding="utf-8") as file:
                rows = csv.reader(file)
                columns = self._columns(path, next(rows, []))
                before = -math.inf
                for number, row in enumerate(rows, 2):
                    hour = self._hour(path, number, row, len(columns), before)
                    before = hour
                    if hour > hours + _EPSILON:
                        continue
                    bin_index = int(hour - _EPSILON)
                    for column, text in zip(columns, row[1:], strict=True):
                        if text:
                            try:
                                values[bin_index, column] = self._parsers[column](text)
                            except (KeyError, ValueError):
                                self.encode(self.channels[column], text, f"{path} row {number}")  # says what is wrong
                            measured[bin_index, column] = True
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise UserError(f"{path} cannot be read: {error}") from None
        # The row of the last measurement before each bin, so that one look-up fills all gaps.
        last = np.maximum.accumulate(np.where(measured, np.arange(count)[:, None], -1), 0)
        filled = np.take_along_axis(values, np.maximum(last, 0), 0)
        return np.where(last < 0, np.asarray(self.normal, np.float32), filled), measured

    def _columns(self, path: Path, header: list[str]) -> list[int]:
        if not header or header[0] != "Hours":
            raise UserError(f"{path}: the first column must be 'Hours', not {header[0] if header else 'nothing'!r}")
        missing = [name for name in self.channels if name not in header]
        if missing:
            raise UserError(f"{path} has no column {missing[0]!r}")
        extra = [name for name in header[1:] if name not in self.channels]
        if extra:
            raise UserError(f"{path} has a column {extra[0]!r}, which discretizer_config.json does not know")
        return [self.channels.index(name) for name in header[1:]]

    def _hour(self, path: Path, number: int, row: list[str], columns: int, before: float) -> float:
        if len(row) != columns + 1:
            raise UserError(f"{path} row {number} has {len(row)} cells instead of {columns + 1}")
        try:
            hour = float(row[0])
        except ValueError:
            hour = math.nan
        if not hour > -_EPSILON:
            raise UserError(f"{path} row {number}: {row[0]!r} is no hour of a stay")
        if hour < before - _EPSILON:
            raise UserError(f"{path} row {number}: hour {row[0]} comes after hour {before:g}")
        return hour

    def expand(self, values: np.ndarray, measured: np.ndarray) -> np.ndarray:
        """Bins as the network sees them: (T, 76) float32, categories as one-hot columns, flags at the end."""
        parts = []
        for index, width in enumerate(self.widths):
            own = values[:, index]
            if self.values[self.channels[index]] is None:
                parts.append(own[:, None])
            else:
                parts.append((own[:, None] == np.arange(width)).astype(np.float32))
        return np.concatenate([*parts, measured.astype(np.float32)], 1)


def read_normalizer(path: Path, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Means and standard deviations of the columns, from JSON or ``.npz`` with ``means`` and ``stds``.

    Raises:
        UserError: if it is missing, would have to be unpickled, or does not fit.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    if path.suffix not in (".json", ".npz"):
        raise UserError(
            f"{path} may be a pickle, and nothing is unpickled: fit a normaliser with python -m taps.data.mimic3, or save its "
            "means and stds as .json or .npz"
        )
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as stored:
                means, stds = np.asarray(stored["means"], float), np.asarray(stored["stds"], float)
        else:
            stored = read_json(path)
            means, stds = np.asarray(stored["means"], float), np.asarray(stored["stds"], float)
    except (KeyError, ValueError, TypeError, zipfile.BadZipFile, OSError) as error:
        raise UserError(f"{path} does not hold numbers 'means' and 'stds': {error}") from None
    if means.shape != (columns,) or stds.shape != (columns,) or not (np.isfinite(means).all() and (stds > 0).all()):
        raise UserError(
            f"{path} has means of shape {means.shape} and stds of shape {stds.shape}; {columns} each, above 0, are needed"
        )
    return means.astype(np.float32), stds.astype(np.float32)


class Stay(NamedTuple):
    """A row of a list: where it stands, its time series and its length in hours."""

    split: str
    row: int
    offset: int
    name: str
    hours: float


@dataclass
class _Lists:
    """What reading a list file finds besides its stays."""

    empty: list[str] = field(default_factory=list)
    long: int = 0
    beyond: int = 0
    positives: dict[str, np.ndarray] = field(default_factory=dict)
    negatives: dict[str, np.ndarray] = field(default_factory=dict)


def find_root(root: Path) -> Path:
    """The folder with the lists: ``root`` itself or ``root/multitask``.

    Raises:
        UserError: if neither has them.
    """
    for folder in (root, root / "multitask"):
        if (folder / "train_listfile.csv").is_file():
            return folder
    raise UserError(
        f"{root} has no train_listfile.csv; make it with mimic3-benchmarks' create_multitask and split_train_val "
        "(datasets/README.md)"
    )


def rows_of(path: Path) -> Iterator[tuple[int, int, list[str]]]:
    """(row number, offset, cells) of a list file, read as a stream.

    Raises:
        UserError: for a row with another number of cells.
    """
    with open(path, "rb") as file:
        file.readline()  # the header
        number, offset = 1, file.tell()
        for line in iter(file.readline, b""):
            number += 1
            start, offset = offset, offset + len(line)
            text = line.decode("utf-8", "replace").strip()
            if not text:
                continue
            cells = text.split(",")
            if len(cells) != len(_COLUMNS):
                raise UserError(
                    f"{path} row {number} has {len(cells)} cells instead of {len(_COLUMNS)} ({', '.join(_COLUMNS)})"
                )
            yield number, start, cells


def _pairs(path: Path, number: int, name: str, text: str) -> int:
    """Length T of a list ``m1;…;mT;y1;…;yT``."""
    count = text.count(";") + 1 if text else 0
    if text in ("", ";"):
        return 0
    if count % 2:
        raise UserError(
            f"{path} row {number}: {name} has {count} entries, but as many masks as labels make an even number"
        )
    return count // 2


def _numbers(path: Path, number: int, name: str, texts: Sequence[str]) -> np.ndarray:
    try:
        values = np.array(texts, np.float64)
    except ValueError as error:
        raise UserError(f"{path} row {number}: {name}: {error}") from None
    if not np.isfinite(values).all():
        raise UserError(f"{path} row {number}: {name} holds {values[~np.isfinite(values)][0]}")
    return values


def read_labels(path: Path, row: int, cells: Sequence[str], crop: int) -> dict[str, np.ndarray]:
    """The labels of one stay by task, for ``crop`` hours, NaN where nothing is asked.

    Raises:
        UserError: naming file and row, for lists of the wrong length or entries that are no labels.
    """
    labels = {name: np.full((task.channels, crop), np.nan, np.float32) for name, task in TASKS.items()}
    labels["los"] = labels["los"][0]
    count = int(float(cells[1]) + 1.0 - _EPSILON)
    mortality = _numbers(path, row, "mortality", cells[2].split(";"))
    if len(mortality) != 3 or mortality[1] not in (0, 1) or mortality[2] not in (0, 1) or mortality[0] < 0:
        raise UserError(f"{path} row {row}: mortality is {cells[2]!r}, not position;mask;label")
    if mortality[1] and mortality[0] < crop:
        labels["ihm"][0, int(mortality[0])] = mortality[2]
    phenotypes = _numbers(path, row, "phenotypes", cells[4].split(";"))
    if len(phenotypes) != PHENOTYPES or not np.isin(phenotypes, (0, 1)).all():
        raise UserError(
            f"{path} row {row}: phenotypes has {len(phenotypes)} entries, {PHENOTYPES} of 0 or 1 are needed"
        )
    if count:
        labels["pheno"][:, min(count, crop) - 1] = phenotypes
    for name, text, target in (
        ("remaining hours", cells[3], labels["los"]),
        ("decompensation", cells[5], labels["decomp"][0]),
    ):
        length = _pairs(path, row, name, text)
        values = _numbers(path, row, name, text.split(";")) if length else np.zeros(0)
        masks, own = values[:length], values[length:]
        if not np.isin(masks, (0, 1)).all() or (name == "decompensation" and not np.isin(own, (0, 1)).all()):
            raise UserError(f"{path} row {row}: {name} holds entries that are no 0 or 1")
        used = min(length, crop)
        target[:used] = np.where(masks[:used] == 1, own[:used], np.nan)
    return labels


@dataclass(frozen=True)
class StayData(SharedData):
    """The benchmark; a sample is a :class:`Stay`.

    Attributes:
        root: the folder with the lists.
        discretizer: of the time series.
        normalizer: means and standard deviations of all columns; applied to the continuous ones.
        crop: hours that are kept of each stay; shorter ones are filled up with zeros.
    """

    root: Path
    discretizer: Discretizer
    normalizer: tuple[np.ndarray, np.ndarray]
    crop: int = 170

    def group(self, sample: Stay) -> str:
        return sample.name.split("_")[0]  # the patient

    def samples(self, split: str, train: bool, seed: int = 0) -> StaySet:
        return StaySet(self, split)

    def bins(self, stay: Stay) -> tuple[np.ndarray, np.ndarray]:
        return self.discretizer.read(self.root / _folder(stay.split) / stay.name, stay.hours)

    def labels(self, stay: Stay) -> dict[str, np.ndarray]:
        path = self.root / f"{stay.split}_listfile.csv"
        with open(path, "rb") as file:
            file.seek(stay.offset)
            cells = file.readline().decode("utf-8", "replace").strip().split(",")
        if len(cells) != len(_COLUMNS) or cells[0] != stay.name:
            raise UserError(f"{path} has changed since it was opened: row {stay.row} is not that of {stay.name}")
        return read_labels(path, stay.row, cells, self.crop)


class StaySet(Dataset):
    """(76, crop) inputs and {task: labels}; bins of small data sets are read from disk once.

    Args:
        data: the benchmark with the tasks wanted.
        split: name of the split.
    """

    def __init__(self, data: StayData, split: str) -> None:
        self.data, self.stays = data, data.splits[split]
        self._kept: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._room = _CACHE_BYTES

    def __len__(self) -> int:
        return len(self.stays)

    def _bins(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        if index not in self._kept:
            values, measured = self.data.bins(self.stays[index])
            values, measured = values[: self.data.crop], measured[: self.data.crop]
            size = values.nbytes + measured.nbytes
            if size > self._room:
                return values, measured
            self._room -= size
            self._kept[index] = values.copy(), measured.copy()
        return self._kept[index]

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, dict[str, Tensor]]:
        index = key[0] if isinstance(key, tuple) else key
        x = self.data.discretizer.expand(*self._bins(index))
        columns, (means, stds) = self.data.discretizer.continuous, self.data.normalizer
        x[:, columns] = (x[:, columns] - means[columns]) / stds[columns]
        full = np.zeros((self.data.crop, x.shape[1]), np.float32)
        full[: len(x)] = x
        labels = self.data.labels(self.stays[index]) if self.data.tasks else {}
        return torch.from_numpy(full.T.copy()), {name: torch.from_numpy(labels[name]) for name in self.data.tasks}


def _folder(split: str) -> str:
    return "test" if split == "test" else "train"


def _read_list(root: Path, split: str, crop: int, found: _Lists) -> list[Stay]:
    """The stays of one list that hold anything."""
    path, folder = root / f"{split}_listfile.csv", root / _folder(split)
    if not path.is_file():
        raise UserError(f"{path} does not exist; mimic3-benchmarks' split_train_val writes it")
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist; it holds the time series that {path.name} lists")
    sizes = {entry.name: entry.stat().st_size for entry in os.scandir(folder)}
    stays: list[Stay] = []
    header: int | None = None
    for number, offset, cells in rows_of(path):
        name = cells[0]
        if name not in sizes:
            raise UserError(f"{path} row {number}: {folder / name} does not exist")
        try:
            hours = float(cells[1])
        except ValueError:
            hours = math.nan
        if not 0 <= hours < 1e6:
            raise UserError(f"{path} row {number}: a length of stay of {cells[1]!r} hours")
        lengths = [_pairs(path, number, _COLUMNS[3], cells[3]), _pairs(path, number, _COLUMNS[5], cells[5])]
        if cells[4].count(";") != PHENOTYPES - 1:
            raise UserError(
                f"{path} row {number}: phenotypes has {cells[4].count(';') + 1} entries, {PHENOTYPES} are needed"
            )
        if header is None:
            with open(folder / name, "rb") as file:
                header = len(file.readline())
        if hours < 1 or sizes[name] <= header or not max(lengths):
            found.empty.append(f"{path.name} row {number}")
            continue
        _count(found, split, cells, lengths[1], crop)
        found.long += hours > crop
        found.beyond += sum(max(length - crop, 0) for length in lengths)
        stays.append(Stay(split, number, offset, name, hours))
    if not stays:
        raise UserError(f"{path} lists no stay that holds anything")
    return stays


def _count(found: _Lists, split: str, cells: Sequence[str], steps: int, crop: int) -> None:
    """Note which answers a row has, to refuse questions with one answer only."""
    mortality = cells[2].split(";")
    counts = len(mortality) == 3 and mortality[1] == "1" and mortality[0].isdigit() and int(mortality[0]) < crop
    asked = {
        "ihm": [[mortality[-1]]] if counts else [],
        "pheno": [cells[4].split(";")],
        "decomp": [[label] for label in set(cells[5].split(";")[steps : steps + crop])],
    }
    for name, rows in asked.items():
        for row in rows:
            for store, text in ((found.positives, "1"), (found.negatives, "0")):
                key = f"{split} {name}"
                store[key] = store.get(key, np.zeros(len(row), int)) + [entry == text for entry in row]


def open_mimic3(
    root: Path,
    crop: int = 170,
    normalizer: Path | None = None,
    positive_weights: Mapping[str, float] | None = None,
    names: Sequence[str] = tuple(TASKS),
) -> StayData:
    """The benchmark from its folder. Lists are read as streams: nothing of a stay but its place is kept.

    Args:
        root: holds the lists, or ``multitask/`` that does.
        crop: hours kept of each stay.
        normalizer: file of means and stds; ``None``: ``normalizer.json`` or ``.npz`` in the root.
        positive_weights: by task, as in :class:`taps.data.shared.Task`.
        names: the tasks.

    Raises:
        UserError: if a task is unknown, a file is missing, a row is wrong (named by file and row), or a split has one
            answer only for a question.
    """
    for name in names:
        if name not in TASKS:
            raise unknown("task of benchmark mimic3", name, TASKS)
    root = find_root(root)
    config = root / "discretizer_config.json"
    if not config.is_file():
        raise UserError(f"{config} does not exist; copy it from mimic3-benchmarks (mimic3models/resources)")
    discretizer = Discretizer(config)
    path = normalizer or next((p for p in (root / "normalizer.json", root / "normalizer.npz") if p.is_file()), None)
    if path is None:
        raise UserError(f"{root} has no normalizer.json; fit it with: python -m taps.data.mimic3 {root}")
    columns = len(discretizer.header)
    found = _Lists()
    splits = {split: _read_list(root, split, crop, found) for split in ("train", "val", "test")}
    _check_disjoint(splits)
    notes = list(_one_answer(found, splits, names))
    if found.empty:
        notes.append(f"{len(found.empty)} empty stays are left out, e.g. {found.empty[0]}")
    if found.long:
        notes.append(
            f"{found.long} stays are longer than {crop} hours; {found.beyond} labels of later hours are left out, and their "
            f"phenotypes are asked at hour {crop - 1}"
        )
    weights = positive_weights or {}
    tasks = {name: replace(TASKS[name], positive_weight=weights.get(name, 1.0)) for name in dict.fromkeys(names)}
    return StayData(
        "mimic3", tasks, splits, root, discretizer, read_normalizer(path, columns), crop, notes=tuple(notes)
    )


def _check_disjoint(splits: Mapping[str, Sequence[Stay]]) -> None:
    patients = {split: {stay.name.split("_")[0] for stay in stays} for split, stays in splits.items()}
    for a, b in (("train", "val"), ("train", "test"), ("val", "test")):
        both = patients[a] & patients[b]
        if both:
            raise UserError(f"patient {min(both)} is in both {a}_listfile.csv and {b}_listfile.csv")


def _one_answer(found: _Lists, splits: Mapping[str, Sequence[Stay]], names: Sequence[str]) -> Iterator[str]:
    """Refuse a question that has one answer in a split; single phenotypes are left out of its mean, and named."""
    for split in splits:
        for name in (name for name in ("ihm", "decomp", "pheno") if name in names):
            key = f"{split} {name}"
            both = (found.positives.get(key, np.zeros(1)) > 0) & (found.negatives.get(key, np.zeros(1)) > 0)
            if not both.any():
                raise UserError(
                    f"{split}_listfile.csv has only one answer for task {name} within the hours that are kept of its stays"
                )
            if not both.all():
                yield f"{split}: {int((~both).sum())} of {len(both)} phenotypes have one answer only and no AUC"


def fit_normalizer(root: Path) -> Path:
    """Write ``normalizer.json``: means and standard deviations of every column over the bins of the training stays."""
    root = find_root(root)
    discretizer = Discretizer(root / "discretizer_config.json")
    stays = _read_list(root, "train", 170, _Lists())
    count, total, squares = 0, np.zeros(len(discretizer.header)), np.zeros(len(discretizer.header))
    for stay in tqdm(stays, desc="reading train", disable=None, leave=False):
        x = discretizer.expand(*discretizer.read(root / "train" / stay.name, stay.hours)).astype(np.float64)
        count, total, squares = count + len(x), total + x.sum(0), squares + (x**2).sum(0)
    means = total / count
    stds = np.sqrt(np.maximum(squares - count * means**2, 0.0) / max(count - 1, 1))
    write_json(root / "normalizer.json", {"means": means.tolist(), "stds": np.maximum(stds, 1e-7).tolist()})
    return root / "normalizer.json"


def check_stays(root: Path) -> tuple[list[str], int]:
    """Read every listed stay: lines for a person, and how many are wrong."""
    data = open_mimic3(root)
    counts = ", ".join(f"{len(stays)} {split}" for split, stays in data.splits.items())
    lines, wrong = [f"{data.root}: mimic3, {counts}", *(f"  {note}" for note in data.notes)], 0
    for stays in data.splits.values():
        for stay in tqdm(stays, desc=f"reading {stays[0].split}", disable=None, leave=False):
            try:
                data.bins(stay)
                data.labels(stay)
            except UserError as error:
                wrong += 1
                lines.append(f"  {error}")
    return lines, wrong


def main(arguments: Sequence[str]) -> None:
    parser = Parser(
        prog="python -m taps.data.mimic3",
        description="Fit the normaliser of a mimic3-benchmarks tree on its training stays and write normalizer.json.",
    )
    parser.add_argument("root", type=Path, help="the folder with the lists")
    path = fit_normalizer(parser.parse_args(arguments).root)
    sys.stdout.write(f"{path}\n")


if __name__ == "__main__":
    from taps.commands import run

    run(main)
