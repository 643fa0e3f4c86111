"""How well predicted edges follow labelled ones: the F-measure of one-pixel lines at the data set's best threshold (ODS-F).

The measure of boundary detection (Martin et al., PAMI 2004), which PASCAL-Context and NYUDv2 report from MATLAB programs. As
there, a predicted pixel is right if a labelled pixel within a tolerance is its own alone, so that F at a threshold needs a
largest one-to-one matching. All thresholds are answered by one matching: the sets of pixels that can be matched together
are a matroid, so that pixels may be taken greedily, the surest first, and a pixel that finds no partner then never finds one.

Where the published programs leave a choice: predictions are brought to their ridges before thresholds are applied (as with
the non-maximum suppression of Structured Edges, PAMI 2015), and labels are thinned.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy.ndimage import gaussian_filter, map_coordinates
from torch import Tensor
from torchmetrics import Metric

from taps.data.shared import Task
from taps.data.thinning import thin

#: of the thresholds k / 100, k = 1..99
_LEVELS = 99


def ridges(probability: np.ndarray) -> np.ndarray:
    """Where a map has a ridge, one pixel wide: not lower than a pixel to either side across the line, and thinned.

    Args:
        probability: (H, W).

    Returns:
        (H, W) of booleans.
    """
    values = probability.astype(np.float64)
    across, down, mixed = (gaussian_filter(values, 2.0, order) for order in ((0, 2), (2, 0), (1, 1)))
    # the direction of the strongest bend downwards is at right angles to that of the largest second derivative
    angle = 0.5 * np.arctan2(2.0 * mixed, across - down) + math.pi / 2
    rows, columns = np.nonzero(values > 0)
    down, across = np.sin(angle[rows, columns]), np.cos(angle[rows, columns])
    kept = np.ones(len(rows), bool)
    for side in (1.0, -1.0):
        beside = map_coordinates(values, [rows + side * down, columns + side * across], order=1, mode="nearest")
        kept &= values[rows, columns] >= beside - 1e-7
    mask = np.zeros(probability.shape, bool)
    mask[rows[kept], columns[kept]] = True
    return thin(mask)


def partners(predicted: np.ndarray, labelled: np.ndarray, tolerance: float) -> tuple[np.ndarray, np.ndarray]:
    """For each predicted pixel the labelled ones within a distance, the nearest first.

    Args:
        predicted: (N, 2), rows and columns.
        labelled: (H, W) of booleans.
        tolerance: distance in pixels.

    Returns:
        Starts (N + 1) of each pixel's part of the second array, and numbers of labelled pixels in row-major order.
    """
    reach = int(tolerance)
    places = [
        (y, x) for y in range(-reach, reach + 1) for x in range(-reach, reach + 1) if math.hypot(y, x) <= tolerance
    ]
    places.sort(key=lambda place: math.hypot(*place))
    numbers = np.full(np.add(labelled.shape, 2 * reach), -1, np.int32)
    numbers[reach : reach + labelled.shape[0], reach : reach + labelled.shape[1]][labelled] = np.arange(labelled.sum())
    rows, columns = predicted[:, 0] + reach, predicted[:, 1] + reach
    found = np.stack([numbers[rows + y, columns + x] for y, x in places], 1)
    there = found >= 0
    return np.concatenate([[0], there.sum(1).cumsum()]), found[there]


def match_in_order(starts: np.ndarray, choices: np.ndarray, count: int) -> np.ndarray:
    """Which of the pixels, taken in order, enlarge the largest one-to-one matching of those before them.

    Args:
        starts, choices: as :func:`partners` gives them.
        count: number of labelled pixels.

    Returns:
        (N,) of booleans; of every first part of the pixels the largest matching has as many pairs as that part has ``True``.
    """
    ends, options = starts.tolist(), choices.tolist()
    owner, partner = [-1] * count, [-1] * len(starts)
    seen = [-1] * count  # the pixel whose search came here last
    closed = len(starts)  # of what was reached in vain: nothing there can be freed by later pixels either
    found = np.zeros(len(starts) - 1, bool)
    for pixel in range(len(starts) - 1):
        waiting, came = [pixel], {}
        free = -1
        for one in waiting:
            own = options[ends[one] : ends[one + 1]]
            free = next((other for other in own if owner[other] < 0), -1)
            if free >= 0:
                came[free] = one
                break
            for other in own:
                if seen[other] != pixel and seen[other] != closed:
                    seen[other] = pixel
                    came[other] = one
                    waiting.append(owner[other])
        if free < 0:
            for other in came:
                seen[other] = closed
            continue
        found[pixel] = True
        while free >= 0:  # each pixel on the way gives its partner to the one before
            one = came[free]
            owner[free], partner[one], free = one, free, partner[one]
    return found


def edge_counts(probability: np.ndarray, labelled: np.ndarray, known: np.ndarray, tolerance: float) -> np.ndarray:
    """Pairs, predicted pixels and labelled pixels of an image at every threshold.

    Args:
        probability: (H, W), 0..1.
        labelled: (H, W) of booleans, the labelled edges; thinned here.
        known: (H, W) of booleans, where there is a label.
        tolerance: in diagonals of the part that is known.

    Returns:
        (3, 99); column k − 1 is of the threshold k / 100.
    """
    if not known.any():
        return np.zeros((3, _LEVELS))
    rows, columns = (np.flatnonzero(known.any(axis)) for axis in (1, 0))
    part = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    labelled, known = thin(labelled[part]), known[part]
    probability = np.nan_to_num(probability[part].astype(np.float64))
    level = np.floor(probability * (_LEVELS + 1) + 1e-6).astype(np.int64).clip(0, _LEVELS)
    reach, total = tolerance * math.hypot(*known.shape), int(labelled.sum())
    predicted = np.argwhere(ridges(np.where(level > 0, probability, 0.0)) & known)
    predicted = predicted[np.argsort(-level[tuple(predicted.T)], kind="stable")]
    levels = level[tuple(predicted.T)]
    matched = match_in_order(*partners(predicted, labelled, reach), total)

    def at_least(own: np.ndarray) -> np.ndarray:
        return np.bincount(own, minlength=_LEVELS + 1)[::-1].cumsum()[::-1][1:]

    return np.stack([at_least(levels[matched]), at_least(levels), np.full(_LEVELS, total)]).astype(np.float64)


class EdgeMetrics(Metric):
    """``ods_f`` in percent: the largest F = 2·P·R / (P + R) over 99 thresholds, each with the precision P and the recall R of all
    images together.

    F is not interpolated between thresholds. The task's ``tolerance`` is that of a match.
    """

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.tolerance = task.tolerance
        self.add_state("counts", torch.zeros(3, _LEVELS, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """``prediction`` logits (B, 1, H, W), ``target`` (B, 1, H, W) of 0 and 1, NaN for none."""
        probability, labels = prediction.detach().sigmoid().cpu().numpy(), target.cpu().numpy()
        for own, label in zip(probability[:, 0], labels[:, 0], strict=True):
            counts = edge_counts(own, label > 0.5, np.isfinite(label), self.tolerance)
            self.counts += torch.from_numpy(counts).to(self.counts)

    def compute(self) -> dict[str, float]:
        pairs, predicted, labelled = self.counts
        if not labelled.any():
            return {"ods_f": math.nan}
        return {"ods_f": 100 * float((2 * pairs / (predicted + labelled)).max())}
