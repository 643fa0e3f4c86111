r"""Gates: for one task and one unit, *run it?* and *how much of the task's own delta?*

A gate answers with a :class:`Decision` and never sees weights. The layer (:mod:`taps.layer`) applies the decision and
never knows which method it came from:

    y = run · f(x; W + specific ⊙ δ_task) + (1 − run) · shortcut(x)

A gate has two faces. In training mode it is *relaxed*: tensors that gradients flow through. In evaluation mode it
*decides*: plain numbers, the same ones every table, picture and file reads. Nothing else in the library thresholds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from taps.errors import UserError


class State:
    """What every unit of one model shares by reference: the task being run and how soft its gates are.

    Attributes:
        task: name of the task, ``None`` for the base network alone, or several tasks: an object of
            :mod:`taps.mixed` or :mod:`taps.together`, to which units hand their calls.
        temperature: of relaxations that have one (Gumbel-softmax, hard concrete), > 0.
        generator: source of the gates' random draws; ``None`` is torch's default one.
    """

    def __init__(self) -> None:
        self.task: str | object | None = None
        self.temperature: float = 1.0
        self.generator: torch.Generator | None = None

    @contextmanager
    def running(self, task: str | object | None) -> Iterator[None]:
        """Inside the ``with`` block units run ``task``."""
        before, self.task = self.task, task
        try:
            yield
        finally:
            self.task = before


def first_input(args: tuple, kwargs: dict):
    """What a unit was called with first: the input that its gate looks at."""
    return args[0] if args else next(iter(kwargs.values()), None)


class Decision(NamedTuple):
    """A gate's answer.

    Attributes:
        run: 0..1, how much of the unit is run: a number, a scalar tensor, or one value a sample, shape (B,).
        specific: 0..1, how much of the task's delta is used: a number, a tensor that broadcasts over each of the
            unit's parameters, or a mapping from parameter name to tensor (one value an element).
        delta_gradient: factor of the delta's gradient where a method defines it to differ from ``specific``
            (straight-through conventions); ``None`` is ``specific`` itself.
    """

    run: float | Tensor = 1.0
    specific: float | Tensor | Mapping[str, Tensor] = 0.0
    delta_gradient: float | Tensor | None = None

    @property
    def uses_delta(self) -> bool:
        """Whether any of the delta is used: false only where ``specific`` is the number 0."""
        return not (isinstance(self.specific, float) and self.specific == 0.0)


def reached(decisions: Iterable[Decision], inside: Sequence[int | None]) -> list[Decision]:
    """Decisions by unit, carried out: what is inside a unit that is not run is not run either.

    Args:
        decisions: in network order.
        inside: for each unit the index of the one that holds it, an earlier one, or ``None``.
    """
    found: list[Decision] = []
    for decision, holder in zip(decisions, inside, strict=True):
        outer = 1.0 if holder is None else found[holder].run
        found.append(Decision(run=0.0) if isinstance(outer, float) and outer == 0.0 else decision)
    return found


class Gate(nn.Module):
    """One task's gate on one unit. Subclasses write :meth:`relax` and :meth:`decide`."""

    #: whether the unit must hold a delta for this task
    needs_delta: bool = True
    #: whether it has decided that most of the delta's weights are 0
    is_sparse: bool = False
    #: whether a curriculum has reached the unit; until then it is trained as the base's
    opened: bool = True

    def forward(self, x: Tensor | None, state: State) -> Decision:
        """The relaxed decision in training mode, the hard one in evaluation mode. ``x``: the unit's first input."""
        if not self.opened:
            return Decision()
        return self.relax(x, state) if self.training else self.decide(x)

    def relax(self, x: Tensor | None, state: State) -> Decision:
        """The differentiable decision used while training."""
        raise NotImplementedError

    def decide(self, x: Tensor | None = None) -> Decision:
        """The hard decision. ``run`` and ``specific`` are exactly 0.0 or 1.0 unless they depend on ``x`` or are
        elementwise; without ``x`` an input-dependent gate answers for its average input."""
        raise NotImplementedError

    def own(self, size: int) -> int:
        """How many of the unit's ``size`` weights are the task's own, by the hard decision."""
        return size if self.decide().uses_delta else 0

    def fix(self, support: Mapping[str, Tensor]) -> bool:
        """Learn only inside of a support from now on, bool tensors by parameter; whether the gate is of a kind that can."""
        return False

    def match(self, names: set[str]) -> None:
        """Take the form in which a checkpoint holds the gate, whose tensors have these names."""


