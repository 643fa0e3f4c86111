"""Reading and writing of results folders.

``results/README.md`` describes the files.
"""

from __future__ import annotations

import errno
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import warnings
import weakref
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from taps.core import accounting
from taps.errors import UserError
from taps.storage import checkpoint, task_file
from taps.storage.files import read_json, write_json, write_text
from taps.storage.library import Library
from taps.storage.task_tables import plain_table
from taps.version import VERSION

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

#: options that a method or the data fill in where they are not given
LATER = ("norm", "tasks", "budget")
#: options that may differ when a run is continued, because they do not change its result
FREE_ON_RESUME = (
    "resume", "overwrite", "workers", "device", "multi_gpu", "gpus", "compile", "result_path", "experiment_name", "phases",
    "exp_ids", "config", "ignore_unknown", "single_task", "policy", "sample", "keep_checkpoint", "track",
    "skip_bad_images", "parallel", "address", "seeds",
)  # fmt: skip


def _is_finished(state: Path, epochs: int) -> bool:
    """Return whether the tasks of a checkpoint, if there is one, were trained and tested, perhaps ended early by ``--patience``."""
    stored = checkpoint.read(state)
    if stored is None:
        return True
    folder = RunFolder(state.parents[1])
    folder.rows = folder.read_metrics()
    return all(folder.finished_epochs(task) >= epochs for task in stored.record["tasks"])


def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that a result depends on."""
    from importlib.metadata import version

    names = ("torch", "torchvision", "timm", "safetensors", "accelerate", "numpy")
    return {"taps": VERSION, "python": platform.python_version(), **{name: version(name) for name in names}}


def commit() -> str | None:
    """Return the commit of the source checkout that this library runs from, with ``+`` if files have changed since."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def _unlock(handle: int, owner: int) -> None:
    """End a lock of this process, also for loading processes that have inherited its handle and may still be ending."""
    if os.getpid() == owner:
        fcntl.flock(handle, fcntl.LOCK_UN)
    os.close(handle)


def settle_epochs_of(path: Path) -> float | None:
    """Return the ``settle_epochs`` of the run in a folder, which goes on with them whatever is now the default; ``None`` if there
    is no run, or it has none."""
    try:
        return read_json(path / "settings.json").get("settle_epochs")
    except UserError:
        return None


