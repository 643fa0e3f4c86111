"""List files of mimic3-benchmarks' multitask setting: the stays of each split, and their labels.

A row is ``filename, length of stay, pos;mask;label, m1;…;mT;y1;…;yT, y1;…;y25, m1;…;mT;y1;…;yT``: the hours of the stay,
in-hospital mortality, remaining hours at each hour, phenotypes, and whether the patient dies within 24 hours. Lists are
read as streams: only the position of a stay's row is kept.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from taps.data.multi_label import Task
from taps.data.records.mimic3_discretizer import bin_count
from taps.errors import UserError

PHENOTYPES = 25
TASKS = {
    "ihm": Task("ihm", "binary", 1),
    "decomp": Task("decomp", "binary", 1),
    "los": Task("los", "duration", 10),
    "pheno": Task("pheno", "binary", PHENOTYPES),
}
COLUMNS = ("filename", "length of stay", "mortality", "remaining hours", "phenotypes", "decompensation")
_SMALL = 4096  # bytes of a time series that may have only a header


class Stay(NamedTuple):
    """A row of a list: its position, its time series and the length of the stay in hours."""

    split: str
    row: int
    offset: int
    name: str
    hours: float


@dataclass
class Lists:
    """Statistics of list files.

    Attributes:
        empty, short: rows whose stays are left out, without measurements or shorter than an hour.
        long: number of stays longer than the crop.
        beyond: number of labels after the crop.
        answers: numbers of negative and positive labels (2, questions) by ``"<split> <task>"``.
    """

    empty: list[str] = field(default_factory=list)
    short: list[str] = field(default_factory=list)
    long: int = 0
    beyond: int = 0
    answers: dict[str, np.ndarray] = field(default_factory=dict)


def find_root(root: Path) -> Path:
    """The folder with the lists, ``root`` or ``root/multitask``.

    Raises:
        UserError: if neither has lists.
    """
    for folder in (root, root / "multitask"):
        if (folder / "train_listfile.csv").is_file():
            return folder
    raise UserError(
        f"{root} has no train_listfile.csv; make it with mimic3-benchmarks' create_multitask and split_train_val "
        "(datasets/README.md)"
    )


def rows_of(path: Path) -> Iterator[tuple[int, int, list[str]]]:
    """(row number, offset, cells) of each row of a list file.

    Raises:
        UserError: for a row with a wrong number of cells.
    """
    with open(path, "rb") as file:
        header = file.readline().decode("utf-8", "replace").strip().split(",")
        if header[0] != "filename" or len(header) != len(COLUMNS):
            raise UserError(f"{path} row 1 is not a header 'filename,length of stay,…' of {len(COLUMNS)} columns")
        number, offset = 1, file.tell()
        for line in iter(file.readline, b""):
            number += 1
            start, offset = offset, offset + len(line)
            text = line.decode("utf-8", "replace").strip()
            if not text:
                continue
            cells = text.split(",")
            if len(cells) != len(COLUMNS):
                raise UserError(
                    f"{path} row {number} has {len(cells)} cells instead of {len(COLUMNS)} ({', '.join(COLUMNS)})"
                )
            yield number, start, cells


def _pairs(path: Path, number: int, name: str, text: str) -> int:
    """The length T of ``m1;…;mT;y1;…;yT``."""
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
        raise UserError(f"{path} row {number}: {name}: {str(error).rpartition(': ')[2]} is not a number") from None
    if not np.isfinite(values).all():
        raise UserError(f"{path} row {number}: {name} holds {values[~np.isfinite(values)][0]}")
    return values


def read_labels(path: Path, row: int, cells: Sequence[str], crop: int) -> dict[str, np.ndarray]:
    """The labels of one stay by task for ``crop`` hours, NaN where there is no label.

    Raises:
        UserError: with file and row, for a wrong number of entries or entries that are not labels.
    """
    hours = float(cells[1])
    labels = {name: np.full((task.channels, crop), np.nan, np.float32) for name, task in TASKS.items()}
    labels["los"] = labels["los"][0]
    count = bin_count(hours)
    mortality = _numbers(path, row, "mortality", cells[2].split(";"))
    if len(mortality) != 3 or mortality[1] not in (0, 1) or mortality[2] not in (0, 1) or mortality[0] < 0:
        raise UserError(f"{path} row {row}: mortality is {cells[2]!r}, not position;mask;label")
    if mortality[1] and mortality[0] >= count:
        raise UserError(f"{path} row {row}: mortality is asked at hour {mortality[0]:g} of a stay of {hours:g} hours")
    if mortality[1] and mortality[0] < crop:
        labels["ihm"][0, int(mortality[0])] = mortality[2]
    phenotypes = _numbers(path, row, "phenotypes", cells[4].split(";"))
    wrong = np.flatnonzero(~np.isin(phenotypes, (0, 1)))
    if len(phenotypes) != PHENOTYPES or len(wrong):
        where = f"; entry {wrong[0] + 1} is {phenotypes[wrong[0]]:g}" if len(wrong) else ""
        raise UserError(
            f"{path} row {row}: phenotypes has {len(phenotypes)} entries, {PHENOTYPES} of 0 or 1 are needed{where}"
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
            raise UserError(f"{path} row {row}: {name} holds entries other than 0 and 1")
        steps = int(hours + 1e-6) + 1
        if length > steps or (name == "remaining hours" and length != steps):
            raise UserError(f"{path} row {row}: {name} has {length} steps, a stay of {hours:g} hours has {steps}")
        if (own[masks == 1] < -1e-4).any():
            raise UserError(f"{path} row {row}: {name} holds {own.min():g}")
        for step, (mask, value) in enumerate(zip(masks, own, strict=True)):
            # a label after ``step`` hours belongs to the bin that ends then; 0 and 1 share the first bin
            position = max(step - 1, 0)
            if position < crop:
                target[position] = value if mask == 1 else np.nan
    return labels


def folder_of(split: str) -> str:
    """The folder with the time series of a split."""
    return "test" if split == "test" else "train"


def read_list(root: Path, split: str, crop: int, found: Lists) -> list[Stay]:
    """The stays of one list, without empty and short ones, which are counted in ``found``."""
    path, folder = root / f"{split}_listfile.csv", root / folder_of(split)
    if not path.is_file():
        raise UserError(f"{path} does not exist; mimic3-benchmarks' split_train_val writes it")
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist; it holds the time series that {path.name} lists")
    sizes = {entry.name: entry.stat().st_size for entry in os.scandir(folder)}
    stays: list[Stay] = []
    seen: dict[str, int] = {}
    for number, offset, cells in rows_of(path):
        name = cells[0]
        if name in seen:
            raise UserError(f"{path} row {number}: {name} was in row {seen[name]} already")
        seen[name] = number
        if name not in sizes:
            raise UserError(f"{path} row {number}: {folder / name} does not exist")
        try:
            hours = float(cells[1])
        except ValueError:
            hours = math.nan
        if not 0 <= hours < 1e6:
            raise UserError(f"{path} row {number}: a length of stay of {cells[1]!r} hours")
        lengths = [_pairs(path, number, COLUMNS[3], cells[3]), _pairs(path, number, COLUMNS[5], cells[5])]
        if cells[4].count(";") != PHENOTYPES - 1:
            raise UserError(
                f"{path} row {number}: phenotypes has {cells[4].count(';') + 1} entries, {PHENOTYPES} are needed"
            )
        if hours < 1:
            found.short.append(f"{path.name} row {number}")
            continue
        if sizes[name] < _SMALL and _is_empty(folder / name):
            found.empty.append(f"{path.name} row {number}")
            continue
        _count(found, split, cells, lengths[1], crop)
        found.long += hours > crop
        found.beyond += sum(max(length - 1 - crop, 0) for length in lengths)
        stays.append(Stay(split, number, offset, name, hours))
    if not stays:
        raise UserError(f"{path} lists only empty stays")
    return stays


def _is_empty(path: Path) -> bool:
    """Whether a time series has no row with a measurement."""
    with open(path, encoding="utf-8", errors="replace") as file:
        file.readline()
        return not any(line.partition(",")[2].strip(",\n\r \t") for line in file)


def _count(found: Lists, split: str, cells: Sequence[str], steps: int, crop: int) -> None:
    """Count the positive and negative labels of a row within the crop."""
    mortality = cells[2].split(";")
    counts = len(mortality) == 3 and mortality[1] == "1" and mortality[0].isdigit() and int(mortality[0]) < crop
    labels = {
        "ihm": [[mortality[-1]]] if counts else [],
        "pheno": [cells[4].split(";")],
        "decomp": [[label] for label in _asked(cells[5].split(";"), steps, crop)],
    }
    for name, rows in labels.items():
        for row in rows:
            answers = found.answers.setdefault(f"{split} {name}", np.zeros((2, len(row)), int))
            answers += [[entry == text for entry in row] for text in "01"]


def _asked(entries: Sequence[str], steps: int, crop: int) -> set[str]:
    """The different labels with a mask of 1 within the crop."""
    pairs = zip(entries[: crop + 1], entries[steps : steps + crop + 1], strict=False)
    return {label for mask, label in pairs if mask == "1"}


def check_disjoint(splits: Mapping[str, Sequence[Stay]]) -> None:
    """Raise a ``UserError`` if a patient has stays in two splits."""
    patients = {split: {stay.name.split("_")[0] for stay in stays} for split, stays in splits.items()}
    for a, b in itertools.combinations(patients, 2):
        both = patients[a] & patients[b]
        if both:
            raise UserError(f"patient {min(both)} is in both {a}_listfile.csv and {b}_listfile.csv")


def one_answer(found: Lists, splits: Mapping[str, Sequence[Stay]], names: Sequence[str]) -> Iterator[str]:
    """Check that every binary task has positive and negative labels in every split.

    Yields:
        A note for each split in which some phenotypes have equal labels, which are left out of the mean AUC.

    Raises:
        UserError: if all labels of a task are equal.
    """
    for split in splits:
        for name in (name for name in ("ihm", "decomp", "pheno") if name in names):
            both = (found.answers.get(f"{split} {name}", np.zeros((2, 1))) > 0).all(0)
            if not both.any():
                raise UserError(
                    f"{split}_listfile.csv has only one answer for task {name} within the hours that are kept of its stays: keep "
                    "more (--hours), or leave it out (--tasks)"
                )
            if not both.all():
                yield f"{split}: {int((~both).sum())} of {len(both)} phenotypes have equal labels only and no AUC"
