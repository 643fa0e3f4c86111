"""Comparison of downloaded data sets with what complete copies hold: ``taps data check FOLDER…``.

Numbers of classes and images are compared with the published ones. Of dense benchmarks, hospital stays and volumes
every listed file is read as well.

Sources: the official cleaned DomainNet lists (M3SDA, ICCV 2019); the counts published with the ImageNet-to-Sketch archive
(Piggyback, ECCV 2018) and its follow-ups.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from taps.data.classification import domainnet
from taps.data.classification.folders import find_tasks, is_divided, read_folder
from taps.data.classification.images import TaskData
from taps.data.dense import astmt_layout
from taps.data.dense.adashare_layout import Layout, layout_of, read_lists, read_sample
from taps.data.dense.video_layout import check_video, is_video
from taps.data.multi_label import SPLITS
from taps.data.reading import mistakes_of
from taps.data.records.mimic3 import check_stays
from taps.data.records.subjects import list_path
from taps.data.records.volumes import check_volumes


class Counts(NamedTuple):
    """Numbers of classes and of images in a complete copy."""

    classes: int
    train: int
    test: int


SKETCH = {
    "cubs_cropped": Counts(200, 5_994, 5_794),
    "stanford_cars_cropped": Counts(196, 8_144, 8_041),
    "flowers": Counts(102, 2_040, 6_149),
    "wikiart": Counts(195, 42_129, 10_628),
    "sketches": Counts(250, 16_000, 4_000),
}
DOMAINNET = {
    "clipart": Counts(345, 33_525, 14_604),
    "infograph": Counts(345, 36_023, 15_582),
    "painting": Counts(345, 50_416, 21_850),
    "quickdraw": Counts(345, 120_750, 51_750),
    "real": Counts(345, 120_906, 52_041),
    "sketch": Counts(345, 48_212, 20_916),
}
#: number of samples per split of the dense benchmarks
DENSE = {
    "nyuv2": {"train": 795, "test": 654},
    "cityscapes": {"train": 2_975, "test": 500},
    "pascal_context": {"train": 4_998, "test": 5_105},
    "nyud": {"train": 795, "test": 654},
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
    """Compare a folder with a complete copy of the data set it is named after.

    Returns:
        The lines of a report, and the number of things that are wrong or missing.

    Raises:
        UserError: if the path holds no data set at all.
    """
    if path.is_dir() and domainnet.has_lists(path):
        return _check_lists(path)
    for name in ("nyuv2", "cityscapes", "taskonomy", "scenes"):
        if (path / layout_of(name).list_file).is_file():
            return _check_dense(name, path)
    if is_video(path):
        return check_video(path)
    protocol = astmt_layout.protocol_of(path)
    if protocol is not None:
        return _check_protocol(protocol, path)
    if any((folder / "train_listfile.csv").is_file() for folder in (path, path / "multitask")):
        return check_stays(path)
    for images in (path, path / "images"):
        if any(list_path(images, split).is_file() for split in SPLITS):
            return check_volumes(images)
    lines, wrong = [], 0
    for folder, task in _tasks(path):
        known = {**SKETCH, **DOMAINNET}.get(folder.name)
        found = Counts(len(task.classes), len(task.train), len(task.test))
        lines.append(f"{folder}: {found.classes} classes, {found.train} train, {found.test} test")
        lines += [f"  {note}" for note in task.notes]
        if task.is_listed:
            absent = [path for path, _ in (*task.train, *(task.val or ()), *task.test) if not Path(path).is_file()]
            lines += _missing(absent)
            wrong += len(absent)
        if known is None:
            lines.append("  no published counts are known for a set of this name")
        else:
            differences = _differences(found._asdict(), known._asdict())
            lines += differences
            wrong += len(differences)
    return lines, wrong


def _differences(found: Mapping[str, int], published: Mapping[str, int]) -> list[str]:
    """A line for each number that is not the published one."""
    return [
        f"  {name}: {abs(want - found[name])} {'missing' if found[name] < want else 'too many'} ({found[name]} of {want})"
        for name, want in published.items()
        if found[name] != want
    ]


def _tasks(path: Path) -> list[tuple[Path, TaskData]]:
    """Return the tasks of folders with ``train/``, or of a folder of classes or a table, with the path of each."""
    folders = [path] if path.is_dir() and is_divided(path) else []
    if not folders and path.is_dir():
        folders = sorted(inner for inner in path.iterdir() if inner.is_dir() and is_divided(inner))
    return [(folder, read_folder(folder)) for folder in folders] or [(path, task) for task in find_tasks([path])]


def _check_lists(root: Path) -> tuple[list[str], int]:
    lines, wrong = [], 0
    for domain, known in DOMAINNET.items():
        for split in ("train", "test"):
            path = domainnet.lists_folder(root) / f"{domain}_{split}.txt"
            if not path.is_file():
                lines.append(f"{path.name}: missing")
                wrong += 1
                continue
            official = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest() == LIST_MD5[path.stem]
            samples = domainnet.read_list(path)
            absent = [name for name, _ in samples if not (root / name).is_file()]
            remark = "the official cleaned list"
            if not official:
                remark = f"not {remark} ({getattr(known, split)} images)"
            lines.append(f"{path.name}: {len(samples)} images, {remark}, {len(absent)} files missing")
            lines += _missing(absent)
            wrong += (not official) + len(absent)
    return lines, wrong


def _missing(names: Sequence[str]) -> list[str]:
    """Lines for the first of some missing files."""
    return [f"  missing: {name}" for name in names[:3]] + (["  …"] if len(names) > 3 else [])


def _compare_sizes(name: str, root: Path, splits: Mapping[str, Sequence]) -> list[str]:
    """The sizes of a dense benchmark's splits, and a line for each that is not the published one."""
    sizes = {split: len(samples) for split, samples in splits.items()}
    counts = ", ".join(f"{size} {split}" for split, size in sizes.items())
    return [f"{root}: {name}, {counts}", *_differences(sizes, DENSE.get(name, {}))]


