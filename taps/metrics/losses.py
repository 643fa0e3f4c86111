"""Losses by kind of task.

Predictions of maps are (B, channels, h, w), as in AdaShare (§4) and its published program, those of series (B, channels, T) with
one value per hour, and those of whole samples (B, channels). Every loss is a mean over the labelled positions; missing labels
(:data:`taps.data.multi_label.IGNORE_INDEX`, NaN) are ignored, and a batch without labels has the loss 0.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, interpolate, normalize

from taps.data.dense.dataset import KINDS
from taps.data.multi_label import IGNORE_INDEX, Task


def to_size(prediction: Tensor, size: tuple[int, int], mode: str = "bilinear") -> Tensor:
    """Resize a prediction to the labels' size."""
    if prediction.shape[-2:] == torch.Size(size):
        return prediction
    corners = {"align_corners": False} if mode == "bilinear" else {}
    return interpolate(prediction, size, mode=mode, **corners)


def shrink(target: Tensor, size: tuple[int, int], mode: str = "nearest-exact") -> Tensor:
    """Resize labels to the prediction's size by one pixel of each cell: the middle one, or with ``"nearest"`` the first one, as in
    the published programs, which moves maps by half a cell."""
    if target.shape[-2:] == torch.Size(size):
        return target
    flat = target[:, None].float() if target.dim() == 3 else target
    small = interpolate(flat, size, mode=mode)
    return small[:, 0].to(target.dtype) if target.dim() == 3 else small


class CrossEntropy:
    """Mean cross-entropy of a classification task.

    Args:
        smoothing: share of the target that is spread over all classes, 0..1.
        weights: weight per class, or ``None`` for equal weights.
    """

    def __init__(self, smoothing: float = 0.0, weights: Sequence[float] | None = None) -> None:
        self.smoothing, self.weights = smoothing, weights

    def __call__(self, output: Tensor, labels: Tensor) -> Tensor:
        weights = None if self.weights is None else output.new_tensor(self.weights)
        return cross_entropy(output, labels, weights, label_smoothing=self.smoothing)


class BinaryCrossEntropy:
    """Mean binary cross-entropy of a task whose images have several labels, over images and labels.

    Args:
        smoothing: share of each target that is ½ instead, 0..1.
        weights: factor on the loss of each label where an image has it, or ``None``.
    """

    def __init__(self, smoothing: float = 0.0, weights: Sequence[float] | None = None) -> None:
        self.smoothing, self.weights = smoothing, weights

    def __call__(self, output: Tensor, labels: Tensor) -> Tensor:
        weights = None if self.weights is None else output.new_tensor(self.weights)
        targets = (1.0 - self.smoothing) * labels.to(output.dtype) + self.smoothing / 2
        return binary_cross_entropy_with_logits(output, targets, pos_weight=weights)


def positive_weights(labels: Sequence[tuple[int, ...]]) -> list[float]:
    """Return for each label the number of samples without it by that with it; 1 for labels that no sample or every sample has."""
    counts = [sum(column) for column in zip(*labels, strict=True)]
    return [(len(labels) - count) / count if 0 < count < len(labels) else 1.0 for count in counts]


def balanced_weights(labels: Iterable[int], classes: int) -> list[float]:
    """Return the weight of each class, the mean number of samples per class divided by its own; 1 for classes without samples."""
    counts = Counter(labels)
    mean = counts.total() / max(len(counts), 1)
    return [mean / counts[label] if counts[label] else 1.0 for label in range(classes)]


def class_loss(prediction: Tensor, target: Tensor, task: Task) -> Tensor:
    """Cross-entropy; with class weights a weighted mean."""
    weight = None if task.class_weights is None else prediction.new_tensor(task.class_weights)
    return cross_entropy(prediction, target, weight, ignore_index=IGNORE_INDEX)


def normal_loss(prediction: Tensor, target: Tensor, task: Task) -> Tensor:
    """1 − cosine of the angle between prediction and label."""
    cosine = (normalize(prediction, dim=1) * normalize(target.nan_to_num(), dim=1)).sum(1)
    return 1.0 - cosine[target.isfinite().all(1)].mean()


