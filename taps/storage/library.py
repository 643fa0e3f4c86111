"""Libraries of task files: folders with many tasks, of which a model holds only those in use.

A task's folder holds ``task.json`` and ``task.safetensors``; a root holds such folders, as a results folder does.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from taps.errors import UserError
from taps.storage.task_file import read_description, tensors_path

FILES = ("task.json", "task.safetensors")


class Library:
    """The tasks in some folders, of which damaged ones are skipped.

    Args:
        roots: task folders, or folders that hold task folders.
        by_run: distinguish tasks of the same name by the parent folder: ``demo_joint/digits``.

    Attributes:
        folders: folder of each usable task by name, in order of the roots and their folders.
        descriptions: contents of each task's ``task.json``.
        refused: for each folder that cannot be used, the reason.

    Raises:
        UserError: if a root does not exist or holds no task, or two tasks have the same name.
    """

    def __init__(self, roots: Iterable[str | Path], by_run: bool = False) -> None:
        self._by_run = by_run
        self.folders: dict[str, Path] = {}
        self.descriptions: dict[str, dict] = {}
        self.refused: dict[Path, str] = {}
        for root in map(Path, roots):
            for folder in _task_folders(root):
                self._add(folder)

    def _add(self, folder: Path) -> None:
        try:
            description = read_description(folder)
            path = tensors_path(folder, description)
            if not path.is_file():
                raise UserError(f"{path} does not exist")
            if path.stat().st_size != description["bytes"]:
                raise UserError(f"{path} has {path.stat().st_size} bytes, task.json says {description['bytes']}")
        except UserError as error:
            self.refused[folder] = str(error)
            return
        name = description["task"]
        if name in self.folders and self._by_run and self.folders[name].resolve() != folder.resolve():
            name = f"{folder.resolve().parent.name}/{name}"
        if name in self.folders:
            raise UserError(
                f"{self.folders[name]} and {folder} both hold a task {name!r}; tasks in one library need different names"
            )
        self.folders[name], self.descriptions[name] = folder, description

    def warn(self) -> None:
        """Warn of each folder that cannot be used."""
        for message in self.refused.values():
            warnings.warn(f"skipping task: {message}", stacklevel=3)

    def check(self) -> None:
        """Check that all tasks can be used.

        Raises:
            UserError: if any cannot; the message names the first one.
        """
        if self.refused:
            first = next(iter(self.refused.values()))
            count = len(self.refused) + len(self.folders)
            more = f" (and {len(self.refused) - 1} more)" if len(self.refused) > 1 else ""
            raise UserError(f"{len(self.refused)} of {count} tasks cannot be used: {first}{more}")


def _task_folders(root: Path) -> list[Path]:
    if not root.is_dir():
        raise UserError(f"{root} does not exist" if not root.exists() else f"{root} is not a folder")
    if any((root / name).is_file() for name in FILES):
        return [root]
    inner = [
        folder
        for folder in sorted(root.iterdir())
        if not folder.name.startswith(".") and any((folder / name).is_file() for name in FILES)
    ]
    if not inner:
        raise UserError(f"{root} holds no task (a folder with {' and '.join(FILES)}) and no folder with one")
    return inner


class TaskCache:
    """A cache that limits which tasks of a library a model holds: those in use and the most recently used, at most ``keep``.

    Args:
        library: the tasks.
        keep: largest number of tasks that are kept, > 0; more are held only while they are in use.
        load: called with a folder and a task's name to put the task into the model.
        drop: called with a task's name to take it out.
    """

    def __init__(
        self, library: Library, keep: int, load: Callable[[Path, str], object], drop: Callable[[str], object]
    ) -> None:
        self.library, self.keep = library, keep
        self._load, self._drop = load, drop
        self._users: dict[str, int] = {}  # number of users per held task, least recently used first
        self._lock = threading.RLock()

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_lock": None, "_users": dict.fromkeys(self._users, 0)}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, _lock=threading.RLock())

    def __contains__(self, task: object) -> bool:
        return task in self.library.folders

    def add(self, library: Library, keep: int) -> None:
        """Add the tasks of another library."""
        with self._lock:
            self.library.folders.update(library.folders)
            self.library.descriptions.update(library.descriptions)
            self.keep = keep

    @contextmanager
    def holding(self, tasks: Sequence[str]) -> Iterator[None]:
        """Keep ``tasks`` in the model inside the ``with`` block, whatever other threads do, and as many others as fit."""
        held = []
        try:
            with self._lock:
                self._make_room(tasks)
                for task in tasks:
                    if task not in self._users:
                        self._load(self.library.folders[task], task)
                    self._users[task] = self._users.pop(task, 0) + 1
                    held.append(task)
            yield
        finally:
            with self._lock:
                for task in held:
                    if task in self._users:
                        self._users[task] -= 1

    def _make_room(self, tasks: Sequence[str]) -> None:
        """Drop the least recently used tasks that are not in use until ``tasks`` fit too."""
        surplus = len({*self._users, *tasks}) - max(self.keep, len(set(tasks)))
        for task in [task for task, users in self._users.items() if users == 0 and task not in tasks][
            : max(surplus, 0)
        ]:
            self._drop(task)
            del self._users[task]

    def forget(self, task: str) -> None:
        with self._lock:
            self._users.pop(task, None)
            self.library.folders.pop(task, None)
            self.library.descriptions.pop(task, None)
