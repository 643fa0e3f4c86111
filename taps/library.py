"""Task files as a library: folders with many tasks, of which a model holds only those in use.

A task's folder holds ``task.json`` and ``task.safetensors``; a root holds such folders, as a results folder does.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from taps.cost import is_tuned
from taps.errors import UserError
from taps.taskfile import read_description

FILES = ("task.json", "task.safetensors")


class Library:
    """The tasks in some folders. Damaged ones do not keep the others from being used.

    Args:
        roots: task folders, or folders that hold task folders.
        by_run: tell tasks of the same name apart by the folder theirs is in: ``demo_joint/digits``.

    Attributes:
        folders: the folder of each usable task, by the task's name, in order of the roots and their folders.
        descriptions: the contents of their ``task.json``.
        refused: what is wrong with each folder that cannot be used.

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
            path = folder / "task.safetensors"
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
        """A warning for each folder that could not be used."""
        for message in self.refused.values():
            warnings.warn(f"a task is left out: {message}", stacklevel=3)

    def check(self) -> None:
        """Name what could not be used.

        Raises:
            UserError: if anything could not.
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
    inner = [folder for folder in sorted(root.iterdir()) if any((folder / name).is_file() for name in FILES)]
    if not inner:
        raise UserError(f"{root} holds no task (a folder with {' and '.join(FILES)}) and no folder with one")
    return inner


class Shelf:
    """Decides which tasks of a library a model holds: at most ``keep`` of them, the most recently used ones.

    Args:
        library: the tasks.
        keep: > 0.
        load: called with a folder and a task's name to put the task into the model.
        drop: called with a task's name to take it out.
    """

    def __init__(
        self, library: Library, keep: int, load: Callable[[Path, str], object], drop: Callable[[str], object]
    ) -> None:
        self.library, self.keep = library, _positive(keep)
        self._load, self._drop = load, drop
        self._held: dict[str, None] = {}  # the least recently used first

    def __contains__(self, task: object) -> bool:
        return task in self.library.folders

    def add(self, library: Library, keep: int) -> None:
        """Offer the tasks of another library too."""
        self.library.folders.update(library.folders)
        self.library.descriptions.update(library.descriptions)
        self.keep = _positive(keep)

    def fetch(self, tasks: Sequence[str]) -> None:
        """Have ``tasks`` in the model, and as many of the others as fit."""
        for task in tasks:
            self._held.pop(task, None)
        spare = max(self.keep - len(tasks), 0)
        for task in [*self._held][: max(len(self._held) - spare, 0)]:
            self._drop(task)
            del self._held[task]
        for task in tasks:
            self._load(self.library.folders[task], task)
            self._held[task] = None

    def forget(self, task: str) -> None:
        self._held.pop(task, None)
        self.library.folders.pop(task, None)
        self.library.descriptions.pop(task, None)


def _positive(keep: int) -> int:
    if keep < 1:
        raise UserError(f"keep must be at least 1, not {keep}")
    return keep


def list_table(library: Library) -> str:
    """One line a task: accuracy, layers tuned, size, and what it was made for."""
    heads = ("task", "accuracy %", "tuned layers", "parameters", "bytes", "method", "norm", "base")
    rows = []
    for name, description in library.descriptions.items():
        account, accuracy = description["accounting"], description.get("accuracy")
        rows.append(
            (
                name,
                "–" if accuracy is None else f"{accuracy:.2f}",
                f"{account['tuned_units']}/{account['units']}",
                f"{account['parameters']:,}",
                f"{description['bytes']:,}",
                description["method"],
                description["norm"],
                f"{description['base']['name']} {description['base']['fingerprint'][:8]}",
            )
        )
    return align([heads, *rows], left=(0, 5, 6, 7))


def show_table(description: dict) -> str:
    """What one task tuned, a line a layer, and what it takes to use it."""
    account = description["accounting"]
    classes = description.get("classes")
    about = {
        "task": description["task"],
        "base": f"{description['base']['name']}, fingerprint {description['base']['fingerprint']}",
        "method": f"{description['method']}, norm={description['norm']}, options {description['options']}",
        "classes": f"{len(classes)}: {', '.join(classes[:8])}{', …' if len(classes) > 8 else ''}"
        if classes
        else "not stored",
        "accuracy": f"{description['accuracy']:.2f} %" if description.get("accuracy") is not None else "not tested",
        "stored": f"{description['bytes']:,} bytes: deltas {account['delta_parameters']:,}, norms "
        f"{account['norm_parameters']:,}, head {account['head_parameters']:,} parameters",
        "tuned": f"{account['tuned_units']} of {account['units']} layers",
    }
    stored_as: dict[str, set[str]] = {}
    for key, encoding in description.get("encodings", {}).items():
        stored_as.setdefault(key.split("/")[1], set()).add(encoding)
    rows = [("layer", "kind", "parameters", "score", "tuned")]
    for unit in description["units"]:
        score = "–" if unit["score"] is None else f"{unit['score']:.4f}"
        tuned = ", ".join(["yes", *sorted(stored_as.get(unit["name"], ()))]) if is_tuned(unit) else ""
        rows.append((unit["name"], unit["kind"], f"{unit['parameters']:,}", score, tuned))
    lines = [f"{key:9} {value}" for key, value in about.items()]
    return "\n".join([*lines, "", align(rows, left=(0, 1, 4))])


def compare_table(library: Library) -> str:
    """For each two tasks the layers that both, either and only one of them tunes.

    Raises:
        UserError: for fewer than two tasks, or tasks of different networks.
    """
    tasks = library.descriptions
    if len(tasks) < 2:
        raise UserError(f"comparing takes two tasks; there {'is one' if tasks else 'is none'}")
    first = next(iter(tasks.values()))
    names = [unit["name"] for unit in first["units"]]
    for name, description in tasks.items():
        if [unit["name"] for unit in description["units"]] != names:
            raise UserError(
                f"tasks {first['task']} ({first['base']['name']}) and {name} ({description['base']['name']}) "
                "are for different networks, whose layers cannot be compared"
            )
    tuned = {name: {u["name"] for u in description["units"] if is_tuned(u)} for name, description in tasks.items()}
    rows = [("tasks", "", "both tune", "either", "overlap %", "same base")]
    for index, a in enumerate(tuned):
        for b in [*tuned][index + 1 :]:
            both, either = len(tuned[a] & tuned[b]), len(tuned[a] | tuned[b])
            same = tasks[a]["base"]["fingerprint"] == tasks[b]["base"]["fingerprint"]
            share = f"{100 * both / either:.0f}" if either else "–"
            rows.append((a, b, str(both), str(either), share, "yes" if same else "no"))
    return align(rows, left=(0, 1, 5))


def remove(folders: Sequence[Path]) -> None:
    """Delete the two files of some tasks, and their folders if nothing else is in them.

    Raises:
        UserError: if a folder is not one task's; nothing is then deleted.
    """
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder} does not exist; nothing is deleted")
        if not any((folder / name).is_file() for name in FILES):
            raise UserError(f"{folder} is not a task's folder (with {' and '.join(FILES)}); nothing is deleted")
    for folder in folders:
        for name in FILES:
            (folder / name).unlink(missing_ok=True)
        if not any(folder.iterdir()):
            folder.rmdir()


def align(rows: Sequence[Sequence[str]], left: Sequence[int]) -> str:
    """Rows of texts as a table; the columns in ``left`` start where the others end."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            text.ljust(width) if column in left else text.rjust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
