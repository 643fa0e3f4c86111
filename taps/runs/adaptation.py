"""Experiments: train tasks one after another or all together, from settings and data to a results folder."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from os.path import isfile
from pathlib import Path

import torch
from accelerate import Accelerator

from taps.core.method import no_penalty
from taps.core.modules import evaluating
from taps.data import opening
from taps.data.classification.images import (
    Sample,
    TaskData,
    make_loader,
    split_validation,
    without_bad_images,
)
from taps.data.classification.mixed_batches import make_task_loader
from taps.errors import UserError
from taps.methods.taps_budget import check_size, parse_budget
from taps.metrics.accuracy import Tested, accuracy_by_class, average_precision
from taps.metrics.losses import BinaryCrossEntropy, CrossEntropy, balanced_weights, positive_weights
from taps.networks.preprocessing import Preprocessing, ToRGB
from taps.plots import layers as layer_plots
from taps.plots import style
from taps.plots.confusion import MOST_CLASSES, confusion
from taps.runs.log import Log, open_log
from taps.settings.adaptation import AdaptationSettings
from taps.settings.choices import OF_PENALTIES
from taps.settings.declare import as_dict, as_yaml
from taps.stop_signals import StopSignals
from taps.storage import certificate, run_folder, task_file
from taps.storage.files import read_tensors, write_json, write_tensors
from taps.task_model import TaskModel
from taps.training.loop import run_phases
from taps.training.recipe import Recipe, recipe_from

#: file names in a run or an export that cannot be task names
RESERVED = ("checkpoint", "shared", "together", "parallel", "opened")


def prepare_tasks(options: AdaptationSettings, accelerator: Accelerator) -> list[TaskData]:
    """Find the data, split off validation images, and refuse data that cannot be trained on."""
    with accelerator.local_main_process_first():
        tasks = opening.read_data(options.dataset, options)
    prepared = []
    for task in tasks:
        task = replace(task, known_digest=task.digest())
        # Divided first, so that what cannot be read does not decide which images are for validation.
        task = split_validation(task, options.val_fraction, options.seed)
        if options.skip_bad_images:
            task, bad = without_bad_images(task, options.workers, ToRGB(options.background, options.published))
            if bad:
                accelerator.print(f"{task.name}: {len(bad)} unreadable images are left out, e.g. {bad[0]}")
        elif task.is_listed:
            missing = [
                path for split in (task.train, task.val or (), task.test) for path, _ in split if not isfile(path)
            ]
            if missing:
                raise UserError(
                    f"task {task.name}: {len(missing)} listed images do not exist, e.g. {missing[0]}; complete the data or "
                    "use --skip_bad_images"
                )
        if options.no_flip:
            task = replace(task, flip=False)
        if task.name in RESERVED:
            raise UserError(f"a task cannot be named {task.name!r}, which is needed for files; rename its folder")
        if len(task.classes) < 2:
            raise UserError(f"task {task.name}: there is one class ({task.classes[0]}); a task needs at least two")
        if len(task.train) == 1:
            raise UserError(f"task {task.name}: one training image is not enough")
        if task.has_several_labels and (options.mixup or options.cutmix):
            raise UserError(f"task {task.name}: --mixup and --cutmix are not for images with several labels")
        prepared.append(task)
    return prepared


def check_budget(options: AdaptationSettings, model: TaskModel, tasks: Sequence[TaskData]) -> None:
    """Refuse a budget that cannot be kept before anything is written or trained."""
    size = None if options.budget is None else parse_budget(options.budget, model)
    for task in tasks if size is not None else ():
        model.add_task(task.name, num_classes=len(task.classes))
        check_size(model, task.name, size)
        model.remove_task(task.name)


def measure(
    model: TaskModel,
    task: TaskData,
    samples: Sequence[Sample],
    prepare: Preprocessing,
    accelerator: Accelerator,
    options: AdaptationSettings,
    title: str,
) -> Tested:
    """Test a task on ``samples``, with the options ``batch_size``, ``workers`` and ``limit_batches``."""
    transform, classes = prepare.transform(False, task.stretch), len(task.classes)
    loader, _ = make_loader(samples, transform, options.batch_size, train=False, workers=options.workers)
    loader = accelerator.prepare_data_loader(loader)
    score = average_precision if task.has_several_labels else accuracy_by_class
    with evaluating(model):
        return score(model, task.name, loader, accelerator, classes, options.limit_batches, title)


def _digests(tasks: Sequence[TaskData]) -> dict[str, str]:
    """Return a hash of each task's images by name, by which a resumed run knows its data wherever that lies."""
    return {task.name: task.digest() for task in tasks}


