"""Dynamic convolutions (arXiv 1912.03458) over time."""

from __future__ import annotations

import torch
from torch import Tensor, nn

#: divides the logits of the shares; at the published value all kernels have nearly equal shares at first
_TEMPERATURE = 34.0


class DynamicConv1d(nn.Module):
    """A convolution of kernel size 1 whose kernel is a mixture that depends on the input's mean over time.

        y = Σ_k π_k(x) · W_k x          π = softmax(MLP(mean x) / 34)

    Args:
        inputs, outputs: numbers of channels.
        stride: stride in positions.
        kernels: K, number of kernels W_k; published is 4.
        causal: take the mean over the positions up to each one, so that outputs are independent of later positions.

    Shape:
        (B, inputs, T) to (B, outputs, ⌈T / stride⌉).
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1, kernels: int = 4, causal: bool = False) -> None:
        super().__init__()
        self.stride, self.causal = stride, causal
        self.weight = nn.Parameter(torch.empty(kernels, outputs, inputs))
        self.reduce = nn.Linear(inputs, inputs // 4 + 1, bias=False)
        self.choose = nn.Linear(inputs // 4 + 1, kernels)
        for kernel in self.weight:
            nn.init.kaiming_uniform_(kernel)
        for layer in (self.reduce, self.choose):
            nn.init.normal_(layer.weight, std=0.01)
        nn.init.zeros_(self.choose.bias)

    def shares(self, means: Tensor) -> Tensor:
        """Return π of means (..., inputs): (..., K)."""
        return (self.choose(self.reduce(means).relu()) / _TEMPERATURE).softmax(-1)

    def forward(self, x: Tensor) -> Tensor:
        taken = x[..., :: self.stride]
        if not self.causal:
            return torch.einsum("bk,koi->boi", self.shares(x.mean(2)), self.weight) @ taken
        lengths = torch.arange(1, x.shape[2] + 1, device=x.device, dtype=x.dtype)
        shares = self.shares((x.cumsum(2) / lengths)[..., :: self.stride].transpose(1, 2))
        each = torch.einsum("koi,bip->bkop", self.weight, taken)  # a kernel for each position would be far larger
        return torch.einsum("bpk,bkop->bop", shares, each)