class RunFolder:
    """The folder of one experiment."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.state_path = path / "checkpoint" / "state.safetensors"
        self.base_path = path / "base.safetensors"
        self.fingerprints_path = path / "fingerprints.json"
        self.rows: list[dict] = []
        #: settings that a later phase has changed: before and now, by name
        self.changed: dict[str, tuple] = {}
        self._lock: weakref.finalize | None = None
        self._handle = -1

    def lock(self) -> None:
        """Keep other runs out of the folder until :meth:`release`, or until this process ends.

        Raises:
            UserError: if another run writes to it.
        """
        if fcntl is None:
            return
        handle = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(handle)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise UserError(
                    f"another run is writing to {self.path}; wait for it, or choose another --experiment_name"
                ) from None
            return  # a file system without locks
        self._lock, self._handle = weakref.finalize(self, _unlock, handle, os.getpid()), handle

    def release(self) -> None:
        """Let other runs write to the folder."""
        if self._lock is not None:
            self._lock()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def check_present(self) -> None:
        """Raise a ``UserError`` if somebody has deleted the folder of a run that has begun."""
        if self._lock is None or not self._lock.alive:
            return
        own = os.fstat(self._handle)
        try:
            there = os.stat(self.path)
            is_own = (there.st_dev, there.st_ino) == (own.st_dev, own.st_ino)
        except FileNotFoundError:
            is_own = False
        if not is_own or not (self.path / "settings.json").is_file():
            raise UserError(f"{self.path} was deleted while the run was writing to it")

    @classmethod
    def open(
        cls,
        path: Path,
        settings: dict,
        resume: bool = False,
        overwrite: bool = False,
        stages: Sequence[str] = (),
        repeatable: str | None = None,
        defaults: Mapping | None = None,
        free: Collection[str] = (),
        records: bool = True,
    ) -> RunFolder:
        """Start or continue an experiment; the settings are written before anything else.

        Args:
            path: the folder.
            settings: every option of the run.
            resume: continue the run in the folder, with the same settings.
            overwrite: delete the earlier run in the folder.
            repeatable: contents of ``settings.yaml``, which repeats the run when given to ``--config``.
            defaults: defaults of the options, for a run that was begun before there were some of them.
            free: settings that may differ from the run's; they are in ``changed`` of the result.
            records: whether the run's record has the new ones from now on.
            stages: subfolders that hold earlier stages of the same run, and are deleted with it.

        Raises:
            UserError: if another run is writing to the folder, or if it exists and neither is set, or holds something other
                than a run, or a run with other settings.
        """
        folder = cls(path)
        if path.is_dir() or not path.exists():
            path.mkdir(parents=True, exist_ok=True)
            folder.lock()
        if not path.is_dir() or any(path.iterdir()):
            is_run = (path / "settings.json").is_file()
            if not is_run:
                raise UserError(f"{path} exists and is not a run of this program; choose another --experiment_name")
            if resume:
                longer, folder.changed = folder._check_same(settings, defaults, free)
                folder.rows = folder.read_metrics()
                if longer or (folder.changed and records):
                    folder._write_settings(settings, repeatable)
                if longer:  # its numbers are those of fewer epochs than the settings say
                    (path / "summary.json").unlink(missing_ok=True)
                return folder
            if not overwrite:
                raise UserError(
                    f"experiment folder {path} exists; continue it with --resume, replace it with --overwrite, "
                    "or choose another --experiment_name"
                )
            own = [path / stage for stage in stages]
            nested = [inner.parent for inner in path.rglob("settings.json") if inner.parent not in (path, *own)]
            if nested:
                raise UserError(f"{path} also holds the run {nested[0]}; move that away before overwriting")
            for inner in path.iterdir():  # the folder itself is locked
                shutil.rmtree(inner) if inner.is_dir() and not inner.is_symlink() else inner.unlink()
        folder._write_settings(settings, repeatable)
        return folder

    def _write_settings(self, settings: dict, repeatable: str | None) -> None:
        more = {"versions": versions(), "commit": commit(), "command": list(sys.argv)}
        write_json(
            self.path / "settings.json", {**settings, **more}
        )  # first, since it is what makes the folder a run's
        lines = [f"{key}={value}" for key, value in settings.items()]
        write_text(self.path / "settings.txt", "\n".join(lines) + "\n")
        if repeatable is not None:
            write_text(self.path / "settings.yaml", repeatable)

    def check_alike(self, settings: Mapping) -> None:
        """Refuse settings that this run, which theirs are to be compared with, does not have.

        Raises:
            UserError: naming the settings that differ.
        """
        stored, wanted = read_json(self.path / "settings.json"), json.loads(json.dumps(dict(settings)))
        free = (*FREE_ON_RESUME, "dataset", "data")  # the same images may lie elsewhere
        # What a method fills in is not known yet.
        given = {
            key: value for key, value in wanted.items() if key not in free and (value is not None or key not in LATER)
        }
        other = [key for key, value in given.items() if key in stored and _unordered(stored[key]) != _unordered(value)]
        if other:
            raise UserError(
                f"{self.path} has other settings: {_listed(other, wanted, stored)}; "
                "leave these as they were, or choose another --experiment_name"
            )

    def _check_same(
        self, settings: dict, defaults: Mapping | None = None, may_differ: Collection[str] = ()
    ) -> tuple[bool, dict[str, tuple]]:
        """Refuse to continue with other settings; return whether the run is to be longer, and before and now of allowed changes.

        Raises:
            UserError: naming the settings that differ.
        """
        stored = read_json(self.path / "settings.json")
        wanted = json.loads(json.dumps(settings))
        known = {*wanted, "versions", "commit", "command"}
        if any(key not in known for key in stored):
            raise UserError(
                f"{self.path} was written by another program ({stored.get('command', ['unknown'])[0]}); resume it with that one"
            )
        free = FREE_ON_RESUME
        if "data" in wanted:  # the same images may lie elsewhere
            free += ("dataset", "data")
        before = {**(defaults or {}), **stored}  # settings that are newer than the run have their defaults
        longer = wanted.get("epochs", 0) > before.get("epochs", math.inf)
        if longer and (before.get("budget") is not None or before.get("variant") == "lite"):
            what = "a budget" if before.get("budget") else "--variant lite"
            raise UserError(
                f"{self.path} cannot be extended to {wanted['epochs']} epochs: {what} divides all epochs into parts"
            )
        paths = [self.state_path, *self.path.glob("parallel/*/checkpoint/state.safetensors")] if longer else []
        if any(not _is_finished(path, before["epochs"]) for path in paths):
            raise UserError(
                f"{self.path} was stopped before its {before['epochs']} epochs: finish them with --resume, and extend it then"
            )
        free += ("epochs", "shared_epochs") if longer else ()
        differing = [key for key in wanted if key not in free and key in before and wanted[key] != before[key]]
        other = [key for key in differing if key not in may_differ]
        if other:
            raise UserError(
                f"{self.path} cannot be resumed with other settings: {_listed(other, wanted, before)}; "
                "leave these as they were, or start again with "
                "--overwrite or another --experiment_name"
            )
        known = stored.get("data") or {}  # not stored before version 0.11
        changed = [task for task, own in wanted.get("data", {}).items() if task in known and own != known[task]]
        if changed:
            raise UserError(
                f"{self.path} cannot be resumed: the images of {', '.join(changed)} are not those of the run"
            )
        return longer, {key: (before[key], wanted[key]) for key in differing}

    def task_path(self, task: str) -> Path:
        return self.path / task

    def finished_epochs(self, task: str) -> int:
        """Return the number of epochs after which the task was trained and tested; 0 if it was not yet."""
        path = self.task_path(task) / "task.json"
        description = read_json(path) if path.is_file() else {}
        if "accuracy" not in description:
            return 0
        known = (description.get("provenance") or {}).get("epochs")  # not stored before version 0.11
        return known or max((row["epoch"] for row in self.rows if row["task"] == task), default=1)

    def read_metrics(self) -> list[dict]:
        """Return one dict per epoch and task."""
        path = self.path / "metrics.jsonl"
        if not path.is_file():
            return []
        try:
            return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
        except json.JSONDecodeError as error:
            raise UserError(f"{path} is damaged: {error}") from None

    def keep_metrics(self, task: str, epochs: int) -> None:
        """Drop the task's rows after the first ``epochs`` epochs, which a continued run writes again."""
        self.rows = [row for row in self.rows if row["task"] != task or row["epoch"] <= epochs]

    def add_metrics(self, rows: Iterable[dict]) -> None:
        self.check_present()
        self.rows.extend(rows)
        write_text(self.path / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in self.rows))

    def write_summary(self, method: str, seed: int, tasks: Iterable[str], before: float = 0.0) -> dict:
        """Write ``summary.json`` from the finished tasks' files; ``before`` is the duration of earlier stages in seconds."""
        descriptions = {task: task_file.read_description(self.task_path(task)) for task in tasks}
        seconds = round(before + sum(row["seconds"] for row in self.rows), 1)
        summary = {"method": method, "seed": seed, "seconds": seconds, **summarise(descriptions)}
        write_json(self.path / "summary.json", summary)
        return summary


