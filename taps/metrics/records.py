"""Metrics of whole samples and of the hours of a stay, computed by scikit-learn over the whole data set at once.

They are those of the benchmarks: areas under curves, Cohen's kappa and mean absolute deviation of mimic3-benchmarks (Harutyunyan
et al., Scientific Data 2019); accuracy, balanced accuracy, R² and mean absolute error for subjects. Missing labels are
ignored.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from sklearn import metrics
from torch import Tensor

from taps.data.multi_label import IGNORE_INDEX, Task
from taps.errors import UserError
from taps.metrics.losses import stay_bins

#: hours that a predicted bin of remaining length of stay stands for, the means of the training stays (mimic3-benchmarks)
BIN_HOURS = np.array(
    [11.450379, 35.070846, 59.206531, 83.382723, 107.487817, 131.579534, 155.643957, 179.660558, 254.306624, 585.325890]
)


class Meter:
    """Collects predictions and labels; subclasses select the labelled ones and compute metrics."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.predictions: list[np.ndarray] = []
        self.targets: list[np.ndarray] = []

    def to(self, device) -> Meter:
        """Returns the meter itself, which collects in main memory."""
        return self

    def reset(self) -> None:
        self.predictions, self.targets = [], []

    def select(self, prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The labelled predictions and their labels, one per row."""
        raise NotImplementedError

    def measure(self, prediction: np.ndarray, target: np.ndarray) -> dict[str, float]:
        """The metrics by name."""
        raise NotImplementedError

    @torch.no_grad()
    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Add a batch of the head's outputs and labels.

        Raises:
            UserError: if an output is not finite.
        """
        if not prediction.isfinite().all():
            raise UserError(f"task {self.task.name}: the network's outputs are not finite; lower --lr")
        prediction, target = self.select(prediction, target)
        self.predictions.append(prediction.cpu().double().numpy())
        self.targets.append(target.cpu().numpy())

    def compute(self) -> dict[str, float]:
        """The metrics by name; NaN if the labels do not define them."""
        return self.measure(np.concatenate(self.predictions), np.concatenate(self.targets))


def area_under_roc(target: np.ndarray, score: np.ndarray) -> float:
    """Area under the ROC curve; NaN if all labels are equal."""
    return float(metrics.roc_auc_score(target, score)) if len(np.unique(target)) == 2 else math.nan


def area_under_precision_recall(target: np.ndarray, score: np.ndarray) -> float:
    """Area under the precision-recall curve by the trapezoidal rule, as in mimic3-benchmarks; NaN without positive labels."""
    if not target.any():
        return math.nan
    precision, recall, _ = metrics.precision_recall_curve(target, score)
    return float(metrics.auc(recall, precision))


class BinaryMeter(Meter):
    """Areas under curves in 0..1, for predictions and labels (B, C, *).

    One binary question: ``auc_roc`` and ``auc_pr``. Several: ``auc_macro``, the mean over the questions with positive and negative
    labels, and ``auc_micro``, over all labels together.
    """

    def select(self, prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        prediction, target = prediction.movedim(1, -1), target.movedim(1, -1)
        valid = target.isfinite().all(-1)
        return prediction[valid], target[valid]

    def measure(self, prediction: np.ndarray, target: np.ndarray) -> dict[str, float]:
        if self.task.channels == 1:
            answers, score = target[:, 0], prediction[:, 0]
            return {"auc_roc": area_under_roc(answers, score), "auc_pr": area_under_precision_recall(answers, score)}
        areas = [area_under_roc(target[:, index], prediction[:, index]) for index in range(self.task.channels)]
        known = [area for area in areas if not math.isnan(area)]
        macro = sum(known) / len(known) if known else math.nan
        return {"auc_macro": macro, "auc_micro": area_under_roc(target.ravel(), prediction.ravel())}


class DurationMeter(Meter):
    """Remaining hours in ten bins: ``kappa``, Cohen's kappa of the bins with linear weights, and ``mad``, the mean absolute
    deviation in hours of the bin's mean length. Predictions (B, 10, T), labels (B, T)."""

    def select(self, prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        valid = target.isfinite()
        return prediction.argmax(1)[valid], target[valid]

    def measure(self, prediction: np.ndarray, target: np.ndarray) -> dict[str, float]:
        if not len(target):
            return {"kappa": math.nan, "mad": math.nan}
        bins = stay_bins(torch.as_tensor(target)).numpy()
        chosen = prediction.astype(np.int64)
        constant = len(np.unique(np.concatenate([bins, chosen]))) == 1  # kappa would be 0 / 0
        kappa = math.nan if constant else float(metrics.cohen_kappa_score(bins, chosen, weights="linear"))
        return {"kappa": kappa, "mad": float(np.abs(BIN_HOURS[chosen] - target).mean())}


class CategoryMeter(Meter):
    """``accuracy`` and ``balanced_accuracy``, the mean recall of the categories, in percent. Predictions (B, C), labels (B,)."""

    def select(self, prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        valid = target != IGNORE_INDEX
        return prediction.argmax(1)[valid], target[valid]

    def measure(self, prediction: np.ndarray, target: np.ndarray) -> dict[str, float]:
        if not len(target):
            return {"accuracy": math.nan, "balanced_accuracy": math.nan}
        recalls = [(prediction[target == label] == label).mean() for label in np.unique(target)]
        accuracy = 100.0 * float((prediction == target).mean())
        return {"accuracy": accuracy, "balanced_accuracy": 100.0 * float(np.mean(recalls))}


class NumberMeter(Meter):
    """``mae``, the mean absolute error in the target's own units, and ``r2``, the coefficient of determination. Predictions and
    labels (B, 1), standardised by the task's scale."""

    def select(self, prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        valid = target.isfinite()
        return prediction[valid], target[valid]

    def measure(self, prediction: np.ndarray, target: np.ndarray) -> dict[str, float]:
        if not len(target):
            return {"mae": math.nan, "r2": math.nan}
        target = target.astype(np.float64)
        r2 = float(metrics.r2_score(target, prediction)) if np.ptp(target) > 0 else math.nan
        return {"mae": self.task.scale[1] * float(np.abs(prediction - target).mean()), "r2": r2}


METERS = {"binary": BinaryMeter, "duration": DurationMeter, "category": CategoryMeter, "number": NumberMeter}