def absolute_loss(prediction: Tensor, target: Tensor, task: Task) -> Tensor:
    """L1."""
    return (prediction - target)[target.isfinite()].abs().mean()


def normal_l1_loss(prediction: Tensor, target: Tensor, task: Task) -> Tensor:
    """L1 distance (sum over the components) between the normalised prediction and the label (ATRC, ICCV 2021)."""
    error = (normalize(prediction, dim=1) - target.nan_to_num()).abs().sum(1)
    return error[target.isfinite().all(1)].mean()


def saliency_loss(prediction: Tensor, target: Tensor, task: Task) -> Tensor:
    """Cross-entropy of two classes, each weighted by the other's share of the batch's labelled pixels (ASTMT, CVPR 2019).

    The sum is divided by the number of labelled pixels, not by the sum of their weights.
    """
    valid = target != IGNORE_INDEX
    present = (target[valid] == 1).to(prediction).mean()
    weight = torch.stack([present, 1.0 - present])
    return cross_entropy(prediction, target, weight, ignore_index=IGNORE_INDEX, reduction="sum") / valid.sum()


def edge_loss(prediction: Tensor, target: Tensor, task: Task) -> Tensor:
    """:func:`binary_loss` with weights that sum to 1: with a ``positive_weight`` of 19, 0.95 on edges and 0.05 elsewhere."""
    return binary_loss(prediction, target, task) / (1.0 + task.positive_weight)


def binary_loss(prediction: Tensor, target: Tensor, task: Task) -> Tensor:
    """Binary cross-entropy of logits, with the weight ``positive_weight`` for positive labels."""
    valid = target.isfinite()
    weight = prediction.new_tensor(task.positive_weight)
    return binary_cross_entropy_with_logits(prediction[valid], target[valid], pos_weight=weight)


def squared_loss(prediction: Tensor, target: Tensor, task: Task) -> Tensor:
    """Mean squared error, in units of the task's ``scale``."""
    return ((prediction - target)[target.isfinite()] ** 2).mean()


#: upper ends in hours of all bins of remaining length of stay but the last: days 1 to 8, and two weeks (mimic3-benchmarks)
STAY_BINS = tuple(24.0 * days for days in (1, 2, 3, 4, 5, 6, 7, 8, 14))


def stay_bins(hours: Tensor) -> Tensor:
    """Bin 0..9 of each length in hours, lower ends included; ``IGNORE_INDEX`` for NaN."""
    bins = torch.bucketize(hours, hours.new_tensor(STAY_BINS), right=True)
    return torch.where(hours.isfinite(), bins, IGNORE_INDEX)


def duration_loss(prediction: Tensor, target: Tensor, task: Task) -> Tensor:
    """Cross-entropy over the bins of remaining hours: ``prediction`` (B, 10, T), ``target`` (B, T) in hours."""
    return class_loss(prediction, stay_bins(target), task)


LOSSES: dict[str, Callable[[Tensor, Tensor, Task], Tensor]] = {
    "classes": class_loss,
    "normals": normal_loss,
    "depth": absolute_loss,
    "disparity": absolute_loss,
    "log_depth": absolute_loss,
    "map": absolute_loss,
    "saliency": saliency_loss,
    "edges": edge_loss,
    "normals_l1": normal_l1_loss,
    "binary": binary_loss,
    "duration": duration_loss,
    "category": class_loss,
    "number": squared_loss,
}


def make_loss(task: Task, labels: str | None = None) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss of a task, as a function of predictions and labels.

    Args:
        task: selects the loss by its ``loss``, or else by its ``kind``.
        labels: how maps of labels get the predictions' size, as in :func:`shrink`; ``None``: predictions are upsampled bilinearly
            to the labels' size instead.
    """
    function = LOSSES[task.loss or task.kind]

    def loss(prediction: Tensor, target: Tensor) -> Tensor:
        prediction = prediction.float()
        if task.kind in KINDS and labels is not None:
            target = shrink(target, prediction.shape[-2:], labels)
        elif task.kind in KINDS:
            prediction = to_size(prediction, target.shape[-2:])
        labelled = target.isfinite() if target.is_floating_point() else target != IGNORE_INDEX
        return function(prediction, target, task) if labelled.any() else prediction.sum() * 0.0

    return loss
