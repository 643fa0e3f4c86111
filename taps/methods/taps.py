r"""TAPS: each task learns, layer by layer, whether it needs its own weights (CVPR 2022, arXiv 2203.16708).

With one learned score s per layer and task, the frozen weights W and the task's delta δ

    w = W + 1[s ≥ τ] · δ          loss = task loss + λ · (1/L) Σ |s|

over the network's L layers. A layer is tuned while s ≥ τ; the penalty pulls scores towards 0, so that layers whose delta does not
help are closed and shared with all other tasks. The published code differs in two ways: it divides by 52 for every network,
and its last learning rate is 0.

A mean over weights, (1/N) Σ n |s| with n weights in a layer and N in all (``penalty="weights"``), closes large layers first, for
tasks that should take few bytes. It is this library's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from taps.core.execution import State
from taps.core.find import Unit
from taps.core.gate import Decision, Gate, HardThreshold
from taps.core.method import SETTLED, Lengths, Method, Model, Phase
from taps.errors import UserError
from taps.methods.registry import register

_OPEN, _CLOSED = Decision(specific=1.0), Decision(specific=0.0)


class ThresholdGate(Gate):
    r"""The gate of TAPS: ``specific`` = 1[s ≥ τ] with one learned score s per unit (CVPR 2022, arXiv 2203.16708, §3).

    The step function has no useful gradient, so the backward pass treats the effective weight as if it moved
    with the score. Two conventions are in use; with g = dL/dw and w = W + 1[s ≥ τ]·δ, both have dL/ds = ⟨g, δ⟩ and

    - ``ste="code"`` (the published code): dL/dδ = 1[s ≥ τ]·g, so a closed unit's delta gets no gradient;
    - ``ste="paper"`` (backward as if w = W + s·δ): dL/dδ = s·g, so it still changes and may reopen the unit.

    Args:
        threshold: τ, any finite number. The published value is 0.1.
        score_init: s before training. The published value is 0.15: every unit starts open.
        ste: ``"code"`` or ``"paper"``.
        size: n, the number of weights that it decides about.

    Raises:
        UserError: for an unknown ``ste`` or a number that is not finite.
    """

    def __init__(self, threshold: float = 0.1, score_init: float = 0.15, ste: str = "code", size: int = 1) -> None:
        super().__init__()
        if ste not in ("code", "paper"):
            raise UserError(f"ste must be 'code' or 'paper', not {ste!r}")
        for name, value in (("threshold", threshold), ("score_init", score_init)):
            if not -1e30 < float(value) < 1e30:
                raise UserError(f"{name} must be a finite number, not {value!r}")
        self.threshold = float(threshold)
        self.ste = ste
        self.score = nn.Parameter(torch.tensor(float(score_init)))
        self.register_buffer("size", torch.tensor(size * 1e-6), persistent=False)  # millions, which float16 can hold
        self._seen: tuple[int, int] | None = None
        self._open = True

    def relax(self, x: Tensor | None, state: State) -> Decision:
        if not self.score.requires_grad:  # the gate is fixed: a closed unit costs as much as the base
            return self.decide(x)
        specific = HardThreshold.apply(self.score, self.threshold)
        return Decision(specific=specific, delta_gradient=self.score.detach() if self.ste == "paper" else None)

    def decide(self, x: Tensor | None = None) -> Decision:
        # A frozen score was read before compilation; reading it here would split the compiled program.
        if not (torch.compiler.is_compiling() and self._seen is not None and not self.score.requires_grad):
            self._read_score()
        return _OPEN if self._open else _CLOSED

    def settled(self) -> Decision | None:
        learns = self.training and self.score.requires_grad
        return Decision() if not self.in_curriculum else None if learns else self.decide()

    def _read_score(self) -> None:
        # Reading a scalar is free on a CPU but stalls an accelerator, where it is read only once per change.
        score = self.score
        version = (id(score), score._version)
        if self._seen != version or (score.requires_grad and score.device.type == "cpu"):
            self._open = bool(score.detach() >= self.threshold)
            self._seen = version

    @staticmethod
    def read_together(gates: Sequence[ThresholdGate]) -> None:
        late = [
            gate for gate in gates if gate.score.requires_grad or gate._seen != (id(gate.score), gate.score._version)
        ]
        if late:
            scores = torch.stack([gate.score.detach() for gate in late])
            thresholds = torch.tensor([gate.threshold for gate in late], device=scores.device, dtype=scores.dtype)
            for gate, is_open in zip(late, (scores >= thresholds).tolist(), strict=True):
                gate._open, gate._seen = is_open, (id(gate.score), gate.score._version)

    def set(self, open: bool) -> None:
        """Open or close the gate by moving its score across the threshold."""
        score = float(self.score.detach())
        if open != (score >= self.threshold):
            self.score.data.fill_(self.threshold if open else min(0.0, self.threshold - 1.0))
        self._seen = None

    def train(self, mode: bool = True) -> ThresholdGate:
        self._seen = None
        return super().train(mode)


def mean_absolute_score(
    gates: Mapping[str, Sequence[Any]],
    task: str,
    penalty: str = "layers",
    penalty_divisor: float | None = None,
    **options,
) -> Tensor:
    """Return the mean of |s| over the task's units (TAPS §3), or over their weights.

    Args:
        gates: every task's gates.
        task: the task.
        penalty: ``"layers"``, (1/L) Σ |s|, or ``"weights"``, (1/N) Σ n |s|.
        penalty_divisor: L, above 0; ``None`` for the number of units. The published program uses 52 for every network.
        **options: not used.

    Raises:
        UserError: for another ``penalty``, a divisor that is not a number above 0, or one with ``penalty="weights"``.
    """
    if penalty not in ("layers", "weights"):
        raise UserError(f"penalty has to be 'layers' or 'weights', not {penalty!r}")
    if penalty_divisor is not None and not (math.isfinite(penalty_divisor) and penalty_divisor > 0):
        raise UserError(f"penalty_divisor has to be above 0, not {penalty_divisor!r}")
    if penalty_divisor is not None and penalty == "weights":
        raise UserError("penalty_divisor is a number of layers: leave it out with penalty='weights'")
    scores = torch.stack([gate.score for gate in gates[task]]).abs()
    if penalty == "weights":
        sizes = torch.stack([gate.size for gate in gates[task]])
        return (scores * sizes).sum() / sizes.sum()
    return scores.mean() if penalty_divisor is None else scores.sum() / penalty_divisor


def threshold_gate(unit: Unit, penalty: str = "layers", penalty_divisor: float | None = None, **options) -> Gate:
    """Return the TAPS gate of a unit; options as in :class:`taps.methods.taps.ThresholdGate`."""
    return ThresholdGate(**options, size=sum(shape.numel() for shape in unit.shapes.values()))


def warmup_penalty_settle(model: Model, lengths: Lengths) -> tuple[Phase, ...]:
    """Return the phases of TAPS: epochs without the penalty, then with it, then epochs with fixed gates (settle).

    ``settle_epochs=0`` is exactly the published schedule, ``None`` settles for two thirds of the epochs after the warm-up.

    Raises:
        UserError: if a budget is requested.
    """
    if lengths.budget is not None:
        raise UserError(f"method {model.method.name!r} does not support a size budget; use method 'taps_budget'")
    warmup = min(lengths.warmup_epochs, lengths.epochs)
    left = lengths.epochs - warmup
    settle = float(left * 2 // 3) if lengths.settle_epochs is None else min(lengths.settle_epochs, left)
    phases = (
        Phase("warm-up", warmup, penalty=0.0),
        Phase("train", left - settle, forks=warmup > 0),  # no λ has had an effect before it
        Phase("settle", settle, penalty=0.0, trains=SETTLED),
    )
    return tuple(phase for phase in phases if phase.epochs > 0)


#: τ, the initial score and the straight-through convention, as published
OPTIONS = {"threshold": 0.1, "score_init": 0.15, "ste": "code"}

register(
    "taps",
    Method(
        summary="learn, layer by layer, whether the task needs its own weights",
        source="Task Adaptive Parameter Sharing, CVPR 2022, arXiv 2203.16708",
        gate=threshold_gate,
        penalty=mean_absolute_score,
        phases=warmup_penalty_settle,
        options={**OPTIONS, "penalty": "layers", "penalty_divisor": None},
    ),
)
