"""Atomic writing of files, and reading that never executes their contents."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from taps.errors import UserError, first_line

_METADATA = {"format": "pt"}


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path that replaces ``path`` if the ``with`` block succeeds and is deleted if it fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    try:
        yield Path(temporary)
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp's files are private
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


@contextmanager
def atomic_write_pair(first: Path, second: Path) -> Iterator[tuple[Path, Path]]:
    """Yield temporary paths for two files that belong together, which replace both or, if the ``with`` block fails, none.

    The replacement of ``second`` decides: until then ``first`` waits under the name :func:`pending_path`. A reader that finds a
    waiting file has to check which of the two belongs to ``second``, since a crash may have left it there.
    """
    with atomic_write(second) as new_second, atomic_write(pending_path(first)) as new_first:
        yield new_first, new_second
    os.replace(pending_path(first), first)


def pending_path(path: Path) -> Path:
    """Return the name of a file that will replace ``path`` once the file that describes it is there."""
    return path.with_name(f"{path.name}.new")


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: Path, text: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")  # names of files need not be Unicode


def json_text(value: object) -> str:
    """Return the contents of a JSON file."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def csv_text(rows: Iterable[Iterable[object]]) -> str:
    """Rows as CSV; ``None`` is an empty cell."""
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(rows)
    return file.getvalue()


def write_json(path: Path, value: object) -> None:
    write_text(path, json_text(value))


def read_json(path: Path) -> dict:
    """Return the object in a JSON file.

    Raises:
        UserError: if the file is missing or does not hold a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON: {first_line(error, 160)}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a JSON object")
    return value


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file; tensors are copied to the CPU and made contiguous.

    Raises:
        UserError: if it cannot be written, e.g. because the disk is full.
    """
    with atomic_write(path) as temporary:
        put_tensors(temporary, tensors, metadata)


def put_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file in place, as :func:`write_tensors` does under a temporary name."""
    try:
        save_file(_plain(tensors), path, metadata={**_METADATA, **(metadata or {})})
    except SafetensorError as error:
        raise UserError(f"{path.parent} cannot be written to: {first_line(error, 160)}") from None


def plain_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """Return the contents of the file that :func:`write_tensors` would write without extra metadata."""
    return save(_plain(tensors), metadata=_METADATA)


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    plain: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        place = own.untyped_storage().data_ptr()
        plain[name] = own.clone() if place in seen else own  # the format has no tensors in common memory
        seen.add(place)
    return plain


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file.

    Raises:
        UserError: if the file is missing or damaged.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is not a complete safetensors file: {first_line(error, 160)}") from None
