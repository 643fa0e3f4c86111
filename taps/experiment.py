"""An experiment: from options and data to a results folder, one task after another or all together."""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator

from taps import certificate, checkpoint, commands, plots, results, taskfile
from taps.budget import check_size, parse_budget
from taps.data import Preprocessing, TaskData, make_loader, split_validation, without_bad_images
from taps.data.images import Sample
from taps.data.tasks import make_task_loader
from taps.errors import UserError
from taps.files import read_tensors, write_json, write_tensors
from taps.layer import evaluating
from taps.metrics import accuracy
from taps.model import TaskModel
from taps.recipe import Recipe
from taps.signals import StopSignals
from taps.train import fit

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

#: names of a run's or an export's files that are no tasks
RESERVED = ("checkpoint", "shared", "together")


def prepare_tasks(options: Namespace, accelerator: Accelerator) -> list[TaskData]:
    """Find the data, split off validation images, and refuse what cannot be trained."""
    with accelerator.local_main_process_first():
        tasks = commands.read_data(options.dataset, options)
    prepared = []
    for task in tasks:
        if options.skip_bad_images:
            task, bad = without_bad_images(task, options.workers)
            if bad:
                accelerator.print(f"{task.name}: {len(bad)} unreadable images are left out, e.g. {bad[0]}")
        task = split_validation(task, options.val_fraction, options.seed)
        if options.no_flip:
            task = replace(task, flip=False)
        if options.batch_size > len(task.train):
            raise UserError(
                f"task {task.name}: --batch_size {options.batch_size} is larger than its {len(task.train)} training images"
            )
        if task.name in RESERVED:
            raise UserError(f"a task cannot be named {task.name!r}, which is needed for files; rename its folder")
        if len(task.classes) < 2:
            raise UserError(f"task {task.name}: there is one class ({task.classes[0]}); a task needs at least two")
        if len(task.train) == 1:
            raise UserError(f"task {task.name}: one training image is not enough")
        prepared.append(task)
    return prepared


def check_budget(options: Namespace, model: TaskModel, tasks: Sequence[TaskData]) -> None:
    """Refuse a budget that cannot be kept before anything is written or trained."""
    size = recipe_of(options, model).budget
    for task in tasks if size is not None else ():
        model.add_task(task.name, num_classes=len(task.classes))
        check_size(model, task.name, size)
        model.remove_task(task.name)


def score(
    model: TaskModel,
    task: TaskData,
    samples: Sequence[Sample],
    prepare: Preprocessing,
    accelerator: Accelerator,
    options: Namespace,
    title: str,
) -> float:
    """Accuracy of a task on some of its images, in percent; of the options ``batch_size``, ``workers``, ``limit_batches``."""
    transform = prepare.transform(False, task.squash)
    loader, _ = make_loader(samples, transform, options.batch_size, train=False, workers=options.workers)
    loader = accelerator.prepare_data_loader(loader)
    with evaluating(model):
        return accuracy(model, task.name, loader, accelerator, len(task.classes), options.limit_batches, title)


def recipe_of(options: Namespace, model: TaskModel) -> Recipe:
    """How the options say to train."""
    given = vars(options)
    return Recipe(
        epochs=options.epochs,
        warmup_epochs=options.warmup_epochs,
        settle_epochs=options.settle_epochs,
        penalty_weight=options.lam,
        budget=parse_budget(options.budget, model) if options.budget else None,
        optimizer=options.optimizer,
        lr=options.lr,
        score_lr=options.score_lr,
        base_lr=given.get("base_lr"),
        momentum=options.momentum,
        weight_decay=options.wd,
        accumulate=options.accumulate,
        eval_epochs=options.eval_epochs,
        seed=options.seed,
        limit_batches=options.limit_batches,
        compile=given.get("compile", False),
        mixed=given.get("variant") != "lite",
    )


