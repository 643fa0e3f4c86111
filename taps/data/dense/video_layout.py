"""NYUDv2 with the frames around each labelled one, in the layout of MultiMAE and efficient computation sharing.

<root>/{train,test}/rgb/<any folders>/<name>.jpg      the labelled frame, the 20th of its clip
  rgb_18, rgb_19, rgb_21, rgb_22/…                    the frames around it; only needed in training with --frame_pull
  semseg, depth, normals, edge/…                      labels as in taps.data.dense.astmt_layout, of the chosen tasks
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from taps.data.dense.astmt_layout import PROTOCOLS, read_image
from taps.data.dense.dataset import FRAMES, DenseData
from taps.data.multi_label import Task
from taps.data.reading import mistakes_of
from taps.errors import UserError, check_known

_FOLDERS = {"image": "rgb", "semseg": "semseg", "depth": "depth", "normals": "normals", "edges": "edge"}
_AROUND = ("rgb_18", "rgb_19", "rgb_21", "rgb_22")
_ENDINGS = (".png", ".jpg", ".jpeg", ".npy")
#: height and width of training crops, as published
_CROP = (416, 416)


def is_video(root: Path) -> bool:
    """Return whether a folder has this layout."""
    folders = {name for name in _FOLDERS.values() if (root / "train" / name).is_dir()}
    return _FOLDERS["image"] in folders and len(folders) > 1


def check_video(root: Path) -> tuple[list[str], int]:
    """Read every file; return the lines of a report and the number of things that are wrong."""
    tasks = [task for task in PROTOCOLS["nyud"].tasks if (root / "train" / _FOLDERS[task]).is_dir()]
    frames = (root / "train" / _AROUND[0]).is_dir()
    data = open_video(root, tasks, frames)
    counts = ", ".join(f"{len(samples)} {split}" for split, samples in data.splits.items())
    lines = [f"{root}: {counts}; {', '.join(tasks)}{'; frames around training images' if frames else ''}"]
    for split, samples in data.splits.items():
        lines += mistakes_of(lambda sample: data.read(sample, list(data.tasks.values())), samples, f"reading {split}")
    return lines, len(lines) - 1


def open_video(root: Path, tasks: Sequence[str] | None = None, with_frames: bool = False) -> DenseData:
    """Open the folder.

    Args:
        root: the folder.
        tasks: the tasks, whose files have to exist; all by default.
        with_frames: read the frames around each training frame.

    Raises:
        UserError: for an unknown task or a missing file.
    """
    protocol = PROTOCOLS["nyud"]
    check_known("task of benchmark nyud", tasks or (), protocol.tasks)
    chosen = list(tasks or protocol.tasks)
    columns = {column: _FOLDERS[column] for column in ("image", *chosen)}
    splits = {
        split: _samples(root / split, {**columns, **({name: name for name in _AROUND} if frames else {})})
        for split, frames in (("train", with_frames), ("test", False))
    }

    def read(sample: Mapping[str, Path], wanted: Sequence[Task]) -> dict[str, np.ndarray]:
        found = read_image(protocol, sample, wanted, None)
        if _AROUND[0] in sample:
            around = [read_image(protocol, {"image": sample[name]}, (), None)["image"] for name in _AROUND]
            wrong = next((n for n, own in zip(_AROUND, around, strict=True) if own.shape != found["image"].shape), None)
            if wrong is not None:
                raise UserError(f"{sample[wrong]} is not of the size of {sample['image']}")
            found[FRAMES] = np.stack(around)
        return found

    return DenseData(
        "nyud",
        protocol.tasks,
        splits,
        read,
        crop=_CROP,
        zoom=(0.5, 2.0),
        varied=("semseg", 0.75),
        distort=True,
        published_resize="bilinear",
        padded=True,
        frames=_AROUND if with_frames else (),
    ).choose(chosen)


def _samples(folder: Path, columns: Mapping[str, str]) -> list[dict[str, Path]]:
    """Return for each labelled frame of a split its files by column."""
    found = {column: _files(folder / name) for column, name in columns.items()}
    for column, files in found.items():
        missing = sorted(found["image"].keys() - files.keys())
        if missing:
            raise UserError(
                f"{folder / columns[column]} has no file for {missing[0]} ({len(missing)} of {len(found['image'])} are missing)"
            )
    if not found["image"]:
        raise UserError(f"{folder / columns['image']} holds no image")
    return [{column: files[name] for column, files in found.items()} for name in sorted(found["image"])]


def _files(folder: Path) -> dict[str, Path]:
    """Return the files in a folder by path below it, without endings.

    Raises:
        UserError: if two differ only in their endings.
    """
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in _ENDINGS or path.name.startswith("."):
            continue
        name = path.relative_to(folder).with_suffix("").as_posix()
        if name in found:
            raise UserError(f"{found[name]} and {path} have the same name")
        found[name] = path
    return found
