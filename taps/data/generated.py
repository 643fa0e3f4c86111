"""Folders of generated data, written whole or not at all and told apart by what made them."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from taps.errors import UserError
from taps.files import read_json, write_json


def make_tree(root: Path, about: dict, write: Callable[[Path], None]) -> None:
    """Have ``write`` fill ``root``, unless it was made with the same recipe.

    Args:
        root: the folder.
        about: the recipe, as JSON; kept in ``about.json``.
        write: fills the folder it is given.

    Raises:
        UserError: if ``root`` holds something else.
    """
    if _is(root, about):
        return
    if root.exists() and any(root.iterdir()):
        raise UserError(f"{root} holds other data; move it away, or choose another folder")
    root.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(dir=root.parent, prefix=f".{root.name}."))
    try:
        building.chmod(0o755)
        write(building)
        write_json(building / "about.json", about)
        try:
            building.rename(root)  # onto nothing, or an empty folder
        except OSError:
            if not _is(root, about):  # else another process was faster
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _is(root: Path, about: dict) -> bool:
    return (root / "about.json").is_file() and read_json(root / "about.json") == about
