"""Test a results folder and print its table; export its tasks as networks of their own.

python evaluate.py results/demo
python evaluate.py results/demo --export exported
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator

import taps
from options import evaluate_parser
from taps import commands, cost, files, results
from taps.data import TaskData, make_loader, without_bad_images
from taps.data.images import Preprocessing
from taps.errors import UserError, unknown
from taps.metrics import accuracy


def main(arguments: Sequence[str]) -> None:
    given = evaluate_parser().parse_args(arguments)
    folder = Path(given.folder)
    descriptions = results.read_tasks(folder)
    for name in given.tasks or ():
        if name not in descriptions:
            raise unknown("task", name, descriptions)
    names = given.tasks or list(descriptions)
    options = Namespace(**{**files.read_json(folder / "settings.json"), "device": given.device, "amp": "none"})
    accelerator = commands.make_accelerator(options)
    base = results.RunFolder(folder).base_path
    net = commands.make_base(options, base if base.is_file() else None)
    prepare = commands.make_preprocessing(options, net)
    model = taps.adapt(net, options.method, norm=options.norm, layers=options.layers, train_base=False).to(
        accelerator.device
    )
    for name in names:
        model.load_task(folder / name, name=name)
    if given.no_test:
        accuracies = {name: descriptions[name].get("accuracy") for name in names}
        missing = [name for name in names if accuracies[name] is None]
        if missing:
            raise UserError(f"{folder}: task {missing[0]} has not been tested; leave out --no_test")
    else:
        data = {task.name: task for task in commands.read_data(given.dataset or options.dataset, options)}
        absent = [name for name in names if name not in data]
        if absent:
            raise UserError(f"task {absent[0]} has no data; the folders given hold {', '.join(data)}")
        accuracies = {
            name: test(model, data[name], descriptions[name], prepare, given, options, accelerator) for name in names
        }
    if accelerator.is_main_process:
        tested = {
            name: {**descriptions[name], "accounting": cost.accounting(model, name), "accuracy": accuracies[name]}
            for name in names
        }
        print(results.table({"method": options.method, **results.summarise(tested)}))
        if given.export:
            export(model, names, Path(given.export), options)
    accelerator.end_training()


def test(
    model: taps.TaskModel,
    task: TaskData,
    description: dict,
    prepare: Preprocessing,
    given: Namespace,
    options: Namespace,
    accelerator: Accelerator,
) -> float:
    """Accuracy of one task on its test split, in percent."""
    if list(task.classes) != description.get("classes", list(task.classes)):
        raise UserError(f"task {task.name}: the data's classes are not those the task was trained on")
    if given.skip_bad_images or options.skip_bad_images:
        task, bad = without_bad_images(task)
        if bad:
            accelerator.print(f"{task.name}: {len(bad)} unreadable images are left out")
    loader, _ = make_loader(
        task.test,
        prepare.transform(False, task.squash),
        given.batch_size or options.batch_size,
        train=False,
        workers=options.workers if given.workers is None else given.workers,
    )
    loader = accelerator.prepare(loader)
    return accuracy(
        model, task.name, loader, accelerator, len(task.classes), given.limit_batches, title=f"testing {task.name}"
    )


def export(model: taps.TaskModel, names: list[str], target: Path, options: Namespace) -> None:
    """Each task as a state dict that timm loads and as a program that needs neither timm nor this library."""
    existing = [
        path for name in names for path in (target / f"{name}.safetensors", target / f"{name}.pt2") if path.exists()
    ]
    if existing:
        raise UserError(f"{existing[0]} exists; export to another folder or remove it")
    image = torch.zeros(2, 3, options.input_size, options.input_size)
    batch = torch.export.Dim("batch", min=1)
    for name in names:
        plain = model.merge(name).cpu()
        files.write_tensors(target / f"{name}.safetensors", plain.state_dict())
        program = torch.export.export(plain, (image,), dynamic_shapes=({0: batch},))
        with files.whole(target / f"{name}.pt2") as temporary:
            torch.export.save(program, temporary)
        print(f"{name}: {target / name}.safetensors (for timm's {options.model_type}) and {target / name}.pt2")


if __name__ == "__main__":
    commands.run(main)