class ConstantGate(Gate):
    """The same answer for every input, with nothing to learn: baselines, frozen decisions, retrained policies.

    Args:
        specific: 1.0 to use the task's delta, 0.0 to use the base alone.
        run: 1.0 to run the unit, 0.0 to take its shortcut.
    """

    def __init__(self, specific: float = 0.0, run: float = 1.0) -> None:
        super().__init__()
        self.decision = Decision(run=float(run), specific=float(specific))
        self.needs_delta = bool(specific)

    def relax(self, x: Tensor | None, state: State) -> Decision:
        return self.decision

    def decide(self, x: Tensor | None = None) -> Decision:
        return self.decision


class HardThreshold(torch.autograd.Function):
    """1[s ≥ τ] forwards, the identity backwards (straight-through); exactly 0 or 1, unlike hard − soft + soft."""

    @staticmethod
    def forward(ctx, score: Tensor, threshold: float) -> Tensor:
        return (score >= threshold).to(score.dtype)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient, None


class ThresholdGate(Gate):
    r"""The gate of TAPS: ``specific`` = 1[s ≥ τ] with one learned score s a unit (CVPR 2022, arXiv 2203.16708, §3).

    The step function has no useful gradient, so the backward pass treats the effective weight as if it moved
    with the score. Two conventions are in use; with g = dL/dw and w = W + 1[s ≥ τ]·δ, both have dL/ds = ⟨g, δ⟩ and

    - ``ste="code"`` (the published program): dL/dδ = 1[s ≥ τ]·g, so a closed unit's delta gets no gradient;
    - ``ste="paper"`` (backward as if w = W + s·δ): dL/dδ = s·g, so it still moves and may bring the unit back.

    Args:
        threshold: τ, any finite number. The published value is 0.1.
        score_init: s before training. The published value is 0.15: every unit starts open.
        ste: ``"code"`` or ``"paper"``.

    Raises:
        UserError: for an unknown ``ste`` or a number that is not finite.
    """

    def __init__(self, threshold: float = 0.1, score_init: float = 0.15, ste: str = "code") -> None:
        super().__init__()
        if ste not in ("code", "paper"):
            raise UserError(f"ste must be 'code' or 'paper', not {ste!r}")
        for name, value in (("threshold", threshold), ("score_init", score_init)):
            if not -1e30 < float(value) < 1e30:
                raise UserError(f"{name} must be a finite number, not {value!r}")
        self.threshold = float(threshold)
        self.ste = ste
        self.score = nn.Parameter(torch.tensor(float(score_init)))
        self._seen: tuple[int, int] | None = None
        self._open = True

    def relax(self, x: Tensor | None, state: State) -> Decision:
        if not self.score.requires_grad:  # decided once and for all: a closed unit costs what the base costs
            return self.decide(x)
        specific = HardThreshold.apply(self.score, self.threshold)
        return Decision(specific=specific, delta_gradient=self.score.detach() if self.ste == "paper" else None)

    def decide(self, x: Tensor | None = None) -> Decision:
        # A score that stands still was read before compilation; reading it there would split the compiled program.
        if not (torch.compiler.is_compiling() and self._seen is not None and not self.score.requires_grad):
            self._read_score()
        return Decision(specific=1.0 if self._open else 0.0)

    def _read_score(self) -> None:
        # Reading a scalar is free on a CPU and stalls an accelerator, so there it is read once a change.
        version = (id(self.score), self.score._version)
        if self.score.device.type == "cpu" or self._seen != version:
            self._open = bool(self.score.detach() >= self.threshold)
            self._seen = version

    def set(self, open: bool) -> None:
        """Open or close the gate by moving its score across the threshold."""
        score = float(self.score.detach())
        if open != (score >= self.threshold):
            self.score.data.fill_(self.threshold if open else min(0.0, self.threshold - 1.0))
        self._seen = None

    def train(self, mode: bool = True) -> ThresholdGate:
        self._seen = None
        return super().train(mode)
