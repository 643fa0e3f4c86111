"""A stage of training: a network, its data, a recipe, and the folder of its best epoch. All programs are lists of stages."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader

from taps.stop_signals import StopSignals
from taps.storage import checkpoint
from taps.storage.run_folder import RunFolder
from taps.task_model import TaskModel
from taps.training.loop import Criterion, Progress, Sampler, run_phases
from taps.training.recipe import Recipe


@dataclass
class Stage:
    """A single training run of one network.

    Attributes:
        model: the model, with the tasks already added.
        tasks: the tasks to train.
        streams: loader and sampler of each stream of batches that the recipe's phases name.
        recipe: how to train.
        criterion: mean loss of a batch from outputs and labels, one for all tasks or one per task.
        validate: as in :func:`taps.training.loop.run_phases`.
        report: called after each epoch, in the first process, with one row of numbers per task and whether it is the best so far.
        keep: called after each epoch that is the best so far, to save its result.
        folder: holds the metrics and the checkpoint, from which the stage continues if there is one; ``None``: nothing is kept.
        fork, done, best: as in :func:`taps.training.loop.run_phases`.
    """

    model: TaskModel
    tasks: Sequence[str]
    streams: Mapping[str, tuple[DataLoader, Sampler]]
    recipe: Recipe
    criterion: Criterion | Mapping[str, Criterion] = nn.functional.cross_entropy
    validate: Callable[[], tuple[dict[str, dict], float]] | None = None
    report: Callable[[list[dict], bool], None] = lambda rows, is_best: None
    keep: Callable[[list[dict]], None] = lambda rows: None
    folder: RunFolder | None = None
    fork: Path | None = None
    done: int = 0
    best: float | None = None

    def train(self, accelerator: Accelerator, stop: StopSignals | None = None) -> Progress:
        """Train from the start, or from the folder's checkpoint."""
        tasks, folder = list(self.tasks), self.folder
        record = None if folder is None else checkpoint.read_record(folder.state_path)
        resume = record is not None and record["tasks"] == tasks
        if resume and self.done:  # the checkpoint of the epochs that are done is of another schedule
            resume = (record["progress"]["epoch"], record["progress"]["batch"]) > (self.done, 0)
        for task in tasks if folder is not None else ():
            folder.keep_metrics(task, record["progress"]["epoch"] if resume else self.done)
        started = time.perf_counter()

        def on_epoch(rows: list[dict], is_best: bool) -> None:
            nonlocal started
            now = time.perf_counter()
            rows = [{**row, "seconds": round((now - started) / len(rows), 3)} for row in rows]
            started = now
            if folder is not None:
                folder.add_metrics(rows)
            self.report(rows, is_best)
            if is_best:
                self.keep(rows)

        return run_phases(
            self.model,
            tasks[0] if len(tasks) == 1 else tasks,
            {name: loader for name, (loader, _) in self.streams.items()},
            {name: sampler for name, (_, sampler) in self.streams.items()},
            self.recipe,
            accelerator,
            criterion=self.criterion,
            validate=self.validate,
            on_epoch=on_epoch,
            state_path=None if folder is None else folder.state_path,
            resume=resume,
            fork=None if self.done else self.fork,  # its state is of the epochs that are done
            stop=stop,
            done=self.done,
            best=self.best,
        )
