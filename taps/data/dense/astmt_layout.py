"""PASCAL-Context and NYUDv2 as multi-task benchmarks, in the layout of ASTMT (CVPR 2019), which ATRC and InvPT share.

Text lists name the images of ``train`` and ``val``; the labels of an image are files of the same name in one folder per kind.
There is no test list: ``val`` is used for testing, and validation samples are taken from ``train``. ``datasets/README.md``
shows the trees.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from taps.data.dense import astmt_labels
from taps.data.dense.adashare_layout import class_ids, read_array
from taps.data.dense.astmt_labels import Files
from taps.data.dense.dataset import DenseData
from taps.data.multi_label import IGNORE_INDEX, Task
from taps.errors import UserError, check_known
from taps.storage.files import read_json

#: class names of NYUv2 and PASCAL-Context; normals are limited to classes that both have
CLASS_FILES = ("nyu_classes.json", "context_classes.json")


@dataclass(frozen=True)
class Protocol:
    """Files and tasks of a benchmark.

    Attributes:
        lists: file with the names of each split's images.
        files: by column, possible paths of an image's file with ``{}`` for its name; the first that exists is used.
        tasks: all tasks by name.
        columns: columns of the tasks that are not read from the column of their name alone.
        decode: by task, a function from an image's files to labels.
        crop: (height, width) of training crops, and smallest size in evaluation.
    """

    lists: Mapping[str, str]
    files: Mapping[str, tuple[str, ...]]
    tasks: Mapping[str, Task]
    columns: Mapping[str, tuple[str, ...]]
    decode: Mapping[str, Callable[[Files], np.ndarray]]
    crop: tuple[int, int]

    def needed(self, tasks: Iterable[str]) -> list[str]:
        """The columns of the image and of some tasks."""
        names = ["image", *(column for task in tasks for column in self.columns.get(task, (task,)))]
        return list(dict.fromkeys(names))


def _tasks(*tasks: Task) -> dict[str, Task]:
    return {task.name: task for task in tasks}


_EDGE_WEIGHT = 0.95 / 0.05
PROTOCOLS = {
    "pascal_context": Protocol(
        lists={"train": "ImageSets/Context/train.txt", "test": "ImageSets/Context/val.txt"},
        files={
            "image": ("JPEGImages/{}.jpg",),
            "semseg": ("semseg/VOC12/{}.png", "semseg/pascal-context/{}.png"),
            "parts": ("human_parts/{}.mat",),
            "saliency": ("sal_distill/{}.png",),
            "normals": ("normals_distill/{}.png",),
            "context": ("pascal-context/trainval/{}.mat",),
        },
        tasks=_tasks(
            Task("semseg", "classes", 21, published=("every_class",), headline=("miou",)),
            Task("parts", "classes", 7, published=("every_class",), headline=("miou",)),
            Task("saliency", "saliency", 2, headline=("max_f",)),
            Task("normals", "normals", 3, published=("exact",), loss="normals_l1", headline=("mean_angle",)),
            Task("edges", "edges", 1, positive_weight=_EDGE_WEIGHT, headline=("ods_f",), tolerance=0.0075),
        ),
        columns={"normals": ("normals", "context"), "edges": ("context",)},
        decode={
            "semseg": lambda files: class_ids(files.paths["semseg"], files.array("semseg"), 21, IGNORE_INDEX),
            "parts": astmt_labels.person_parts,
            "saliency": lambda files: astmt_labels.above_half(files.flat("saliency")).astype(np.int64),
            "normals": astmt_labels.covered_normals,
            "edges": astmt_labels.class_edges,
        },
        crop=(512, 512),
    ),
    "nyud": Protocol(
        lists={"train": "gt_sets/train.txt", "test": "gt_sets/val.txt"},
        files={
            "image": ("images/{}.png", "images/{}.jpg"),
            "semseg": ("segmentation/{}.png",),
            "depth": ("depth/{}.npy",),
            "normals": ("normals/{}.png", "normals/{}.npy"),
            "edges": ("edge/{}.png", "edge/{}.npy"),
        },
        tasks=_tasks(
            Task("semseg", "classes", 40, published=("every_class",), headline=("miou",)),
            Task("depth", "depth", 1, published=("exact",), headline=("rmse",)),
            Task("normals", "normals", 3, published=("exact",), loss="normals_l1", headline=("mean_angle",)),
            Task("edges", "edges", 1, positive_weight=_EDGE_WEIGHT, headline=("ods_f",), tolerance=0.011),
        ),
        columns={},
        decode={
            "semseg": lambda files: class_ids(files.paths["semseg"], files.array("semseg"), 40, 0, shift=1),
            "depth": astmt_labels.depth,
            "normals": astmt_labels.normals,
            "edges": lambda files: astmt_labels.above_half(files.flat("edges")).astype(np.float32)[None],
        },
        crop=(448, 576),
    ),
}


def protocol_of(root: Path) -> str | None:
    """The benchmark whose lists are in a folder, if any."""
    found = (name for name, protocol in PROTOCOLS.items() if (root / protocol.lists["train"]).is_file())
    return next(found, None)


def read_names(root: Path, protocol: Protocol) -> dict[str, list[str]]:
    """Names of each split's images.

    Raises:
        UserError: if a list is missing or empty, or an image is in both.
    """
    names: dict[str, list[str]] = {}
    for split, file in protocol.lists.items():
        path = root / file
        if not path.is_file():
            raise UserError(f"{path} does not exist; datasets/README.md says where the data comes from")
        try:
            names[split] = path.read_text(encoding="utf-8").split()
        except UnicodeDecodeError as error:
            raise UserError(f"{path} cannot be read ({error})") from None
        if not names[split]:
            raise UserError(f"{path} lists no image")
    both = set(names["train"]) & set(names["test"])
    if both:
        raise UserError(f"{min(both)} is in {protocol.lists['train']} and in {protocol.lists['test']} of {root}")
    return names


def find(root: Path, protocol: Protocol, column: str, name: str) -> Path:
    """Path of an image's file of a column, whether or not it exists."""
    places = [root / place.format(name) for place in protocol.files[column]]
    return next((path for path in places if path.is_file()), places[0])


