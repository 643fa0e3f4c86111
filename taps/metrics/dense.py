"""Metrics of dense predictions, accumulated over a data set in which all pixels count alike.

Each kind of task has one metric, which takes batches of predictions and labels at the labels' size and computes a dict of
numbers. With ``published=True`` it follows the published programs (AdaShare, ASTMT, ATRC, InvPT) where they differ; every
difference is described in the class's docstring and in ``docs/metrics.md``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import normalize
from torchmetrics import Metric
from torchmetrics.classification import MulticlassConfusionMatrix

from taps.data.multi_label import IGNORE_INDEX, Task
from taps.metrics.edges import EdgeMetrics
from taps.metrics.losses import make_loss
from taps.metrics.records import METERS, Meter

_ANGLES = (11.25, 22.5, 30.0)
_BINS = 18000  # of 0.01° each
_BETA_SQUARED = 0.3  # weight of precision against recall, as usual for saliency


class _Sums(Metric):
    """A metric whose states are sums in float64.

    Args:
        published: follow the published programs.
        **sizes: length of each state by name.
    """

    def __init__(self, published: bool, **sizes: int) -> None:
        super().__init__()
        self.published = published
        for name, size in sizes.items():
            self.add_state(name, torch.zeros(size, dtype=torch.float64), dist_reduce_fx="sum")

    def _add(self, name: str, *values: Tensor | float) -> None:
        state = getattr(self, name)
        state += torch.stack([torch.as_tensor(value).to(state) for value in values])


class ClassMetrics(_Sums):
    """``miou`` and ``pixel_accuracy`` in percent, from the confusion matrix of the whole data set.

    The mean IoU is over all classes that are labelled or predicted anywhere. Published: over classes with at least one correct
    pixel, so that a class that is always missed is ignored; and the accuracy is the mean of the batches' accuracies weighted
    by their number of images, for CityScapes with unlabelled pixels counted as wrong. Published for Taskonomy: only
    ``cross_entropy``, the weighted loss. Published for PASCAL-Context and NYUDv2: the mean is over all classes, even absent
    ones.
    """

    def __init__(self, task: Task, published: bool = False) -> None:
        super().__init__(published, totals=3)
        self.task = task
        self.confusion = MulticlassConfusionMatrix(task.channels, ignore_index=IGNORE_INDEX)
        self.cross_entropy = published and "cross_entropy" in task.published

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """``prediction`` (B, C, H, W), ``target`` (B, H, W)."""
        chosen = prediction.argmax(1)
        self.confusion.update(chosen, target)
        known = target != IGNORE_INDEX
        pixels = known.numel() if "void" in self.task.published else known.sum().clamp(min=1)
        right = (chosen == target)[known].sum() / pixels
        loss = make_loss(self.task)(prediction, target).double() if self.cross_entropy else 0.0
        self._add("totals", loss * len(target), right.double() * len(target), len(target))

    def compute(self) -> dict[str, float]:
        loss, batch_accuracy, images = self.totals.tolist()
        if self.cross_entropy:
            return {"cross_entropy": loss / max(images, 1)}
        matrix = self.confusion.compute().double()
        right, labelled, predicted = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
        union = labelled + predicted - right
        every = self.published and "every_class" in self.task.published
        counts = torch.ones_like(union, dtype=torch.bool) if every else right > 0 if self.published else union > 0
        miou = float((right[counts] / union[counts].clamp(min=1)).mean()) if counts.any() else 0.0
        accuracy = float(right.sum() / matrix.sum().clamp(min=1))
        if self.published and not every:
            accuracy = batch_accuracy / max(images, 1)
        return {"miou": 100 * miou, "pixel_accuracy": 100 * accuracy}

    def reset(self) -> None:
        super().reset()
        self.confusion.reset()


class NormalMetrics(_Sums):
    """Angles in degrees between predicted and labelled normals: ``mean_angle``, ``median_angle`` (to 0.01°), ``rmse_angle``,
    and the percentages ``within_11.25``, ``within_22.5`` and ``within_30``.

    Published: angles between the encoded vectors (n + 1)/2, which are smaller because these lie in one octant. Published for
    Taskonomy: only ``cosine``, the mean over all pixels.
    """

    def __init__(self, task: Task, published: bool = False) -> None:
        super().__init__(published, cosines=1, histogram=_BINS, sums=6)
        self.cosine = published and "cosine" in task.published

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """``prediction`` (B, 3, H, W) of any length, ``target`` (B, 3, H, W)."""
        valid = target.isfinite().all(1)
        a, b = (normalize(own.double().movedim(1, -1)[valid], dim=-1) for own in (prediction, target))
        self._add("cosines", (a * b).sum())
        if self.published:
            a, b = normalize(a + 1, dim=-1), normalize(b + 1, dim=-1)
        # the arc cosine of a small angle would lose half of the digits
        angles = 2 * torch.rad2deg(torch.atan2((a - b).norm(dim=-1), (a + b).norm(dim=-1)))
        bins = (angles * (_BINS / 180.0)).long().clamp(max=_BINS - 1)
        self.histogram += torch.bincount(bins, minlength=_BINS).to(self.histogram)
        within = [(angles < limit).sum() for limit in _ANGLES]
        self._add("sums", len(angles), angles.sum(), (angles**2).sum(), *within)

    def compute(self) -> dict[str, float]:
        count, total, squares, *within = self.sums.tolist()
        if self.cosine:
            return {"cosine": float(self.cosines) / max(count, 1.0)}
        if not count:
            return dict.fromkeys(("mean_angle", "median_angle", "rmse_angle"), math.nan)
        half = int((self.histogram.cumsum(0) < (count + 1) // 2).sum())
        return {
            "mean_angle": total / count,
            "median_angle": (half + 0.5) * 180.0 / _BINS,
            "rmse_angle": math.sqrt(squares / count),
            **{f"within_{limit:g}": 100 * own / count for limit, own in zip(_ANGLES, within, strict=True)},
        }


class DepthMetrics(_Sums):
    """``abs_error``, ``rel_error`` = mean |p − g| / g and ``rmse``, and ``delta_1`` to ``delta_3``, the percentages of pixels with
    max(p/g, g/p) < 1.25^k; predictions that are not positive count as wrong.

    Published: negative predictions count as right, and the errors are means of the batches' means, weighted by their images.
    """

    def __init__(self, published: bool = False) -> None:
        super().__init__(published, sums=7, batches=3)

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """``prediction`` and ``target`` (B, 1, H, W)."""
        valid = target.isfinite()
        p, g = prediction.double()[valid], target.double()[valid]
        error = (p - g).abs()
        ratio = torch.maximum(p / g, g / p)
        good = torch.ones_like(p, dtype=torch.bool) if self.published else p > 0
        within = [((ratio < 1.25**power) & good).sum() for power in (1, 2, 3)]
        self._add("sums", len(p), error.sum(), (error / g).sum(), (error**2).sum(), *within)
        if len(p):
            self._add("batches", len(target), error.mean() * len(target), (error / g).mean() * len(target))

    def compute(self) -> dict[str, float]:
        count, error, relative, squares, *within = self.sums.tolist()
        if not count:
            return dict.fromkeys(("abs_error", "rel_error", "rmse"), math.nan)
        batches, batch_error, batch_relative = self.batches.tolist()
        return {
            "abs_error": batch_error / batches if self.published else error / count,
            "rel_error": batch_relative / batches if self.published else relative / count,
            "rmse": math.sqrt(squares / count),
            **{f"delta_{power}": 100 * share / count for power, share in enumerate(within, 1)},
        }


class MapMetrics(_Sums):
    """``error``: the mean absolute error of a map of keypoints or edges. Published: the mean of the batches' means, weighted by
    their images."""

    def __init__(self, published: bool = False) -> None:
        super().__init__(published, sums=4)

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """``prediction`` and ``target`` (B, 1, H, W)."""
        error = (prediction.double() - target.double())[target.isfinite()].abs()
        if len(error):
            self._add("sums", len(error), error.sum(), len(target), error.mean() * len(target))

    def compute(self) -> dict[str, float]:
        count, error, batches, means = self.sums.tolist()
        if not count:
            return {"error": math.nan}
        return {"error": means / batches if self.published else error / count}


class SaliencyMetrics(_Sums):
    """``max_f`` in percent: the largest F = (1 + β²)·P·R / (β²·P + R), β² = 0.3, over the thresholds k / 255, k = 0..255, of the
    foreground's probability, with precision P and recall R over all pixels of the data set.

    Published (ASTMT, ATRC, InvPT): thresholds 0.05, 0.1, … 0.95 of the *sigmoid of the probability*, which lies in 0.5..0.731, so
    that only probabilities of at least 0, 0.20, 0.41, 0.62 and 0.85 are distinguished.
    """

    def __init__(self, published: bool = False) -> None:
        thresholds = torch.arange(1, 20) * 0.05 if published else torch.arange(256) / 255.0
        # numbers of foreground and background pixels by the number of thresholds that they reach
        super().__init__(published, right=len(thresholds) + 1, other=len(thresholds) + 1)
        self.register_buffer("thresholds", thresholds, persistent=False)

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """``prediction`` (B, 2, H, W), ``target`` (B, H, W) of 0 and 1."""
        known = target != IGNORE_INDEX
        probability = prediction.float().softmax(1)[:, 1][known]
        compared = probability.sigmoid() if self.published else probability
        reached = torch.bucketize(compared, self.thresholds.to(compared), right=True)
        foreground = target[known] == 1
        for state, chosen in ((self.right, foreground), (self.other, ~foreground)):
            state += torch.bincount(reached[chosen], minlength=len(state)).to(state)

    def compute(self) -> dict[str, float]:
        if not self.right.any():
            return {"max_f": math.nan}
        right, other = (state.flip(0).cumsum(0).flip(0)[1:] for state in (self.right, self.other))
        predicted, labelled = right + other, self.right.sum()
        # F with P = right / predicted and R = right / labelled
        scores = (1.0 + _BETA_SQUARED) * right / (_BETA_SQUARED * labelled + predicted)
        return {"max_f": 100 * float(scores.max())}


def make_metric(task: Task, published: bool = False) -> Metric | Meter:
    """The metric for a task's kind."""
    published = published and "exact" not in task.published
    if task.kind in METERS:
        return METERS[task.kind](task)
    if task.kind == "edges":
        return EdgeMetrics(task)
    if task.kind in ("classes", "normals"):
        return {"classes": ClassMetrics, "normals": NormalMetrics}[task.kind](task, published)
    return {"saliency": SaliencyMetrics, "depth": DepthMetrics, "disparity": DepthMetrics}.get(task.kind, MapMetrics)(
        published
    )
