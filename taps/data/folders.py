"""Image folders, and which kind of data a path holds.

A task is a folder with ``train/<class>/*`` and ``test/<class>/*``, optionally ``val/<class>/*``. A root with several
such folders is several tasks. A DomainNet root with the official lists is recognised by them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from taps.data import domainnet
from taps.data.images import Sample, TaskData, list_images
from taps.errors import UserError


def find_tasks(paths: Sequence[str | Path], cropped: bool | None = None) -> list[TaskData]:
    """The tasks that the given paths hold, in the order given; within a root, in alphabetical order.

    Args:
        paths: image folders, roots with several of them, DomainNet roots, or single domains of one.
        cropped: scale images without regard to their proportions; ``None`` does so for the sets whose folder's name
            contains "cropped", the rule of the ImageNet-to-Sketch sets.

    Raises:
        UserError: if a path is missing or holds no task, or two tasks have the same name.
    """
    tasks: list[TaskData] = []
    for path in map(Path, paths):
        tasks.extend(_tasks_of(path, cropped))
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
    if domainnet.has_lists(path.parent) and path.name in domainnet.listed_domains(path.parent):
        return [domainnet.read_domain(path.parent, path.name)]
    inner = [folder for folder in sorted(path.iterdir()) if (folder / "train").is_dir() and (folder / "test").is_dir()]
    if inner:
        return [read_folder(folder, cropped) for folder in inner]
    raise UserError(
        f"{path} is not a dataset: it needs train/ and test/ folders (or folders that have them, or DomainNet's lists)"
    )


def read_folder(path: Path, cropped: bool | None = None) -> TaskData:
    """One task from ``train/``, ``test/`` and optionally ``val/``; labels are the sorted class folders of ``train/``.

    A folder named like a DomainNet domain with its 345 classes in train or test gets the official order of labels
    instead, and classes that the official split leaves without training or test images keep theirs.

    Raises:
        UserError: if a split is missing or empty, or a class is tested that is not trained.
    """
    path = path.resolve() if not path.name else path
    for split in ("train", "test"):
        if not (path / split).is_dir():
            raise UserError(f"{path} has no {split}/ folder; a task needs train/<class>/ and test/<class>/")
    splits = {split: _class_folders(path / split) for split in ("train", "test", "val") if (path / split).is_dir()}
    for split, found in splits.items():
        if not any(found.values()):
            raise UserError(f"{path / split} has no images; it needs one folder of images a class")
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
                more = f" and {len(extra) - 3} more" if len(extra) > 3 else ""
                raise UserError(f"{path}: {split}/ has classes that train/ lacks: {', '.join(extra[:3])}{more}")
    label = {name: index for index, name in enumerate(classes)}
    samples: dict[str, tuple[Sample, ...]] = {}
    for split, found in splits.items():
        samples[split] = tuple((image, label[name]) for name in found for image in found[name])
    return TaskData(
        name=_task_name(path),
        classes=tuple(classes),
        train=samples["train"],
        test=samples["test"],
        val=samples.get("val"),
        squash="cropped" in path.name.lower() if cropped is None else cropped,
        notes=notes,
    )


def _class_folders(path: Path) -> dict[str, list[str]]:
    """Images by class folder; an empty class folder is kept."""
    folders = [folder for folder in sorted(path.iterdir()) if folder.is_dir() and not folder.name.startswith(".")]
    return {folder.name: list_images(folder) for folder in folders}


def _task_name(path: Path) -> str:
    """The folder's name with everything a task's name cannot hold turned into ``_``."""
    return "".join(letter if letter.isascii() and (letter.isalnum() or letter in "_-") else "_" for letter in path.name)
