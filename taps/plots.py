"""Pictures. Everything shown is read from task descriptions, i.e. from the gates' hard decisions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from taps.cost import is_tuned
from taps.files import whole

_TUNED, _SHARED, _BORDER = "#d9542b", "#e9edf2", "#8793a3"


def stage_of(name: str) -> str:
    """The part of the network a layer belongs to: ``layer3`` of ``layer3.0.conv1``, ``blocks.4`` of ``blocks.4.1.conv_pw``."""
    parts = name.split(".")
    for index, part in enumerate(parts[:-1]):
        if part[-1].isdigit():
            return ".".join(parts[: index + 1])
    return parts[0]


def layers(tasks: Mapping[str, list[dict]], title: str = "", captions: Mapping[str, str] | None = None):
    """Heat map of units (left to right in network order) × tasks: tuned or shared.

    Args:
        tasks: rows of ``model.report`` by task; all of the same network.
        title: above the picture.
        captions: a short text at the right end of a task's row, e.g. its accuracy.

    Returns:
        A matplotlib figure.
    """
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    names = list(tasks)
    units = [row["name"] for row in tasks[names[0]]]
    matrix = [[float(is_tuned(row)) for row in tasks[name]] for name in names]
    figure = Figure(figsize=(min(max(0.17 * len(units) + 3.2, 7), 26), 0.34 * len(names) + 1.9), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(matrix, aspect="auto", cmap=ListedColormap([_SHARED, _TUNED]), vmin=0, vmax=1, interpolation="nearest")
    axes.set_yticks(range(len(names)), names)
    axes.set_xticks([index - 0.5 for index in range(1, len(units))], minor=True)
    axes.set_yticks([index - 0.5 for index in range(1, len(names))], minor=True)
    axes.grid(which="minor", color="white", linewidth=1.2)
    axes.tick_params(which="both", length=0)
    starts = [
        index for index in range(len(units)) if index == 0 or stage_of(units[index]) != stage_of(units[index - 1])
    ]
    ends = [*starts[1:], len(units)]
    for start in starts[1:]:
        axes.axvline(start - 0.5, color=_BORDER, linewidth=1.0)
    wide = [(start, end) for start, end in zip(starts, ends, strict=True)]
    axes.set_xticks(
        [(start + end - 1) / 2 for start, end in wide],
        [f"{stage_of(units[start])}" for start, _ in wide],
        rotation=45 if len(wide) > 6 else 0,
        ha="right" if len(wide) > 6 else "center",
        fontsize=8,
    )
    axes.set_xlabel(f"layers in network order, {len(units)} in all")
    for side in axes.spines.values():
        side.set_visible(False)
    if captions:
        right = axes.secondary_yaxis("right")
        right.set_yticks(range(len(names)), [captions.get(name, "") for name in names])
        right.tick_params(length=0)
        right.spines["right"].set_visible(False)
    axes.set_title(title, loc="left", fontsize=11)
    keys = [Patch(color=_TUNED, label="the task's own weights"), Patch(color=_SHARED, label="shared with the base")]
    figure.legend(handles=keys, loc="outside upper right", ncols=2, frameon=False, fontsize=8)
    return figure


def save(figure, path: Path) -> None:
    """Write a figure as PNG, whole or not at all."""
    with whole(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")


def run_picture(descriptions: Mapping[str, dict], summary: dict):
    """The heat map of a run, with each task's accuracy, from task descriptions and ``summary.json``."""
    captions = {
        name: f"{row['accuracy']:.1f} %, {100 * row['tuned_layers']:.0f} % tuned"
        for name, row in summary["tasks"].items()
    }
    base = next(iter(descriptions.values()))["base"]["name"]
    title = f"{base}: which layers each task tuned ({summary['parameters_x_base']:.2f} × base)"
    return layers({name: description["units"] for name, description in descriptions.items()}, title, captions)
