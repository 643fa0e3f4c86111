r"""The matrix products of a task, computed in full or from the result for another input or another task's weights.

With W' = W + δ and an earlier x₀, y₀ = W x₀ (the base's in the same layer, or the task's own in an earlier frame)

    y = W'x                    at positions where ‖x − x₀‖ > θ · rms ‖x₀‖: computed
    y = y₀ + δ x               elsewhere: only the non-zero rows of δ are computed

so with θ = 0 the output is that of the merged layer up to rounding. A position is a token of a transformer, or a pixel of the
input of a 1×1 convolution; other convolutions are reused only if their whole input is equal.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from taps.core.gate import Decision
from taps.core.modules import with_tensors
from taps.core.unit import GatedUnit


class Product:
    """A task's version of a matrix product, prepared once: its weights and the rows that differ from the base's."""

    def __init__(self, unit: GatedUnit, task: str | None, decision: Decision) -> None:
        effective = unit.effective_parameters(task, decision)
        base = unit.base
        self.layer = base
        self.weight = effective.get("weight", base.weight).detach()
        self.bias = effective.get("bias", base.bias)
        self.bias = None if self.bias is None else self.bias.detach()
        changed = (self.weight != base.weight).flatten(1).any(1)
        #: the task's bias minus the base's
        self.shift = None if self.bias is None or torch.equal(self.bias, base.bias) else self.bias - base.bias
        self.rows = changed.nonzero()[:, 0]
        #: whether the output for the same input differs from the base's
        self.differs = len(self.rows) > 0 or self.shift is not None
        self.own = (self.weight[self.rows], None if self.bias is None else self.bias[self.rows])
        self.tokens = isinstance(base, nn.Linear)
        self.by_position = self.tokens or (
            all(size == 1 for size in (*base.kernel_size, *base.stride)) and base.groups == 1 and not any(base.padding)
        )

    def full(self, x: Tensor) -> Tensor:
        """Return the output of the merged layer."""
        return self._call(x, self.weight, self.bias)

    def _call(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        values = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
        return with_tensors(self.layer, values)(x)

    def reuse(self, x: Tensor, x_base: Tensor, y_base: Tensor, threshold: float) -> tuple[Tensor, float]:
        """Return the output, from the base's input and output, and the executed share of the merged layer's multiplications."""
        share = len(self.rows) / len(self.weight)
        if x is x_base and not self.differs:
            return y_base, 0.0
        if not self.by_position:
            if not torch.equal(x, x_base) or share == 1 or (share and self.layer.groups > 1):
                return self.full(x), 1.0
            return self._rows_of_convolution(x, y_base), share
        flat, flat_base, flat_y = self._by_position(x, x_base, y_base)
        index, part = _moved(flat, flat_base, threshold)
        y = _copy(flat_y) if self.shift is None else flat_y + self.shift
        y, inputs = y.flatten(0, -2), flat.flatten(0, -2)
        if share and part < 1:
            y[:, self.rows] = linear(inputs, self.own[0].flatten(1), self.own[1])
        if len(index):
            y[index] = linear(inputs[index], self.weight.flatten(1), self.bias)
        return self._as_before(y.view(flat_y.shape)), part + (1 - part) * share

    def since(self, x: Tensor, x_past: Tensor, y_past: Tensor, threshold: float) -> tuple[Tensor, float, Tensor]:
        """Return the output from an earlier input and output of this product, the executed share of multiplications, and the
        input that the output belongs to: positions left out keep their earlier input, so small changes add up until they count.
        """
        if not self.by_position:
            return (y_past, 0.0, x_past) if torch.equal(x, x_past) else (self.full(x), 1.0, x)
        flat, flat_past, flat_y = self._by_position(x, x_past, y_past)
        index, part = _moved(flat, flat_past, threshold)
        y, kept = _copy(flat_y).flatten(0, -2), _copy(flat_past).flatten(0, -2)
        inputs = flat.flatten(0, -2)[index]
        y[index], kept[index] = linear(inputs, self.weight.flatten(1), self.bias), inputs
        return self._as_before(y.view(flat_y.shape)), part, self._as_before(kept.view(flat_past.shape))

    def _by_position(self, *tensors: Tensor) -> list[Tensor]:
        """Return the tensors with channels last."""
        return [tensor if self.tokens else tensor.movedim(1, -1) for tensor in tensors]

    def _as_before(self, tensor: Tensor) -> Tensor:
        return tensor if self.tokens else tensor.movedim(-1, 1)

    def _rows_of_convolution(self, x: Tensor, y_base: Tensor) -> Tensor:
        y = y_base.clone() if self.shift is None else y_base + self.shift.view(-1, *[1] * (y_base.dim() - 2))
        if len(self.rows):
            y[:, self.rows] = self._call(x, *self.own)
        return y


def _copy(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


def _moved(x: Tensor, before: Tensor, threshold: float) -> tuple[Tensor, float]:
    """Return the indices of positions whose vectors (last dimension) moved by more than θ · rms ‖before‖, and their share."""
    distance = (x - before).float().square().sum(-1)  # half precision would overflow
    moved = distance > threshold**2 * before.float().square().sum(-1).mean()
    index = moved.flatten().nonzero()[:, 0]
    return index, len(index) / max(moved.numel(), 1)
