"""Testing of finished runs, verification that nothing has drifted, and export of tasks as separate networks."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm import tqdm

from taps.core import accounting
from taps.data import opening
from taps.data.classification.images import TaskData, without_bad_images
from taps.errors import UserError, check_known, first_line
from taps.networks.preprocessing import Preprocessing, ToRGB
from taps.runs import setup
from taps.runs.adaptation import measure
from taps.settings.adaptation import AdaptationSettings, EvaluateSettings
from taps.storage import certificate, files, run_folder
from taps.task_model import TaskModel

#: name of the exported program with one output per task
TOGETHER = "together"


def evaluate(given: EvaluateSettings, say: Callable[[str], None]) -> None:
    """Test the tasks of a run, or verify it, and export them if requested.

    Args:
        given: settings of the command.
        say: receives each line of output.

    Raises:
        UserError: if the folder holds no run, or a task or its data is missing.
    """
    folder = Path(given.folder)
    descriptions = run_folder.read_tasks(folder)
    check_known("task", given.tasks or (), descriptions)
    names = list(dict.fromkeys(given.tasks or descriptions))
    target = Path(given.export) if given.export else None
    if target is not None:
        _check_target(target, names, given.onnx)
    if given.verify:
        verify(folder, descriptions, names, say)
        return
    options = replace(setup.read_settings(folder), device=given.device, amp="none")
    accelerator = setup.make_accelerator(options)
    if given.onnx:
        check_onnx()
    model, prepare = setup.load_run(folder, names, accelerator.device)
    if given.no_test:
        accuracies = {name: descriptions[name].get("accuracy") for name in names}
        missing = [name for name in names if accuracies[name] is None]
        if missing:
            raise UserError(f"{folder}: task {missing[0]} has not been tested; leave out --no_test")
    else:
        stored = files.read_json(folder / "settings.json").get("data", {})
        read = opening.read_data(given.dataset or options.dataset, options, all_tested=bool(given.dataset))
        data = {task.name: task for task in read}
        if given.dataset:  # the run's data, which may have moved, is divided as in the run
            with suppress(UserError):
                divided = opening.read_data(given.dataset, options)
                data.update(
                    {one.name: one for one in divided if one.name in stored and one.is_known_as(stored[one.name])}
                )
            stored = {}
        for name, task in data.items():
            for note in task.notes if given.dataset and name in names else ():
                say(f"{name}: {note}")
            if name in stored and not task.is_known_as(stored[name]):
                say(f"warning: the images of {name} are not those of the run; some may have been trained on")
        absent = [name for name in names if name not in data]
        if absent:
            raise UserError(f"task {absent[0]} has no data; the folders given hold {', '.join(data)}")
        accuracies = {
            name: test(model, data[name], descriptions[name], prepare, given, options, accelerator) for name in names
        }
    if accelerator.is_main_process:
        tested = {
            name: {**descriptions[name], "accounting": accounting.accounting(model, name), "accuracy": accuracies[name]}
            for name in names
        }
        say(
            run_folder.table(
                {"method": options.method, **run_folder.summarise(tested)}, in_bytes=options.budget is not None
            )
        )
        if target is not None:
            export(model, names, target, options, given.onnx, say)
    accelerator.end_training()


def verify(folder: Path, descriptions: dict[str, dict], names: list[str], say: Callable[[str], None]) -> None:
    """Report whether base and tasks are unchanged; exits with status 1 if they are not."""
    path = run_folder.RunFolder(folder).fingerprints_path
    stored = files.read_json(path)
    net, _ = setup.load_base(folder)
    moved = certificate.check_base(net, stored)
    for name in moved:
        say(f"base: {name} is not what it was")
    if moved:
        raise SystemExit(1)
    say(f"base: {len(stored)} tensors, bit for bit")
    model, _ = setup.load_run(folder, [])
    folders, wrong = run_folder.task_folders(folder), 0
    for name in names:
        if "probe" not in descriptions[name]:
            raise UserError(f"{folder / name}: the task has no certificate; its run did not end")
        try:
            model.load_task(folders.get(name, folder / name), name=name)
            is_same, text = certificate.check_task(model.eval(), name, descriptions[name]["probe"])
        except UserError as error:
            is_same, text = False, f"not loaded: {error}"
        wrong += not is_same
        say(f"{name}: {text}")
    if wrong:
        raise SystemExit(1)


def test(
    model: TaskModel,
    task: TaskData,
    description: dict,
    prepare: Preprocessing,
    given: EvaluateSettings,
    options: AdaptationSettings,
    accelerator: Accelerator,
) -> float:
    """Return the accuracy of one task on its test split, or its mean average precision, in percent."""
    stored = description.get("classes", list(task.classes))
    if [name.lower() for name in task.classes] != stored:  # as tables were read before 0.17
        task = _with_labels(task, stored)
    if given.skip_bad_images or options.skip_bad_images:
        only_tests = replace(task, train=(), val=None)
        task, bad = without_bad_images(only_tests, options.workers, ToRGB(options.background, options.published))
        if bad:
            accelerator.print(f"{task.name}: {len(bad)} unreadable images are left out")
    how = replace(
        options,
        batch_size=given.batch_size or options.batch_size,
        workers=options.workers if given.workers is None else given.workers,
        limit_batches=given.limit_batches,
    )
    return measure(model, task, task.test, prepare, accelerator, how, f"testing {task.name}").accuracy


def _with_labels(task: TaskData, stored: list[str]) -> TaskData:
    """Return the data with labels that count the classes of the stored task, of which it may lack some.

    Raises:
        UserError: for classes that the task was not trained on.
    """
    other = [name for name in task.classes if name not in stored]
    if other or (task.has_several_labels and list(task.classes) != stored):
        raise UserError(
            f"task {task.name}: the data's classes are not those the task was trained on"
            + (f", e.g. {other[0]!r}" if other else "")
        )
    label = [stored.index(name) for name in task.classes]
    if task.has_several_labels or label == list(range(len(stored))):
        return task
    test = tuple((path, label[old]) for path, old in task.test if isinstance(old, int))
    return replace(task, classes=tuple(stored), test=test)


def _check_target(target: Path, names: list[str], onnx: bool) -> None:
    """Raise a ``UserError`` if an export would overwrite a file."""
    programs = [*names, *([TOGETHER] if len(names) > 1 else [])]
    paths = [target / f"{name}.safetensors" for name in names]
    paths += [target / f"{name}{ending}" for name in programs for ending in ((".pt2", ".onnx") if onnx else (".pt2",))]
    existing = next((path for path in paths if path.exists()), None)
    if existing is not None:
        raise UserError(f"{existing} exists; export to another folder or remove it")


def export(model: TaskModel, names: list[str], target: Path, options: AdaptationSettings, onnx: bool, say) -> None:
    """Export each task as a timm state dict and as a program, and all tasks as one program that computes shared work once."""
    labels = {
        name: {key: model.about(name).get(key) for key in ("classes", "preprocessing", "metric")} for name in names
    }
    known = files.read_json(target / "labels.json") if (target / "labels.json").is_file() else {}
    files.write_json(target / "labels.json", {**known, **labels})
    say(f"{target / 'labels.json'}: class names and preprocessing of each task")
    image = torch.zeros(2, 3, options.input_size, options.input_size)
    together = [TOGETHER] if len(names) > 1 else []
    for name in tqdm([*names, *together], desc="exporting", disable=None, leave=False):
        of = [name] if name in labels else names
        network = (model.merge(name) if name in labels else model.predictor(names)).cpu()  # one at a time is in memory
        if name in labels:
            file = target / f"{name}.safetensors"
            files.write_tensors(file, network.state_dict(), {"task": name, "labels": json.dumps(labels[name])})
            say(f"{file}: state dict for timm's {options.model_type}")
        outputs = f"outputs of {name}" if name in labels else "outputs of all tasks by name"
        shapes = ({0: torch.export.Dim("batch", min=1)},)
        try:
            program = torch.export.export(network, (image,), dynamic_shapes=shapes)
        except Exception as reason:  # of any network of the user's
            line = first_line(reason)
            what = f"task {name}" if name in labels else "all tasks together"
            warnings.warn(f"no program for {what}: {line}", stacklevel=2)
            continue
        with files.atomic_write(target / f"{name}.pt2") as temporary:
            torch.export.save(program, temporary)
        say(f"{target / name}.pt2: torch.export program, {outputs}")
        if onnx:
            about = {"labels": json.dumps({task: labels[task] for task in of})}
            write_onnx(network, image, shapes, of, target / f"{name}.onnx", about)
            say(f"{target / name}.onnx: {outputs}")


def check_onnx() -> None:
    """Raise a ``UserError`` unless the packages for ONNX export are installed."""
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"ONNX export needs the package {error.name}: pip install 'taps-vision[onnx]'") from None


def write_onnx(
    network: torch.nn.Module, x: torch.Tensor, shapes, outputs: Sequence[str], path: Path, about: dict[str, str]
) -> None:
    """Export a network to an ONNX file with named outputs and metadata."""
    program = torch.onnx.export(
        network,
        (x,),
        dynamo=True,
        dynamic_shapes=shapes,
        input_names=["images"],
        output_names=list(outputs),
        verbose=False,
    )
    program.model.metadata_props.update(about)
    with files.atomic_write(path) as temporary:
        program.save(temporary)
