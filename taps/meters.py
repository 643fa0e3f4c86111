"""What is measured of maps, streamed over a data set.

Each kind of task has one metric object that takes batches of predictions and labels at the labels' size and gives a dict
of numbers. All pixels of the data set count alike. ``published=True`` repeats the arithmetic of the published programs where
it differs; every difference is named in the class's docstring and in ``docs/metrics.md``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import normalize
from torchmetrics import Metric
from torchmetrics.classification import MulticlassConfusionMatrix

from taps.contours import EdgeMetrics
from taps.data.shared import VOID, Task
from taps.losses import class_loss
from taps.record_meters import METERS, Meter

_ANGLES = (11.25, 22.5, 30.0)
_BINS = 18000  # of 0.01° each
_BETA_SQUARED = 0.3  # how much more precision weighs than recall, as usual for saliency


class ClassMetrics(Metric):
    """``miou`` and ``pixel_accuracy`` in percent, from the confusion matrix of the whole data set.

    A class takes part in the mean if it is labelled or predicted anywhere. Published: only if some pixel of it is right,
    so that a class that is always missed does no harm; and accuracy is the mean of the batches' accuracies, weighted by
    their images, for CityScapes with unlabelled pixels as wrong ones. Published for Taskonomy: ``cross_entropy`` alone,
    the weighted loss. Published for PASCAL-Context and NYUDv2: the mean is over all classes, also those that are nowhere.
    """

    def __init__(self, task: Task, published: bool = False) -> None:
        super().__init__()
        self.published = published
        self.task = task
        self.confusion = MulticlassConfusionMatrix(task.channels, ignore_index=VOID)
        self.add_state("loss", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("accurate", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """``prediction`` (B, C, H, W), ``target`` (B, H, W)."""
        chosen = prediction.argmax(1)
        self.confusion.update(chosen, target)
        known = target != VOID
        of = known.numel() if "void" in self.task.published else known.sum().clamp(min=1)
        right = (chosen == target)[known].sum() / of
        self.accurate += right.double() * len(target)
        if self.published and "cross_entropy" in self.task.published:
            self.loss += class_loss(prediction.float(), target, self.task).double() * len(target)
        self.images += len(target)

    def compute(self) -> dict[str, float]:
        if self.published and "cross_entropy" in self.task.published:
            return {"cross_entropy": float(self.loss / self.images.clamp(min=1))}
        matrix = self.confusion.compute().double()
        right, labelled, predicted = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
        union = labelled + predicted - right
        every = self.published and "every_class" in self.task.published
        counts = torch.ones_like(union, dtype=torch.bool) if every else right > 0 if self.published else union > 0
        miou = float((right[counts] / union[counts].clamp(min=1)).mean()) if counts.any() else 0.0
        accuracy = float(right.sum() / matrix.sum().clamp(min=1))
        if self.published and not every:
            accuracy = float(self.accurate / self.images.clamp(min=1))
        return {"miou": 100 * miou, "pixel_accuracy": 100 * accuracy}

    def reset(self) -> None:
        super().reset()
        self.confusion.reset()


class NormalMetrics(Metric):
    """Angles in degrees between predicted and labelled normals: ``mean_angle``, ``median_angle`` (to 0.01°), ``rmse_angle``,
    and the percentages ``within_11.25``, ``within_22.5`` and ``within_30``.

    Published: angles between the encoded vectors (n + 1)/2, all of which lie in one octant, so that they look smaller.
    Published for Taskonomy: ``cosine`` alone, the mean over all pixels.
    """

    def __init__(self, task: Task, published: bool = False) -> None:
        super().__init__()
        self.published = published
        self.cosine = published and "cosine" in task.published
        self.add_state("cosines", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("histogram", torch.zeros(_BINS, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("sums", torch.zeros(6, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """``prediction`` (B, 3, H, W) of any length, ``target`` (B, 3, H, W)."""
        valid = target.isfinite().all(1)
        a = normalize(prediction.double().movedim(1, -1)[valid], dim=-1)
        b = normalize(target.double().movedim(1, -1)[valid], dim=-1)
        self.cosines += (a * b).sum().to(self.cosines)
        if self.published:
            a, b = normalize(a + 1, dim=-1), normalize(b + 1, dim=-1)
        # of small angles the arc cosine would lose half of the digits
        angles = 2 * torch.rad2deg(torch.atan2((a - b).norm(dim=-1), (a + b).norm(dim=-1)))
        bins = (angles * (_BINS / 180.0)).long().clamp(max=_BINS - 1)
        self.histogram += torch.bincount(bins, minlength=_BINS).to(self.histogram)
        within = [(angles < limit).sum() for limit in _ANGLES]
        self.sums += torch.stack([angles.new_tensor(len(angles)), angles.sum(), (angles**2).sum(), *within]).to(
            self.sums
        )

    def compute(self) -> dict[str, float]:
        count, total, squares, *within = self.sums.tolist()
        if self.cosine:
            return {"cosine": float(self.cosines) / max(count, 1.0)}
        if not count:
            return dict.fromkeys(("mean_angle", "median_angle", "rmse_angle"), math.nan)
        half = int((self.histogram.cumsum(0) < (count + 1) // 2).sum())
        shares = {f"within_{limit:g}": 100 * share / count for limit, share in zip(_ANGLES, within, strict=True)}
        return {
            "mean_angle": total / count,
            "median_angle": (half + 0.5) * 180.0 / _BINS,
            "rmse_angle": math.sqrt(squares / count),
            **shares,
        }


class DepthMetrics(Metric):
    """``abs_error`` and ``rel_error`` = mean abs(p − g)/g, ``rmse``, and ``delta_1``–``delta_3``, the percentages of pixels with
    max(p/g, g/p) < 1.25^k; a prediction that is not positive is wrong.

    Published: a negative prediction counts as right, and the errors are means of the batches' means.
    """

    def __init__(self, published: bool = False) -> None:
        super().__init__()
        self.published = published
        self.add_state("sums", torch.zeros(7, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("batches", torch.zeros(3, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """``prediction`` and ``target`` (B, 1, H, W)."""
        valid = target.isfinite()
        p, g = prediction.double()[valid], target.double()[valid]
        error = (p - g).abs()
        ratio = torch.maximum(p / g, g / p)
        good = torch.ones_like(p, dtype=torch.bool) if self.published else p > 0
        within = [((ratio < 1.25**power) & good).sum().double() for power in (1, 2, 3)]
        parts = [error.new_tensor(len(p)), error.sum(), (error / g).sum(), (error**2).sum(), *within]
        self.sums += torch.stack(parts).to(self.sums)
        if len(p):
            self.batches += torch.stack([error.new_tensor(1.0), error.mean(), (error / g).mean()]).to(self.batches)

    def compute(self) -> dict[str, float]:
        count, error, relative, squares, *within = self.sums.tolist()
        if not count:
            return dict.fromkeys(("abs_error", "rel_error", "rmse"), math.nan)
        batches, batch_error, batch_relative = self.batches.tolist()
        return {
            "abs_error": batch_error / batches if self.published else error / count,
            "rel_error": batch_relative / batches if self.published else relative / count,
            "rmse": math.sqrt(squares / count),
            **{f"delta_{power}": 100 * share / count for power, share in zip((1, 2, 3), within, strict=True)},
        }


class MapMetrics(Metric):
    """``error``: the mean absolute error of a map such as keypoints or edges. Published: the mean of the batches' means."""

    def __init__(self, published: bool = False) -> None:
        super().__init__()
        self.published = published
        self.add_state("sums", torch.zeros(4, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """``prediction`` and ``target`` (B, 1, H, W)."""
        valid = target.isfinite()
        error = (prediction.double() - target.double())[valid].abs()
        if len(error):
            parts = [error.new_tensor(len(error)), error.sum(), error.new_tensor(1.0), error.mean()]
            self.sums += torch.stack(parts).to(self.sums)

    def compute(self) -> dict[str, float]:
        count, error, batches, means = self.sums.tolist()
        if not count:
            return {"error": math.nan}
        return {"error": means / batches if self.published else error / count}


class SaliencyMetrics(Metric):
    """``max_f`` in percent: the largest F = (1 + β²)·P·R / (β²·P + R), β² = 0.3, over the thresholds k / 255, k = 0..255, of the
    foreground's probability; each with the precision P and the recall R of all pixels of the data set.

    Published (ASTMT, ATRC, InvPT): the thresholds 0.05, 0.1, … 0.95, which are compared with the *sigmoid of the probability*, a
    number in 0.5..0.731, so that only probabilities of at least 0, 0.20, 0.41, 0.62 and 0.85 are told apart.
    """

    def __init__(self, published: bool = False) -> None:
        super().__init__()
        self.published = published
        thresholds = torch.arange(1, 20) * 0.05 if published else torch.arange(256) / 255.0
        self.register_buffer("thresholds", thresholds, persistent=False)
        for name in (
            "right",
            "other",
        ):  # pixels of the foreground and of the background by the thresholds that they reach
            self.add_state(name, torch.zeros(len(thresholds) + 1, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """``prediction`` (B, 2, H, W), ``target`` (B, H, W) of 0 and 1."""
        known = target != VOID
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
        # (1 + β²)·P·R / (β²·P + R) with both fractions multiplied out
        scores = (1.0 + _BETA_SQUARED) * right / (_BETA_SQUARED * labelled + predicted)
        return {"max_f": 100 * float(scores.max())}


def make_metric(task: Task, published: bool = False) -> Metric | Meter:
    """The metric of a task's kind."""
    published = published and "exact" not in task.published
    if task.kind in METERS:
        return METERS[task.kind](task)
    if task.kind == "saliency":
        return SaliencyMetrics(published)
    if task.kind == "edges":
        return EdgeMetrics(task)
    if task.kind in ("classes", "normals"):
        return (ClassMetrics if task.kind == "classes" else NormalMetrics)(task, published)
    return (MapMetrics if task.kind == "map" else DepthMetrics)(published)
