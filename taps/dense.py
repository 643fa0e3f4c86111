"""What a dense task's kind means for training: how predictions are read, and the loss (AdaShare §4, its published program).

Predictions are (B, channels, h, w). Labels without a value (:data:`taps.data.dense.VOID`, NaN) take no part; a batch without
any label has loss 0. Every loss is a mean over the labelled pixels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, interpolate, normalize

from taps.data.dense import VOID, DenseTask


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


def class_loss(prediction: Tensor, target: Tensor, task: DenseTask) -> Tensor:
    """Cross-entropy; with class weights a weighted mean."""
    if not (target != VOID).any():
        return prediction.sum() * 0.0
    weight = None if task.class_weights is None else prediction.new_tensor(task.class_weights)
    return cross_entropy(prediction, target, weight, ignore_index=VOID)


def normal_loss(prediction: Tensor, target: Tensor, task: DenseTask) -> Tensor:
    """1 − cosine of the angle between prediction and label, both brought to unit length."""
    valid = target.isfinite().all(1)
    if not valid.any():
        return prediction.sum() * 0.0
    cosine = (normalize(prediction, dim=1) * normalize(target.nan_to_num(), dim=1)).sum(1)
    return 1.0 - cosine[valid].mean()


def absolute_loss(prediction: Tensor, target: Tensor, task: DenseTask) -> Tensor:
    """L1."""
    valid = target.isfinite()
    if not valid.any():
        return prediction.sum() * 0.0
    return (prediction - target)[valid].abs().mean()


LOSSES: dict[str, Callable[[Tensor, Tensor, DenseTask], Tensor]] = {
    "classes": class_loss,
    "normals": normal_loss,
    "depth": absolute_loss,
    "disparity": absolute_loss,
    "map": absolute_loss,
}


def make_loss(task: DenseTask, at_output: bool = False) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss of one task from predictions and labels.

    Args:
        task: its kind chooses the loss.
        at_output: compare at the predictions' size, with labels shrunk by nearest neighbour (published); else at the
            labels' size, with predictions scaled up bilinearly.
    """
    function = LOSSES[task.kind]

    def loss(prediction: Tensor, target: Tensor) -> Tensor:
        prediction = prediction.float()
        if at_output:
            return function(prediction, shrink(target, prediction.shape[-2:]), task)
        return function(to_size(prediction, target.shape[-2:]), target, task)

    return loss
