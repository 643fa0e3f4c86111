"""Tasks trained side by side, in processes of Ray: on a frozen base they do not need each other.

Each task is trained in a folder of its own, ``<run>/parallel/<task>``, with its own checkpoint, and moves into the run when it is
finished. A task whose process is lost goes on from its checkpoint in another one. Files are byte for byte those of training one
task after another with as many threads.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

from taps.data.classification.images import TaskData
from taps.errors import UserError, first_line
from taps.memory import keep_freed_memory
from taps.runs import cluster
from taps.runs.adaptation import Experiment, epoch_line
from taps.runs.setup import make_accelerator, make_model
from taps.settings.adaptation import SequentialSettings
from taps.stop_signals import Interrupted, StopSignals
from taps.storage import checkpoint
from taps.storage.files import atomic_write
from taps.storage.run_folder import RunFolder

#: how often Ray starts a task again whose process died
_RETRIES = 20
#: seconds between looks at the progress
_PAUSE = 0.5


@dataclass
class Job:
    """One task of one run.

    Attributes:
        experiment: the run.
        task: the task's name.
        units: number of layers of the model.
        label: what to call it.
        start: file of the state from which its training may start, there or not.
        rows: number of epochs that have been shown.
        tries: how often it was stopped by something else than this program, or lost a process that reads images.
        bar: its line on a terminal.
    """

    experiment: Experiment
    task: str
    units: int
    label: str
    start: Path | None = None
    rows: int = 0
    tries: int = 0
    bar: tqdm | None = None

    @property
    def path(self) -> Path:
        """The folder in which the task is trained."""
        return self.experiment.folder.path / "parallel" / self.task

    def prepare(self) -> None:
        """Hand over what the run has of the task: one that is to be trained for longer, or was begun without ``--parallel``."""
        folder, own = self.experiment.folder, RunFolder(self.path)
        stored = checkpoint.read(folder.state_path)
        was_begun = stored is not None and stored.record["tasks"] == [self.task]
        record_path = self.path / "settings.json"  # written last: until then nothing is handed over
        if (was_begun or folder.finished_epochs(self.task)) and not record_path.is_file():
            shutil.rmtree(self.path, ignore_errors=True)
            self.path.mkdir(parents=True)
            shutil.copy(folder.path / "settings.txt", self.path)
            if folder.task_path(self.task).is_dir():
                shutil.copytree(folder.task_path(self.task), own.task_path(self.task))
            if was_begun:
                shutil.copytree(folder.state_path.parent, own.state_path.parent)
            own.add_metrics([row for row in folder.rows if row["task"] == self.task])
            with atomic_write(record_path) as temporary:
                shutil.copy(folder.path / "settings.json", temporary)
            if was_begun:
                shutil.rmtree(folder.state_path.parent)
        self.rows = len(own.read_metrics())

    def show(self) -> None:
        """Show the epochs that have ended since the last time."""
        try:
            rows = RunFolder(self.path).read_metrics()
        except UserError:
            return  # it is being written on a file system that shows it
        self.experiment.track(rows[self.rows :])
        for row in rows[self.rows :]:
            if self.bar is None:
                line = epoch_line([row], self.experiment.options.epochs, self.units, False, 0.0).rpartition(",")[0]
                self.experiment.accelerator.print(f"{self.label}{line}", flush=True)
            else:
                self.bar.n = row["epoch"]
                error = row.get("val_error", row["train_error"])
                accuracy = "" if error is None else f"{100 - error:.2f} %, "
                tuned = round(row["tuned_layers"] * self.units)
                self.bar.set_postfix_str(f"{row['phase']}, {accuracy}tuned {tuned}/{self.units}")
        self.rows = max(self.rows, len(rows))

    def finish(self) -> None:
        """Move the trained task into the run."""
        self.show()
        own, folder = RunFolder(self.path), self.experiment.folder
        folder.keep_metrics(self.task, 0)
        folder.add_metrics([row for row in own.read_metrics() if row["task"] == self.task])
        target = folder.task_path(self.task)
        if target.is_dir():
            shutil.rmtree(target)
        if not folder.fingerprints_path.is_file():
            with atomic_write(folder.fingerprints_path) as temporary:
                shutil.copy(own.fingerprints_path, temporary)
        for events in self.path.glob("events.out.*"):
            shutil.move(events, folder.path / events.name)
        os.rename(own.task_path(self.task), target)
        if self.experiment.options.keep_checkpoint and own.state_path.is_file():
            shutil.rmtree(folder.state_path.parent, ignore_errors=True)
            shutil.move(own.state_path.parent, folder.state_path.parent)
        shutil.rmtree(self.path)
        if not any(self.path.parent.iterdir()):
            self.path.parent.rmdir()


def train(settings: SequentialSettings, jobs: Sequence[Job], stop: StopSignals) -> None:
    """Train the jobs side by side, as many at a time as ``--parallel`` says, or as a cluster has room for.

    Raises:
        UserError: if a task cannot be trained, or Ray does not start.
        Interrupted: if a signal asked to stop; every task has then saved its state.
    """
    if not jobs:
        return
    at_once = min(settings.parallel or len(jobs), len(jobs))
    threads = cluster.threads_each(at_once)
    for job in jobs:
        job.prepare()
    with cluster.connected(settings.address, at_once * threads, "--parallel"):
        import ray

        gpus = _gpus(settings, at_once)
        if settings.address is not None:  # no task may ask for more than a machine there has
            largest = max((node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]), default=1)
            threads = max(min(threads, int(largest)), 1)
        # A process that has used a GPU keeps its memory, so none trains a second task there.
        calls = 1 if gpus else 0
        remote = ray.remote(num_cpus=threads, num_gpus=gpus, max_retries=_RETRIES, max_calls=calls)(_train_task)
        data = {id(job.experiment): ray.put(job.experiment.tasks) for job in jobs}
        waiting, running = list(jobs), {}
        bars = _show_bars(jobs)
        try:
            while waiting or running:
                while waiting and len(running) < at_once and stop.received is None:
                    job = _next(waiting, list(running.values()))
                    if job is None:
                        break
                    waiting.remove(job)
                    options = replace(job.experiment.options, workers=_share(settings.workers, at_once))
                    place = (str(job.experiment.folder.path.absolute()), os.getcwd(), threads)
                    fork = job.experiment.fork and job.experiment.fork.absolute()
                    running[remote.remote(options, data[id(job.experiment)], job.task, fork, *place)] = job
                if stop.received is not None:
                    _stop(ray, running, stop.received)
                done, _ = ray.wait(list(running), timeout=_PAUSE)
                for job in running.values():
                    job.show()
                for reference in done:
                    job, is_finished = running[reference], ray.get(reference)
                    del running[reference]
                    if is_finished:
                        job.finish()
                    elif job.tries < _RETRIES:
                        job.tries += 1
                        waiting.append(job)
                    else:
                        raise UserError(
                            f"task {job.task} was stopped {_RETRIES} times by something else than this program"
                        )
        except ray.exceptions.RayTaskError as error:
            cause = error.cause if isinstance(error.cause, Exception) else error
            raise cause if isinstance(cause, UserError) else error from None
        except ray.exceptions.RayError as error:
            raise UserError(f"a task's process was lost {_RETRIES} times: {first_line(error)}") from None
        finally:
            for bar in bars:
                bar.close()


def _next(waiting: Sequence[Job], running: Sequence[Job]) -> Job | None:
    """Return the next job that may start: of runs that share a beginning, one trains it before the others go on from it."""
    for job in waiting:
        if job.start is None or job.start.is_file() or all(own.start != job.start for own in running):
            return job
    return None


def _share(workers: int, at_once: int) -> int:
    return max(workers // at_once, 1) if workers else 0


def _gpus(settings: SequentialSettings, at_once: int) -> float:
    """Return how many GPUs, or which part of one, each task gets."""
    import ray

    there = ray.cluster_resources().get("GPU", 0)
    if settings.device == "cpu" or not there:
        return 0
    return 1.0 if settings.address is not None else cluster.share(int(there), at_once)


def _show_bars(jobs: Sequence[Job]) -> list[tqdm]:
    """Show one line per task on a terminal; elsewhere each epoch is printed."""
    if not os.isatty(1):
        return []
    width = max(len(job.label + job.task) for job in jobs)
    form = "{desc} {n_fmt:>3}/{total_fmt} |{bar:20}| {postfix}"
    for position, job in enumerate(jobs):
        title = f"{job.label}{job.task}".ljust(width)
        job.bar = tqdm(total=job.experiment.options.epochs, desc=title, position=position, bar_format=form)
    return [job.bar for job in jobs if job.bar is not None]


def _stop(ray, running: dict, number: int) -> None:
    """Ask every process to save its state, wait until they have, and end."""
    for reference in running:
        ray.cancel(reference, force=False, recursive=False)
    ended = time.time() + 60
    while running and time.time() < ended:
        done, _ = ray.wait(list(running), timeout=_PAUSE)
        for reference in done:
            del running[reference]
    raise Interrupted(number)


def _train_task(
    settings: SequentialSettings, tasks: list[TaskData], name: str, fork: Path | None, run: str, cwd: str, threads: int
) -> bool:
    """Train one task of a run, from its checkpoint if it has one, and return whether it is finished; executed by Ray."""
    os.chdir(cwd)
    torch.set_num_threads(threads)
    keep_freed_memory()
    own = replace(settings, resume=True, overwrite=False, parallel=None, address=None, track=None)
    model, prepare = make_model(own, train_base=False)
    path = Path(run) / "parallel" / name
    accelerator = make_accelerator(own)
    with (
        contextlib.suppress(Interrupted),  # the checkpoint is then written
        StopSignals() as stop,
        Experiment.start(own, accelerator, tasks, prepare, path, stop, fork=fork, only=name) as experiment,
    ):
        try:
            experiment.train_in_sequence(model)
        except (RuntimeError, EOFError, ConnectionError) as error:
            if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
                raise
            return False  # a process that reads images was killed
        return True
    return False
