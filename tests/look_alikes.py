"""Small look-alikes of PASCAL-Context and NYUDv2: rendered Scenes in the file formats of those data sets.

In the look-alike of PASCAL-Context, cylinders are persons with a head, a torso and legs; spheres, boxes and cones are
other classes; and the foreground is salient.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat
from skimage.morphology import thin

from taps.data.dense.adashare_layout import SCENE_CLASSES
from taps.data.dense.astmt_labels import PERSON
from taps.data.dense.astmt_layout import CLASS_FILES
from taps.data.generated.scenes import render
from taps.data.multi_label import IGNORE_INDEX
from taps.storage.files import write_json

SIZE, TRAIN, VAL = (48, 64), 8, 3
#: of the classes of Scenes, in order: class of VOC, id of the context class, its name
VOC = (0, 0, 0, 20, 9, PERSON, 5)
CONTEXT = (158, 59, 440, 427, 72, 284, 34)
_NAMES = ("floor", "ceiling", "wall", "tvmonitor", "chair", "person", "bottle")
#: parts of a person from top to bottom
_BODY = ("head", "neck", "torso", "luarm", "rlarm", "luleg", "rlleg", "lfoot")


def rendered() -> list[dict[str, np.ndarray]]:
    """Return the scenes of a look-alike, with those of ``train`` first."""
    random = np.random.default_rng(0)
    return [render(random, SIZE, 0.5) for _ in range(TRAIN + VAL)]


def make_look_alike(root: Path, layout: str) -> None:
    """Write a look-alike of ``pascal_context`` or ``nyud`` into ``root``."""
    write, lists = {"pascal_context": (_pascal, "ImageSets/Context"), "nyud": (_nyud, "gt_sets")}[layout]
    names = [f"{number + 1:06d}" for number in range(TRAIN + VAL)]
    for name, scene in zip(names, rendered(), strict=True):
        write(root, name, scene)
    (root / lists).mkdir(parents=True)
    for split, own in (("train", names[:TRAIN]), ("val", names[TRAIN:])):
        (root / lists / f"{split}.txt").write_text("\n".join(own) + "\n", encoding="utf-8")
    if layout == "pascal_context":
        nyu, context = CLASS_FILES
        write_json(root / "db_info" / nyu, {"unknown": 0, "floor": 1, "ceiling": 2, "wall": 3, "chair": 4})
        write_json(root / "db_info" / context, dict(zip(_NAMES, CONTEXT, strict=True)))


def anno(name: str, classes: np.ndarray) -> dict:
    """Return the structure ``anno`` of a ``human_parts`` file: all objects, and the parts of persons from top to bottom."""
    objects = []
    for own in range(3, len(SCENE_CLASSES)):
        mask = classes == own
        if mask.any():
            parts = _structures("part_name", "mask", rows=_body(mask)) if VOC[own] == PERSON else np.zeros((0, 0))
            objects.append((_NAMES[own], float(VOC[own]), mask.astype(np.uint8), parts))
    return {"imname": name, "objects": _structures("class", "class_ind", "mask", "parts", rows=objects)}


def _body(mask: np.ndarray) -> list[tuple]:
    rows = np.flatnonzero(mask.any(1))
    bands = (np.arange(mask.shape[0]) - rows[0]) * len(_BODY) // (rows[-1] + 1 - rows[0])
    parts = [(name, (mask & (bands == band)[:, None]).astype(np.uint8)) for band, name in enumerate(_BODY)]
    return [(name, own) for name, own in parts if own.any()]


def _structures(*fields: str, rows: Sequence[tuple]) -> np.ndarray:
    """Return a MATLAB structure array (1, N)."""
    array = np.zeros((1, len(rows)), [(field, object) for field in fields])
    for index, row in enumerate(rows):
        array[0, index] = row
    return array


def _save(path: Path, content, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, content, allow_pickle=False)
    elif path.suffix == ".mat":
        savemat(path, content, do_compression=True)
    else:
        Image.fromarray(content).save(path, **options)


def _encoded(normals: np.ndarray) -> np.ndarray:
    """Return (n + 1) · 127.5 as bytes; a missing normal is a vector of about 0."""
    return ((np.nan_to_num(normals) + 1) * 127.5).round().astype(np.uint8)


def _looked_up(classes: np.ndarray, values: Sequence[int], missing: int) -> np.ndarray:
    table = np.full(256, missing, np.int64)
    table[: len(values)] = values
    return table[classes]


def _pascal(root: Path, name: str, scene: dict[str, np.ndarray]) -> None:
    classes = scene["semseg"]
    salient = (classes > 2) & (classes != IGNORE_INDEX)
    folder = "VOC12" if int(name) % 2 else "pascal-context"
    _save(root / f"JPEGImages/{name}.jpg", scene["image"], quality=95)
    _save(root / f"semseg/{folder}/{name}.png", _looked_up(classes, VOC, IGNORE_INDEX).astype(np.uint8))
    _save(root / f"normals_distill/{name}.png", _encoded(scene["normals"]))
    _save(root / f"sal_distill/{name}.png", np.where(salient, 230, 20).astype(np.uint8))
    _save(root / f"human_parts/{name}.mat", {"anno": anno(name, classes)})
    context = _looked_up(classes, CONTEXT, 0).astype(np.uint16)
    _save(root / f"pascal-context/trainval/{name}.mat", {"LabelMap": context})


def _nyud(root: Path, name: str, scene: dict[str, np.ndarray]) -> None:
    classes = np.where(scene["semseg"] == IGNORE_INDEX, 0, 5 * scene["semseg"] + 1)
    _save(root / f"images/{name}.png", scene["image"])
    _save(root / f"segmentation/{name}.png", classes.astype(np.uint8))
    _save(root / f"depth/{name}.npy", scene["depth"])
    _save(root / f"normals/{name}.png", _encoded(scene["normals"]))
    _save(root / f"edge/{name}.png", np.where(thin(scene["edges"] == 1.0), 255, 0).astype(np.uint8))
