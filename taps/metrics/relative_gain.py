"""Comparison of multi-task results: relative gains and Δ_T of AdaShare (NeurIPS 2020, §4), and a score to choose epochs by."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from taps.data.multi_label import ALSO

#: metrics by task and name
Metrics = dict[str, dict[str, float]]

LOWER_IS_BETTER = frozenset(
    (
        "mean_angle",
        "median_angle",
        "rmse_angle",
        "abs_error",
        "rel_error",
        "rmse",
        "error",
        "cross_entropy",
        "mad",
        "mae",
    )
)
#: metrics that do not count for Δ_T: the published tables lack the first two, and relative gains of an R² near 0 are unbounded
NOT_COUNTED = frozenset({"rmse", "rmse_angle", "r2"})
_FLOORS = {"kappa": 0.1, "max_f": 1.0, "ods_f": 1.0}  # smaller values differ between epochs by chance alone


def counted(names: Iterable[str]) -> list[str]:
    """The metrics of a task that count for Δ_T and for the choice of epochs.

    If some have the prefix :data:`taps.data.multi_label.ALSO`, these are the others, the headline metrics of the task's benchmark;
    else all that are not in :data:`NOT_COUNTED`, or all if none would be left.
    """
    own = list(names)
    headline = [name for name in own if not name.startswith(ALSO)]
    return headline if len(headline) < len(own) else [name for name in own if name not in NOT_COUNTED] or own


def relative_gain(metrics: Mapping[str, float], reference: Mapping[str, float]) -> float:
    """Δ_{T_i} in percent: the mean over a task's metrics of (−1)^{l_j} (M_j − M_j^{single}) / M_j^{single} · 100, where l_j = 1
    if lower is better (AdaShare §4)."""
    gains = []
    for name in counted(metrics):
        value = metrics[name]
        if reference.get(name) and not math.isnan(value) and not math.isnan(reference[name]):
            gain = (value - reference[name]) / abs(reference[name])
            gains.append(-gain if name in LOWER_IS_BETTER else gain)
    return 100.0 * sum(gains) / len(gains) if gains else math.nan


def delta_t(metrics: Mapping[str, Mapping[str, float]], reference: Mapping[str, Mapping[str, float]]) -> float:
    """Δ_T in percent: the mean of :func:`relative_gain` over the tasks for which it is defined."""
    gains = [relative_gain(own, reference[task]) for task, own in metrics.items()]
    known = [gain for gain in gains if not math.isnan(gain)]
    return sum(known) / len(known) if known else math.nan


def score(metrics: Mapping[str, Mapping[str, float]]) -> float:
    """A number to compare epochs by (higher is better): the mean over tasks of the mean over metrics of ±log M.

    A difference of 0.01 is a gain of about 1 % relative to any reference.
    """
    means = []
    for own in metrics.values():
        values = [
            (-1.0 if name in LOWER_IS_BETTER else 1.0) * math.log(max(own[name], _FLOORS.get(name, 1e-3)))
            for name in counted(own)
            if not math.isnan(own[name])
        ]
        means.append(sum(values) / max(len(values), 1))
    return sum(means) / len(means)


def mean_metrics(rows: Sequence[Metrics]) -> Metrics:
    """The mean of several results."""
    return {
        task: {name: sum(row[task][name] for row in rows) / len(rows) for name in own} for task, own in rows[0].items()
    }
