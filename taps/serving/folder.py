"""The folder of tasks that is served, followed while tasks are added, replaced and removed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from taps.errors import UserError, unknown
from taps.storage.library import FILES
from taps.storage.task_file import read_description, tensors_path

_Stamp = tuple[tuple[int, ...] | None, ...]


@dataclass(frozen=True)
class StoredTask:
    """A task as its files were when they were last read.

    Attributes:
        name: the task's name.
        folder: the folder with its files.
        version: hash of ``task.json``, which holds a hash of the tensors; it changes when anything about the task does.
        description: contents of ``task.json``.
        stamp: times and sizes of the files.
    """

    name: str
    folder: Path
    version: str
    description: dict
    stamp: _Stamp


class ServedFolder:
    """The tasks in a folder, by name.

    Args:
        root: a task's folder, or a folder that holds task folders.

    Attributes:
        tasks: the usable tasks.
        refused: the reason for each folder that cannot be used.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.tasks: dict[str, StoredTask] = {}
        self.refused: dict[Path, str] = {}
        self._read: dict[Path, tuple[_Stamp, StoredTask | str]] = {}
        self.refresh()

    def refresh(self, names: Iterable[str] | None = None) -> None:
        """Read what has changed: all tasks, or only those of these names, of which unknown ones are looked for."""
        known = None if names is None else {name: self.tasks.get(name) for name in names}
        if known is not None and all(known.values()):
            folders = [task.folder for task in known.values() if task is not None]
            if all(self._read[folder][0] == _stamp(folder) for folder in folders):
                return
        found = {folder: stamp for folder in self._folders() if any(stamp := _stamp(folder))}
        read = {folder: self._known_or_read(folder, stamp) for folder, stamp in found.items()}
        tasks: dict[str, StoredTask] = {}
        refused: dict[Path, str] = {}
        for folder, (_, task) in read.items():
            if isinstance(task, str):
                refused[folder] = task
            elif task.name in tasks:
                refused[folder] = f"{tasks[task.name].folder} holds a task {task.name!r} too"
            else:
                tasks[task.name] = task
        self._read, self.tasks, self.refused = read, tasks, refused  # other threads see the old or the new ones

    def _folders(self) -> list[Path]:
        if any((self.root / name).is_file() for name in FILES):
            return [self.root]
        try:
            return sorted(path for path in self.root.iterdir() if path.is_dir() and not path.name.startswith("."))
        except OSError:
            return []

    def _known_or_read(self, folder: Path, stamp: _Stamp) -> tuple[_Stamp, StoredTask | str]:
        before = self._read.get(folder)
        if before is not None and before[0] == stamp:
            return before
        try:
            return stamp, _read_task(folder, stamp)
        except OSError as error:  # perhaps not for long: the empty stamp is never that of the files
            return (), f"{error.filename or folder}: {error.strerror}"

    def get(self, name: str) -> StoredTask:
        """Return a task as it is now.

        Raises:
            UserError: for a task that is not there, with the nearest name, or the reason why it cannot be used.
        """
        self.refresh([name])
        if name in self.tasks:
            return self.tasks[name]
        for folder, reason in self.refused.items():
            if folder.name == name:
                raise UserError(f"task {name!r} cannot be used: {reason}")
        raise unknown("task", name, self.tasks)


def _stamp(folder: Path) -> _Stamp:
    """Return what changes when a task's files are written."""
    stamps: list[tuple[int, ...] | None] = []
    for name in FILES:
        try:
            found = (folder / name).stat()
            stamps.append((found.st_mtime_ns, found.st_size, found.st_ino))
        except OSError:
            stamps.append(None)
    return tuple(stamps)


def _read_task(folder: Path, stamp: _Stamp) -> StoredTask | str:
    try:
        version = hashlib.sha256((folder / "task.json").read_bytes()).hexdigest()[:16]
        description = read_description(folder)
        path = tensors_path(folder, description)
        size = path.stat().st_size
        json.dumps(description, allow_nan=False, ensure_ascii=False).encode()
    except UserError as error:
        return str(error)
    except ValueError as error:
        return f"{folder / 'task.json'} holds a value that JSON cannot express ({error})"
    if size != description["bytes"]:
        return f"{path} has {size} bytes, task.json says {description['bytes']}"
    return StoredTask(description["task"], folder, version, description, stamp)
