"""Logging to TensorBoard."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


@contextmanager
def tensorboard(path: Path, wanted: bool) -> Iterator[SummaryWriter | None]:
    """Open TensorBoard's file in a results folder for the ``with`` block; yields ``None`` if it is not wanted."""
    writer = None
    if wanted:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and not needed to report a user error

        writer = SummaryWriter(path)
    try:
        yield writer
    finally:
        if writer is not None:
            writer.close()
