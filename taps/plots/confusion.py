"""Figures of what a task confuses, and of training over its epochs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from taps.plots.style import bare, new_figure, title_width, write_cells

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: above this number of classes the cells are too small to see
MOST_CLASSES = 60


def confusion(counts: Sequence[Sequence[int]], classes: Sequence[str], title: str = "") -> Figure:
    """Confusion matrix in percent of each class's images; rows are classes, columns what was predicted."""
    size = len(classes)
    shares = [[100.0 * count / max(sum(row), 1) for count in row] for row in counts]
    right, images = sum(row[index] for index, row in enumerate(counts)), sum(map(sum, counts))
    side = min(max(0.36 * size, 2.2), 14)
    longest = 0.075 * max(map(len, classes))
    heading = f"{title}: {100 * right / max(images, 1):.1f} % of {images} test images are right"
    figure = new_figure(max(side + longest + 1.4, title_width(heading)), side + longest + 0.9)
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    axes.set_xticks(range(size), classes, rotation=90 if size > 5 or longest > 0.4 else 0, fontsize=7)
    axes.set_yticks(range(size), classes, fontsize=7)
    axes.set_xlabel("predicted", fontsize=8)
    axes.set_ylabel("class", fontsize=8)
    if size <= 25:
        write_cells(
            axes, shares, lambda row, column: f"{shares[row][column]:.0f}" if counts[row][column] else "", 60, 6
        )
    bare(axes)
    figure.colorbar(image, ax=axes, shrink=0.8).set_label("% of the class's images", fontsize=8)
    axes.set_title(heading, fontsize=9, loc="left")
    return figure


def curves(metrics: Iterable[Mapping]) -> Figure:
    """Loss and accuracy of every task over its epochs; dashed: on the training images."""
    from matplotlib.lines import Line2D

    by_task: dict[str, list[Mapping]] = {}
    for row in metrics:
        by_task.setdefault(row["task"], []).append(row)
    figure = new_figure(9, 3.4)
    left, right = figure.subplots(1, 2)
    handles = []
    for index, (task, rows) in enumerate(by_task.items()):
        color, epochs = f"C{index % 10}", [row["epoch"] for row in rows]
        left.plot(epochs, [row["train_loss"] for row in rows], color=color, linestyle="--", marker=".", markersize=3)
        for key, line in (("train_error", "--"), ("val_error", "-")):
            known = [(row["epoch"], 100 - row[key]) for row in rows if row.get(key) is not None]
            if known:
                right.plot(*zip(*known, strict=True), color=color, linestyle=line, marker=".", markersize=3)
        handles.append(Line2D([], [], color=color, label=task))
    left.set_ylabel("training loss")
    has_classes = any(row.get("train_error") is not None for rows in by_task.values() for row in rows)
    right.set_ylabel("accuracy %" if has_classes else "mean average precision %")
    for axes in (left, right):
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.spines[["top", "right"]].set_visible(False)
    styles = [
        Line2D([], [], color="black", label="validation"),
        Line2D([], [], color="black", linestyle="--", label="training"),
    ]
    shown = handles if len(handles) <= 10 else []  # as many as there are colours
    figure.legend(handles=[*shown, *styles], loc="outside right upper", frameon=False, fontsize=8)
    if not shown:
        left.set_title(f"{len(handles)} tasks", fontsize=9, loc="left")
    return figure
