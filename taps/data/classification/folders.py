"""Classification tasks in image folders.

A task is a folder with ``train/<class>/*`` and ``test/<class>/*``, optionally ``val/<class>/*``; a root may hold several such
folders. DomainNet is recognised by its official lists (:mod:`taps.data.classification.domainnet`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from taps.data.classification import domainnet
from taps.data.classification.images import TaskData, list_images
from taps.errors import UserError


def find_tasks(paths: Sequence[str | Path], cropped: bool | None = None) -> list[TaskData]:
    """The tasks in the given paths, in the order given and alphabetically within a root.

    Args:
        paths: image folders, roots with several of them, DomainNet roots, or single domains.
        cropped: stretch images to the square input; ``None`` does so for folders whose name contains "cropped", the rule
            of the ImageNet-to-Sketch sets.

    Raises:
        UserError: if a path is missing or holds no task, or two tasks have the same name.
    """
    tasks = [task for path in map(Path, paths) for task in _tasks_of(path, cropped)]
    names = [task.name for task in tasks]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two tasks have the name {name!r}; tasks are named after their folders, so rename one")
    return tasks


def _tasks_of(path: Path, cropped: bool | None) -> list[TaskData]:
    if not path.is_dir():
        raise UserError(f"dataset folder {path} does not exist" if not path.exists() else f"{path} is not a folder")
    if domainnet.has_lists(path):
        return [domainnet.read_domain(path, domain) for domain in domainnet.listed_domains(path)]
    if (path / "train").is_dir() or (path / "test").is_dir():
        return [read_folder(path, cropped)]
    if path.name in domainnet.listed_domains(path.parent):
        return [domainnet.read_domain(path.parent, path.name)]
    inner = [folder for folder in sorted(path.iterdir()) if (folder / "train").is_dir() and (folder / "test").is_dir()]
    if inner:
        return [read_folder(folder, cropped) for folder in inner]
    raise UserError(
        f"{path} is not a dataset: it needs train/ and test/ folders (or folders that have them, or DomainNet's lists)"
    )


def read_folder(path: Path, cropped: bool | None = None) -> TaskData:
    """One task from ``train/``, ``test/`` and optionally ``val/``; labels are the sorted class folders of ``train/``.

    A folder named like a DomainNet domain that has its 345 classes in train or test gets the official order of labels, and
    classes without training or test images in the official split keep their labels.

    Raises:
        UserError: if a split is missing or empty, or a class in test or val is missing in train.
    """
    path = path if path.name else path.resolve()
    for split in ("train", "test"):
        if not (path / split).is_dir():
            raise UserError(f"{path} has no {split}/ folder; a task needs train/<class>/ and test/<class>/")
    splits = {split: _class_folders(path / split) for split in ("train", "test", "val") if (path / split).is_dir()}
    for split, found in splits.items():
        if not any(found.values()):
            raise UserError(f"{path / split} has no images; it needs one folder of images per class")
    notes: tuple[str, ...] = ()
    union = {name for split in splits.values() for name in split}
    if path.name in domainnet.DOMAINS and len(union) == domainnet.NUM_CLASSES:
        classes = domainnet.official_order(union)
        notes = domainnet.missing_notes(classes, {split: set(found) for split, found in splits.items()})
    else:
        classes = sorted(name for name, images in splits["train"].items() if images)
        for split in ("test", "val"):
            extra = sorted(name for name, images in splits.get(split, {}).items() if images and name not in classes)
            if extra:
                raise UserError(f"{path}: {split}/ has classes that train/ lacks: {domainnet.first_three(extra)}")
    label = {name: index for index, name in enumerate(classes)}
    samples = {
        split: tuple((image, label[name]) for name, images in found.items() for image in images)
        for split, found in splits.items()
    }
    stretch = "cropped" in path.name.lower() if cropped is None else cropped
    name = re.sub(r"[^A-Za-z0-9_-]", "_", path.name)
    return TaskData(name=name, classes=tuple(classes), **samples, stretch=stretch, notes=notes)


def _class_folders(path: Path) -> dict[str, list[str]]:
    """Images by class folder, including empty class folders."""
    folders = [folder for folder in sorted(path.iterdir()) if folder.is_dir() and not folder.name.startswith(".")]
    return {folder.name: list_images(folder) for folder in folders}
