"""Colours and elements that all figures share. Figures are created without pyplot, so that no display is needed."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from taps.storage.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TUNED, SHARED, BORDER, SECOND = "#d9542b", "#e9edf2", "#8793a3", "#3f6fa3"
#: inches of the side of a map of pairs, beyond which cells become smaller and lose their texts
_LARGEST_SIDE = 17.0
#: colours of several lines in one figure
LINES = (TUNED, SECOND, "#4f9d69", "#8a5fa8", "#b08d2f", "#5f6b78")


def stage_of(name: str) -> str:
    """The stage of a layer: ``layer3`` of ``layer3.0.conv1``, ``blocks.4`` of ``blocks.4.1.conv_pw``."""
    parts = name.split(".")
    for index, part in enumerate(parts[:-1]):
        if part[-1].isdigit():
            return ".".join(parts[: index + 1])
    return parts[0]


def new_figure(width: float, height: float) -> Figure:
    """An empty figure with a size in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def title_width(title: str) -> float:
    """About the inches that a title of 9 points takes, margins included; layouts do not make room for titles."""
    return 0.075 * len(title) + 1.2


def bare(axes) -> None:
    """Remove frame and tick marks."""
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)


def white_grid(axes, columns: int, rows: int) -> None:
    """White lines between the cells of an image, drawn as lines: a minor tick at a major one's place would not be drawn."""
    for index in range(1, columns):
        axes.axvline(index - 0.5, color="white", linewidth=1.2)
    for index in range(1, rows):
        axes.axhline(index - 0.5, color="white", linewidth=1.2)


def write_cells(
    axes, values: Sequence[Sequence[float]], text: Callable[[int, int], str], dark: float, size: int = 7
) -> None:
    """Write ``text(row, column)`` into the cells of an image, in white where the value is above ``dark``."""
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            color = "white" if value > dark else "black"
            axes.text(column, row, text(row, column), ha="center", va="center", fontsize=size, color=color)


def pair_map(
    names: Sequence[str], values: Sequence[Sequence[float]], low: float, cell: float, label: str, title: str, text
):
    """A figure of a matrix of percentages between pairs of tasks.

    Args:
        names: the tasks.
        values: rows of percentages from ``low`` to 100.
        low: lowest value of the colour scale.
        cell: side of a cell in inches.
        label: label of the colour bar.
        title: title of the figure.
        text: function from row and column to the text of a cell.
    """
    count = len(names)
    side = min(cell * count, _LARGEST_SIDE) + 2.4
    figure = new_figure(max(side + 1.2, title_width(title)), side)
    axes = figure.add_subplot()
    image = axes.imshow(values, cmap="Blues", vmin=low, vmax=100)
    size = min(10.0, 65 * _LARGEST_SIDE / count)  # in points; a cell has 72 times its inches
    shown = range(0, count, math.ceil(count / 160))
    axes.set_xticks(shown, [names[n] for n in shown], rotation=45, ha="right", rotation_mode="anchor", fontsize=size)
    axes.set_yticks(shown, [names[n] for n in shown], fontsize=size)
    if cell * count <= _LARGEST_SIDE:
        write_cells(axes, values, text, low + 0.6 * (100 - low))
    bare(axes)
    figure.colorbar(image, ax=axes, shrink=0.8).set_label(label, fontsize=8)
    axes.set_title(title, fontsize=9, loc="left")
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, completely or not at all."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_parse_math(False)  # names with a $ are not formulas
    with atomic_write(path) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(temporary, dpi=150, format="png")
