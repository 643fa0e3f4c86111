"""Figures of policies: which units each task runs, and how similar the tasks' policies are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING

from taps.plots.style import BORDER, LINES, bare, new_figure, pair_map, stage_of, white_grid, write_cells

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def policy(
    learned,
    executed: Mapping[str, Mapping[str, Sequence[float]]] | None = None,
    own: Mapping[str, Mapping[str, Sequence[float]]] | None = None,
) -> Figure:
    """Heat maps of tasks × units: the learned probability of running each unit, with that of the blocks around it, and for each
    network trained under a policy the share of samples that ran it. If tasks can have their own weights, skipped units are white,
    shared ones light and the task's own dark in the latter.

    Args:
        learned: a :class:`taps.methods.policy.Policy`.
        executed: by network and task, shares of samples in 0..1.
        own: by network and task, 1.0 for units with the task's own weights.
    """
    from matplotlib.patches import Patch

    panels = {"learned probability of running": _with_blocks(learned, learned.probability)}
    if learned.own:
        panels["learned probability of own weights"] = _with_blocks(learned, learned.own)
    is_learned = len(panels)
    names, count = list(learned.run), len(learned.units)
    for title, shares in (executed or {}).items():
        mine = (own or {}).get(title)
        if mine:
            shares = {name: [r * (1 + o) / 2 for r, o in zip(shares[name], mine[name], strict=True)] for name in names}
        panels[title] = shares
    is_long = count > 40
    width = min(0.19 * count + 2.5, 14) if is_long else max(0.34 * count + 3.0, 7)
    figure = new_figure(width, len(panels) * (0.28 * len(names) + 0.5) + 1.6)
    grid = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for index, (axes, (title, shares)) in enumerate(zip(grid, panels.items(), strict=True)):
        rows = [shares[name] for name in names]
        color = "Blues" if own and index < is_learned else "Oranges"  # probabilities are no decisions between three
        axes.imshow(rows, aspect="auto", cmap=color, vmin=0, vmax=1.15)
        axes.set_yticks(range(len(names)), names, fontsize=8)
        values = [value for row in rows for value in row]
        with_own = bool((own or {}).get(title))
        summary = f"{100 * sum(values) / len(values):.0f} %"
        if with_own:
            parts = [100 * values.count(level) / len(values) for level in (0.5, 1.0, 0.0)]
            summary = f"{parts[0]:.0f} % shared, {parts[1]:.0f} % task-specific, {parts[2]:.0f} % skipped"
        axes.set_title(f"{title}: {summary}", fontsize=9, loc="left")
        white_grid(axes, count, len(names))
        if not is_long:
            marks = {0.0: "", 0.5: "·", 1.0: "own"} if with_own else {}
            texts = [[marks.get(value, _short(value)) for value in row] for row in rows]
            write_cells(axes, rows, lambda row, column, texts=texts: texts[row][column], 0.7)
        bare(axes)
    stages = [stage_of(unit) for unit in learned.units] if is_long else list(learned.units)
    starts = [index for index in range(count) if index == 0 or stages[index] != stages[index - 1]]
    middles = [(start + end - 1) / 2 for start, end in zip(starts, [*starts[1:], count], strict=True)]
    names_of = [stages[start] for start in starts]
    grid[-1].set_xticks(middles, names_of, rotation=45, ha="right", rotation_mode="anchor", fontsize=8)
    for axes in grid if is_long else ():
        for start in starts[1:]:
            axes.axvline(start - 0.5, color=BORDER, linewidth=1.0)
    grid[-1].set_xlabel(f"units of {learned.backbone} in network order, {count} in all")
    scales = [(grid[0], ("0", "½", "probability 1"))] if own else [(grid[-1], ("never", "half", "always run"))]
    scales += [(grid[-1], ("skipped", "shared", "task-specific"))] if own else []
    keys = [
        Patch(facecolor=axes.images[0].cmap(axes.images[0].norm(level)), edgecolor=BORDER, label=name)
        for axes, texts in scales
        for level, name in zip((0.0, 0.5, 1.0), texts, strict=True)
    ]
    figure.legend(handles=keys, loc="outside lower right", ncols=len(keys), frameon=False, fontsize=8)
    return figure


def _with_blocks(learned, values: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """Return probabilities of units, times those with which the blocks around them run."""
    found = {}
    for name, own in values.items():
        running: list[float] = []  # a block precedes the layers in it
        for index, value in enumerate(learned.probability[name]):
            parent = learned.parents[index] if learned.parents else None
            running.append(value if parent is None else value * running[parent])
        around = [1.0 if not learned.parents or p is None else running[p] for p in learned.parents or [None] * len(own)]
        found[name] = [value * outer for value, outer in zip(own, around, strict=True)]
    return found


def _short(share: float) -> str:
    return f"{share:.2f}".lstrip("0") if 0 < share < 1 else f"{share:.0f}"


def similarity(learned) -> Figure:
    """Similarity of the tasks' policies in %: 1 − mean difference of the probabilities."""
    names = list(learned.run)
    values = [[100 * learned.similarity(a, b) for b in names] for a in names]
    low = min(map(min, values))
    low = math.floor(low / 10) * 10 if low < 100 else 90
    title = "which tasks have similar policies"
    return pair_map(names, values, low, 0.6, "similarity of policies, %", title, lambda a, b: f"{values[a][b]:.0f}")


def runs(points: Mapping[str, Sequence[tuple[float, float]]]) -> Figure:
    """Δ_T against the share of blocks that tasks run, one point per run and a cross at the mean.

    Args:
        points: by name of a policy or method, (executed blocks in percent, Δ_T in percent) of each run.
    """
    figure = new_figure(7, 4.4)
    axes = figure.add_subplot()
    for color, (name, own) in zip(cycle(LINES), points.items(), strict=False):
        across, up = [x for x, _ in own], [y for _, y in own]
        axes.plot(across, up, "o", color=color, alpha=0.6, label=name)
        if len(own) > 1:
            axes.plot(sum(across) / len(own), sum(up) / len(own), "+", color=color, markersize=14)
    axes.axhline(0, color=BORDER, linewidth=0.8)
    if len(points) > 1:
        axes.legend(frameon=False, fontsize=8)
    axes.margins(0.15)
    axes.set_xlabel("blocks that tasks run, %")
    axes.set_ylabel("Δ_T against single-task networks, %")
    axes.spines[["top", "right"]].set_visible(False)
    return figure
