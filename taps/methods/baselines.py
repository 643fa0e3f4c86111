"""Baselines for all other methods, built on the same wrappers."""

from __future__ import annotations

from taps.core.find import Unit, find_everything
from taps.core.gate import ConstantGate, Gate
from taps.core.method import Method
from taps.methods.registry import register


def always_own(unit: Unit) -> Gate:
    """Return a gate that is always open."""
    return ConstantGate(specific=1.0)


def always_base(unit: Unit) -> Gate:
    """Return a gate that is always closed."""
    return ConstantGate(specific=0.0)


register(
    "finetune",
    Method(
        summary="full fine-tuning: every weight is task-specific (largest files)",
        source="full fine-tuning",
        gate=always_own,
        select=find_everything,
    ),
)
register(
    "norm_only",
    Method(
        summary="only the norms and the head are task-specific",
        source="K for the price of 1, ICLR 2019, arXiv 1810.10703",
        gate=always_base,
        norms=("task",),
    ),
)
register(
    "linear_probe",
    Method(
        summary="only the head is task-specific (smallest files)",
        source="linear classifier probe",
        gate=always_base,
        norms=("frozen",),
    ),
)
register(
    "hard_sharing",
    Method(
        summary="one network learns for all tasks, which differ in their heads alone",
        source="Multitask Learning, Machine Learning 28, 1997",
        gate=always_base,
        norms=("frozen",),
        trains_base=True,
    ),
)
