"""What sweeps have in common, of sequential and joint runs (:mod:`taps.runs.sweep`) and of multi-task runs
(:mod:`taps.runs.multi_task_sweep`): values that differ, the folders of earlier runs, and the table at the end."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from taps.errors import UserError
from taps.plots import style
from taps.storage.files import csv_text, write_text
from taps.storage.task_tables import plain_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def check_different(option: str, values: Sequence, key: Callable = lambda value: value, what: str = "value") -> None:
    """Raise a ``UserError`` if an option has a value twice."""
    known: dict = {}
    for value in values:
        if key(value) in known:
            raise UserError(f"{option} names one {what} twice: {known[key(value)]} and {value}")
        known[key(value)] = value


def earlier_runs(path: Path) -> list[Path]:
    """Return the folders of the runs in an experiment's folder; none if that is itself a run."""
    if (path / "settings.json").is_file():
        return []
    return [inner.parent for inner in path.glob("*/settings.json") if inner.parent.name != "opened"]


def check_folder(path: Path, may_exist: bool) -> None:
    """Raise a ``UserError`` if an experiment's folder is itself a run, or holds runs that nobody asked to continue."""
    if (path / "settings.json").is_file():
        raise UserError(f"{path} is a single run; choose another --experiment_name")
    if any(path.glob("*/settings.json")) and not may_exist:
        raise UserError(
            f"experiment folder {path} exists; continue it or add runs with --resume, replace runs with --overwrite, or choose "
            "another --experiment_name"
        )


def mean_and_spread(values: Sequence[float | None], form: str) -> str:
    """Return the mean of the known values in a number format, and ± their standard deviation if they are several."""
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    spread = f" ± {statistics.stdev(known):{form.lstrip('+')}}" if len(known) > 1 else ""
    return f"{statistics.mean(known):{form}}{spread}"


def report(
    path: Path, runs: Sequence[Sequence], picture: tuple[str, Figure], table: Sequence[Sequence[str]], align: str, say
) -> None:
    """Write a sweep's ``summary.csv`` and picture, and print its table.

    Args:
        path: the experiment's folder.
        runs: rows of the CSV file, one per run after the heads.
        picture: file name and figure.
        table: rows of the table after its heads, aligned as in :func:`taps.storage.task_tables.plain_table`.
        align: a letter per column.
        say: prints a text.
    """
    write_text(path / "summary.csv", csv_text(runs))
    name, figure = picture
    style.save(figure, path / name)
    text = plain_table(table[0], table[1:], align)
    say(f"\n{text}\ntable of runs: {path / 'summary.csv'}\npicture: {path / name}")
