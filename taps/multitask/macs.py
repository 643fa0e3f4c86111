"""Counting of multiply-accumulate operations."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode


def macs(function: Callable, *args) -> int:
    """Return the multiply-accumulate operations of ``function(*args)`` in convolutions, matrix products and attention."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # the counter does not see its fused kernel
    try:
        with FlopCounterMode(display=False) as counter:
            function(*args)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counter.get_total_flops() // 2
