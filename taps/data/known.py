"""What complete copies of the published data sets hold, and a check of a folder against it.

    python -m taps.data datasets/DomainNet datasets/cubs_cropped

Of formatted dense sets, hospital stays and volumes every listed file is read.

Sources: the official cleaned DomainNet lists (M3SDA); the counts of the ImageNet-to-Sketch archive (Piggyback, ECCV
2018) as published with it and with its follow-ups.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from taps.data import domainnet
from taps.data.context import CLASS_FILES, PROTOCOLS, covered_classes, find, protocol_of, read_image, read_names
from taps.data.folders import find_tasks, read_folder
from taps.data.formatted import layout_of, read_lists, read_sample
from taps.data.mimic3 import check_stays
from taps.data.subjects import list_path
from taps.data.volumes import check_volumes
from taps.errors import UserError


@dataclass(frozen=True)
class Known:
    """Numbers of classes and of images of a complete copy."""

    classes: int
    train: int
    test: int


SKETCH = {
    "cubs_cropped": Known(200, 5_994, 5_794),
    "stanford_cars_cropped": Known(196, 8_144, 8_041),
    "flowers": Known(102, 2_040, 6_149),
    "wikiart": Known(195, 42_129, 10_628),
    "sketches": Known(250, 16_000, 4_000),
}
#: samples of each split of the formatted dense sets
DENSE = {
    "nyuv2": {"train": 795, "test": 654},
    "cityscapes": {"train": 2_975, "test": 500},
    "pascal_context": {"train": 4_998, "test": 5_105},
    "nyud": {"train": 795, "test": 654},
}
DOMAINNET = {
    "clipart": Known(345, 33_525, 14_604),
    "infograph": Known(345, 36_023, 15_582),
    "painting": Known(345, 50_416, 21_850),
    "quickdraw": Known(345, 120_750, 51_750),
    "real": Known(345, 120_906, 52_041),
    "sketch": Known(345, 48_212, 20_916),
}
LIST_MD5 = {
    "clipart_train": "b4349693a7f9c05c53955725c47ed6cb", "clipart_test": "f5ddbcfd657a3acf9d0f7da10db22565",
    "infograph_train": "379b50054f4ac2018dca4f89421b92d9", "infograph_test": "779626b50869edffe8ea6941c3755c71",
    "painting_train": "7db0e7ca73ad9982f6e1f7f3ef372c0a", "painting_test": "232b35dc53f26d414686ae579e38d9b5",
    "quickdraw_train": "b732ced3939ac8efdd8c0a889dca56cc", "quickdraw_test": "c1a828fdfe216fb109f1c0083a252c6f",
    "real_train": "8ebf02c2075fadd564705f0dc7cd6291", "real_test": "6098816791c3ebed543c71ffa11b9054",
    "sketch_train": "1233bd18aa9a8a200bf4cecf1c34ef3e", "sketch_test": "d8a222e4672cfd585298aa14d02ea441",
}  # fmt: skip


def check(path: Path) -> tuple[list[str], int]:
    """Compare a folder with what is known of the data set it is named after.

    Returns:
        Lines for a person, and how many things are wrong or missing.

    Raises:
        UserError: if the path holds no data set at all.
    """
    if path.is_dir() and domainnet.has_lists(path):
        return _check_lists(path)
    for name in ("nyuv2", "cityscapes", "taskonomy", "scenes"):
        if (path / layout_of(name).list_file).is_file():
            return _check_dense(name, path)
    if protocol_of(path) is not None:
        return _check_protocol(protocol_of(path), path)
    if any((folder / "train_listfile.csv").is_file() for folder in (path, path / "multitask")):
        return check_stays(path)
    for images in (path, path / "images"):
        if any(list_path(images, split).is_file() for split in ("train", "val", "test")):
            return check_volumes(images)
    lines, wrong = [], 0
    for folder in _task_folders(path):
        task = read_folder(folder)
        known = DOMAINNET.get(folder.name) if folder.name in DOMAINNET else SKETCH.get(folder.name)
        found = Known(len(task.classes), len(task.train), len(task.test))
        lines.append(f"{folder}: {found.classes} classes, {found.train} train, {found.test} test")
        lines += [f"  {note}" for note in task.notes]
        if known is None:
            lines.append("  no published counts are known for a set of this name")
            continue
        for what in ("classes", "train", "test"):
            have, want = getattr(found, what), getattr(known, what)
            if have != want:
                wrong += 1
                lines.append(
                    f"  {what}: {abs(want - have)} {'missing' if have < want else 'too many'} ({have} of {want})"
                )
    return lines, wrong


def _task_folders(path: Path) -> list[Path]:
    if (path / "train").is_dir():
        return [path]
    folders = sorted(inner for inner in path.iterdir() if (inner / "train").is_dir()) if path.is_dir() else []
    if not folders:
        find_tasks([path])  # says what is wrong with the path
        raise UserError(f"{path} holds no data set")
    return folders


def _check_lists(root: Path) -> tuple[list[str], int]:
    lines, wrong = [], 0
    folder = domainnet.lists_folder(root)
    for domain, known in DOMAINNET.items():
        for split in ("train", "test"):
            path = folder / f"{domain}_{split}.txt"
            if not path.is_file():
                lines.append(f"{path.name}: missing")
                wrong += 1
                continue
            same = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest() == LIST_MD5[path.stem]
            samples = domainnet.read_list(path)
            absent = [name for name, _ in samples if not (root / name).is_file()]
            remark = (
                "the official cleaned list"
                if same
                else f"not the official cleaned list ({getattr(known, split)} images)"
            )
            lines.append(f"{path.name}: {len(samples)} images, {remark}, {len(absent)} files missing")
            lines += [f"  missing: {name}" for name in absent[:3]] + (["  …"] if len(absent) > 3 else [])
            wrong += (not same) + len(absent)
    return lines, wrong


def _compare_sizes(name: str, root: Path, splits: Mapping[str, Sequence]) -> tuple[list[str], int]:
    """The sizes of a dense benchmark's splits beside the published ones."""
    counts = ", ".join(f"{len(samples)} {split}" for split, samples in splits.items())
    lines = [f"{root}: {name}, {counts}"]
    for split, want in DENSE.get(name, {}).items():
        have = len(splits[split])
        if have != want:
            lines.append(f"  {split}: {abs(want - have)} {'missing' if have < want else 'too many'} ({have} of {want})")
    return lines, len(lines) - 1


