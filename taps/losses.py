"""What a task's kind means for training: how predictions are read, and the loss.

Predictions of maps are (B, channels, h, w), as in AdaShare (§4) and its published program; those of series (B, channels, T),
one value an hour; those of whole samples (B, channels). Labels without a value (:data:`taps.data.shared.VOID`, NaN) take no
part; a batch without any label has loss 0. Every loss is a mean over what is labelled.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, interpolate, normalize

from taps.data.dense import KINDS
from taps.data.shared import VOID, Task


def to_size(prediction: Tensor, size: tuple[int, int], mode: str = "bilinear") -> Tensor:
    """A prediction at the labels' size."""
    if prediction.shape[-2:] == torch.Size(size):
        return prediction
    corners = {"align_corners": False} if mode == "bilinear" else {}
    return interpolate(prediction, size, mode=mode, **corners)


def shrink(target: Tensor, size: tuple[int, int]) -> Tensor:
    """Labels at the prediction's size: of each cell the first pixel, as in the published programs."""
    if target.shape[-2:] == torch.Size(size):
        return target
    flat = target[:, None].float() if target.dim() == 3 else target
    small = interpolate(flat, size, mode="nearest")
    return small[:, 0].to(target.dtype) if target.dim() == 3 else small


def class_loss(prediction: Tensor, target: Tensor, task: Task) -> Tensor:
    """Cross-entropy; with class weights a weighted mean."""
    if not (target != VOID).any():
        return prediction.sum() * 0.0
    weight = None if task.class_weights is None else prediction.new_tensor(task.class_weights)
    return cross_entropy(prediction, target, weight, ignore_index=VOID)


def normal_loss(prediction: Tensor, target: Tensor, task: Task) -> Tensor:
    """1 − cosine of the angle between prediction and label, both brought to unit length."""
    valid = target.isfinite().all(1)
    if not valid.any():
        return prediction.sum() * 0.0
    cosine = (normalize(prediction, dim=1) * normalize(target.nan_to_num(), dim=1)).sum(1)
    return 1.0 - cosine[valid].mean()


def absolute_loss(prediction: Tensor, target: Tensor, task: Task) -> Tensor:
    """L1."""
    valid = target.isfinite()
    if not valid.any():
        return prediction.sum() * 0.0
    return (prediction - target)[valid].abs().mean()


def normal_l1_loss(prediction: Tensor, target: Tensor, task: Task) -> Tensor:
    """Σ over the three components of abs(difference) between the prediction at unit length and the label (ATRC, ICCV 2021)."""
    valid = target.isfinite().all(1)
    if not valid.any():
        return prediction.sum() * 0.0
    return (normalize(prediction, dim=1) - target.nan_to_num()).abs().sum(1)[valid].mean()


def saliency_loss(prediction: Tensor, target: Tensor, task: Task) -> Tensor:
    """Cross-entropy of two classes, each weighted by the other's share of the batch's labelled pixels (ASTMT, CVPR 2019).

    The weighted terms are divided by the number of labelled pixels, not by the sum of their weights.
    """
    valid = target != VOID
    if not valid.any():
        return prediction.sum() * 0.0
    present = (target[valid] == 1).to(prediction).mean()
    weight = torch.stack([present, 1.0 - present])
    return cross_entropy(prediction, target, weight, ignore_index=VOID, reduction="sum") / valid.sum()


def edge_loss(prediction: Tensor, target: Tensor, task: Task) -> Tensor:
    """:func:`binary_loss` whose two weights add up to 1: with a ``positive_weight`` of 19, 0.95 on edges and 0.05 elsewhere."""
    return binary_loss(prediction, target, task) / (1.0 + task.positive_weight)


def binary_loss(prediction: Tensor, target: Tensor, task: Task) -> Tensor:
    """Binary cross-entropy of logits; what is there (label 1) counts ``positive_weight`` times."""
    valid = target.isfinite()
    if not valid.any():
        return prediction.sum() * 0.0
    weight = prediction.new_tensor(task.positive_weight)
    return binary_cross_entropy_with_logits(prediction[valid], target[valid], pos_weight=weight)


def squared_loss(prediction: Tensor, target: Tensor, task: Task) -> Tensor:
    """Mean squared error, in units of the task's ``scale``."""
    valid = target.isfinite()
    if not valid.any():
        return prediction.sum() * 0.0
    return ((prediction - target)[valid] ** 2).mean()


#: upper ends in hours of the bins of remaining length of stay but the last: days 1 to 8, and two weeks (mimic3-benchmarks)
STAY_BINS = tuple(24.0 * days for days in (1, 2, 3, 4, 5, 6, 7, 8, 14))


def stay_bins(hours: Tensor) -> Tensor:
    """Bin 0..9 of each length in hours, lower ends included; NaN gives VOID."""
    bins = torch.bucketize(hours, hours.new_tensor(STAY_BINS), right=True)
    return torch.where(hours.isfinite(), bins, VOID)


def duration_loss(prediction: Tensor, target: Tensor, task: Task) -> Tensor:
    """Cross-entropy over the bins of remaining hours: ``prediction`` (B, 10, T), ``target`` (B, T) in hours."""
    return class_loss(prediction, stay_bins(target), task)


LOSSES: dict[str, Callable[[Tensor, Tensor, Task], Tensor]] = {
    "classes": class_loss,
    "normals": normal_loss,
    "depth": absolute_loss,
    "disparity": absolute_loss,
    "map": absolute_loss,
    "saliency": saliency_loss,
    "edges": edge_loss,
    "normals_l1": normal_l1_loss,
    "binary": binary_loss,
    "duration": duration_loss,
    "category": class_loss,
    "number": squared_loss,
}


def make_loss(task: Task, at_output: bool = False) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss of one task from predictions and labels.

    Args:
        task: its ``loss`` or else its kind chooses the loss.
        at_output: compare maps at the predictions' size, with labels shrunk by nearest neighbour (published); else at the
            labels' size, with predictions scaled up bilinearly.
    """
    function = LOSSES[task.loss or task.kind]
    if task.kind not in KINDS:
        return lambda prediction, target: function(prediction.float(), target, task)

    def loss(prediction: Tensor, target: Tensor) -> Tensor:
        prediction = prediction.float()
        if at_output:
            return function(prediction, shrink(target, prediction.shape[-2:]), task)
        return function(to_size(prediction, target.shape[-2:]), target, task)

    return loss
