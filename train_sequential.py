"""Adapt one pretrained network to one task after another: small deltas behind learned gates, the base untouched.

python train_sequential.py                                          # the demo, about three minutes on two CPU cores
python train_sequential.py --dataset datasets/cubs_cropped --model_type resnet50 --lam 0.1
"""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Sequence
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator

import taps
from options import parse_sequential
from taps import checkpoint, commands, plots, results
from taps.budget import check_size, parse_budget
from taps.data import TaskData, make_loader, split_validation, without_bad_images
from taps.data.images import Preprocessing
from taps.errors import UserError
from taps.metrics import accuracy
from taps.recipe import Recipe
from taps.signals import StopSignals
from taps.train import fit

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


def main(arguments: Sequence[str]) -> None:
    options = parse_sequential(arguments)
    if options.multi_gpu:
        commands.launch_on_every_gpu(__file__, arguments)
    accelerator = commands.make_accelerator(options)
    tasks = prepare_tasks(options, accelerator)
    net = commands.make_base(options)
    prepare = commands.make_preprocessing(options, net)
    model = taps.adapt(net, options.method, norm=options.norm, layers=options.layers)
    check_budget(options, model, tasks)
    settings = {**vars(options), "tasks": [task.name for task in tasks]}
    path = Path(options.result_path) / options.experiment_name
    if accelerator.is_main_process:
        folder = results.RunFolder.open(path, settings, options.resume, options.overwrite)
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        folder = results.RunFolder(path)
    announce(accelerator, options, tasks, model, path)
    from torch.utils.tensorboard import SummaryWriter  # slow to import, and not needed to refuse a mistake

    unfinished = [task for task in tasks if not folder.is_finished(task.name)]
    writer = SummaryWriter(path) if unfinished and accelerator.is_main_process else None
    with StopSignals() as stop, closing(writer) if writer is not None else nullcontext():
        for task in unfinished:
            suffix = f"_{task.name}" if len(tasks) > 1 else ""
            train_task(model, task, prepare, options, folder, accelerator, stop, writer, suffix)
    if accelerator.is_main_process:
        finish(folder, options, tasks)
    accelerator.end_training()


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
        if task.name == "checkpoint":
            raise UserError("a task cannot be named 'checkpoint', which the results folder needs; rename its folder")
        if len(task.classes) < 2:
            raise UserError(f"task {task.name}: there is one class ({task.classes[0]}); a task needs at least two")
        if len(task.train) == 1:
            raise UserError(f"task {task.name}: one training image is not enough")
        prepared.append(task)
    return prepared


def check_budget(options: Namespace, model: taps.TaskModel, tasks: list[TaskData]) -> None:
    """Refuse a budget that cannot be kept before anything is written or trained."""
    size = recipe_of(options, model).budget
    for task in tasks if size is not None else ():
        model.add_task(task.name, num_classes=len(task.classes))
        check_size(model, task.name, size)
        model.remove_task(task.name)


def announce(
    accelerator: Accelerator, options: Namespace, tasks: list[TaskData], model: taps.TaskModel, path: Path
) -> None:
    accelerator.print(
        f"{options.model_type}: {model.base_parameters:,} parameters, {len(model.units)} layers, method {options.method}, "
        f"{accelerator.num_processes} × {accelerator.device.type}, results in {path}"
    )
    for task in tasks:
        val = len(task.val) if task.val is not None else 0
        accelerator.print(
            f"  {task.name}: {len(task.classes)} classes, {len(task.train)} train, {val} val, {len(task.test)} test"
        )
        for note in task.notes:
            accelerator.print(f"    {note}")
    if any(task.val is None for task in tasks):
        accelerator.print(
            "  no validation split: the best epoch is selected on the test split, as in the published program"
        )
    if options.multi_gpu and accelerator.num_processes == 1:
        accelerator.print("  --multi_gpu: there is at most one GPU here, so one process is used")


