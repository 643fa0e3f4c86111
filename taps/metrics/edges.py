"""ODS-F: the F-measure of predicted edges at the best threshold of the whole data set (Martin et al., PAMI 2004).

PASCAL-Context and NYUDv2 report it from MATLAB programs. As in these, a predicted pixel is correct if it can be matched
one-to-one with a labelled pixel within a tolerance, so that F at a threshold needs a maximum matching. A single pass answers
all thresholds: the sets of pixels that can be matched together form a matroid, so that pixels can be added greedily in order
of decreasing probability, and a pixel without a partner never gets one later.

The published programs leave two choices open. Here predictions are reduced to their ridges before thresholds are applied
(like the non-maximum suppression of Structured Edges, PAMI 2015), and labels are thinned (Guo and Hall, CACM 1989, as MATLAB's
``bwmorph(mask, "thin", inf)``).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy.ndimage import gaussian_filter, map_coordinates
from scipy.spatial import KDTree
from skimage.morphology import thin
from torch import Tensor
from torchmetrics import Metric

from taps.data.multi_label import Task

_LEVELS = 99  # thresholds k / 100, k = 1..99


def ridges(probability: np.ndarray) -> np.ndarray:
    """Ridges of a map (H, W), one pixel wide, as booleans (H, W): local maxima across the line, thinned."""
    values = probability.astype(np.float64)
    across, down, mixed = (gaussian_filter(values, 2.0, order) for order in ((0, 2), (2, 0), (1, 1)))
    # the direction of the smallest second derivative is orthogonal to that of the largest
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
    """The labelled pixels within a distance of each predicted pixel.

    Args:
        predicted: (N, 2), rows and columns.
        labelled: (H, W), booleans.
        tolerance: distance in pixels.

    Returns:
        In the format of a sparse CSR matrix: the start of each predicted pixel's part of the second array (N + 1), and indices of
        labelled pixels in row-major order.
    """
    if not len(predicted) or not labelled.any():
        return np.zeros(len(predicted) + 1, np.int64), np.zeros(0, np.int64)
    trees = KDTree(predicted), KDTree(np.argwhere(labelled))
    near = trees[0].sparse_distance_matrix(trees[1], tolerance, output_type="coo_matrix").tocsr()
    return near.indptr, near.indices


def match_in_order(starts: np.ndarray, choices: np.ndarray, count: int) -> np.ndarray:
    """Whether each pixel, added in order, enlarges the maximum one-to-one matching.

    Args:
        starts, choices: from :func:`partners`.
        count: number of labelled pixels.

    Returns:
        (N,), booleans; the number of ``True`` among the first n is the size of the maximum matching of the first n pixels.
    """
    ends, options = starts.tolist(), choices.tolist()
    owner, partner = [-1] * count, [-1] * len(starts)
    seen = [-1] * count  # last pixel whose search reached this one
    closed = len(starts)  # marks pixels of failed searches, which later searches cannot free either
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
        while free >= 0:  # augment: each pixel on the path passes its partner on to the previous one
            one = came[free]
            owner[free], partner[one], free = one, free, partner[one]
    return found


def edge_counts(probability: np.ndarray, labelled: np.ndarray, known: np.ndarray, tolerance: float) -> np.ndarray:
    """Numbers of matched, predicted and labelled pixels of an image at every threshold.

    Args:
        probability: (H, W), 0..1.
        labelled: (H, W), booleans, labelled edges, which are thinned here.
        known: (H, W), booleans, pixels that have a label.
        tolerance: relative to the diagonal of the known part.

    Returns:
        (3, 99); column k − 1 belongs to the threshold k / 100.
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
    """``ods_f`` in percent: the largest F = 2·P·R / (P + R) over 99 thresholds, with precision P and recall R over all images.

    F is not interpolated between thresholds. The task's ``tolerance`` is the largest distance of a match.
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
