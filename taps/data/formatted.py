"""The published formatted layouts of NYUv2, CityScapes and Tiny-Taskonomy, and that of the generated Scenes.

A root holds a JSON file with lists of samples by split; a sample is a list of paths in a fixed order of columns, relative
to the root. ``datasets/README.md`` has the trees and where to get them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from taps.data.dense import DenseData
from taps.data.shared import VOID, Task
from taps.errors import UserError, unknown

#: names of splits in the lists, and what they are called here
_SPLITS = {"train": "train", "val": "val", "test": "test", "train1": "weights", "train2": "policy"}
#: the published names of tasks
ALIASES = {
    "seg": "semseg", "sn": "normals", "normal": "normals", "keypoint": "keypoints", "edge": "edges", "sal": "saliency",
    "human_parts": "parts",
}  # fmt: skip


def read_array(path: Path, shape: tuple[int, ...] | None = None, kinds: str = "uif") -> np.ndarray:
    """A ``.npy`` or image file as an array of its own type.

    Args:
        path: the file; nothing is unpickled.
        shape: (H, W) that it must begin with.
        kinds: of numbers allowed: ``u`` and ``i`` whole, ``f`` with a fraction.

    Raises:
        UserError: if it is missing, damaged, of another size or of another kind of number.
    """
    if not path.is_file():
        raise UserError(f"{path} is listed and does not exist")
    try:
        if path.suffix == ".npy":
            array = np.load(path, allow_pickle=False)
        else:
            with Image.open(path) as image:
                array = np.array(image)
    except Exception as error:  # decoders raise almost anything on damaged files
        raise UserError(f"{path} cannot be read ({(str(error).splitlines() or [type(error).__name__])[0]})") from None
    if array.ndim < 1 + (shape is not None):
        raise UserError(f"{path} has {array.ndim} dimensions")
    if array.dtype.kind not in kinds:
        raise UserError(f"{path} holds {array.dtype}, which is not what this label is stored as")
    if shape is not None and array.shape[:2] != shape:
        raise UserError(f"{path} has {array.shape[0]} × {array.shape[1]} pixels, its image has {shape[0]} × {shape[1]}")
    return array


def class_ids(path: Path, array: np.ndarray, classes: int, void: int, shift: int = 0) -> np.ndarray:
    """Class ids with :data:`VOID` where there is none."""
    array = array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array
    if array.ndim != 2:
        raise UserError(f"{path} has {array.ndim} dimensions; a label map has two")
    values = array.astype(np.int64)
    if array.dtype.kind == "f" and not np.array_equal(values, array):
        raise UserError(f"{path} holds numbers that are no class ids")
    ids = np.where(values == void, VOID, values - shift)
    wrong = (ids != VOID) & ((ids < 0) | (ids >= classes))
    if wrong.any():
        raise UserError(
            f"{path} holds class {int(values[wrong][0])}; there are {classes} classes ({shift}–{classes - 1 + shift}) "
            f"and {void} for none"
        )
    if (ids == VOID).all():
        raise UserError(f"{path} has no labelled pixel")
    return ids


def distance(path: Path, array: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """A depth or disparity as (1, H, W) with NaN where it is not valid."""
    array = array[..., 0] if array.ndim == 3 else array
    valid = valid[..., 0] if valid.ndim == 3 else valid
    if not np.isfinite(array).all():
        raise UserError(f"{path} holds values that are not finite; a missing depth is stored as 0")
    if (array < 0).any():
        raise UserError(f"{path} holds a negative depth ({float(array.min()):g})")
    if not valid.any():
        raise UserError(f"{path} has no valid pixel")
    return np.where(valid, array, np.nan).astype(np.float32)[None]


def _unit(path: Path, array: np.ndarray) -> np.ndarray:
    """Normals stored as (n + 1) · 127.5 in three channels, (255, 255, 255) where there is none; of unit length."""
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise UserError(f"{path} holds {array.dtype} of shape {array.shape}; normals are uint8 with three channels")
    valid = array.min(2) < 255
    if not valid.any():
        raise UserError(f"{path} has no valid pixel")
    vectors = array.astype(np.float32) / 127.5 - 1.0
    length = np.linalg.norm(vectors, axis=2, keepdims=True)
    vectors = vectors / np.maximum(length, 1e-6)
    return np.where(valid[..., None], vectors, np.nan).transpose(2, 0, 1).astype(np.float32)


def _scaled(path: Path, array: np.ndarray, top: float) -> np.ndarray:
    """uint16 values in 0..top of their range, as -1..1 (Taskonomy's edges and keypoints)."""
    array = array[..., 0] if array.ndim == 3 else array
    if array.dtype.kind == "f" or array.max(initial=0) > 65535:
        raise UserError(f"{path} holds {array.dtype}; this map is stored as 16-bit whole numbers")
    scaled = np.clip(array.astype(np.float32) / 65536.0, 0.0, top) / top
    return (2.0 * scaled - 1.0)[None]


@dataclass(frozen=True)
class Layout:
    """How a benchmark lies on disk.

    Attributes:
        list_file: the JSON file with the lists.
        columns: what the paths of a sample are, in order.
        tasks: what can be predicted.
        decode: from a column's path and array to its labels; by task.
        crop, zoom: as in :class:`taps.data.dense.DenseData`.
        size: (H, W) that images and labels are brought to by nearest neighbour, as published; ``None`` as they are.
        masks: for a task, another column and the function of its array that says where the task has labels.
    """

    list_file: str
    columns: tuple[str, ...]
    tasks: Mapping[str, Task]
    decode: Mapping[str, Callable[[Path, np.ndarray], np.ndarray]]
    crop: int = 321
    zoom: tuple[float, float] = (1.0, 1.0)
    size: tuple[int, int] | None = None
    masks: Mapping[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] | None = None


def _tasks(*rows: tuple) -> dict[str, Task]:
    return {row[0]: Task(*row) for row in rows}


def _nyuv2_depth(path: Path, array: np.ndarray) -> np.ndarray:
    return distance(path, array, array > 3e-5)


NYUV2 = Layout(
    list_file="nyu_v2_3task.json",
    columns=("image", "semseg", "normals", "depth"),
    tasks=_tasks(("semseg", "classes", 40), ("normals", "normals", 3), ("depth", "depth", 1)),
    decode={
        "semseg": lambda path, array: class_ids(path, array, 40, 255),
        "normals": _unit,
        "depth": _nyuv2_depth,
    },
    crop=321,
    zoom=(0.5, 1.5),
)


def cityscapes(classes: int = 19) -> Layout:
    """CityScapes with 2, 7 or 19 classes.

    Raises:
        UserError: for another number.
    """
    columns = {2: "label2", 7: "label7", 19: "label19"}
    if classes not in columns:
        raise UserError(f"CityScapes has labels of 2, 7 or 19 classes, not {classes}")
    order = ["image", "depth", "label2", "label7", "label19"]
    order[order.index(columns[classes])] = "semseg"
    return Layout(
        list_file="cityscape.json",
        columns=tuple(order),
        tasks=_tasks(("semseg", "classes", classes, None, ("void",)), ("depth", "disparity", 1)),
        decode={
            "semseg": lambda path, array: class_ids(path, array, classes, -1),
            "depth": _nyuv2_depth,
        },
        crop=224,
        zoom=(0.5, 1.5),
    )


def _log_depth(path: Path, array: np.ndarray) -> np.ndarray:
    valid = array < 64500
    return distance(path, np.log1p(array.astype(np.float64)) / np.log(2.0**16), valid)


TASKONOMY = Layout(
    list_file="taskonomy.json",
    columns=("image", "semseg", "normals", "depth", "keypoints", "edges"),
    tasks=_tasks(
        ("semseg", "classes", 17, None, ("cross_entropy",)), ("normals", "normals", 3, None, ("cosine",)), ("depth", "map", 1),
        ("keypoints", "map", 1), ("edges", "map", 1),
    ),
    decode={
        "semseg": lambda path, array: class_ids(path, array, 17, 0, shift=1),
        "normals": _unit,
        "depth": _log_depth,
        "keypoints": lambda path, array: _scaled(path, array, 0.005),
        "edges": lambda path, array: _scaled(path, array, 0.08),
    },
    crop=224,
    size=(256, 256),
    masks={"normals": ("depth", lambda array: array < 64500)},
)  # fmt: skip

SCENE_CLASSES = ("floor", "ceiling", "wall", "sphere", "box", "cylinder", "cone")
SCENES = Layout(
    list_file="scenes.json",
    columns=("image", "semseg", "normals", "depth", "edges", "keypoints"),
    tasks=_tasks(
        ("semseg", "classes", len(SCENE_CLASSES)), ("normals", "normals", 3), ("depth", "depth", 1), ("edges", "map", 1),
        ("keypoints", "map", 1),
    ),
    decode={
        "semseg": lambda path, array: class_ids(path, array, len(SCENE_CLASSES), 255),
        "normals": _unit,
        "depth": _nyuv2_depth,
        "edges": lambda path, array: _scaled(path, array, 1.0),
        "keypoints": lambda path, array: _scaled(path, array, 1.0),
    },
    crop=64,
)  # fmt: skip


def read_lists(root: Path, layout: Layout) -> dict[str, list[dict[str, Path]]]:
    """The samples of each split: paths by column.

    Raises:
        UserError: if the list file is missing, damaged, or has a wrong entry.
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
        raise UserError(
            f"{path}: {next(iter(shared)).name} is in both 'train1' and 'train2', which have to be disjoint"
        )
    return splits


def open_formatted(name: str, root: Path, layout: Layout) -> DenseData:
    """A benchmark from its folder.

    Raises:
        UserError: if the lists are wrong or a listed image is missing.
    """
    splits = read_lists(root, layout)
    for split in splits.values():
        for sample in split:
            for path in sample.values():
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
    """A sample's image and the labels of some tasks, in the encoding of :mod:`taps.data.dense`.

    Raises:
        UserError: if a file is missing, damaged, or holds what it should not.
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
        mask = (layout.masks or {}).get(task.name)
        if mask is not None:
            valid = mask[1](read_array(sample[mask[0]], image.shape[:2]))
            label = np.where(valid, label, np.float32("nan"))
        arrays[task.name] = label
    if layout.size is not None:
        height, width = layout.size
        rows, columns = np.arange(height) * image.shape[0] // height, np.arange(width) * image.shape[1] // width
        arrays = {name: _at(array, rows, columns, name == "image") for name, array in arrays.items()}
    return arrays


def _at(array: np.ndarray, rows: np.ndarray, columns: np.ndarray, channels_last: bool) -> np.ndarray:
    """The pixels in some rows and columns."""
    return np.ascontiguousarray(array[rows][:, columns] if channels_last else array[..., rows, :][..., columns])


def layout_of(name: str, classes: int = 19) -> Layout:
    """The layout of a benchmark by name.

    Raises:
        UserError: for an unknown one.
    """
    layouts = {"nyuv2": NYUV2, "taskonomy": TASKONOMY, "scenes": SCENES, "cityscapes": None}
    if name not in layouts:
        raise unknown("dense benchmark", name, layouts)
    return cityscapes(classes) if name == "cityscapes" else layouts[name]
