r"""The matrix products of a task, whole or from what another input or another task's weights have given.

With W' = W + δ and an earlier x₀, y₀ = W x₀ (the base's in the same place, or the task's own in an earlier frame)

    y = W'x                    at positions where ‖x − x₀‖ > θ · rms ‖x₀‖: computed
    y = y₀ + δ x               elsewhere: only the rows of δ that are not zero are computed

so that with θ = 0 the output is that of the merged layer, to rounding. A position is a token of a transformer, or a pixel in
front of a 1×1 convolution; other convolutions are reused where their whole input is equal.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from taps.gates import Decision
from taps.layer import GatedUnit


class Product:
    """A task's version of a matrix product, prepared once: its weights and which of their rows are its own."""

    def __init__(self, unit: GatedUnit, task: str | None, decision: Decision) -> None:
        effective = unit.effective_parameters(task, decision)
        base = unit.base
        self.layer = base
        self.weight = effective.get("weight", base.weight).detach()
        self.bias = effective.get("bias", base.bias)
        self.bias = None if self.bias is None else self.bias.detach()
        changed = (self.weight != base.weight).flatten(1).any(1)
        #: what the task's bias adds to the base's
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
        """The merged layer."""
        return self._call(x, self.weight, self.bias)

    def _call(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        values = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
        return torch.func.functional_call(self.layer, values, (x,), tie_weights=False)

    def reuse(self, x: Tensor, x_base: Tensor, y_base: Tensor, threshold: float) -> tuple[Tensor, float]:
        """The output from the base's input and output; and the share of the merged layer's multiplications that it took."""
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
        """The output of this very product from an earlier input; also the share of multiplications, and the input that the
        output now stands for: of positions that were left out the earlier one, so that small changes add up until they count.
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
        """With channels last."""
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
    """Indices of the positions whose vectors (last dimension) have moved further than θ · rms ‖before‖, and their share."""
    distance = (x - before).float().square().sum(-1)  # half precision would overflow
    moved = distance > threshold**2 * before.float().square().sum(-1).mean()
    index = moved.flatten().nonzero()[:, 0]
    return index, len(index) / max(moved.numel(), 1)
