"""Classification of a user's own images with stored tasks."""

from __future__ import annotations

import glob
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tabulate import tabulate
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from taps.data.classification.images import list_images, read_image
from taps.data.seeded import leave_signals_to_the_main_process
from taps.errors import UserError
from taps.runs.setup import pick_device
from taps.settings.prediction import PredictSettings
from taps.storage.files import csv_text
from taps.storage.task_file import AVERAGE_PRECISION
from taps.task_model import TaskModel, load


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of one image under one task, the best first, with their probabilities in 0..1."""

    image: str
    task: str
    classes: tuple[tuple[str, float], ...]


def predict(settings: PredictSettings, say: Callable[[str], None], complain: Callable[[str], None]) -> None:
    """Report the classes of images under every task; ends with status 1 if some images cannot be read.

    Args:
        settings: settings of the command.
        say: receives each line of output.
        complain: receives a line for each image that cannot be read, and their number.

    Raises:
        UserError: if there is no task or no image, or none of the images can be read.
    """
    images = find_images(settings.images)
    device = pick_device(settings.device)
    model = load(settings.folder, base=settings.base, tasks=settings.tasks, keep=settings.keep).to(device)
    bad: dict[str, str] = {}
    found = classify(model, images, settings.top, settings.batch_size, settings.workers, bad.__setitem__)
    write = _as_json if settings.json else _as_csv if settings.csv else _as_table
    hidden = True if len(images) == 1 else None  # None: unless this is a terminal
    write(tqdm(found, total=len(images), unit="image", disable=hidden, leave=False), say)
    if bad and len(bad) == len(images):
        image, reason = next(iter(bad.items()))
        raise UserError(
            f"image {image} cannot be read ({reason})" + (f", nor can the other {len(bad) - 1}" * (len(bad) > 1))
        )
    for image, reason in bad.items():
        complain(f"not read: {image} ({reason})")
    if bad:
        complain(f"{len(bad)} of {len(images)} images could not be read")
        raise SystemExit(1)


def find_images(given: Sequence[str]) -> list[str]:
    """Return the images that files, folders and patterns name, each once, in order.

    Raises:
        UserError: if one of them names nothing.
    """
    found: dict[str, None] = {}
    for text in given:
        path = Path(text)
        if path.is_dir():
            own = list_images(path)
        elif path.is_file():
            own = [text]
        else:
            own = sorted(name for name in glob.glob(text, recursive=True) if Path(name).is_file())
        if not own:
            raise UserError(f"{text} holds no images" if path.is_dir() else f"{text} does not exist")
        found.update(dict.fromkeys(own))
    return list(found)


class _Images(Dataset):
    """Images by position, each prepared in several ways; an image that cannot be read is the reason."""

    def __init__(self, paths: Sequence[str], transforms: Sequence[Callable]) -> None:
        self.paths, self.transforms = paths, transforms

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[int, list[Tensor] | str]:
        try:
            return index, read_image(self.paths[index], lambda image: [one(image) for one in self.transforms])
        except UserError as error:
            return index, str(error)


def classify(
    model: TaskModel,
    images: Sequence[str],
    top: int = 5,
    batch_size: int = 32,
    workers: int = 0,
    on_bad: Callable[[str, str], None] = lambda image, reason: None,
) -> Iterator[list[Prediction]]:
    """Yield the predictions for each readable image, one per task; all tasks run in one pass.

    Args:
        model: a model with tasks.
        images: paths.
        top: number of classes to return.
        batch_size: images per batch.
        workers: processes that read images.
        on_bad: called with each image that cannot be read, and the reason.

    Raises:
        UserError: if a task does not classify.
    """
    groups: dict[str, list[str]] = {}  # tasks that prepare images alike
    for task in model.tasks:
        groups.setdefault(json.dumps(model.preprocessing_of(task), sort_keys=True), []).append(task)
    transforms = [model.transform(tasks[0]) for tasks in groups.values()]
    loader = DataLoader(
        _Images(images, transforms),
        batch_size=batch_size,
        num_workers=workers if len(images) > 4 * batch_size else 0,
        collate_fn=list,
        worker_init_fn=leave_signals_to_the_main_process,
    )
    device = next(model.parameters()).device
    for batch in loader:
        good = [(index, tensors) for index, tensors in batch if not isinstance(tensors, str)]
        for index, reason in batch:
            if isinstance(reason, str):
                on_bad(images[index], _reason(reason))
        if not good:
            continue
        outputs: dict[str, Tensor] = {}
        for position, tasks in enumerate(groups.values()):
            x = torch.stack([tensors[position] for _, tensors in good]).to(device)
            outputs.update(model.predict(x, tasks=tasks))
        best = {task: ranked(model, task, outputs[task], top) for task in model.tasks}
        for row, (index, _) in enumerate(good):
            yield [Prediction(images[index], task, best[task][row]) for task in model.tasks]


def _reason(message: str) -> str:
    """Return the reason in an error message of :func:`read_image`."""
    _, said, reason = message.rpartition(" cannot be read (")
    return reason[: reason.rfind(")")] if said else message


def ranked(model: TaskModel, task: str, output: Tensor, top: int) -> list[tuple[tuple[str, float], ...]]:
    """Return the ``top`` classes of each sample with their probabilities; those of several labels are independent."""
    if not isinstance(output, Tensor) or output.dim() != 2:
        raise UserError(f"task {task!r} does not classify images: its output is not (images, classes)")
    names = model.about(task).get("classes") or []
    if len(names) != output.shape[1]:
        names = [str(index) for index in range(output.shape[1])]
    separate = model.about(task).get("metric") == AVERAGE_PRECISION
    probabilities = output.float().sigmoid() if separate else output.float().softmax(1)
    values, indices = probabilities.cpu().topk(min(top, output.shape[1]))
    return [
        tuple((names[index], value) for index, value in zip(own, of, strict=True))
        for own, of in zip(indices.tolist(), values.tolist(), strict=True)
    ]


def _as_table(found: Iterable[list[Prediction]], say: Callable[[str], None]) -> None:
    for predictions in found:
        rows = [
            (one.task, *(f"{name} {100 * probability:.1f} %" for name, probability in one.classes))
            for one in predictions
        ]
        with tqdm.external_write_mode():
            table = tabulate(rows, tablefmt="plain", disable_numparse=True)
            say(predictions[0].image + "\n" + "\n".join(f"  {line}".rstrip() for line in table.splitlines()))


def _as_json(found: Iterable[list[Prediction]], say: Callable[[str], None]) -> None:
    """Print a JSON array, one line per image."""
    before = None
    say("[")
    for predictions in found:
        if before is not None:
            say(before + ",")
        tasks = {
            one.task: [{"class": name, "probability": probability} for name, probability in one.classes]
            for one in predictions
        }
        before = json.dumps({"image": predictions[0].image, "tasks": tasks})
    say(f"{before}\n]" if before is not None else "]")


def _as_csv(found: Iterable[list[Prediction]], say: Callable[[str], None]) -> None:
    say("image,task,rank,class,probability")
    for predictions in found:
        for one in predictions:
            for rank, (name, probability) in enumerate(one.classes, start=1):
                say(csv_text([(one.image, one.task, rank, name, f"{probability:.6g}")]).removesuffix("\n"))
