"""Settings of ``taps tasks``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from taps.settings.declare import FromFile, setting


@dataclass(frozen=True)
class TasksSettings(FromFile):
    """Settings of ``taps tasks list``, ``show`` and ``compare``."""

    title: ClassVar[str] = "tasks"
    description: ClassVar[str] = "Inspect stored tasks: list prints one row per task with its accuracy, tuned layers, size and base, show every layer of each task with its score and whether it is tuned, compare how many layers each pair of tasks tunes in common."
    positional: ClassVar[tuple[str, ...]] = ("folders",)
    required: ClassVar[tuple[str, ...]] = ("folders",)
    missing: ClassVar[str] = "name folders of tasks: taps tasks list results/demo"
    folders: list[str] = setting([], "folders of a task, or of several, e.g. results/demo", nargs="+", metavar="FOLDER")
