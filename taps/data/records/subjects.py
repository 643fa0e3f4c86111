"""Subjects of a table: reading the table and the lists of train, val and test, and dividing subjects into such lists.

    taps data subjects --images DIR --labels CSV --stratify sex --group rel_family_id site_id_l

writes the three lists: shuffled with a seed, stratified, and with all members of a group in one list.
"""

from __future__ import annotations

import csv
import math
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from taps.data.multi_label import SPLITS
from taps.errors import UserError, check_known, unknown

SUFFIXES = (".npy", ".nii.gz", ".nii")
_MISSING = ("", "nan", "na")
_FOLDS = 50
_RARE = 3  # strata with fewer members are merged


def list_path(images: Path, split: str) -> Path:
    """Path of the list of a split's files."""
    return images / f"image_{split}_SubjectList.txt"


def subject_of(name: str) -> str | None:
    """The subject of a volume's file name; ``None`` for other files."""
    return next((name[: -len(suffix)] for suffix in SUFFIXES if name.endswith(suffix)), None)


def listed(path: Path) -> Iterator[tuple[int, str, str]]:
    """(row, subject, file name) of each line of a list that is not empty.

    Raises:
        UserError: if the list cannot be read, or a line is not the name of a volume.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    for number, line in enumerate(lines, 1):
        name = line.strip()
        if name:
            subject = subject_of(name)
            if subject is None:
                raise UserError(f"{path} row {number}: {name!r} is not a volume: files end in {', '.join(SUFFIXES)}")
            yield number, subject, name


@dataclass(frozen=True)
class Table:
    """A CSV table with one row per subject.

    Attributes:
        path: the file.
        columns: names of the columns.
        rows: by subject, the number of the row in the file and its cells by column.
    """

    path: Path
    columns: tuple[str, ...]
    rows: Mapping[str, tuple[int, Mapping[str, str]]]

    def need(self, names: Sequence[str]) -> None:
        """Raise a ``UserError`` unless the table has these columns."""
        check_known(f"column of {self.path}", names, self.columns)

    def cell(self, subject: str, column: str) -> str | None:
        """A cell; ``None`` if it is empty or "nan"."""
        text = self.rows[subject][1][column].strip()
        return None if text.lower() in _MISSING else text

    def number(self, subject: str, column: str) -> float:
        """A cell as a number; NaN if it is empty or "nan".

        Raises:
            UserError: with file and row, for other text.
        """
        text = self.cell(subject, column)
        try:
            value = math.nan if text is None else float(text)
        except ValueError:
            value = math.inf
        if math.isinf(value):
            raise UserError(f"{self.path} row {self.rows[subject][0]}: {column} is {text!r}, not a number")
        return value


def read_table(path: Path, subject_column: str = "subjectkey") -> Table:
    """Read a table of targets.

    Raises:
        UserError: if it cannot be read, lacks the subjects' column, or has a duplicate subject or a row of another length.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            columns = next(reader, [])
            if len(set(columns)) != len(columns):
                raise UserError(f"{path} has the column {Counter(columns).most_common(1)[0][0]!r} twice")
            if subject_column not in columns:
                raise unknown(f"column of {path}", subject_column, columns, "name the subjects' with --subject_column")
            rows: dict[str, tuple[int, dict[str, str]]] = {}
            for cells in reader:
                number = reader.line_num
                if not cells:
                    continue
                if len(cells) != len(columns):
                    raise UserError(f"{path} row {number} has {len(cells)} cells instead of {len(columns)}")
                row = dict(zip(columns, cells, strict=True))
                subject = row[subject_column].strip()
                if subject in rows:
                    raise UserError(f"{path} row {number}: subject {subject!r} was in row {rows[subject][0]} already")
                rows[subject] = (number, row)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    return Table(path, tuple(columns), rows)


@dataclass
class LeftOut:
    """Examples of rows and files that are left out, by reason."""

    reasons: dict[str, list[str]] = field(default_factory=dict)

    def leave_out(self, reason: str, example: str) -> None:
        self.reasons.setdefault(reason, []).append(example)

    def notes(self) -> tuple[str, ...]:
        return tuple(f"{len(examples)} {reason}, e.g. {examples[0]}" for reason, examples in self.reasons.items())