def base_origin(path: Path, name: str) -> dict:
    """Return how the base of a run's tasks was made, from its settings, or from the network's name if there are none.

    For tasks whose own files do not say it, those of versions before 0.11.
    """
    settings = read_json(path / "settings.json") if (path / "settings.json").is_file() else {}
    file = settings.get("model_path")
    weights = "file" if file else "pretrained" if settings.get("pretrained", True) else "random"
    origin = {"model": settings.get("model_type", name), "weights": weights, "file": file}
    origin.update(seed=settings.get("seed"), input_size=settings.get("input_size"))
    return {**origin, "path": file} if file and Path(file).is_file() else origin


def image_settings(path: Path) -> dict | None:
    """Return a run's ``input_size``, ``resize`` and ``cropped``, or ``None`` if the folder says nothing of them."""
    settings = read_json(path / "settings.json") if (path / "settings.json").is_file() else {}
    sizes = {name: settings.get(name) for name in ("input_size", "resize")}
    whole = all(isinstance(size, int) for size in sizes.values())
    return {**sizes, "cropped": bool(settings.get("cropped"))} if whole else None


def _listed(names: Iterable[str], wanted: Mapping, before: Mapping) -> str:
    """Return settings with their values now and before, for a message."""
    return ", ".join(f"{name}={wanted[name]} (was {before[name]})" for name in names)


def _unordered(value: object) -> object:
    return sorted(value, key=str) if isinstance(value, list) else value


def older_preprocessing(default: Mapping, folder: Path, task: str) -> dict | None:
    """Return the preprocessing of a task that was saved before version 0.11, as its run's settings say, or ``None``.

    Args:
        default: the base's, as :meth:`taps.networks.preprocessing.Preprocessing.describe` returns it.
        folder: the task's folder.
        task: the task's name.
    """
    settings = image_settings(folder.resolve().parent)
    if settings is None:
        return None
    crop = "stretch" if settings["cropped"] or "cropped" in task.lower() else "center"
    return {**default, "input_size": settings["input_size"], "resize": settings["resize"], "crop": crop}


@dataclass(frozen=True)
class Run:
    """A finished run, as read from its folder.

    Attributes:
        path: the folder.
        settings: options of the run.
        summary: final table.
        tasks: descriptions of the tasks by name, in training order.
        metrics: one dict per epoch and task.
    """

    path: Path
    settings: dict
    summary: dict
    tasks: dict[str, dict]
    metrics: list[dict]


def read_run(path: str | Path) -> Run:
    """Read a finished run.

    Raises:
        UserError: if the folder holds no finished run.
    """
    path = Path(path)
    if path.is_dir() and not any(path.iterdir()):
        raise UserError(f"{path} is empty; train into it first, e.g. with: python train_sequential.py")
    tasks = read_tasks(path)
    if not (path / "summary.json").is_file():
        raise UserError(f"{path} holds no finished run: it lacks summary.json; continue it with --resume")
    summary = read_json(path / "summary.json")
    tasks = {name: description for name, description in tasks.items() if name in summary["tasks"]}
    return Run(path, read_json(path / "settings.json"), summary, tasks, RunFolder(path).read_metrics())


