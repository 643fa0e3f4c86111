"""Gumbel sampling."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from taps.core.gate import HardThreshold


def gumbel_noise(shape: Sequence[int], generator: torch.Generator | None = None) -> Tensor:
    """Return standard Gumbel draws in float64, made on the CPU so that they are the same for every device."""
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64).clamp_(1e-12, 1 - 1e-12)
    return -(-uniform.log()).log()


def gumbel(logits: Tensor, temperature: float, hard: bool, generator: torch.Generator | None = None) -> Tensor:
    """Return the first of two classes in a Gumbel-softmax draw (arXiv 1611.01144, arXiv 1611.00712).

    Args:
        logits: (..., 2).
        temperature: τ > 0.
        hard: exactly 0 or 1, with the soft draw's gradient; else in 0..1.
        generator: source of the draws.

    Returns:
        (...).
    """
    noise = gumbel_noise(logits.shape, generator).to(logits)
    soft = ((logits + noise) / temperature).softmax(-1)[..., 0]
    return HardThreshold.apply(soft, 0.5) if hard else soft
