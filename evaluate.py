"""Test a results folder and print its table; export its tasks as networks of their own.

python evaluate.py results/demo
python evaluate.py results/demo --export exported
python evaluate.py results/demo --verify
"""

from __future__ import annotations

import warnings
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator

import taps
from options import parse_evaluate
from taps import certificate, commands, cost, files, results
from taps.data import TaskData, without_bad_images
from taps.data.images import Preprocessing
from taps.errors import UserError, unknown
from taps.experiment import score

#: name of the program that has an output for every task
TOGETHER = "together"


def main(arguments: Sequence[str]) -> None:
    given = parse_evaluate(arguments)
    folder = Path(given.folder)
    descriptions = results.read_tasks(folder)
    for name in given.tasks or ():
        if name not in descriptions:
            raise unknown("task", name, descriptions)
    names = given.tasks or list(descriptions)
    if given.verify:
        verify(folder, descriptions, names)
        return
    options = Namespace(**{**files.read_json(folder / "settings.json"), "device": given.device, "amp": "none"})
    accelerator = commands.make_accelerator(options)
    model, prepare = commands.load_run(folder, names, accelerator.device)
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
            export(model, names, Path(given.export), options, given.onnx)
    accelerator.end_training()


def verify(folder: Path, descriptions: dict[str, dict], names: list[str]) -> None:
    """Print whether base and tasks are what they were, bit for bit; ends the program with status 1 if anything is not."""
    path = results.RunFolder(folder).fingerprints_path
    stored = files.read_json(path)
    net, _ = commands.load_base(folder)
    moved = certificate.check_base(net, stored)
    for name in moved:
        print(f"base: {name} is not what it was")
    if moved:
        raise SystemExit(1)
    print(f"base: {len(stored)} tensors, bit for bit")
    model, _ = commands.load_run(folder, names)
    wrong = 0
    for name in names:
        if "probe" not in descriptions[name]:
            raise UserError(f"{folder / name}: the task has no certificate; its run did not end")
        problem = certificate.check_task(model, name, descriptions[name]["probe"])
        wrong += problem is not None
        print(f"{name}: {'answers bit for bit as after its training' if problem is None else problem}")
    if wrong:
        raise SystemExit(1)


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
    workers = options.workers if given.workers is None else given.workers
    how = {
        "batch_size": given.batch_size or options.batch_size,
        "workers": workers,
        "limit_batches": given.limit_batches,
    }
    return score(model, task, task.test, prepare, accelerator, Namespace(**how), f"testing {task.name}")


def export(model: taps.TaskModel, names: list[str], target: Path, options: Namespace, onnx: bool) -> None:
    """Each task as a state dict for timm and as a program, and all tasks as one program that computes shared work once."""
    networks = {name: model.merge(name).cpu() for name in names}
    programs = {**networks, **({TOGETHER: model.predictor(names).cpu()} if len(names) > 1 else {})}
    files_of = {name: target / f"{name}.safetensors" for name in networks}
    endings = (".pt2", ".onnx") if onnx else (".pt2",)
    existing = [path for path in files_of.values() if path.exists()]
    existing += [
        target / f"{name}{ending}" for name in programs for ending in endings if (target / f"{name}{ending}").exists()
    ]
    if existing:
        raise UserError(f"{existing[0]} exists; export to another folder or remove it")
    image = torch.zeros(2, 3, options.input_size, options.input_size)
    shapes = ({0: torch.export.Dim("batch", min=1)},)
    for name, plain in networks.items():
        files.write_tensors(files_of[name], plain.state_dict())
        print(f"{files_of[name]}: state dict for timm's {options.model_type}")
    for name, network in programs.items():
        outputs = "outputs of all tasks by name" if name == TOGETHER else f"outputs of {name}"
        try:
            program = torch.export.export(network, (image,), dynamic_shapes=shapes)
        except Exception as reason:
            if name != TOGETHER:
                raise
            line = str(reason).strip().splitlines()[0] if str(reason).strip() else type(reason).__name__
            warnings.warn(f"no program for all tasks together: {line}", stacklevel=2)
            continue
        with files.whole(target / f"{name}.pt2") as temporary:
            torch.export.save(program, temporary)
        print(f"{target / name}.pt2: torch.export program, {outputs}")
        if onnx:
            write_onnx(network, image, shapes, names if name == TOGETHER else [name], target / f"{name}.onnx")
            print(f"{target / name}.onnx: {outputs}")


def write_onnx(network: torch.nn.Module, x: torch.Tensor, shapes, outputs: Sequence[str], path: Path) -> None:
    """Export a network to an ONNX file with named outputs.

    Raises:
        UserError: if the packages it takes are not installed.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"ONNX export needs the package {error.name}: pip install 'taps-vision[onnx]'") from None
    program = torch.onnx.export(
        network,
        (x,),
        dynamo=True,
        dynamic_shapes=shapes,
        input_names=["images"],
        output_names=list(outputs),
        verbose=False,
    )
    with files.whole(path) as temporary:
        program.save(temporary)


if __name__ == "__main__":
    commands.run(main)
