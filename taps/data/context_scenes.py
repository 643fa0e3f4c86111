"""Small look-alikes of PASCAL-Context and NYUDv2: rendered Scenes in the files that those data sets have.

``python -m taps.data.context_scenes FOLDER --layout nyud`` writes one. They try out what reads and trains on the real ones; what
is learned on them means nothing. In the look-alike of PASCAL-Context cylinders are persons with a head, a torso and
legs, spheres, boxes and cones other classes, and the foreground is salient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from taps.arguments import Parser, number
from taps.commands import run
from taps.data.context import CLASS_FILES
from taps.data.context_labels import PERSON
from taps.data.formatted import SCENE_CLASSES
from taps.data.generated import make_tree
from taps.data.scenes import render
from taps.data.shared import VOID
from taps.data.thinning import thin
from taps.errors import UserError, unknown
from taps.files import write_json

_VERSION = 1
#: of the scenes' classes, in their order: class of VOC, id and name of the context class
_VOC = (0, 0, 0, 20, 9, PERSON, 5)
_CONTEXT = (158, 59, 440, 427, 72, 284, 34)
_NAMES = ("floor", "ceiling", "wall", "tvmonitor", "chair", "person", "bottle")
#: names of a person's parts from top to bottom
_BODY = ("head", "neck", "torso", "luarm", "rlarm", "luleg", "rlleg", "lfoot")


@dataclass(frozen=True)
class Recipe:
    """What look-alike is made.

    Attributes:
        layout: ``pascal_context`` or ``nyud``.
        size: (height, width) in pixels.
        train, val: number of images.
        seed: of everything.
    """

    layout: str = "nyud"
    size: tuple[int, int] = (96, 128)
    train: int = 24
    val: int = 8
    seed: int = 0


def _save(path: Path, array: np.ndarray, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, array, allow_pickle=False)
    else:
        Image.fromarray(array).save(path, **options)


def _encoded(normals: np.ndarray) -> np.ndarray:
    """(n + 1) · 127.5 in bytes; no normal is a vector of about 0."""
    return ((np.nan_to_num(normals) + 1) * 127.5).round().astype(np.uint8)


def _looked_up(classes: np.ndarray, values: Sequence[int], missing: int) -> np.ndarray:
    table = np.full(256, missing, np.int64)
    table[: len(values)] = values
    return table[classes]


def anno(name: str, classes: np.ndarray) -> dict:
    """The structure ``anno`` of a file of ``human_parts``: every class of objects, and the parts of persons from top to bottom.

    Args:
        name: of the image.
        classes: (H, W), those of Scenes.
    """
    objects = []
    for own in range(3, len(SCENE_CLASSES)):
        mask = classes == own
        if mask.any():
            parts = _structures("part_name", "mask", rows=_body(mask)) if _VOC[own] == PERSON else np.zeros((0, 0))
            objects.append((_NAMES[own], float(_VOC[own]), mask.astype(np.uint8), parts))
    return {"imname": name, "objects": _structures("class", "class_ind", "mask", "parts", rows=objects)}


def _body(mask: np.ndarray) -> list[tuple]:
    """Bands of a mask from top to bottom, each with the name of a part."""
    rows = np.flatnonzero(mask.any(1))
    height = rows[-1] + 1 - rows[0]
    bands = (np.arange(mask.shape[0]) - rows[0]) * len(_BODY) // height
    parts = [(name, (mask & (bands == band)[:, None]).astype(np.uint8)) for band, name in enumerate(_BODY)]
    return [(name, own) for name, own in parts if own.any()]


def _structures(*fields: str, rows: Sequence[tuple]) -> np.ndarray:
    """A MATLAB structure array (1, N)."""
    array = np.zeros((1, len(rows)), [(field, object) for field in fields])
    for index, row in enumerate(rows):
        array[0, index] = row
    return array


def _write_pascal(root: Path, name: str, scene: dict[str, np.ndarray]) -> None:
    from scipy.io import savemat

    classes = scene["semseg"]
    context = _looked_up(classes, _CONTEXT, 0).astype(np.uint16)
    _save(root / f"JPEGImages/{name}.jpg", scene["image"], quality=95)
    folder = "VOC12" if int(name) % 2 else "pascal-context"
    _save(root / f"semseg/{folder}/{name}.png", _looked_up(classes, _VOC, VOID).astype(np.uint8))
    _save(root / f"normals_distill/{name}.png", _encoded(scene["normals"]))
    _save(root / f"sal_distill/{name}.png", np.where((classes > 2) & (classes != VOID), 230, 20).astype(np.uint8))
    for path, content in (
        (f"human_parts/{name}", {"anno": anno(name, classes)}),
        (f"pascal-context/trainval/{name}", {"LabelMap": context}),
    ):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        savemat(root / f"{path}.mat", content, do_compression=True)


def _write_nyud(root: Path, name: str, scene: dict[str, np.ndarray]) -> None:
    _save(root / f"images/{name}.png", scene["image"])
    _save(
        root / f"segmentation/{name}.png",
        np.where(scene["semseg"] == VOID, 0, 5 * scene["semseg"] + 1).astype(np.uint8),
    )
    _save(root / f"depth/{name}.npy", scene["depth"])
    _save(root / f"normals/{name}.png", _encoded(scene["normals"]))
    _save(root / f"edge/{name}.png", np.where(thin(scene["edges"] == 1.0), 255, 0).astype(np.uint8))


_WRITERS: dict[str, tuple[Callable, str]] = {
    "pascal_context": (_write_pascal, "ImageSets/Context"),
    "nyud": (_write_nyud, "gt_sets"),
}


def _write(root: Path, recipe: Recipe) -> None:
    random = np.random.default_rng(recipe.seed)
    write, lists = _WRITERS[recipe.layout]
    names = [f"{number + 1:06d}" for number in range(recipe.train + recipe.val)]
    for name in names:
        write(root, name, render(random, recipe.size, 0.5))
    (root / lists).mkdir(parents=True)
    for split, own in (("train", names[: recipe.train]), ("val", names[recipe.train :])):
        (root / lists / f"{split}.txt").write_text("\n".join(own) + "\n", encoding="utf-8")
    if recipe.layout == "pascal_context":
        nyu, context = CLASS_FILES
        write_json(root / "db_info" / nyu, {"unknown": 0, "floor": 1, "ceiling": 2, "wall": 3, "chair": 4})
        write_json(root / "db_info" / context, dict(zip(_NAMES, _CONTEXT, strict=True)))


def make_look_alike(root: Path, recipe: Recipe | None = None) -> None:
    """Write a look-alike into ``root``, whole or not at all; one of the same recipe that is there is kept.

    Raises:
        UserError: if ``root`` holds something else, or the recipe is not possible.
    """
    recipe = recipe or Recipe()
    if recipe.layout not in _WRITERS:
        raise unknown("layout", recipe.layout, _WRITERS)
    if min(recipe.size) < 16 or min(recipe.train, recipe.val) < 1:
        raise UserError("a look-alike needs 16 pixels a side and one image a split")
    about = {"version": _VERSION, **asdict(recipe), "size": list(recipe.size)}
    make_tree(root, about, lambda building: _write(building, recipe))


def main(arguments: Sequence[str]) -> None:
    """The command."""
    default = Recipe()
    parser = Parser(
        prog="python -m taps.data.context_scenes", description="Generate a look-alike of PASCAL-Context or NYUDv2."
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path)
    parser.add_argument("--layout", choices=list(_WRITERS), default=default.layout, help=f"(default: {default.layout})")
    parser.add_argument(
        "--size",
        type=int,
        nargs=2,
        default=default.size,
        metavar=("HEIGHT", "WIDTH"),
        help="in pixels (default: 96 128)",
    )
    for name in ("train", "val"):
        value = getattr(default, name)
        parser.add_argument(f"--{name}", type=int, default=value, metavar="N", help=f"images (default: {value})")
    parser.add_argument("--seed", type=number(int, 0), default=0, metavar="N", help="(default: 0)")
    given = vars(parser.parse_args(arguments))
    folder = given.pop("folder")
    make_look_alike(folder, Recipe(**{**given, "size": tuple(given["size"])}))


if __name__ == "__main__":
    run(main)