def find_runs(root: str | Path, like: Run | None = None) -> dict[str, Run]:
    """Return the finished runs directly below ``root`` by folder; with ``like``, only those with its tasks and network."""
    found = {}
    for path in sorted(Path(root).glob("*/summary.json")):
        try:
            if "delta_t" in read_json(path):
                continue  # a multi-task run, which has no accuracy and size to compare
            run = read_run(path.parent)
        except UserError as error:
            warnings.warn(f"a run is left out: {error}", stacklevel=2)
            continue
        alike = like is None or (
            set(run.summary["tasks"]) == set(like.summary["tasks"])
            and run.settings["model_type"] == like.settings["model_type"]
        )
        if alike:
            found[path.parent.name] = run
    return found


def summarise(descriptions: Mapping[str, dict]) -> dict:
    """Return the part of ``summary.json`` that is computed from the tasks' descriptions, including accuracies."""
    accounts = [description["accounting"] for description in descriptions.values()]
    metric = task_file.common_metric(descriptions.values())
    return {
        **({} if metric == "accuracy" else {"metric": metric}),
        "mean_accuracy": sum(description["accuracy"] for description in descriptions.values()) / len(descriptions),
        "parameters_x_base": accounting.parameters_x_base(accounts),
        "parameters_x_base_with_heads": accounting.parameters_x_base(accounts, heads=True),
        "bytes_x_base": accounting.bytes_x_base(
            accounts, [description["bytes"] for description in descriptions.values()]
        ),
        "tasks": {
            task: {
                "accuracy": description["accuracy"],
                "tuned_layers": description["accounting"]["tuned_layers"],
                "parameters": description["accounting"]["parameters"],
                "bytes": description["bytes"],
            }
            for task, description in descriptions.items()
        },
    }


def task_folders(path: Path) -> dict[str, Path]:
    """Return the folder of each usable task in ``path`` by the task's name, which the folder need not have."""
    return Library([path]).folders


def read_tasks(path: Path) -> dict[str, dict]:
    """Return the descriptions (``task.json``) of a run's tasks, in training order.

    Raises:
        UserError: if the folder holds no run or no finished task. Damaged tasks among good ones are left out with a
            warning that names them.
    """
    if not path.is_dir():
        raise UserError(f"results folder {path} does not exist")
    if any(path.glob("retrain_*")) or (path / "single_task").is_dir():
        command = f"python train_mtl.py --config {path / 'settings.json'} --resume --phases test"
        raise UserError(f"{path} is a multi-task run; print its table with: {command}")
    if not any(path.glob("*/task.json")):
        runs = sorted(inner.parent for inner in path.glob("*/settings.json"))
        if runs:
            raise UserError(f"{path} holds several runs; name one of them, e.g. {runs[0]}")
        raise UserError(f"{path} holds no task files; train some tasks into it first")
    library = Library([path])
    if not library.folders:
        library.check()
    library.warn()
    settings = read_json(path / "settings.json") if (path / "settings.json").is_file() else {}
    order = {name: position for position, name in enumerate(settings.get("tasks", []))}
    names = sorted(library.descriptions, key=lambda name: (order.get(name, len(order)), name))
    return {name: library.descriptions[name] for name in names}


def table(summary: dict, in_bytes: bool = False) -> str:
    """Return the summary as text: one row per task, then the mean and the total size.

    With ``in_bytes``, for runs with a budget, sizes are bytes alone: weights of few bits are not comparable by their number.
    """
    sizes = ("bytes",) if in_bytes else ("parameters", "bytes")
    heads = ("task", f"{summary.get('metric', 'accuracy')} %", "tuned layers %", *sizes)
    rows = [
        (name, f"{row['accuracy']:.2f}", f"{100 * row['tuned_layers']:.1f}", *(f"{row[size]:,}" for size in sizes))
        for name, row in summary["tasks"].items()
    ]
    tuned = [row["tuned_layers"] for row in summary["tasks"].values()]
    rows.append(("mean", f"{summary['mean_accuracy']:.2f}", f"{100 * sum(tuned) / len(tuned):.1f}"))
    text = plain_table(heads, rows, "lrr" + "r" * len(sizes))
    with_heads = f"({summary['parameters_x_base_with_heads']:.3f} with heads)"
    size = "" if in_bytes else f"parameters × base: {summary['parameters_x_base']:.3f} {with_heads}, "
    count = f"{len(tuned)} {'task' if len(tuned) == 1 else 'tasks'}"
    return f"{text}\n{size}bytes × base: {summary['bytes_x_base']:.3f}, {count}, method {summary['method']}"
