"""``taps tasks list|show|compare FOLDER…``: inspect stored tasks."""

from __future__ import annotations

import sys
from collections.abc import Callable

from taps.settings.task_files import TasksSettings
from taps.storage.library import Library
from taps.storage.task_tables import compare_table, list_table, show_table


def show_list(settings: TasksSettings) -> None:
    """Print one row per task."""
    _print(settings, list_table)


def show_layers(settings: TasksSettings) -> None:
    """Print every layer of each task."""
    _print(settings, lambda library: "\n\n".join(map(show_table, library.descriptions.values())))


def show_comparison(settings: TasksSettings) -> None:
    """Print how many layers each pair of tasks tunes in common."""
    _print(settings, compare_table)


def _print(settings: TasksSettings, table: Callable[[Library], str]) -> None:
    library = Library(settings.folders, by_run=True)
    if library.folders:
        print(table(library))
    sys.stdout.flush()
    library.check()