def read_lists(images: Path, table: Table, found: LeftOut) -> tuple[dict[str, list[str]], dict[str, Path]]:
    """The subjects of each split that have a volume and a row, and their volumes.

    Raises:
        UserError: if a list is missing, or a subject is listed twice.
    """
    if not images.is_dir():
        raise UserError(f"{images} does not exist")
    splits: dict[str, list[str]] = {}
    paths: dict[str, Path] = {}
    seen: dict[str, str] = {}
    for split in SPLITS:
        path = list_path(images, split)
        if not path.is_file():
            raise UserError(
                f"{path} does not exist; make the lists with: taps data subjects --images {images} --labels {table.path}"
            )
        splits[split] = []
        for number, subject, name in listed(path):
            if subject in seen:
                raise UserError(f"{path.name} row {number}: subject {subject!r} is in {seen[subject]} too")
            seen[subject] = path.name
            row = f"{path.name} row {number}"
            if not (images / name).is_file():
                found.leave_out("listed subjects have no volume and are left out", row)
            elif subject not in table.rows:
                found.leave_out(f"listed subjects have no row in {table.path.name} and are left out", row)
            else:
                splits[split].append(subject)
                paths[subject] = images / name
    return splits, paths


def join_groups(table: Table, subjects: Sequence[str], columns: Sequence[str]) -> list[int]:
    """A group number for each subject. Subjects with equal values in any of the columns are in the same group, transitively."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    nodes: dict[tuple[str, str], int] = {}
    edges: list[tuple[int, int]] = []
    for index, subject in enumerate(subjects):
        for column in columns:
            cell = table.cell(subject, column)
            if cell is not None:
                node = nodes.setdefault((column, cell), len(subjects) + len(nodes))
                edges.append((index, node))
    count = len(subjects) + len(nodes)
    rows, others = zip(*edges, strict=True) if edges else ((), ())
    graph = coo_matrix((np.ones(len(edges)), (rows, others)), shape=(count, count))
    return connected_components(graph, directed=False)[1][: len(subjects)].tolist()


def divide(
    table: Table,
    subjects: Sequence[str],
    val_size: float,
    test_size: float,
    seed: int,
    stratify: Sequence[str] = (),
    group: Sequence[str] = (),
) -> dict[str, list[str]]:
    """Divide subjects into ``train``, ``val`` and ``test``.

    Args:
        table: table with the columns.
        subjects: subjects to divide.
        val_size, test_size: shares, in steps of 1/50, or of one group if there are fewer groups.
        seed: seed of the shuffle.
        stratify: columns whose values are distributed evenly; more than ten different numbers are divided into five ranges.
        group: columns of groups that stay together, as in :func:`join_groups`.

    Raises:
        UserError: if a part would be empty.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    table.need([*stratify, *group])
    kinds = [_strata(table, subjects, column) for column in stratify]
    strata = ["/".join(own) for own in zip(*kinds, strict=True)] if kinds else ["all"] * len(subjects)
    members = Counter(strata)
    strata = [own if members[own] >= _RARE else "rare" for own in strata]
    groups = join_groups(table, subjects, group)
    folds = min(_FOLDS, len(set(groups)), max(Counter(strata).values()))
    counts = {"val": max(round(val_size * folds), 1), "test": max(round(test_size * folds), 1)}
    if folds < 3 or sum(counts.values()) >= folds:
        raise UserError(f"{len(set(groups))} groups of subjects leave none for train, val or test")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about strata with fewer members than folds
        splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
        parts = [own for _, own in splitter.split(np.zeros(len(subjects)), strata, groups)]
    chosen = {"val": parts[: counts["val"]], "test": parts[counts["val"] : counts["val"] + counts["test"]]}
    chosen["train"] = parts[sum(counts.values()) :]
    found = {name: sorted(subjects[index] for part in own for index in part) for name, own in chosen.items()}
    for name, own in found.items():
        if not own:
            raise UserError(f"{name} would be empty: groups are too large for its share")
    return {name: found[name] for name in SPLITS}


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _strata(table: Table, subjects: Sequence[str], column: str) -> list[str]:
    cells = [table.cell(subject, column) for subject in subjects]
    values = {cell for cell in cells if cell is not None}
    if len(values) <= 10 or not all(map(_is_number, values)):
        return [str(cell) for cell in cells]
    numbers = np.array([table.number(subject, column) for subject in subjects])
    edges = np.nanquantile(numbers, [0.2, 0.4, 0.6, 0.8])
    return ["nan" if math.isnan(number) else str(int(np.searchsorted(edges, number))) for number in numbers]
