r"""Gates, which decide for one task and one unit whether to run the unit and how much of the task's delta to use.

A gate returns a :class:`Decision` and does not see weights. The unit (:mod:`taps.core.unit`) applies the decision without
knowing which method made it:

    y = run · f(x; W + specific ⊙ δ_task) + (1 − run) · shortcut(x)

In training mode a gate is *relaxed*: it returns tensors through which gradients flow. In evaluation mode it *decides*: 0 or 1,
from which all tables, plots and files are made. Nothing else applies a threshold to scores.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from taps.core.execution import State


class Decision(NamedTuple):
    """The decision of a gate.

    Attributes:
        run: 0..1, how much of the unit is run: a number, a scalar tensor, or one value per sample, shape (B,).
        specific: 0..1, how much of the task's delta is used: a number, a tensor that broadcasts over each of the
            unit's parameters, or a mapping from parameter name to tensor (one value per element).
        delta_gradient: factor of the delta's gradient if a method defines it to differ from ``specific``
            (straight-through conventions); ``None`` means ``specific`` itself.
    """

    run: float | Tensor = 1.0
    specific: float | Tensor | Mapping[str, Tensor] = 0.0
    delta_gradient: float | Tensor | None = None

    @property
    def uses_delta(self) -> bool:
        """Whether the delta is used at all; false only if ``specific`` is the number 0."""
        return not (isinstance(self.specific, float) and self.specific == 0.0)


def propagate_skips(decisions: Iterable[Decision], parents: Sequence[int | None]) -> list[Decision]:
    """Return the decisions as applied: every unit inside a skipped unit is skipped too.

    Args:
        decisions: one per unit, in network order.
        parents: for each unit the index of the enclosing unit, which comes earlier, or ``None``.
    """
    found: list[Decision] = []
    for decision, parent in zip(decisions, parents, strict=True):
        outer = 1.0 if parent is None else found[parent].run
        found.append(Decision(run=0.0) if isinstance(outer, float) and outer == 0.0 else decision)
    return found


class Gate(nn.Module):
    """One task's gate on one unit. Subclasses implement :meth:`relax` and :meth:`decide`."""

    #: whether the unit must hold a delta for this task
    needs_delta: bool = True
    #: whether :meth:`decide` depends on the input
    uses_input: bool = False
    #: whether it has fixed most of the delta's weights at 0
    is_sparse: bool = False
    #: whether a curriculum has reached the unit; until then the unit is trained as in the base
    in_curriculum: bool = True

    def forward(self, x: Tensor | None, state: State) -> Decision:
        """Return the relaxed decision in training mode and the hard one in evaluation mode; ``x`` is the unit's first input."""
        if not self.in_curriculum:
            return Decision()
        return self.relax(x, state) if self.training else self.decide(x)

    def relax(self, x: Tensor | None, state: State) -> Decision:
        """Return the differentiable decision used in training."""
        raise NotImplementedError

    def decide(self, x: Tensor | None = None) -> Decision:
        """Return the hard decision, in which ``run`` and ``specific`` are exactly 0.0 or 1.0 unless they depend on ``x`` or are
        elementwise. Without ``x`` a gate that uses its input decides for its average input."""
        raise NotImplementedError

    def settled(self) -> Decision | None:
        """Return the decision if it depends neither on the input nor on chance, else ``None``."""
        if not self.in_curriculum:
            return Decision()
        return None if self.training or self.uses_input else self.decide()

    @staticmethod
    def read_together(gates: Sequence[Any]) -> None:
        """Copy the decisions of several gates from the device to the host at once, instead of one by one."""

    def task_parameters(self, size: int) -> int:
        """Return how many of the unit's ``size`` weights are task-specific under the hard decision."""
        return size if self.decide().uses_delta else 0

    def fix_support(self, support: Mapping[str, Tensor]) -> bool:
        """Restrict further learning to a support, bool tensors by parameter; return whether the gate can do so."""
        return False

    def restore_structure(self, names: set[str]) -> None:
        """Adopt the structure of the gate in a checkpoint, given the names of its tensors there."""


class ConstantGate(Gate):
    """A gate with a constant decision and no parameters, for baselines, frozen decisions and retraining under policies.

    Args:
        specific: 1.0 to use the task's delta, 0.0 to use the base alone.
        run: 1.0 to run the unit, 0.0 to use its shortcut.
    """

    def __init__(self, specific: float = 0.0, run: float = 1.0) -> None:
        super().__init__()
        self.decision = Decision(run=float(run), specific=float(specific))
        self.needs_delta = bool(specific)

    def relax(self, x: Tensor | None, state: State) -> Decision:
        return self.decision

    def decide(self, x: Tensor | None = None) -> Decision:
        return self.decision

    def settled(self) -> Decision:
        return self.decision if self.in_curriculum else Decision()


class HardThreshold(torch.autograd.Function):
    """1[s ≥ τ] forward, the identity backward (straight-through); exactly 0 or 1, unlike hard − soft + soft."""

    @staticmethod
    def forward(ctx, score: Tensor, threshold: float) -> Tensor:
        return (score >= threshold).to(score.dtype)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient, None
