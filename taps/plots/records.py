"""Figures of predictions for hospital stays and for subjects."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from scipy.special import expit

from taps.metrics.losses import STAY_BINS
from taps.plots.style import BORDER, TUNED, bare, new_figure, write_cells

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TRUE, _PREDICTED = BORDER, TUNED
_TITLES = {"ihm": "dies in hospital", "decomp": "dies within 24 hours", "los": "remaining days", "pheno": "phenotypes"}


def stays(samples: Sequence[Mapping], tasks: Sequence[str]) -> Figure:
    """Labels and predictions by hour for stays × tasks; of phenotypes those at the end of the stay.

    Args:
        samples: dicts of ``name``, ``hours``, and by task ``targets`` and ``predicted`` (C, T) tensors.
        tasks: the tasks, in order.
    """
    from matplotlib.lines import Line2D

    figure = new_figure(3.2 * len(tasks) + 0.4, 1.7 * len(samples) + 0.6)
    grid = figure.subplots(len(samples), len(tasks), squeeze=False)
    for line, stay in zip(grid, samples, strict=True):
        for axes, task in zip(line, tasks, strict=True):
            target, output = stay["targets"][task].numpy(), stay["predicted"][task].numpy()
            hours = np.arange(min(math.ceil(stay["hours"]), target.shape[-1]))
            draw = {"pheno": _phenotypes, "los": _remaining}.get(task, _hourly)
            draw(axes, target, output, hours)
            axes.tick_params(labelsize=6, length=2)
            axes.spines[["top", "right"]].set_visible(False)
        line[0].set_ylabel(stay["name"], fontsize=7)
    for task, first, last in zip(tasks, grid[0], grid[-1], strict=True):
        first.set_title(_TITLES.get(task, task), fontsize=9, loc="left")
        if task != "pheno":
            last.set_xlabel("hour", fontsize=7)
    lines = [Line2D([], [], color=color, linewidth=2) for color in (_TRUE, _PREDICTED)]
    figure.legend(lines, ["true", "predicted"], loc="outside upper right", ncols=2, fontsize=8, frameon=False)
    return figure


def _phenotypes(axes, target: np.ndarray, output: np.ndarray, hours: np.ndarray) -> None:
    labelled = np.flatnonzero(np.isfinite(target[0]))
    hour = int(labelled[0]) if len(labelled) else 0
    present = np.flatnonzero(target[:, hour] == 1)
    axes.bar(np.arange(len(output)), expit(output[:, hour]), color=_PREDICTED, width=0.75)
    axes.plot(present, np.full(len(present), 1.08), "v", color=_TRUE, markersize=4)
    axes.set_ylim(0, 1.2)
    axes.set_xticks([])


def _remaining(axes, target: np.ndarray, output: np.ndarray, hours: np.ndarray) -> None:
    ends = np.array([0.0, *STAY_BINS, 2 * STAY_BINS[-1]]) / 24
    chosen = output.argmax(0)[hours]
    axes.fill_between(hours, ends[chosen], ends[chosen + 1], step="mid", color=_PREDICTED, alpha=0.35, linewidth=0)
    axes.plot(hours, target[hours] / 24, color=_TRUE, linewidth=1.5)
    axes.set_ylim(0, max(np.nanmax(target[hours], initial=0) / 24 * 1.5, 2))


def _hourly(axes, target: np.ndarray, output: np.ndarray, hours: np.ndarray) -> None:
    labelled = np.flatnonzero(np.isfinite(target[0]))
    single, probability = len(labelled) == 1, expit(output[0])
    if len(labelled) == 0:
        axes.text(0.5, 0.5, "not asked", transform=axes.transAxes, ha="center", fontsize=7, color=_TRUE)
    elif single:
        axes.bar(labelled, probability[labelled], color=_PREDICTED, width=4)
    else:
        axes.plot(hours, probability[hours], color=_PREDICTED, linewidth=1.5)
    axes.plot(labelled, target[0, labelled], "o" if single else "-", color=_TRUE, linewidth=1.5, markersize=5)
    axes.set_xlim(-0.04 * len(hours), 1.04 * len(hours))
    axes.set_ylim(-0.05, 1.05)


def subjects(pairs: Mapping[str, Sequence[tuple[float, float]]], names: Mapping[str, Sequence[str]]) -> Figure:
    """Labels against predictions for every target: points for numbers, confusion matrices for categories.

    Args:
        pairs: by target, (label, prediction) of each subject; categories as indices.
        names: by target, names of the categories, empty for numbers.
    """
    figure = new_figure(2.9 * len(pairs) + 0.3, 3.1)
    for axes, (task, own) in zip(figure.subplots(1, len(pairs), squeeze=False)[0], pairs.items(), strict=True):
        true, predicted = np.array(own, float).T if own else np.zeros((2, 0))
        axes.set_title(task, fontsize=9, loc="left")
        axes.set_xlabel("true", fontsize=8)
        axes.set_ylabel("predicted", fontsize=8)
        axes.tick_params(labelsize=7)
        if not names[task]:
            ends = [min(true.min(), predicted.min()), max(true.max(), predicted.max())] if own else [0, 1]
            axes.plot(ends, ends, color=_TRUE, linewidth=1)
            axes.plot(true, predicted, ".", color=_PREDICTED, markersize=4, alpha=0.6)
            axes.set_aspect("equal", adjustable="datalim")
            continue
        count = len(names[task])
        table = np.zeros((count, count))
        np.add.at(table, (predicted.astype(int), true.astype(int)), 1)
        shares = table / np.maximum(table.sum(0, keepdims=True), 1)
        axes.imshow(shares, cmap="Oranges", vmin=0, vmax=1.15, origin="lower")
        axes.set_xticks(range(count), names[task])
        axes.set_yticks(range(count), names[task])
        if count <= 12:
            write_cells(axes, shares, lambda row, column, shares=shares: f"{100 * shares[row, column]:.0f} %", 0.7)
        bare(axes)
    return figure
