"""Convolutions, norms and pooling in one, two and three dimensions."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import pad

from taps.networks.dynamic_convolution import DynamicConv1d


class CausalConv1d(nn.Conv1d):
    """A convolution over time that depends only on the present and the past: all padding is in front."""

    is_linear_in_parameters = True

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(pad(x, (self.dilation[0] * (self.kernel_size[0] - 1), 0)))


CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
POOLS = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}


class Layers:
    """Creates convolutions and norms with a given number of dimensions.

    Args:
        dimensions: 1, 2 or 3.
        causal: make outputs independent of later positions, with one dimension.
        dynamic_kernels: number of kernels of dynamic convolutions, which projections are then; 0: ordinary ones.
    """

    def __init__(self, dimensions: int, causal: bool = False, dynamic_kernels: int = 0) -> None:
        self.dimensions, self.causal, self.dynamic_kernels = dimensions, causal, dynamic_kernels

    def convolution(self, inputs: int, outputs: int, kernel: int, stride: int = 1, dilation: int = 1) -> nn.Module:
        options = {"stride": stride, "dilation": dilation, "bias": False}
        if self.causal:
            return CausalConv1d(inputs, outputs, kernel, **options)
        padding = dilation * (kernel // 2) * (kernel % 2)
        return CONVOLUTIONS[self.dimensions](inputs, outputs, kernel, padding=padding, **options)

    def norm(self, channels: int) -> nn.Module:
        return NORMS[self.dimensions](channels)

    def projection(self, inputs: int, outputs: int, stride: int) -> nn.Module | None:
        """The projection of a block's shortcut; ``None`` if input and output have the same shape."""
        if stride == 1 and inputs == outputs:
            return None
        return nn.Sequential(self.pointwise(inputs, outputs, stride), self.norm(outputs))

    def pointwise(self, inputs: int, outputs: int, stride: int) -> nn.Module:
        """A convolution of kernel size 1, dynamic if that is wanted."""
        if self.dynamic_kernels:
            return DynamicConv1d(inputs, outputs, stride, self.dynamic_kernels, self.causal)
        return self.convolution(inputs, outputs, 1, stride)
