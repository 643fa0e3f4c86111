"""Figures of the layers that tasks tune, of their sizes and scores, and of accuracy against size.

All values are read from results folders, i.e. from the gates' hard decisions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import TYPE_CHECKING

from taps.core.accounting import is_tuned
from taps.plots.confusion import curves
from taps.plots.style import BORDER, LINES, SECOND, SHARED, TUNED, bare, new_figure, pair_map, stage_of, white_grid

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SHORTCUTS = ("downsample", "shortcut", "skip")


def layers(tasks: Mapping[str, list[dict]], title: str = "", captions: Mapping[str, str] | None = None) -> Figure:
    """Heat map of tasks × units in network order: tuned or shared.

    Stages are separated by lines, and shortcut convolutions are named above the map.

    Args:
        tasks: rows of ``model.report`` by task, all of the same network.
        title: title of the figure.
        captions: by task, a short text at the right end of its row, e.g. its accuracy.
    """
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    matrix = [[float(is_tuned(row)) for row in rows] for rows in tasks.values()]
    figure, axes = _map_of_layers(tasks, captions)
    axes.imshow(matrix, aspect="auto", cmap=ListedColormap([SHARED, TUNED]), vmin=0, vmax=1, interpolation="nearest")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    keys = [Patch(color=TUNED, label="the task's own weights"), Patch(color=SHARED, label="shared with the base")]
    figure.legend(handles=keys, loc="outside lower right", ncols=2, frameon=False, fontsize=8)
    return figure


def bits(descriptions: Mapping[str, Mapping], title: str = "", captions: Mapping[str, str] | None = None) -> Figure:
    """Heat map of tasks × units: the bits per weight in which each task's file stores the unit's delta; 0: shared with the base.

    Args:
        descriptions: contents of ``task.json`` by task, all of the same network.
        title, captions: as in :func:`layers`.
    """
    from matplotlib import colormaps

    stored = {name: one.get("delta_bytes", {}) for name, one in descriptions.items()}
    matrix = [
        [8 * stored[name].get(row["name"], 0) / max(row["parameters"], 1) for row in one["units"]]
        for name, one in descriptions.items()
    ]
    figure, axes = _map_of_layers({name: one["units"] for name, one in descriptions.items()}, captions)
    colors = colormaps["YlOrRd"].with_extremes(under=SHARED)
    highest = max([1.0, *(value for row in matrix for value in row)])
    image = axes.imshow(matrix, aspect="auto", cmap=colors, vmin=1e-6, vmax=highest, interpolation="nearest")
    figure.colorbar(image, ax=axes, pad=0.01, aspect=12).set_label("bits per weight\n(grey: shared)", fontsize=8)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    return figure


def _map_of_layers(tasks: Mapping[str, list[dict]], captions: Mapping[str, str] | None) -> tuple[Figure, Axes]:
    """Return a figure with axes for one cell per task and unit, with names of tasks and stages."""
    names = list(tasks)
    units = [row["name"] for row in tasks[names[0]]]
    figure = new_figure(min(max(0.17 * len(units) + 3.2, 7), 26), 0.3 * len(names) + 2.3)
    axes = figure.add_subplot()
    axes.set_xlim(-0.5, len(units) - 0.5)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_yticks(range(len(names)), names)
    white_grid(axes, len(units), len(names))
    stages = [stage_of(unit) for unit in units]
    starts = [index for index in range(len(units)) if index == 0 or stages[index] != stages[index - 1]]
    ends = [*starts[1:], len(units)]
    for start in starts[1:]:
        axes.axvline(start - 0.5, color=BORDER, linewidth=1.0)
    middles = [(start + end - 1) / 2 for start, end in zip(starts, ends, strict=True)]
    is_close = any(second - first < 4 for first, second in pairwise(middles))  # the names would overlap
    turned = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if is_close or len(starts) > 6 else {}
    axes.set_xticks(middles, [stages[start] for start in starts], fontsize=8, **turned)
    axes.set_xlabel(f"layers in network order, {len(units)} in all")
    bare(axes)
    shortcuts = {n: word for n, unit in enumerate(units) for word in reversed(_SHORTCUTS) if word in unit}
    if shortcuts:
        above = axes.secondary_xaxis("top")
        above.set_xticks(list(shortcuts), shortcuts.values(), fontsize=7, color=BORDER)
        above.tick_params(length=3, color=BORDER)
        above.spines["top"].set_visible(False)
    if captions:
        right = axes.secondary_yaxis("right")
        right.set_yticks(range(len(names)), [captions.get(name, "") for name in names])
        right.tick_params(length=0)
        right.spines["right"].set_visible(False)
    return figure, axes


def sizes(summary: Mapping, in_bytes: bool = False) -> Figure:
    """Accuracy and size of each task in a ``summary.json``: stored parameters, or the bytes of its file."""
    rows = summary["tasks"]
    names = list(rows)
    figure = new_figure(8 + 0.08 * max(map(len, names)), 0.3 * len(names) + 1.6)
    left, right = figure.subplots(1, 2, sharey=True)
    values = [row["accuracy"] for row in rows.values()]
    bars = left.barh(names, values, color=SECOND, height=0.7)
    left.axvline(summary["mean_accuracy"], color=BORDER, linestyle="--", linewidth=1, zorder=0)
    wide = [f"{value:.1f}" if value >= 10 else "" for value in values]
    left.bar_label(bars, wide, label_type="center", color="white", fontsize=8)
    left.bar_label(bars, [f"{value:.1f}" if value < 10 else "" for value in values], padding=3, fontsize=8)
    left.set_xlim(0, 100)
    left.set_xticks(range(0, 101, 20))
    left.set_xlabel(
        f"{summary.get('metric', 'accuracy')} on the test split, %  (mean {summary['mean_accuracy']:.1f}, dashed)"
    )
    key, unit = ("bytes", "MB") if in_bytes else ("parameters", "M")
    millions = [row[key] / 1e6 for row in rows.values()]
    bars = right.barh(names, millions, color=TUNED, height=0.7)
    texts = [f"{row[key] / 1e6:.2f} {unit}, {100 * row['tuned_layers']:.0f} %" for row in rows.values()]
    right.bar_label(bars, texts, padding=3, fontsize=8)
    right.set_xlim(0, max([*millions, 1e-3]) * 1.35)
    what = "size of the file" if in_bytes else "stored parameters"
    right.set_xlabel(f"{what}, and layers tuned  (all: {summary[f'{key}_x_base']:.2f} × base)")
    left.invert_yaxis()
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
    return figure


def scores(metrics: Iterable[Mapping], threshold: float) -> Figure | None:
    """Every layer's score by epoch, in one panel per task, with the threshold τ above which a layer is tuned.

    Args:
        metrics: rows of ``metrics.jsonl``.
        threshold: τ.

    Returns:
        ``None`` if the method's gates have no scores.
    """
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    tasks: dict[str, list[Mapping]] = {}
    for row in metrics:
        if row["scores"] and row["scores"][0] is not None:
            tasks.setdefault(row["task"], []).append(row)
    if not tasks:
        return None
    columns = min(len(tasks), max(3, math.ceil(math.sqrt(len(tasks)))))
    lines = math.ceil(len(tasks) / columns)
    figure = new_figure(max(2.6 * columns + 1.6, 6), max(2.0 * lines + 0.9, 3.6))
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    depth = colormaps["viridis"]
    for axes in panels.flat[len(tasks) :]:
        axes.axis("off")
    for axes, (name, rows) in zip(panels.flat, tasks.items(), strict=False):
        epochs, count = [row["epoch"] for row in rows], len(rows[0]["scores"])
        for unit in range(count):
            values = [row["scores"][unit] for row in rows]
            axes.plot(epochs, values, color=depth(unit / max(count - 1, 1)), linewidth=0.8, marker=".", markersize=3)
        axes.axhline(threshold, color=TUNED, linestyle="--", linewidth=1.2)
        axes.set_title(name, fontsize=9)
        axes.set_yscale("symlog", linthresh=0.5, linscale=2)  # most scores stay near τ, a few are far away
        axes.set_yticks([-1, 0, 1], ["-1", "0", "1"])
        axes.set_yticks([], minor=True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.supxlabel("epoch", fontsize=9)
    figure.supylabel(f"score of a layer, logarithmic beyond ±0.5 (dashed: threshold {threshold:g})", fontsize=8)
    bar = figure.colorbar(ScalarMappable(Normalize(1, count), depth), ax=panels, pad=0.01, aspect=30)
    bar.set_label("layer, in network order", fontsize=8)
    return figure


def overlap(tasks: Mapping[str, list[dict]]) -> Figure:
    """For each pair of tasks, the layers that both tune in % of those that either tunes; the diagonal has numbers of layers."""
    tuned = [{row["name"] for row in rows if is_tuned(row)} for rows in tasks.values()]
    shared = [[100 * len(a & b) / max(len(a | b), 1) for b in tuned] for a in tuned]

    def text(row: int, column: int) -> str:
        return str(len(tuned[row])) if row == column else f"{shared[row][column]:.0f}"

    title = "overlap of tuned layers (diagonal: count)"
    return pair_map(list(tasks), shared, 0, 0.42, "Jaccard index, %", title, text)


def trade_off(
    runs: Mapping[str, Mapping],
    labels: Mapping[str, str] | None = None,
    groups: Mapping[str, str] | None = None,
    size: str = "parameters_x_base",
    spread: Mapping[str, float] | None = None,
) -> Figure:
    """Mean accuracy against size, with one point per run.

    Args:
        runs: ``summary.json`` by run.
        labels: text at each point by run, e.g. λ; the run's name by default.
        groups: line of each run, e.g. its way of training; one line by default.
        size: size in the summary, ``"parameters_x_base"`` or ``"bytes_x_base"``.
        spread: standard deviation of the accuracy by run, drawn as a bar.
    """
    figure = new_figure(7, 4.4)
    axes = figure.add_subplot()
    lines: dict[str, list[tuple[float, float, str]]] = {}
    for name, run in runs.items():
        line = (groups or {}).get(name, "")
        lines.setdefault(line, []).append((run[size], run["mean_accuracy"], name))
    for index, (line, points) in enumerate(sorted(lines.items())):
        points.sort()
        color = LINES[index % len(LINES)]
        axes.plot([x for x, _, _ in points], [y for _, y, _ in points], "o-", color=color, linewidth=1, label=line)
        for x, y, name in points:
            if (spread or {}).get(name):
                axes.errorbar(x, y, yerr=spread[name], color=color, linewidth=1, capsize=3)
            axes.annotate((labels or {}).get(name, name), (x, y), xytext=(6, 5), textcoords="offset points", fontsize=8)
    if len(lines) > 1:
        axes.legend(frameon=False, fontsize=8, loc="lower right")
    axes.margins(x=0.15, y=0.2)
    axes.set_xlabel(f"{size.partition('_')[0]} of base and tasks together, × base")
    metrics = {run.get("metric", "accuracy") for run in runs.values()}
    axes.set_ylabel(f"mean {metrics.pop() if len(metrics) == 1 else 'accuracy'}, %")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def run_pictures(
    descriptions: Mapping[str, Mapping], summary: Mapping, metrics: Iterable[Mapping]
) -> dict[str, Figure]:
    """The figures of a run by name, from its tasks' descriptions, ``summary.json`` and ``metrics.jsonl``."""
    captions = {
        name: f"{row['accuracy']:.1f} %, {100 * row['tuned_layers']:.0f} % tuned"
        for name, row in summary["tasks"].items()
    }
    first = next(iter(descriptions.values()))
    units = {name: description["units"] for name, description in descriptions.items()}
    has_budget = all(description.get("compact") for description in descriptions.values())
    size = (
        f"{summary['bytes_x_base']:.2f} × the bytes of the base"
        if has_budget
        else f"{summary['parameters_x_base']:.2f} × base"
    )
    title = f"{first['base']['name']}: which layers each task tuned ({size})"
    figures = {"layers": layers(units, title, captions), "sizes": sizes(summary, in_bytes=has_budget)}
    metrics = list(metrics)  # with a budget, scores play no part
    if has_budget and any("delta_bytes" in description for description in descriptions.values()):
        figures["bits"] = bits(
            descriptions, f"{first['base']['name']}: bits per weight of each task's deltas", captions
        )
    elif not has_budget and (over_time := scores(metrics, first["options"].get("threshold", 0.0))) is not None:
        figures["scores"] = over_time
    if metrics:
        figures["curves"] = curves(metrics)
    if len(units) > 1:
        figures["overlap"] = overlap(units)
    return figures