def recipe_of(options: AdaptationSettings) -> Recipe:
    """Return the training recipe of the settings."""
    return recipe_from(options, mixed=getattr(options, "variant", "joint") != "lite")


def _of_penalties(options: AdaptationSettings) -> list[str]:
    """Return the options that concern penalties and have other values than by default, for runs that no preset gives values to."""
    default = type(options)()
    names = OF_PENALTIES if options.dataset and not options.published and not options.resume else ()
    return [f"--{name}" for name in names if getattr(options, name) != getattr(default, name)]


@dataclass
class Experiment:
    """A run: :meth:`start` creates it, :meth:`finish` writes its table and pictures.

    Attributes:
        options: settings of the command.
        accelerator: devices and processes.
        tasks: the data, in order.
        prepare: maps images to the network's input.
        folder: the results folder.
        stop: signals that end the run.
        only: the task to train, if the others are trained elsewhere; ``None``: all.
        fork: folder of the states from which the runs of a sweep go on (:mod:`taps.runs.sweep`).
        log: what goes to TensorBoard and to trackers; nothing if nothing is left to train.
    """

    options: AdaptationSettings
    accelerator: Accelerator
    tasks: list[TaskData]
    prepare: Preprocessing
    folder: run_folder.RunFolder
    stop: StopSignals
    fork: Path | None = None
    only: str | None = None
    log: Log = field(default_factory=Log)
    _spent: tuple[float, int] = (0.0, 0)  # seconds and training images so far

    @classmethod
    @contextmanager
    def start(
        cls,
        options: AdaptationSettings,
        accelerator: Accelerator,
        tasks: list[TaskData],
        prepare: Preprocessing,
        path: Path,
        stop: StopSignals,
        stages: Sequence[str] = (),
        fork: Path | None = None,
        only: str | None = None,
    ) -> Iterator[Experiment]:
        """Open the results folder and TensorBoard's file for the ``with`` block; ``stages`` as in ``RunFolder.open``."""
        settings = {**as_dict(options), "tasks": [task.name for task in tasks], "data": _digests(tasks)}
        if accelerator.is_main_process:
            folder = run_folder.RunFolder.open(
                path, settings, options.resume, options.overwrite, stages, as_yaml(options), as_dict(type(options)())
            )
        accelerator.wait_for_everyone()
        if not accelerator.is_main_process:
            folder = run_folder.RunFolder(path)
        experiment = cls(options, accelerator, tasks, prepare, folder, stop, fork, only)
        name = options.experiment_name if options.track else None
        logs = open_log(path, accelerator, name, settings) if experiment.unfinished else nullcontext(Log())
        with folder, logs as experiment.log:
            yield experiment

    @property
    def compact(self) -> bool:
        """Whether task files have a size budget."""
        return self.options.budget is not None

    @property
    def unfinished(self) -> list[TaskData]:
        wanted = [task for task in self.tasks if self.only in (None, task.name)]
        return [task for task in wanted if self.folder.finished_epochs(task.name) < self.options.epochs]

    def start_of(self, *tasks: str) -> Path | None:
        """Return the file of the state from which the training of these tasks may start, there or not."""
        if self.fork is None:
            return None
        names = [task.name for task in self.tasks]
        return self.fork / f"{names.index(tasks[0]) if len(tasks) == 1 else 'together'}.safetensors"

    def announce(self, model: TaskModel) -> None:
        """Print the model, the tasks and the data of the run."""
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
        unused = [] if model.method.penalty is not no_penalty else _of_penalties(options)
        if unused:
            say(f"  no effect with --method {options.method}: {', '.join(unused)}")
        lam_is_used = options.method == "taps" and options.lam > 0 and options.budget is None
        if lam_is_used and options.warmup_epochs >= options.epochs:
            say(
                f"  --lam has no effect: --warmup_epochs {options.warmup_epochs:g} leaves none of {options.epochs} epochs for it"
            )
        if options.multi_gpu and self.accelerator.num_processes == 1:
            say("  --multi_gpu: there is at most one GPU here, so one process is used")

    # -- training ------------------------------------------------------------------------------------------------

    def train_in_sequence(self, model: TaskModel, heads: Path | None = None) -> None:
        """Train the tasks one after another; the model is restored after each.

        Args:
            model: a model without tasks.
            heads: folder of a finished run on the same data, whose heads are the initial heads.
        """
        for task in self.unfinished:
            torch.manual_seed(self.options.seed)  # the initial head does not depend on the tasks before
            done = self.folder.finished_epochs(task.name)
            if done:
                model.load_task(self.folder.task_path(task.name), trainable=True)
            else:
                model.add_task(task.name, num_classes=len(task.classes))
            if heads is not None:
                model.heads[task.name].load_state_dict(task_file.read_head(heads / task.name))
            size = min(self.options.batch_size, len(task.train))
            if size < self.options.batch_size:
                self.accelerator.print(f"{task.name}: only {size} training images: batch size reduced to {size}")
            kind = {"batch_size": size, "seed": self.options.seed, "workers": self.options.workers}
            kind["processes"] = self.accelerator.num_processes
            loader, sampler = make_loader(task.train, self._training_transform(task), train=True, **kind)
            suffix = f"_{task.name}" if len(self.tasks) > 1 else ""
            self._fit(model, [task], loader, sampler, suffix, done)
            self.accelerator.wait_for_everyone()
            model.remove_task(task.name)
            model.load_task(self.folder.task_path(task.name))
            self._test(model, [task])
            model.remove_task(task.name)

    def train_together(self, model: TaskModel) -> None:
        """Train all tasks at once, and the base if the model trains it; the model ends in its best epoch's state."""
        if not self.unfinished:
            return
        torch.manual_seed(self.options.seed)
        done = min(self.folder.finished_epochs(task.name) for task in self.tasks)
        if done:
            model.load_base(read_tensors(self.folder.base_path))
        for task in self.tasks:
            if done:
                model.load_task(self.folder.task_path(task.name), trainable=True)
            else:
                model.add_task(task.name, num_classes=len(task.classes))
        loader, sampler = make_task_loader(
            {task.name: task.train for task in self.tasks},
            {task.name: self._training_transform(task) for task in self.tasks},
            self.options.batch_size,
            sampling=self.options.sampling,
            temperature=self.options.sampling_temperature,
            seed=self.options.seed,
            workers=self.options.workers,
            processes=self.accelerator.num_processes,
        )
        self._fit(model, self.tasks, loader, sampler, done=done)
        self.accelerator.wait_for_everyone()
        for task in self.tasks:
            model.remove_task(task.name)
        model.load_base(read_tensors(self.folder.base_path))
        for task in self.tasks:
            model.load_task(self.folder.task_path(task.name))
        self._test(model, self.tasks)

    def _training_transform(self, task: TaskData):
        options = self.options
        return self.prepare.transform(True, task.stretch, task.flip, options.auto_augment, options.random_erasing)

    def _criterion(self, task: TaskData) -> CrossEntropy | BinaryCrossEntropy:
        balanced = self.options.class_weights == "balanced"
        if task.has_several_labels:
            positive = positive_weights([label for _, label in task.train]) if balanced else None
            return BinaryCrossEntropy(self.options.label_smoothing, positive)
        weights = balanced_weights((label for _, label in task.train), len(task.classes)) if balanced else None
        return CrossEntropy(self.options.label_smoothing, weights)

    def _fit(
        self, model: TaskModel, tasks: list[TaskData], loader, sampler, suffix: str | None = None, done: int = 0
    ) -> None:
        """Train the given tasks, from their first epoch or the one after ``done``, and keep their best in the results folder."""

        def report(rows: list[dict], is_best: bool) -> None:
            for row in rows:
                self._write_tensorboard(row, f"_{row['task']}" if suffix is None else suffix)
            self.track(rows)
            left = self._seconds_left(tasks, rows)
            self.accelerator.print(epoch_line(rows, self.options.epochs, len(model.units), is_best, left), flush=True)

        def keep(rows: list[dict]) -> None:
            if model.train_base:
                write_tensors(self.folder.base_path, model.base_state())
            for task, row in zip(tasks, rows, strict=True):
                about = {
                    "classes": list(task.classes),
                    "preprocessing": self.prepare.describe(task.stretch),
                    "metric": task_file.AVERAGE_PRECISION if task.has_several_labels else "accuracy",
                    "epoch": row["epoch"],
                    "val_error": row.get("val_error"),
                    "provenance": self._provenance(task),
                }
                model.save_task(task.name, self.folder.task_path(task.name), about, compact=self.compact)

        def validate() -> tuple[dict[str, dict], float]:
            accuracies = {task.name: self._score(model, task) for task in tasks}
            errors = {name: {"val_error": 100.0 - accuracy} for name, accuracy in accuracies.items()}
            return errors, sum(accuracies.values()) / len(accuracies)

        names = [task.name for task in tasks]
        fork = self.start_of(*names)
        criteria = {task.name: self._criterion(task) for task in tasks}
        run_phases(
            model,
            names,
            loader,
            sampler,
            recipe_of(self.options),
            self.accelerator,
            criterion=criteria,
            validate=validate,
            on_epoch=report,
            keep=keep,
            folder=self.folder,
            fork=fork,
            stop=self.stop,
            done=done,
            best=self._stored_score(names) if done else None,
        )

    def _stored_score(self, tasks: Sequence[str]) -> float | None:
        """Return the validation accuracy with which the tasks were stored, their mean; ``None`` if it is not known."""
        stored = [task_file.read_description(self.folder.task_path(task)).get("val_error") for task in tasks]
        errors = [error for error in stored if error is not None]
        return 100.0 - sum(errors) / len(errors) if len(errors) == len(tasks) else None

    def track(self, rows: Sequence[dict]) -> None:
        """Send an epoch's numbers to the trackers."""
        for row in rows:
            self.log.track({f"{row['task']}/{key}": own for key, own in row.items() if isinstance(own, (int, float))})

    def _seconds_left(self, tasks: list[TaskData], rows: list[dict]) -> float:
        """Estimate how long the rest of the run takes, from the time per training image so far."""
        epoch, images = rows[0]["epoch"], sum(len(task.train) for task in tasks)
        self._spent = (self._spent[0] + sum(row["seconds"] for row in rows), self._spent[1] + images)
        position = max(self.tasks.index(task) for task in tasks)
        later = sum(
            len(task.train) * max(self.options.epochs - self.folder.finished_epochs(task.name), 0)
            for task in self.tasks[position + 1 :]
        )
        rest = (self.options.epochs - epoch) * images + later
        return rest * self._spent[0] / self._spent[1]

    def _provenance(self, task: TaskData) -> dict:
        """Return where a task comes from: data, seed and versions."""
        images = {split: len(getattr(task, split) or ()) for split in ("train", "val", "test")}
        used = {key: own for key, own in run_folder.versions().items() if key in ("taps", "torch", "timm")}
        return {"images": images, "epochs": self.options.epochs, "seed": self.options.seed, "versions": used}

    def _test(self, model: TaskModel, tasks: list[TaskData]) -> None:
        """Score the best epoch on the test splits and record the accuracies in the task files."""
        self.folder.check_present()
        for task in tasks:
            result = self._measure(model, task, task.test, "test")
            path, side = self.folder.task_path(task.name), self.prepare.input_size
            answer = certificate.probe(
                model, task.name, (2, 3, side, side)
            )  # in all processes, since it moves weights in memory
            if self.accelerator.is_main_process:
                about = {"accuracy": result.accuracy, "top5": result.top5, "probe": answer}
                about["provenance"] = self._provenance(task)
                model.save_task(task.name, path, about, compact=self.compact)
                write_json(path / "test.json", result.describe(task.classes))
                if result.confusion is not None and len(task.classes) <= MOST_CLASSES:
                    style.save(confusion(result.confusion, task.classes, task.name), path / "confusion.png")
                if model.train_base or not self.folder.fingerprints_path.is_file():
                    write_json(self.folder.fingerprints_path, certificate.fingerprints(model))
            self.accelerator.wait_for_everyone()

    def _score(self, model: TaskModel, task: TaskData) -> float:
        """Return the accuracy in percent on the validation split; without one the test split is used."""
        return self._measure(model, task, task.test if task.val is None else task.val, "validation").accuracy

    def _measure(self, model: TaskModel, task: TaskData, samples: Sequence[Sample], title: str) -> Tested:
        return measure(model, task, samples, self.prepare, self.accelerator, self.options, title)

    def _write_tensorboard(self, row: Mapping, suffix: str) -> None:
        """Write the published tags; with several tasks in one run, each tag gets the task's name as a suffix."""
        tags = {
            "Validation Error": row.get("val_error"),
            "Training Error": row["train_error"],
            "Training Loss": row["train_loss"],
            "Learning Rate": row["lr"],
            "Percent Weights Activated": row["tuned_layers"],
        }
        self.log.scalars({tag + suffix: own for tag, own in tags.items() if own is not None}, row["epoch"])

    # -- the end -------------------------------------------------------------------------------------------------

    def finish(self, before: float = 0.0) -> None:
        """Write the summary, its table and the pictures in the first process; ``before``: seconds of earlier stages."""
        if not self.accelerator.is_main_process:
            return
        names = [task.name for task in self.tasks]
        summary = self.folder.write_summary(self.options.method, self.options.seed, names, before)
        stored = {name: task_file.read_description(self.folder.task_path(name)) for name in names}
        figures = layer_plots.run_pictures(stored, summary, self.folder.rows)
        pictures = [self.folder.path / f"{name}.png" for name in figures]
        for path, (name, figure) in zip(pictures, figures.items(), strict=True):
            style.save(figure, path)
            self.log.figure(name, figure)
        if not self.options.keep_checkpoint and self.folder.state_path.parent.is_dir():
            shutil.rmtree(self.folder.state_path.parent)
        self.accelerator.print(
            f"\n{run_folder.table(summary, in_bytes=self.compact)}\npictures: {', '.join(map(str, pictures))}\n"
            f"your own images: taps predict {self.folder.path} IMAGE…"
        )


