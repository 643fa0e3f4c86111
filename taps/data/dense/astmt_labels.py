"""Decoders of the labels of PASCAL-Context and NYUDv2, which are stored as images, ``.npy`` arrays and MATLAB files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from scipy.ndimage import laplace
from skimage.morphology import thin

from taps.data.dense.adashare_layout import distance, read_array, read_file
from taps.data.multi_label import IGNORE_INDEX
from taps.errors import UserError

#: class of persons in ``human_parts``
PERSON = 15
#: names of body parts -> class: 1 head, 2 torso, 3 upper arms, 4 lower arms, 5 upper legs, 6 lower legs; 0 is background
PARTS = {
    **dict.fromkeys(("hair", "head", "lear", "lebrow", "leye", "mouth", "nose", "rear", "rebrow", "reye"), 1),
    **dict.fromkeys(("neck", "torso"), 2),
    **dict.fromkeys(("luarm", "ruarm"), 3),
    **dict.fromkeys(("lhand", "llarm", "rhand", "rlarm"), 4),
    **dict.fromkeys(("luleg", "ruleg"), 5),
    **dict.fromkeys(("lfoot", "llleg", "rfoot", "rlleg"), 6),
}


@dataclass
class Files:
    """The files of one image.

    Attributes:
        paths: paths by column.
        shape: (H, W) of the image and its labels.
        covered: ids of the context classes that have normals; ``None``: all.
    """

    paths: Mapping[str, Path]
    shape: tuple[int, int]
    covered: frozenset[int] | None = None

    def array(self, column: str) -> np.ndarray:
        """A label as stored."""
        return read_array(self.paths[column], self.shape, "uifb")

    def flat(self, column: str) -> np.ndarray:
        """A label with one channel, (H, W)."""
        array = self.array(column)
        return array[..., 0] if array.ndim == 3 else array

    def checked(self, column: str, mask: np.ndarray) -> np.ndarray:
        """``mask``, an array of a MATLAB file, which has to be of the image's size."""
        if np.shape(mask) != self.shape:
            raise UserError(
                f"{self.paths[column]} holds a map of shape {np.shape(mask)}, its image has {self.shape[0]} × {self.shape[1]} "
                "pixels"
            )
        return np.asarray(mask)

    @cached_property
    def label_map(self) -> np.ndarray:
        """Ids of the context classes (H, W)."""
        content = read_file(self.paths["context"])
        if "LabelMap" not in content:
            raise UserError(f"{self.paths['context']} has no LabelMap")
        return self.checked("context", content["LabelMap"]).astype(np.int64)


def _many(cells) -> list:
    """The elements of a structure array, which SciPy reads as a dict if it has only one."""
    return [cells] if isinstance(cells, dict) else list(np.atleast_1d(cells)) if np.size(cells) else []


def person_parts(files: Files) -> np.ndarray:
    """Body parts of all persons (H, W); the whole map is unlabelled if no part is."""
    path = files.paths["parts"]
    labels, found = np.zeros(files.shape, np.int64), False
    try:
        objects = _many(read_file(path)["anno"]["objects"])
        people = [part for own in objects if own["class_ind"] == PERSON for part in _many(own["parts"])]
        parts = [(str(part["part_name"]), part["mask"]) for part in people]
    except (KeyError, TypeError, IndexError) as error:
        raise UserError(f"{path} does not hold anno.objects with class_ind and parts ({error})") from None
    for name, mask in parts:
        if name not in PARTS:
            raise UserError(f"{path} has a part {name!r}, which persons do not have")
        there = files.checked("parts", mask) > 0
        labels[there] = PARTS[name]
        found = found or bool(there.any())
    return labels if found else np.full(files.shape, IGNORE_INDEX, np.int64)


def class_edges(files: Files) -> np.ndarray:
    """Outlines of the context classes (1, H, W): pixels where the Laplacian of the class ids is not 0, thinned."""
    return thin(laplace(files.label_map, mode="mirror") != 0).astype(np.float32)[None]


def covered_normals(files: Files) -> np.ndarray:
    """:func:`normals`, without labels on classes that are not covered."""
    vectors = normals(files)
    if files.covered is None:
        return vectors
    return np.where(np.isin(files.label_map, sorted(files.covered)), vectors, np.float32("nan"))


def normals(files: Files) -> np.ndarray:
    """Unit normals (3, H, W), stored as bytes (n + 1) · 127.5 or as floats; no label where n is about 0."""
    path, array = files.paths["normals"], files.array("normals")
    if array.ndim != 3 or array.shape[2] != 3 or (array.dtype.kind != "f" and array.dtype != np.uint8):
        raise UserError(f"{path} holds {array.dtype} of shape {array.shape}; normals are uint8 with three channels")
    vectors = array.astype(np.float32)
    vectors = vectors if array.dtype.kind == "f" else vectors / 127.5 - 1.0
    length = np.linalg.norm(vectors, axis=2, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(length > 0.05, vectors / length, np.float32("nan")).transpose(2, 0, 1)


def depth(files: Files) -> np.ndarray:
    """Depth in metres (1, H, W), stored as 0 where it is missing."""
    array = files.array("depth")
    return distance(files.paths["depth"], array, array > 0)


def above_half(array: np.ndarray) -> np.ndarray:
    """A map in 0..255 or 0..1 as booleans."""
    return array > (127.5 if array.max(initial=0) > 1 else 0.5)
