"""Pictures of what networks answer about stays and subjects."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from taps.losses import STAY_BINS
from taps.plots import bare, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ASKED, _ANSWERED = "#8793a3", "#d9542b"
_TITLES = {
    "ihm": "dies in hospital",
    "decomp": "dies within 24 hours",
    "los": "remaining days",
    "pheno": "phenotypes",
}


def stays(shown: Sequence[Mapping], tasks: Sequence[str]) -> Figure:
    """Stays × tasks: over the hours what is true and what is answered; phenotypes as two rows of dots.

    Args:
        shown: dicts of ``name``, ``hours``, and by task ``targets`` and ``predicted``, as benchmarks give them.
        tasks: the tasks, in order.
    """
    figure = new_figure(3.2 * len(tasks) + 0.4, 1.7 * len(shown) + 0.6)
    grid = figure.subplots(len(shown), len(tasks), squeeze=False)
    for row, (line, stay) in enumerate(zip(grid, shown, strict=True)):
        for axes, task in zip(line, tasks, strict=True):
            target, output = stay["targets"][task].numpy(), stay["predicted"][task].numpy()
            hours = np.arange(min(math.ceil(stay["hours"]), target.shape[-1]))
            if task == "pheno":
                _phenotypes(axes, target, output)
            elif task == "los":
                ends = np.array([0.0, *STAY_BINS, 2 * STAY_BINS[-1]]) / 24
                chosen = output.argmax(0)[hours]
                axes.fill_between(
                    hours, ends[chosen], ends[chosen + 1], step="mid", color=_ANSWERED, alpha=0.35, linewidth=0
                )
                axes.plot(hours, target[hours] / 24, color=_ASKED, linewidth=1.5)
                axes.set_ylim(0, max(np.nanmax(target[hours], initial=0) / 24 * 1.5, 2))
            else:
                asked = np.isfinite(target[0])
                where = np.flatnonzero(asked)
                answer = 1 / (1 + np.exp(-output[0]))
                if len(where) == 0:
                    axes.text(0.5, 0.5, "not asked", transform=axes.transAxes, ha="center", fontsize=7, color=_ASKED)
                elif len(where) == 1:
                    axes.bar(where, answer[where], color=_ANSWERED, width=4)
                else:
                    axes.plot(hours, answer[hours], color=_ANSWERED, linewidth=1.5)
                axes.set_xlim(-0.04 * len(hours), 1.04 * len(hours))
                axes.plot(
                    where, target[0, asked], "o" if len(where) == 1 else "-", color=_ASKED, linewidth=1.5, markersize=5
                )
                axes.set_ylim(-0.05, 1.05)
            axes.tick_params(labelsize=6, length=2)
            for side in ("top", "right"):
                axes.spines[side].set_visible(False)
            if row == 0:
                axes.set_title(_TITLES.get(task, task), fontsize=9, loc="left")
            if row == len(shown) - 1 and task != "pheno":
                axes.set_xlabel("hour", fontsize=7)
        line[0].set_ylabel(stay["name"], fontsize=7)
    _legend(figure)
    return figure


def _phenotypes(axes, target: np.ndarray, output: np.ndarray) -> None:
    at = np.flatnonzero(np.isfinite(target[0]))
    hour = int(at[0]) if len(at) else 0
    answer = 1 / (1 + np.exp(-output[:, hour]))
    places = np.arange(len(answer))
    axes.bar(places, answer, color=_ANSWERED, width=0.75)
    axes.plot(
        places[target[:, hour] == 1], np.full(int((target[:, hour] == 1).sum()), 1.08), "v", color=_ASKED, markersize=4
    )
    axes.set_ylim(0, 1.2)
    axes.set_xticks([])


def _legend(figure) -> None:
    from matplotlib.lines import Line2D

    lines = [Line2D([], [], color=color, linewidth=2) for color in (_ASKED, _ANSWERED)]
    figure.legend(lines, ["true", "answered"], loc="outside upper right", ncols=2, fontsize=8, frameon=False)


def subjects(pairs: Mapping[str, Sequence[tuple[float, float]]], names: Mapping[str, Sequence[str]]) -> Figure:
    """For every target what is true against what is answered: numbers as points, categories as shares of each true one.

    Args:
        pairs: by target, (true, answered) of each subject; categories by index.
        names: of the categories; empty for numbers.
    """
    figure = new_figure(2.9 * len(pairs) + 0.3, 3.1)
    for axes, (task, own) in zip(figure.subplots(1, len(pairs), squeeze=False)[0], pairs.items(), strict=True):
        true, answered = np.array(own, float).T if own else np.zeros((2, 0))
        axes.set_title(task, fontsize=9, loc="left")
        axes.set_xlabel("true", fontsize=8)
        axes.set_ylabel("answered", fontsize=8)
        axes.tick_params(labelsize=7)
        if not names[task]:
            ends = [min(true.min(), answered.min()), max(true.max(), answered.max())] if own else [0, 1]
            axes.plot(ends, ends, color=_ASKED, linewidth=1)
            axes.plot(true, answered, ".", color=_ANSWERED, markersize=4, alpha=0.6)
            axes.set_aspect("equal", adjustable="datalim")
            continue
        count = len(names[task])
        table = np.zeros((count, count))
        np.add.at(table, (answered.astype(int), true.astype(int)), 1)
        shares = table / np.maximum(table.sum(0, keepdims=True), 1)
        axes.imshow(shares, cmap="Oranges", vmin=0, vmax=1.15, origin="lower")
        axes.set_xticks(range(count), names[task])
        axes.set_yticks(range(count), names[task])
        if count <= 12:
            for row, column in np.ndindex(count, count):
                share = shares[row, column]
                color = "white" if share > 0.7 else "black"
                axes.text(column, row, f"{100 * share:.0f} %", ha="center", va="center", fontsize=7, color=color)
        bare(axes)
    return figure