def _check_protocol(name: str, root: Path) -> tuple[list[str], int]:
    """Read every file of the listed images; of those that are not there, say how many and name the first."""
    protocol = PROTOCOLS[name]
    names = read_names(root, protocol)
    lines, wrong = _compare_sizes(name, root, names)
    images = [image for own in names.values() for image in own]
    samples = [{column: find(root, protocol, column, image) for column in protocol.files} for image in images]
    for column in protocol.files:
        absent = [sample[column] for sample in samples if not sample[column].is_file()]
        wrong += len(absent)
        if absent:
            lines.append(f"  {column}: {len(absent)} of {len(samples)} files missing, the first is {absent[0]}")
    covered = covered_classes(root)
    if "context" in protocol.files and covered is None:
        lines.append(f"  no db_info/{' and '.join(CLASS_FILES)}: normals are used on every class")
    for sample in tqdm(samples, desc=f"reading {root.name}", disable=None, leave=False):
        there = [
            task
            for name, task in protocol.tasks.items()
            if all(sample[column].is_file() for column in protocol.needed([name]))
        ]
        mistakes: dict[str, None] = {}
        for task in there:
            try:
                read_image(protocol, sample, [task], covered)
            except UserError as error:
                mistakes[f"  {error}"] = None  # once, where several tasks are read from one file
        wrong += len(mistakes)
        lines += mistakes
    return lines, wrong


def _check_dense(name: str, root: Path) -> tuple[list[str], int]:
    """Read every file that the lists of a dense benchmark name."""
    splits = read_lists(root, layout_of(name))
    lines, wrong = _compare_sizes(name, root, splits)
    samples = {sample["image"]: sample for split in splits.values() for sample in split}
    kinds = [layout_of(name, classes) for classes in (2, 7, 19)] if name == "cityscapes" else [layout_of(name)]
    for layout in kinds:
        for sample in tqdm(samples.values(), desc=f"reading {root.name}", disable=None, leave=False):
            try:
                read_sample(
                    layout, dict(zip(layout.columns, sample.values(), strict=True)), list(layout.tasks.values())
                )
            except UserError as error:
                wrong += 1
                lines.append(f"  {error}")
    return lines, wrong
