"""Folders of generated data, which are written completely or not at all and record the recipe that they were made with."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from taps.errors import UserError
from taps.storage.files import read_json, write_json


@contextmanager
def temporary_folder(root: Path) -> Iterator[Path]:
    """A new folder beside ``root``, to be renamed to it when it is complete; it is deleted otherwise."""
    root.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=root.parent, prefix=f".{root.name}."))
    try:
        folder.chmod(0o755)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def make_tree(root: Path, about: dict, write: Callable[[Path], None]) -> None:
    """Generate a folder, unless it already exists with the same recipe.

    Args:
        root: the folder.
        about: the recipe as JSON, stored in ``about.json``.
        write: function that fills the folder passed to it.

    Raises:
        UserError: if ``root`` holds other data.
    """
    if _is(root, about):
        return
    if root.exists() and any(root.iterdir()):
        raise UserError(f"{root} holds other data; move it away, or choose another folder")
    with temporary_folder(root) as folder:
        write(folder)
        write_json(folder / "about.json", about)
        try:
            folder.rename(root)  # fails unless root is missing or empty
        except OSError:
            if not _is(root, about):  # another process may have been faster
                raise


def _is(root: Path, about: dict) -> bool:
    return (root / "about.json").is_file() and read_json(root / "about.json") == about
