"""Classification tasks in image folders and tables.

A task is a folder with ``train/<class>/*`` and ``test/<class>/*``, optionally ``val/<class>/*`` (or ``training``, ``testing``,
``validation``, ``valid``, in any case); a root may hold several such folders. Without ``test/``, ``val/`` is tested on; a plain
folder of classes is divided. A task can also be a CSV file with the columns ``path,label`` and optionally ``split``, or with
several labels per image. DomainNet is recognised by its official lists (:mod:`taps.data.classification.domainnet`).
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from taps.data.classification import domainnet
from taps.data.classification.images import (
    Sample,
    TaskData,
    choose_stratified,
    direct_images,
    hidden_images,
    is_hidden,
    list_images,
)
from taps.data.seeded import mix_seed
from taps.errors import UserError, first_line

#: names of the folders, in lower case, and of a table's entries, that stand for each split
_SPLITS = {"train": ("train", "training"), "val": ("val", "validation", "valid"), "test": ("test", "testing")}
_SPLIT_OF = {name: split for split, names in _SPLITS.items() for name in names}


@dataclass(frozen=True)
class Reading:
    """How folders are read.

    Attributes:
        cropped: stretch images to the square input; ``None`` does so for folders whose name contains "cropped", the rule of the
            ImageNet-to-Sketch sets.
        test_fraction: share of each class that is tested on if the data has no images for this, 0..1.
        seed: seed of that choice.
        all_tested: test on all images of data that has none for testing; training images may be missing.
    """

    cropped: bool | None = None
    test_fraction: float = 0.2
    seed: int = 0
    all_tested: bool = False


def find_tasks(paths: Sequence[str | Path], reading: Reading | None = None) -> list[TaskData]:
    """The tasks in the given paths, in the order given and alphabetically within a root.

    Args:
        paths: image folders, CSV files, roots with several of them, DomainNet roots, or single domains.
        reading: how to read them.

    Raises:
        UserError: if a path is missing or holds no task, or two tasks have the same name.
    """
    tasks = [task for path in map(Path, paths) for task in _tasks_of(path, reading or Reading())]
    names = [task.name for task in tasks]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two tasks have the name {name!r}; tasks are named after their folders, so rename one")
    return tasks


def _tasks_of(path: Path, reading: Reading) -> list[TaskData]:
    if path.is_file() and path.suffix.lower() == ".csv":
        return [read_table(path, reading)]
    if not path.is_dir():
        raise UserError(
            f"dataset folder {path} does not exist" if not path.exists() else f"{path} is not a folder or a .csv file"
        )
    if domainnet.has_lists(path):
        return [domainnet.read_domain(path, domain, bool(reading.cropped)) for domain in domainnet.listed_domains(path)]
    if is_divided(path) or "test" in split_folders(path):
        return [read_folder(path, reading)]
    if path.name in domainnet.listed_domains(path.parent):
        return [domainnet.read_domain(path.parent, path.name, bool(reading.cropped))]
    folders = [folder for folder in sorted(path.iterdir()) if folder.is_dir() and not is_hidden(folder, path)]
    inner = [folder for folder in folders if is_divided(folder)]
    if inner:
        return [read_folder(folder, reading) for folder in inner]
    names = [folder.name for folder in folders]
    if len(names) > 1 and set(names) <= {*domainnet.DOMAINS, "txt"} and not any(map(direct_images, folders)):
        raise UserError(
            f"{path} lacks DomainNet's lists: put {names[0]}_train.txt and {names[0]}_test.txt there, or in txt/"
        )
    _refuse_undivided_splits(path, names)
    filled = [folder for folder in folders if list_images(folder)]
    if len(filled) > 1:
        return [read_folder(path, reading)]
    if filled:
        raise UserError(f"{path} holds images of one class only, {filled[0].name}; a task needs two")
    raise UserError(
        f"{path} is not a dataset: it needs train/ and test/ folders, or one folder of images per class (or folders that have "
        "them, or DomainNet's lists)"
    )


def is_divided(path: Path) -> bool:
    """Whether a folder has images for training apart from others, in ``train/<class>/``."""
    return "train" in split_folders(path)


def split_folders(path: Path) -> dict[str, Path]:
    """The folders with the training, validation and test images of a folder, by split.

    A folder of images without folders inside is a class, whatever its name, unless another split lies beside it: DomainNet has a
    class that is called ``train``. So is one with another name than those in lower case that stands alone (``Training``).
    """
    found = sorted(folder for folder in path.iterdir() if folder.name.lower() in _SPLIT_OF and folder.is_dir())
    found.sort(key=lambda folder: _SPLIT_OF[folder.name.lower()] != folder.name)  # what is named exactly so comes first
    splits: dict[str, Path] = {}
    for folder in found:
        splits.setdefault(_SPLIT_OF[folder.name.lower()], folder)
    hold_classes = [_holds_classes(folder) for folder in splits.values()]
    usual = {"train", "test", *_SPLITS["val"]}
    if not any(hold_classes) or (len(splits) == 1 and not {folder.name for folder in splits.values()} <= usual):
        return {}
    return {split: splits[split] for split in _SPLITS if split in splits}


def _holds_classes(folder: Path) -> bool:
    inner = any(one.is_dir() and not is_hidden(one, folder) for one in folder.iterdir())
    return inner or not direct_images(folder)


def _refuse_undivided_splits(path: Path, names: Sequence[str]) -> None:
    """Raise a ``UserError`` if folders of a folder of classes are called like splits, as ``seg_train`` and ``seg_test``."""
    alike: dict[str, dict[str, str]] = {}
    for name in names:
        before, word = re.fullmatch(r"(.*?)([a-z]*)", name.lower()).groups()  # type: ignore[union-attr]
        if word in _SPLIT_OF:
            alike.setdefault(before, {})[_SPLIT_OF[word]] = name
    for before, found in alike.items():
        if len(found) > 1:
            shown = " and ".join(sorted(found.values()))
            hint = "rename them to train, val and test" if before else "in each, give every class a folder"
            raise UserError(f"{path} holds {shown}, which look like splits: {hint}")


def read_folder(path: Path, reading: Reading | None = None) -> TaskData:
    """One task from ``train/``, ``test/`` and optionally ``val/``, or from a folder of classes; labels are the sorted class
    folders of ``train/``.

    A folder named like a DomainNet domain that has its 345 classes in train or test gets the official order of labels, and
    classes without training or test images in the official split keep their labels.

    Raises:
        UserError: if a split is missing or empty, or a class in test or val is missing in train.
    """
    reading = reading or Reading()
    path = path if path.name else path.resolve()
    where = split_folders(path)
    is_split = bool({"train", "test"} & where.keys())
    if not is_split:
        where = {"train": path}
    tests_validation = "test" not in where and "val" in where
    if tests_validation:
        where["test"] = where.pop("val")
    if "train" not in where and not reading.all_tested:
        raise UserError(f"{path} has no train/ folder; a task needs train/<class>/ and test/<class>/")
    splits = {split: _class_folders(folder) for split, folder in where.items()}
    for split, found in splits.items():
        if not any(found.values()):
            raise UserError(f"{where[split]} has no images; it needs one folder of images per class")
    notes: list[str] = []
    union = {name for split in splits.values() for name in split}
    if path.name in domainnet.DOMAINS and len(union) == domainnet.NUM_CLASSES:
        classes = domainnet.official_order(union)
        notes += domainnet.missing_notes(classes, {split: set(found) for split, found in splits.items()})
    else:
        trained = splits.get("train", splits.get("test", {}))
        classes = sorted(name for name, images in trained.items() if images)
        for split in set(splits) - {"train"}:
            extra = sorted(name for name, images in splits[split].items() if images and name not in classes)
            if extra:
                raise UserError(
                    f"{path}: {where[split].name}/ has classes that train/ lacks: {domainnet.first_three(extra)}"
                )
        empty = sorted(name for name in union if name not in classes)
        if empty:
            notes.append(f"no class, since they hold no image that can be read: {domainnet.first_three(empty)}")
    hidden = [image for folder in where.values() for image in hidden_images(folder)]
    if hidden:
        notes.append(f"{len(hidden)} hidden images are left out, e.g. {hidden[0]}")
    deep = {
        name
        for found in splits.values()
        for name, images in found.items()
        if any(Path(i).parent.name != name for i in images)
    }
    if deep:
        notes.append(f"images in subfolders belong to the class above them: {domainnet.first_three(sorted(deep))}")
    beside = [folder for folder in sorted(path.iterdir()) if folder.is_dir() and not is_hidden(folder, path)]
    beside = [folder for folder in beside if is_split and folder not in where.values()]
    left_out = [
        folder.name for folder in beside if any(map(direct_images, (folder, *filter(Path.is_dir, folder.iterdir()))))
    ]
    if left_out:
        notes.append(f"folders with images beside the splits are left out: {domainnet.first_three(left_out)}")
    apart = [image for folder in where.values() for image in direct_images(folder)]
    if apart:
        notes.append(f"{len(apart)} images are in no class folder and left out, e.g. {apart[0]}")
    label = {name: index for index, name in enumerate(classes)}
    samples = {
        split: tuple((image, label[name]) for name, images in found.items() for image in images)
        for split, found in splits.items()
    }
    if tests_validation:
        notes.append(
            f"there is no test/, so {where['test'].name}/ is tested on, and validation images come from train/"
        )
    task = TaskData(
        name=task_name(path.name),
        classes=tuple(name.encode(errors="surrogateescape").decode(errors="replace") for name in classes),
        **{"train": (), "test": (), **samples},
        stretch="cropped" in path.name.lower() if reading.cropped is None else reading.cropped,
        notes=tuple(notes),
    )
    if "test" in samples:
        return task
    return split_test(task, replace(reading, all_tested=False) if is_split else reading)


def split_test(task: TaskData, reading: Reading) -> TaskData:
    """Move a random stratified part of the training images, or all that should be tested, to an empty test split.

    Raises:
        UserError: if none would be left to test on.
    """
    if reading.all_tested:
        note = f"there is no test/, so all {len(task.train)} images are tested on"
        return replace(task, train=(), test=task.train, notes=(*task.notes, note))
    chosen = choose_stratified(task.train, reading.test_fraction, mix_seed(reading.seed, 1))
    if not chosen:
        raise UserError(
            f"task {task.name}: --test_fraction {reading.test_fraction:g} of {len(task.train)} images leaves none to test on; "
            "add images or give a larger fraction"
        )
    parts = {
        "train": tuple(sample for sample in task.train if sample not in chosen),
        "test": tuple(sample for sample in task.train if sample in chosen),
    }
    note = (
        f"there is no test/, so {len(chosen)} images are tested on: {reading.test_fraction:.0%} of each class, "
        f"chosen with seed {reading.seed}"
    )
    return replace(task, **parts, notes=(*task.notes, note))


def read_table(path: Path, reading: Reading | None = None) -> TaskData:
    """One task from a CSV file with the columns ``path`` and ``label``, and optionally ``split`` (train, val, test).

    Paths are relative to the file's folder. Labels are the sorted names, by value if all are numbers. Images may have several
    labels, or none: a column ``labels`` instead of ``label`` has their names, separated by ``;`` or ``|``; or each label has a
    column of its own with 0 and 1.

    Raises:
        UserError: with the line, if a column, a value or all images of a split are missing.
    """
    reading = reading or Reading()
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            columns = [_column(name) for name in reader.fieldnames or ()]
            reader.fieldnames = columns
            rows = [(reader.line_num, {k: (v or "").strip() for k, v in row.items() if k}) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as CSV: {first_line(error)}") from None
    twice = next((name for name in columns if name and columns.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{path} has two columns {twice!r}; leave one of them out")
    if "path" not in columns:
        raise UserError(f"{path} has no column 'path'; its first line has to name the columns path,label")
    classes, label_of = _labels(path, columns, rows)
    splits: dict[str, list[Sample]] = {"train": [], "val": [], "test": []}
    seen: dict[str, tuple] = {}
    for line, row in rows:
        said = row.get("split", "").lower()
        split = _SPLIT_OF.get(said or "train")
        if split is None:
            raise UserError(f"{path}, line {line}: split {said!r} is not train, val or test")
        if not row["path"]:
            raise UserError(f"{path}, line {line}: path or label is missing")
        image, label = str(path.parent / row["path"]), label_of(line, row)
        if image in seen and seen[image] != (split, label):
            what = (
                "split" if seen[image][1] == label else "label; several labels belong in one line of a column 'labels'"
            )
            raise UserError(f"{path}, line {line}: {row['path']} is there twice, with another {what}")
        seen[image] = split, label
        splits[split].append((image, label))
    samples = {split: tuple(found) for split, found in splits.items()}
    if not samples["train"] and not (reading.all_tested and samples["test"]):
        raise UserError(f"{path} lists no training images")
    untrained = set(range(len(classes))) - {label for _, label in samples["train"]} if "label" in columns else set()
    if untrained and not reading.all_tested:
        raise UserError(f"{path} lists no training images of class {classes[min(untrained)]!r}")
    task = TaskData(
        name=task_name(path.stem),
        classes=tuple(classes),
        train=samples["train"],
        test=samples["test"],
        val=samples["val"] or None,
        stretch=bool(reading.cropped),
        is_listed=True,
    )
    if reading.all_tested and not task.test and task.val:
        return replace(task, train=(), val=None, test=task.val)
    return task if task.test else split_test(task, reading)


def _column(name: str | None) -> str:
    """Return the name of a table's column; labels are written as they are, the others in any case."""
    plain = (name or "").strip()
    return plain.lower() if plain.lower() in ("path", "label", "labels", "split") else plain