def covered_classes(root: Path) -> frozenset[int] | None:
    """Ids of the context classes that NYUv2 has too, and of ``tvmonitor``; ``None`` without the files of class names.

    The files are searched in ``db_info/`` and ``data/db_info/`` of the root: names of NYUv2's classes, and context ids by name.

    Raises:
        UserError: if a file does not hold names or ids.
    """
    for folder in (root / "db_info", root / "data" / "db_info"):
        nyu, context = (folder / name for name in CLASS_FILES)
        if nyu.is_file() and context.is_file():
            ids = read_json(context)
            if not all(isinstance(own, int) for own in ids.values()):
                raise UserError(f"{context} does not hold an id for each class name")
            try:
                names = json.loads(nyu.read_text(encoding="utf-8"))  # a list, or an object whose keys are the names
                shared = {*names, "tvmonitor"} - {"unknown"}
            except (OSError, ValueError, TypeError) as error:
                raise UserError(f"{nyu} does not hold class names ({error})") from None
            return frozenset(own for name, own in ids.items() if name in shared)
    return None


def read_image(protocol: Protocol, sample: Mapping[str, Path], wanted: Sequence[Task], covered: frozenset[int] | None):
    """An image and the labels of some tasks, in the encoding of :mod:`taps.data.dense.dataset`.

    Raises:
        UserError: if a file is missing, damaged or not in the expected format.
    """
    image = read_array(sample["image"], kinds="u")
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise UserError(f"{sample['image']} holds {image.dtype} of shape {image.shape}; an image has three channels")
    files = Files(sample, image.shape[:2], covered)
    return {"image": image, **{task.name: protocol.decode[task.name](files) for task in wanted}}


def open_protocol(name: str, root: Path, tasks: Sequence[str] | None = None) -> DenseData:
    """Open a benchmark's folder.

    Args:
        name: a key of :data:`PROTOCOLS`.
        root: the folder.
        tasks: the tasks, whose files have to exist; all by default.

    Raises:
        UserError: for an unknown task, a wrong list or a missing file.
    """
    protocol = PROTOCOLS[name]
    check_known(f"task of benchmark {name}", tasks or (), protocol.tasks)
    columns = protocol.needed(tasks or protocol.tasks)
    splits = {
        split: [{column: find(root, protocol, column, image) for column in columns} for image in images]
        for split, images in read_names(root, protocol).items()
    }
    for split, samples in splits.items():
        for sample in samples:
            for path in sample.values():
                if not path.is_file():
                    raise UserError(f"{path} belongs to an image of {protocol.lists[split]} and does not exist")
    covered, notes = None, ()
    if "normals" in columns and "context" in columns:
        covered = covered_classes(root)
        if covered is None:
            count = sum(len(samples) for samples in splits.values())
            files = " and ".join(CLASS_FILES)
            notes = (f"normals of {count} images are used on every class: {root} has no db_info/{files}",)

    def read(sample: Mapping[str, Path], wanted: Sequence[Task]) -> dict[str, np.ndarray]:
        return read_image(protocol, sample, wanted, covered)

    return DenseData(
        name,
        protocol.tasks,
        splits,
        read,
        crop=protocol.crop,
        zoom=(0.5, 2.0),
        varied=("semseg", 0.75),
        distort=True,
        published_resize="bilinear",
        padded=True,
        notes=notes,
    ).choose(list(tasks or protocol.tasks))