def train_task(
    model: taps.TaskModel,
    task: TaskData,
    prepare: Preprocessing,
    options: Namespace,
    folder: results.RunFolder,
    accelerator: Accelerator,
    stop: StopSignals,
    writer: SummaryWriter | None,
    suffix: str,
) -> None:
    """Train one task, keep its best epoch, test that once, and leave the model as it was."""
    torch.manual_seed(options.seed)  # the head's start does not depend on which tasks came before
    model.add_task(task.name, num_classes=len(task.classes))
    kind = {"batch_size": options.batch_size, "seed": options.seed, "workers": options.workers}
    kind["processes"] = accelerator.num_processes
    train_loader, sampler = make_loader(task.train, prepare.transform(True, task.squash, task.flip), train=True, **kind)
    evaluation = prepare.transform(False, task.squash)
    test_loader, _ = make_loader(task.test, evaluation, train=False, **kind)
    test_loader = accelerator.prepare(test_loader)
    validation_loader = test_loader
    if task.val is not None:
        validation_loader = accelerator.prepare(make_loader(task.val, evaluation, train=False, **kind)[0])

    def score(loader, title: str) -> float:
        return accuracy(model, task.name, loader, accelerator, len(task.classes), options.limit_batches, title)

    record = checkpoint.read_record(folder.state_path)
    resume = record is not None and record["task"] == task.name
    done = record["progress"]["epoch"] if resume else 0
    folder.keep_metrics(task.name, done)
    started = time.perf_counter()

    def on_epoch(numbers: dict, is_best: bool) -> None:
        nonlocal started
        now = time.perf_counter()
        folder.add_metrics({**numbers, "seconds": round(now - started, 3)})
        started = now
        write_tensorboard(writer, numbers, suffix)
        validation = f"  validation error {numbers['val_error']:5.2f} %" if "val_error" in numbers else ""
        print(
            f"{task.name} {numbers['epoch']}/{options.epochs} {numbers['phase']}: loss {numbers['train_loss']:.3f}  "
            f"train error {numbers['train_error']:5.2f} %{validation}  "
            f"tuned {round(numbers['tuned_layers'] * len(model.units))}/{len(model.units)}{'  *' if is_best else ''}",
            flush=True,
        )
        if is_best:
            about = {"classes": list(task.classes), "epoch": numbers["epoch"], "val_error": numbers.get("val_error")}
            model.save_task(task.name, folder.task_path(task.name), about)

    fit(
        model,
        task.name,
        train_loader,
        sampler,
        recipe_of(options, model),
        accelerator,
        validate=lambda: score(validation_loader, "validation"),
        on_epoch=on_epoch,
        state_path=folder.state_path,
        resume=resume,
        stop=stop,
    )
    accelerator.wait_for_everyone()
    model.remove_task(task.name)
    model.load_task(folder.task_path(task.name))
    tested = score(test_loader, "test")
    if accelerator.is_main_process:
        stored = taps.taskfile.read_description(folder.task_path(task.name))
        about = {key: stored[key] for key in ("classes", "epoch", "val_error")}
        model.save_task(task.name, folder.task_path(task.name), {**about, "accuracy": tested})
    accelerator.wait_for_everyone()
    model.remove_task(task.name)


def recipe_of(options: Namespace, model: taps.TaskModel) -> Recipe:
    return Recipe(
        epochs=options.epochs,
        warmup_epochs=options.warmup_epochs,
        settle_epochs=options.settle_epochs,
        penalty_weight=options.lam,
        budget=parse_budget(options.budget, model) if options.budget else None,
        optimizer=options.optimizer,
        lr=options.lr,
        score_lr=options.score_lr,
        momentum=options.momentum,
        weight_decay=options.wd,
        accumulate=options.accumulate,
        eval_epochs=options.eval_epochs,
        seed=options.seed,
        limit_batches=options.limit_batches,
        compile=options.compile,
    )


def write_tensorboard(writer: SummaryWriter, numbers: dict, suffix: str) -> None:
    """The published tag names; with several tasks in one run each gets its name as a suffix."""
    tags = {
        "Validation Error": numbers.get("val_error"),
        "Training Error": numbers["train_error"],
        "Training Loss": numbers["train_loss"],
        "Learning Rate": numbers["lr"],
        "Percent Weights Activated": numbers["tuned_layers"],
    }
    for tag, value in tags.items():
        if value is not None:
            writer.add_scalar(tag + suffix, value, numbers["epoch"])
    writer.flush()


def finish(folder: results.RunFolder, options: Namespace, tasks: list[TaskData]) -> None:
    """The summary, its table and the picture."""
    names = [task.name for task in tasks]
    summary = folder.write_summary(options.method, options.seed, names)
    picture = folder.path / "layers.png"
    stored = results.read_tasks(folder.path)
    plots.save(plots.run_picture({name: stored[name] for name in names}, summary), picture)
    print(f"\n{results.table(summary)}\npicture: {picture}")


if __name__ == "__main__":
    commands.run(main)