def _check_protocol(name: str, root: Path) -> tuple[list[str], int]:
    """Read every file of the listed images; count missing files per column."""
    protocol = astmt_layout.PROTOCOLS[name]
    names = astmt_layout.read_names(root, protocol)
    lines = _compare_sizes(name, root, names)
    wrong = len(lines) - 1
    images = [image for own in names.values() for image in own]
    samples = [
        {column: astmt_layout.find(root, protocol, column, image) for column in protocol.files} for image in images
    ]
    for column in protocol.files:
        absent = [sample[column] for sample in samples if not sample[column].is_file()]
        wrong += len(absent)
        if absent:
            lines.append(f"  {column}: {len(absent)} of {len(samples)} files missing, the first is {absent[0]}")
    covered = astmt_layout.covered_classes(root)
    if "context" in protocol.files and covered is None:
        lines.append(f"  no db_info/{' and '.join(astmt_layout.CLASS_FILES)}: normals are used on every class")
    parts = [
        (sample, task)
        for sample in samples
        for task in protocol.tasks.values()
        if all(sample[column].is_file() for column in protocol.needed([task.name]))
    ]
    mistakes = mistakes_of(
        lambda part: astmt_layout.read_image(protocol, part[0], [part[1]], covered), parts, f"reading {root.name}"
    )
    found = dict.fromkeys(mistakes)  # one line per file, although several tasks may be read from it
    return [*lines, *found], wrong + len(found)


def _read_dense(layout: Layout, sample: Mapping[str, Path]) -> None:
    read_sample(layout, dict(zip(layout.columns, sample.values(), strict=True)), list(layout.tasks.values()))


def _check_dense(name: str, root: Path) -> tuple[list[str], int]:
    """Read every file in the lists of a dense benchmark."""
    splits = read_lists(root, layout_of(name))
    lines = _compare_sizes(name, root, splits)
    samples = {sample["image"]: sample for split in splits.values() for sample in split}
    layouts = [layout_of(name, classes) for classes in (2, 7, 19)] if name == "cityscapes" else [layout_of(name)]
    for layout in layouts:
        lines += mistakes_of(partial(_read_dense, layout), samples.values(), f"reading {root.name}")
    return lines, len(lines) - 1
