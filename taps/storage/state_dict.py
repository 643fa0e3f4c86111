"""Weights in the files of training programs: the wrappers around a state dict, read without executing anything."""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from taps.errors import UserError, first_line
from taps.storage.files import read_tensors

T = TypeVar("T")
#: entries of a checkpoint that hold weights, in the order of preference: averages of the weights come first, as in timm
_WRAPPERS = (
    "state_dict_ema", "model_ema", "ema_state_dict", "ema", "teacher", "state_dict", "model_state_dict", "model_state",
    "model", "net", "network", "module", "backbone", "encoder", "student", "params",
)  # fmt: skip
#: messages are at most this long
_LIMIT = 300


def without_counters(state: Mapping[str, T]) -> dict[str, T]:
    """Return a state dict without the batch counters of batch norms, on which no output depends."""
    return {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read names with tensors from ``.safetensors``, or from a ``.pth``, ``.pt`` or ``.bin`` file that torch wrote.

    A checkpoint of a training program is unwrapped, e.g. ``{"epoch": 3, "state_dict": …}``; if it holds an average of the
    weights too (``state_dict_ema``, ``model_ema``), that is what is read. Only tensors, plain values and
    ``argparse.Namespace`` are unpickled.

    Raises:
        UserError: if the file is missing, damaged, or can only be read by unpickling anything else.
    """
    return read_checkpoint(path)[0]


def read_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], str | None]:
    """Return what :func:`read_state_dict` does, and the architecture that the file says it holds (``arch``, as timm writes it)."""
    path = Path(path)
    if path.suffix == ".safetensors":
        return read_tensors(path), None
    loaded = read_plain(path)
    state = _tensors(loaded, path.name)
    if not state:
        kind = f"a {type(loaded).__name__}" if not isinstance(loaded, Mapping) else "the keys " + listed(loaded)
        raise UserError(f"{path} does not hold a state dict (names with tensors), but {kind}")
    said = loaded.get("arch")
    return state, said if isinstance(said, str) else None


def read_plain(path: Path) -> Any:
    """Return what torch saved in a file: tensors, plain values and ``argparse.Namespace``; nothing else is unpickled.

    Raises:
        UserError: if the file is missing, damaged, or holds anything else.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged file makes the unpickler raise
        reason = first_line(error)
        raise UserError(
            f"{path} is not a file of plain tensors, and nothing else is unpickled ({reason[:120]}); "
            "save it again with torch.save(model.state_dict(), …) or as .safetensors"
        ) from None


def _tensors(loaded: object, name: str, depth: int = 3) -> dict[str, Tensor]:
    """The state dict in what a file holds, wherever it lies; empty if there is none."""
    if not isinstance(loaded, Mapping) or depth == 0:
        return {}
    inner = {key: loaded[key] for key in _WRAPPERS if isinstance(loaded.get(key), Mapping)}
    rest = [value for key, value in loaded.items() if key not in _WRAPPERS and isinstance(value, Mapping)]
    parts = {key: state for key, value in inner.items() if (state := _tensors(value, name, depth - 1))}
    if len(parts) > 1:
        warnings.warn(f"{name}: of {', '.join(parts)}, {next(iter(parts))} is taken", stacklevel=5)
    for state in parts.values():
        return state
    own = {name: value for name, value in loaded.items() if isinstance(name, str) and isinstance(value, Tensor)}
    return own or max((_tensors(value, name, depth - 1) for value in rest), key=len, default={})


def listed(names: Iterable[object], count: int = 3) -> str:
    """The first few of some names, shortened."""
    texts = [text if len(text := str(name)) <= 40 else f"…{text[-39:]}" for name in names]
    return ", ".join(texts[:count]) + (", …" if len(texts) > count else "") if texts else "none"


def does_not_fit(path: str | Path, network: str, differences: Mapping[str, list[str]]) -> UserError:
    """The error for a file of other weights: the first names in one line, all of them in a file that it names.

    Args:
        path: the file of weights.
        network: the network's name.
        differences: names by title, e.g. ``{"missing": […]}``.
    """
    found = {title: names for title, names in differences.items() if names}
    whole = "".join(
        f"{title} ({len(names)}):\n" + "".join(f"  {name}\n" for name in names) for title, names in found.items()
    )
    with tempfile.NamedTemporaryFile("w", prefix="taps-", suffix=".txt", delete=False, encoding="utf-8") as file:
        file.write(f"{path} and {network}\n\n{whole}")
    for count in (2, 1, 0):
        parts = [
            f"{len(names)} {title}" + (f" ({listed(names, count)})" if count else "") for title, names in found.items()
        ]
        message = f"{Path(path).name} does not fit {network}: {'; '.join(parts)}; all names are in {file.name}"
        if len(message) <= _LIMIT:
            break
    return UserError(message)
