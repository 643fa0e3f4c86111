"""Settings of ``taps predict``."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import ClassVar

from taps.settings.declare import FromFile, setting


@dataclass(frozen=True)
class PredictSettings(FromFile):
    """Settings of ``taps predict``."""

    title: ClassVar[str] = "predict"
    description: ClassVar[str] = "Classify images with stored tasks."
    epilog: ClassVar[str] = "Exit status: 0 done; 1 some images could not be read; 2 a mistake, or no image could be read."
    positional: ClassVar[tuple[str, ...]] = ("folder", "images")
    required: ClassVar[tuple[str, ...]] = ("folder", "images")
    missing: ClassVar[str] = "expected a folder of tasks and images, then options: taps predict results/demo photo.jpg"
    folder: str = setting("", "a task's folder, a folder that holds several such as results/demo, or hf-hub:user/repository")
    images: list[str] = setting([], "image files, folders of images, or patterns such as 'photos/*.jpg'", nargs="+", metavar="IMAGE")
    tasks: list[str] | None = setting(None, "tasks to run, in one pass unless there are more than --keep", nargs="+", metavar="NAME", shown="all")
    top: int = setting(5, "number of classes to show", int, low=1, metavar="N")
    json: bool = setting(False, "print a JSON array with one object per image", bool)
    csv: bool = setting(False, "print CSV with one row per image, task and class", bool)
    base: str | None = setting(None, "weights of the base, if the task's files do not say where they are", metavar="FILE")
    keep: int = setting(64, "tasks in memory; if there are more, each batch of images reads the others again", int, low=1, metavar="N")
    batch_size: int = setting(32, "images per batch", int, low=1, metavar="N")
    workers: int = setting(min(8, os.cpu_count() or 1), "processes that read images, if there are many", int, low=0, metavar="N", shown="the number of processors, at most 8")
    device: str = setting("auto", "device to run on", choices=("auto", "cpu", "cuda", "mps"))
