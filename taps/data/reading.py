"""Reading all of a data set to find its mistakes."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TypeVar

from tqdm import tqdm

from taps.errors import UserError

T = TypeVar("T")


def mistakes_of(read: Callable[[T], object], samples: Collection[T], title: str) -> list[str]:
    """Call ``read`` with every sample, under a progress bar; return an indented line for each ``UserError`` that it raises."""
    lines = []
    for sample in tqdm(samples, desc=title, disable=None, leave=False):
        try:
            read(sample)
        except UserError as error:
            lines.append(f"  {error}")
    return lines