def _labels(path: Path, columns: Sequence[str], rows: Sequence[tuple[int, dict]]) -> tuple[list[str], Callable]:
    """Return the names of a table's labels, and a function from a row's line and values to its label."""
    if "label" in columns:
        names = {row["label"] for _, row in rows} - {""}
        numbers = all(re.fullmatch(r"-?\d+", name) for name in names)
        classes = sorted(names, key=int) if numbers else sorted(names)
        position = {name: index for index, name in enumerate(classes)}

        def one(line: int, row: dict) -> int:
            if not row["label"]:
                raise UserError(f"{path}, line {line}: path or label is missing")
            return position[row["label"]]

        return classes, one
    if "labels" in columns:

        def named(row: dict) -> set[str]:
            return {name.strip() for name in re.split(r"[;|]", row["labels"])} - {""}

        classes = sorted({name for _, row in rows for name in named(row)})
        if not classes:
            raise UserError(f"{path}: column 'labels' names no label")
        return classes, lambda line, row: tuple(int(name in named(row)) for name in classes)
    classes = [name for name in columns if name and name not in ("path", "split")]

    def several(line: int, row: dict) -> tuple[int, ...]:
        wrong = next((name for name in classes if row.get(name) not in ("0", "1")), None)
        if wrong is not None:
            raise UserError(
                f"{path}, line {line}: column {wrong!r} is {row.get(wrong, '')!r}; without a column label or labels, each column "
                "is a label and has 0 or 1"
            )
        return tuple(int(row[name]) for name in classes)

    if len(classes) < 2:
        raise UserError(
            f"{path} has no column 'label'; its first line has to name the columns path,label, or path,labels for images with "
            "several labels"
        )
    return classes, several


def task_name(text: str) -> str:
    """Return a folder's or file's name as the name of a task."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", text)


def _class_folders(path: Path) -> dict[str, list[str]]:
    """Images by class folder, including empty class folders."""
    folders = [folder for folder in sorted(path.iterdir()) if folder.is_dir() and not is_hidden(folder, path)]
    return {folder.name: list_images(folder) for folder in folders}
