"""NYUv2, CityScapes and Tiny-Taskonomy in the layouts that AdaShare (NeurIPS 2020) published, and the generated Scenes.

A root holds a JSON file with lists of samples by split; a sample is a list of paths relative to the root, in a fixed order of
columns. ``datasets/README.md`` shows the trees and says where to get them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from taps.data.dense.dataset import LOG_RANGE, DenseData
from taps.data.multi_label import IGNORE_INDEX, Task
from taps.errors import UserError, first_line, unknown

#: names of splits in the lists -> names of splits in the library
_SPLITS = {"train": "train", "val": "val", "test": "test", "train1": "weights", "train2": "policy"}
SCENE_CLASSES = ("floor", "ceiling", "wall", "sphere", "box", "cylinder", "cone")


def read_file(path: Path) -> Any:
    """The contents of an ``.npy``, MATLAB (version 5) or image file; nothing is unpickled.

    Returns:
        An array of the file's own type; for a MATLAB file a dict, with structures as dicts.

    Raises:
        UserError: if the file is missing or damaged.
    """
    if not path.is_file():
        raise UserError(f"{path} is listed and does not exist")
    try:
        if path.suffix == ".npy":
            return np.load(path, allow_pickle=False)
        if path.suffix == ".mat":
            from scipy.io import loadmat

            return loadmat(path, simplify_cells=True)
        with Image.open(path) as image:
            return np.array(image)
    except Exception as error:  # decoders raise almost anything on damaged files
        raise UserError(f"{path} cannot be read ({first_line(error)})") from None


def read_array(path: Path, shape: tuple[int, ...] | None = None, kinds: str = "uif") -> np.ndarray:
    """An ``.npy`` or image file as an array of its own type.

    Args:
        path: the file.
        shape: (H, W), the array's required first dimensions.
        kinds: allowed kinds of dtypes: ``u``, ``i``, ``f``, ``b``.

    Raises:
        UserError: if the file is missing or damaged, or the array has another size or dtype.
    """
    array = read_file(path)
    if array.ndim < 1 + (shape is not None):
        raise UserError(f"{path} has {array.ndim} dimensions")
    if array.dtype.kind not in kinds:
        raise UserError(f"{path} holds {array.dtype}, which this label is not stored as")
    if shape is not None and array.shape[:2] != shape:
        raise UserError(f"{path} has {array.shape[0]} × {array.shape[1]} pixels, its image has {shape[0]} × {shape[1]}")
    return array


def class_ids(path: Path, array: np.ndarray, classes: int, missing: int, shift: int = 0) -> np.ndarray:
    """Class ids (H, W) with :data:`IGNORE_INDEX` for missing labels.

    Args:
        path: the file, for messages.
        array: (H, W) or (H, W, 1), class ids plus ``shift``.
        classes: number of classes.
        missing: value of pixels without a label.
        shift: stored value of class 0.
    """
    array = array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array
    if array.ndim != 2:
        raise UserError(f"{path} has {array.ndim} dimensions; a label map has two")
    values = array.astype(np.int64)
    if array.dtype.kind == "f" and not np.array_equal(values, array):
        raise UserError(f"{path} holds numbers that are not class ids")
    ids = np.where(values == missing, IGNORE_INDEX, values - shift)
    wrong = (ids != IGNORE_INDEX) & ((ids < 0) | (ids >= classes))
    if wrong.any():
        raise UserError(
            f"{path} holds class {int(values[wrong][0])}; there are {classes} classes ({shift}–{classes - 1 + shift}) "
            f"and {missing} for none"
        )
    if (ids == IGNORE_INDEX).all():
        raise UserError(f"{path} has no labelled pixel")
    return ids


def distance(path: Path, array: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """A depth or disparity map (H, W) or (H, W, 1) as (1, H, W) float32, NaN where it is not valid."""
    array, valid = (own[..., 0] if own.ndim == 3 else own for own in (array, valid))
    if not np.isfinite(array).all():
        raise UserError(f"{path} holds values that are not finite; a missing depth is stored as 0")
    if (array < 0).any():
        raise UserError(f"{path} holds a negative depth ({float(array.min()):g})")
    if not valid.any():
        raise UserError(f"{path} has no valid pixel")
    return np.where(valid, array, np.nan).astype(np.float32)[None]


def _depth(path: Path, array: np.ndarray) -> np.ndarray:
    return distance(path, array, array > 3e-5)


def _log_depth(path: Path, array: np.ndarray) -> np.ndarray:
    return distance(path, np.log1p(array.astype(np.float64)) / LOG_RANGE, array < 64500)


def _normals(path: Path, array: np.ndarray) -> np.ndarray:
    """Unit normals (3, H, W) from (n + 1) · 127.5 in three channels, with (255, 255, 255) for missing ones."""
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise UserError(f"{path} holds {array.dtype} of shape {array.shape}; normals are uint8 with three channels")
    valid = array.min(2) < 255
    if not valid.any():
        raise UserError(f"{path} has no valid pixel")
    vectors = array.astype(np.float32) / 127.5 - 1.0
    vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=2, keepdims=True), 1e-6)
    return np.where(valid[..., None], vectors, np.nan).transpose(2, 0, 1).astype(np.float32)


def _classes(count: int, missing: int, shift: int = 0) -> Callable[[Path, np.ndarray], np.ndarray]:
    return lambda path, array: class_ids(path, array, count, missing, shift)


def _scaled(top: float) -> Callable[[Path, np.ndarray], np.ndarray]:
    """A decoder of uint16 maps that scales 0..``top`` of their range to -1..1 (Taskonomy's edges and keypoints)."""

    def decode(path: Path, array: np.ndarray) -> np.ndarray:
        array = array[..., 0] if array.ndim == 3 else array
        if array.dtype.kind == "f" or array.max(initial=0) > 65535:
            raise UserError(f"{path} holds {array.dtype}; this map is stored as 16-bit whole numbers")
        scaled = np.clip(array.astype(np.float32) / 65536.0, 0.0, top) / top
        return (2.0 * scaled - 1.0)[None]

    return decode


@dataclass(frozen=True)
class Layout:
    """Files of a benchmark.

    Attributes:
        list_file: the JSON file with the lists.
        columns: contents of a sample's paths, in order.
        tasks: all tasks by name.
        decode: by task, a function from a column's path and array to labels.
        crop, zoom: as in :class:`taps.data.dense.dataset.DenseData`.
        size: (H, W) that images and labels are resized to by nearest neighbour, as published; ``None``: their own size.
        masks: by task, another column and a function from its array to a mask of the task's labelled pixels.
    """

    list_file: str
    columns: tuple[str, ...]
    tasks: Mapping[str, Task]
    decode: Mapping[str, Callable[[Path, np.ndarray], np.ndarray]]
    crop: int = 321
    zoom: tuple[float, float] = (1.0, 1.0)
    size: tuple[int, int] | None = None
    masks: Mapping[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] = field(default_factory=dict)


def _tasks(*rows: tuple) -> dict[str, Task]:
    return {row[0]: Task(*row) for row in rows}


NYUV2 = Layout(
    list_file="nyu_v2_3task.json",
    columns=("image", "semseg", "normals", "depth"),
    tasks=_tasks(("semseg", "classes", 40), ("normals", "normals", 3), ("depth", "depth", 1)),
    decode={"semseg": _classes(40, 255), "normals": _normals, "depth": _depth},
    zoom=(0.5, 1.5),
)
TASKONOMY = Layout(
    list_file="taskonomy.json",
    columns=("image", "semseg", "normals", "depth", "keypoints", "edges"),
    tasks=_tasks(
        ("semseg", "classes", 17, None, ("cross_entropy",)), ("normals", "normals", 3, None, ("cosine",)),
        ("depth", "log_depth", 1), ("keypoints", "map", 1), ("edges", "map", 1),
    ),
    decode={
        "semseg": _classes(17, 0, shift=1), "normals": _normals, "depth": _log_depth, "keypoints": _scaled(0.005),
        "edges": _scaled(0.08),
    },
    crop=224,
    zoom=(0.5, 1.5),
    size=(256, 256),
    masks={"normals": ("depth", lambda array: array < 64500)},
)  # fmt: skip
SCENES = Layout(
    list_file="scenes.json",
    columns=("image", "semseg", "normals", "depth", "edges", "keypoints"),
    tasks=_tasks(
        ("semseg", "classes", len(SCENE_CLASSES)), ("normals", "normals", 3), ("depth", "depth", 1), ("edges", "map", 1),
        ("keypoints", "map", 1),
    ),
    decode={
        "semseg": _classes(len(SCENE_CLASSES), 255), "normals": _normals, "depth": _depth, "edges": _scaled(1.0),
        "keypoints": _scaled(1.0),
    },
    crop=64,
)  # fmt: skip


def cityscapes(classes: int = 19) -> Layout:
    """CityScapes with 2, 7 or 19 classes.

    Raises:
        UserError: for another number of classes.
    """
    if classes not in (2, 7, 19):
        raise UserError(f"CityScapes has labels of 2, 7 or 19 classes, not {classes}")
    columns = ("image", "depth", "label2", "label7", "label19")
    return Layout(
        list_file="cityscape.json",
        columns=tuple("semseg" if column == f"label{classes}" else column for column in columns),
        tasks=_tasks(("semseg", "classes", classes, None, ("void",)), ("depth", "disparity", 1)),
        decode={"semseg": _classes(classes, -1), "depth": _depth},
        crop=224,
        zoom=(0.5, 1.5),
    )


def layout_of(name: str, classes: int = 19) -> Layout:
    """The layout of a benchmark; ``classes`` is for CityScapes.

    Raises:
        UserError: for an unknown name.
    """
    layouts = {"nyuv2": NYUV2, "taskonomy": TASKONOMY, "scenes": SCENES, "cityscapes": None}
    if name not in layouts:
        raise unknown("dense benchmark", name, layouts)
    return layouts[name] or cityscapes(classes)


def read_lists(root: Path, layout: Layout) -> dict[str, list[dict[str, Path]]]:
    """The samples of each split, as mappings from columns to paths.

    Raises:
        UserError: if the list file is missing or damaged, or has a wrong entry.
    """
    path = root / layout.list_file
    if not path.is_file():
        raise UserError(f"{path} does not exist; datasets/README.md says where the data comes from")
    try:
        lists = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(lists, dict) or not all(isinstance(entries, list) for entries in lists.values()):
        raise UserError(f"{path} does not hold lists of samples by split")
    for name in ("train", "test"):
        if not lists.get(name):
            raise UserError(f"{path} has no list {name!r}")
    splits: dict[str, list[dict[str, Path]]] = {}
    for name, own in _SPLITS.items():
        for number, entry in enumerate(lists.get(name, ())):
            if not isinstance(entry, list) or not all(isinstance(part, str) for part in entry):
                raise UserError(f"{path}: entry {number} of {name!r} is not a list of paths")
            if len(entry) != len(layout.columns):
                raise UserError(
                    f"{path}: entry {number} of {name!r} has {len(entry)} paths instead of {len(layout.columns)} "
                    f"({', '.join(layout.columns)})"
                )
            parts = [root / part for part in entry]
            splits.setdefault(own, []).append(dict(zip(layout.columns, parts, strict=True)))
    shared = {s["image"] for s in splits.get("weights", ())} & {s["image"] for s in splits.get("policy", ())}
    if shared:
        raise UserError(f"{path}: {min(shared).name} is in both 'train1' and 'train2', which have to be disjoint")
    return splits


def open_formatted(name: str, root: Path, layout: Layout) -> DenseData:
    """Open a benchmark's folder.

    Raises:
        UserError: if the lists are wrong or a listed file is missing.
    """
    splits = read_lists(root, layout)
    for path in (path for split in splits.values() for sample in split for path in sample.values()):
        if not path.exists():
            raise UserError(f"{path} is listed in {layout.list_file} and does not exist")
    tasks = dict(layout.tasks)
    prior = root / "semseg_prior_factor.npy"
    if prior.is_file() and "semseg" in tasks:
        weights = read_array(prior, kinds="f")
        channels = tasks["semseg"].channels
        if weights.shape != (channels,) or not (weights > 0).all():
            raise UserError(f"{prior} has shape {weights.shape}; it should hold {channels} weights above 0")
        tasks["semseg"] = replace(tasks["semseg"], class_weights=tuple(weights.tolist()))

    def read(sample: Mapping[str, Path], wanted: Sequence[Task]) -> dict[str, np.ndarray]:
        return read_sample(layout, sample, wanted)

    return DenseData(name, tasks, splits, read, layout.crop, layout.zoom)


def read_sample(layout: Layout, sample: Mapping[str, Path], wanted: Sequence[Task]) -> dict[str, np.ndarray]:
    """A sample's image and the labels of some tasks, in the encoding of :mod:`taps.data.dense.dataset`.

    Raises:
        UserError: if a file is missing, damaged or not in the expected format.
    """
    image = read_array(sample["image"])
    if image.ndim != 3 or image.shape[2] not in (3, 4):
        raise UserError(f"{sample['image']} has shape {image.shape}; an image has three channels")
    if image.dtype != np.uint8 and image.dtype.kind != "f":
        raise UserError(f"{sample['image']} holds {image.dtype}; an image is uint8, or numbers in 0..1")
    image = image[..., :3]
    arrays = {"image": np.ascontiguousarray(image if image.dtype == np.uint8 else image.astype(np.float32) * 255.0)}
    for task in wanted:
        path = sample[task.name]
        label = layout.decode[task.name](path, read_array(path, image.shape[:2]))
        if task.name in layout.masks:
            column, is_valid = layout.masks[task.name]
            label = np.where(is_valid(read_array(sample[column], image.shape[:2])), label, np.float32("nan"))
        arrays[task.name] = label
    if layout.size is not None:
        height, width = layout.size
        rows = (np.arange(height) * image.shape[0] // height)[:, None]
        columns = np.arange(width) * image.shape[1] // width
        arrays = {
            name: np.ascontiguousarray(array[rows, columns] if name == "image" else array[..., rows, columns])
            for name, array in arrays.items()
        }
    return arrays