def epoch_line(rows: list[dict], epochs: int, units: int, is_best: bool, left: float) -> str:
    """Return an epoch as one line: a task's numbers, or the means over several tasks; ``left``: seconds until the run's end."""

    def mean(key: str) -> float:
        return sum(row[key] for row in rows) / len(rows)

    first = rows[0]
    name = first["task"] if len(rows) == 1 else f"{len(rows)} tasks"
    best = " (best so far)" if is_best and first["epoch"] < epochs else " (best)" if is_best else ""
    validation = f"{100 - mean('val_error'):.2f} % validation{best}" if "val_error" in first else ""
    if first["train_error"] is None:  # images with several labels
        numbers = f"mAP {validation}  " if validation else ""
    else:
        numbers = f"accuracy {100 - mean('train_error'):.2f} % train{validation and f', {validation}'}  "
    tuned = round(mean("tuned_layers") * units, 1 if len(rows) > 1 else None)
    seconds = sum(row["seconds"] for row in rows)
    return (
        f"{name} {first['epoch']}/{epochs} {first['phase']}: loss {mean('train_loss'):.3f}  "
        f"{numbers}tuned {tuned}/{units}  {duration(seconds)}, "
        f"{duration(left)} left"
    )


def duration(seconds: float) -> str:
    """Return a duration as ``3.2 s``, ``4:05`` or ``2:04:05``."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if not hours and not minutes:
        return f"{rest} s"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