@dataclass
class Experiment:
    """What a run consists of. :meth:`start` makes one, :meth:`finish` writes its table and pictures.

    Attributes:
        options: of the command.
        accelerator: devices and processes.
        tasks: the data, in order.
        prepare: from images to the network's input.
        folder: the results folder.
        stop: signals to obey.
        opened: where states at the end of a budget's open phase are kept for other sizes (:mod:`taps.curve`).
        writer: of TensorBoard; ``None`` where there is nothing left to train, and in processes but the first.
    """

    options: Namespace
    accelerator: Accelerator
    tasks: list[TaskData]
    prepare: Preprocessing
    folder: results.RunFolder
    stop: StopSignals
    opened: Path | None = None
    writer: SummaryWriter | None = None

    @classmethod
    @contextmanager
    def start(
        cls,
        options: Namespace,
        accelerator: Accelerator,
        tasks: list[TaskData],
        prepare: Preprocessing,
        path: Path,
        stop: StopSignals,
        stages: Sequence[str] = (),
        opened: Path | None = None,
    ) -> Iterator[Experiment]:
        """Open the results folder and TensorBoard's file for the ``with`` block; ``stages`` as in ``RunFolder.open``."""
        settings = {**vars(options), "tasks": [task.name for task in tasks]}
        if accelerator.is_main_process:
            folder = results.RunFolder.open(path, settings, options.resume, options.overwrite, stages)
        accelerator.wait_for_everyone()
        if not accelerator.is_main_process:
            folder = results.RunFolder(path)
        experiment = cls(options, accelerator, tasks, prepare, folder, stop, opened)
        wanted = bool(experiment.unfinished) and accelerator.is_main_process
        with commands.tensorboard(path, wanted) as experiment.writer:
            yield experiment

    @property
    def compact(self) -> bool:
        """Whether task files have to keep a budget."""
        return self.options.budget is not None

    @property
    def unfinished(self) -> list[TaskData]:
        return [task for task in self.tasks if not self.folder.is_finished(task.name)]

    def announce(self, model: TaskModel) -> None:
        """Say what is going to be trained on what."""
        say, options = self.accelerator.print, self.options
        say(
            f"{options.model_type}: {model.base_parameters:,} parameters, {len(model.units)} layers, method {options.method}, "
            f"{self.accelerator.num_processes} × {self.accelerator.device.type}, results in {self.folder.path}"
        )
        for task in self.tasks:
            val = len(task.val) if task.val is not None else 0
            say(
                f"  {task.name}: {len(task.classes)} classes, {len(task.train)} train, {val} val, {len(task.test)} test"
            )
            for note in task.notes:
                say(f"    {note}")
        if any(task.val is None for task in self.tasks):
            say("  no validation split: the best epoch is selected on the test split, as in the published program")
        if options.multi_gpu and self.accelerator.num_processes == 1:
            say("  --multi_gpu: there is at most one GPU here, so one process is used")

    # -- training ------------------------------------------------------------------------------------------------

    def train_in_sequence(self, model: TaskModel, heads: Path | None = None) -> None:
        """Train the tasks one after another; each leaves the model as it was.

        Args:
            model: without tasks.
            heads: a folder with a finished run on the same data whose heads are the starts of these.
        """
        for task in self.unfinished:
            torch.manual_seed(self.options.seed)  # the head's start does not depend on which tasks came before
            model.add_task(task.name, num_classes=len(task.classes))
            if heads is not None:
                stored = read_tensors(heads / task.name / "task.safetensors")
                head = {name[5:]: tensor for name, tensor in stored.items() if name.startswith("head/")}
                model.heads[task.name].load_state_dict(head)
            kind = {"batch_size": self.options.batch_size, "seed": self.options.seed, "workers": self.options.workers}
            kind["processes"] = self.accelerator.num_processes
            transform = self.prepare.transform(True, task.squash, task.flip)
            loader, sampler = make_loader(task.train, transform, train=True, **kind)
            suffix = f"_{task.name}" if len(self.tasks) > 1 else ""
            self._fit(model, [task], loader, sampler, suffix)
            self.accelerator.wait_for_everyone()
            model.remove_task(task.name)
            model.load_task(self.folder.task_path(task.name))
            self._test(model, [task])
            model.remove_task(task.name)

    def train_together(self, model: TaskModel) -> None:
        """Train all tasks at once, with the base where the model says so; the model ends as the best epoch left it."""
        if not self.unfinished:
            return
        torch.manual_seed(self.options.seed)
        for task in self.tasks:
            model.add_task(task.name, num_classes=len(task.classes))
        loader, sampler = make_task_loader(
            {task.name: task.train for task in self.tasks},
            {task.name: self.prepare.transform(True, task.squash, task.flip) for task in self.tasks},
            self.options.batch_size,
            sampling=self.options.sampling,
            temperature=self.options.sampling_temperature,
            seed=self.options.seed,
            workers=self.options.workers,
            processes=self.accelerator.num_processes,
        )
        self._fit(model, self.tasks, loader, sampler)
        self.accelerator.wait_for_everyone()
        for task in self.tasks:
            model.remove_task(task.name)
        model.load_base(read_tensors(self.folder.base_path))
        for task in self.tasks:
            model.load_task(self.folder.task_path(task.name))
        self._test(model, self.tasks)

    def _fit(self, model: TaskModel, tasks: list[TaskData], loader, sampler, suffix: str | None = None) -> None:
        """Train some tasks and keep their best epoch in the results folder."""
        names = [task.name for task in tasks]
        record = checkpoint.read_record(self.folder.state_path)
        resume = record is not None and record["tasks"] == names
        done = record["progress"]["epoch"] if resume else 0
        for name in names:
            self.folder.keep_metrics(name, done)
        started = time.perf_counter()

        def on_epoch(rows: list[dict], is_best: bool) -> None:
            nonlocal started
            now = time.perf_counter()
            rows = [{**row, "seconds": round((now - started) / len(rows), 3)} for row in rows]
            started = now
            self.folder.add_metrics(rows)
            for row in rows:
                self._write_tensorboard(row, f"_{row['task']}" if suffix is None else suffix)
            self.accelerator.print(epoch_line(rows, self.options.epochs, len(model.units), is_best), flush=True)
            if is_best:
                if model.train_base:
                    write_tensors(self.folder.base_path, model.base_state())
                for task, row in zip(tasks, rows, strict=True):
                    about = {"classes": list(task.classes), "epoch": row["epoch"], "val_error": row.get("val_error")}
                    model.save_task(task.name, self.folder.task_path(task.name), about, compact=self.compact)

        def validate() -> tuple[dict[str, dict], float]:
            accuracies = {task.name: self._score(model, task, "validation") for task in tasks}
            errors = {name: {"val_error": 100.0 - accuracy} for name, accuracy in accuracies.items()}
            return errors, sum(accuracies.values()) / len(accuracies)

        fit(
            model,
            names,
            loader,
            sampler,
            recipe_of(self.options, model),
            self.accelerator,
            validate=validate,
            on_epoch=on_epoch,
            state_path=self.folder.state_path,
            resume=resume,
            opened=self.opened and self.opened / f"{names[0] if len(names) == 1 else 'together'}.safetensors",
            stop=self.stop,
        )

    def _test(self, model: TaskModel, tasks: list[TaskData]) -> None:
        """Score the kept epoch on the test splits and note it in the task files."""
        for task in tasks:
            tested = self._score(model, task, "test")
            path, side = self.folder.task_path(task.name), self.prepare.input_size
            answer = certificate.probe(
                model, task.name, (2, 3, side, side)
            )  # by all processes: it moves weights in memory
            if self.accelerator.is_main_process:
                stored = taskfile.read_description(path)
                about = {key: stored[key] for key in ("classes", "epoch", "val_error")}
                about.update(accuracy=tested, probe=answer)
                model.save_task(task.name, path, about, compact=self.compact)
                if not self.folder.fingerprints_path.is_file():
                    write_json(self.folder.fingerprints_path, certificate.fingerprints(model))
            self.accelerator.wait_for_everyone()

    def _score(self, model: TaskModel, task: TaskData, split: str) -> float:
        """Accuracy in percent on every image of a split; validation falls back on test where there is none."""
        samples = task.val if split == "validation" and task.val is not None else task.test
        return score(model, task, samples, self.prepare, self.accelerator, self.options, split)

    def _write_tensorboard(self, row: Mapping, suffix: str) -> None:
        """The published tag names; with several tasks in one run each gets its name as a suffix."""
        tags = {
            "Validation Error": row.get("val_error"),
            "Training Error": row["train_error"],
            "Training Loss": row["train_loss"],
            "Learning Rate": row["lr"],
            "Percent Weights Activated": row["tuned_layers"],
        }
        for tag, value in tags.items():
            if value is not None:
                self.writer.add_scalar(tag + suffix, value, row["epoch"])
        self.writer.flush()

    # -- the end -------------------------------------------------------------------------------------------------

    def finish(self, before: float = 0.0) -> None:
        """The summary, its table and the pictures, by the first process; ``before``: seconds that earlier stages took."""
        if not self.accelerator.is_main_process:
            return
        names = [task.name for task in self.tasks]
        summary = self.folder.write_summary(self.options.method, self.options.seed, names, before)
        stored = {name: taskfile.read_description(self.folder.task_path(name)) for name in names}
        figures = plots.run_pictures(stored, summary, self.folder.rows)
        pictures = [self.folder.path / f"{name}.png" for name in figures]
        for path, (name, figure) in zip(pictures, figures.items(), strict=True):
            plots.save(figure, path)
            if self.writer is not None:
                self.writer.add_figure(name, figure)
        self.accelerator.print(f"\n{results.table(summary)}\npictures: {', '.join(map(str, pictures))}")


def epoch_line(rows: list[dict], epochs: int, units: int, is_best: bool) -> str:
    """An epoch in one line: a task's numbers, or the means over several tasks."""

    def mean(key: str) -> float:
        return sum(row[key] for row in rows) / len(rows)

    first = rows[0]
    name = first["task"] if len(rows) == 1 else f"{len(rows)} tasks"
    validation = f"  validation error {mean('val_error'):5.2f} %" if "val_error" in first else ""
    tuned = round(mean("tuned_layers") * units, 1 if len(rows) > 1 else None)
    return (
        f"{name} {first['epoch']}/{epochs} {first['phase']}: loss {mean('train_loss'):.3f}  "
        f"train error {mean('train_error'):5.2f} %{validation}  tuned {tuned}/{units}{'  *' if is_best else ''}"
    )
