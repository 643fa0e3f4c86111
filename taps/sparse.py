r"""Sparse deltas: for every single weight, whether the task changes it (efficient computation sharing, ICCV 2023, §3).

A weight is W + z_T · z · δ with hard-concrete gates (Louizos et al., arXiv 1712.01312): one for each weight, and one for each
tensor (structured diff pruning, arXiv 2012.07463). With u ~ U(0, 1) and logit α

    s = sigmoid((log u − log(1 − u) + α)/τ)      z = clip(l + s · (r − l), 0, 1)      P(z > 0) = sigmoid(α − τ · log(−l/r))

The penalty is the expected number of open gates. Then the support is fixed, gates are folded into the deltas, and the deltas go
on learning inside it. What decides is never a draw, as in the published program, but the gate's middle z̄, s = sigmoid(α).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from taps.adapt import Unit
from taps.errors import UserError
from taps.gates import ConstantGate, Decision, Gate, State

STRUCTURES = ("weight", "row")
LOW, HIGH = -1.5, 1.5  # published l and r


def hard_concrete(
    logit: Tensor, temperature: float = 1.0, generator: torch.Generator | None = None, uniform: Tensor | None = None
) -> Tensor:
    """A draw z of the hard-concrete distribution for every logit α, 0..1, with gradients to α.

    Args:
        logit: α, any shape.
        temperature: τ > 0.
        generator: of the uniform draws, which are made on the CPU so that every device sees the same ones.
        uniform: draws to use instead, 0..1.
    """
    if uniform is None:
        uniform = torch.rand(logit.shape, generator=generator)
    noise = torch.logit(uniform, eps=1e-4).to(logit)
    return _stretch(torch.sigmoid((noise + logit) / temperature))


def _stretch(s: Tensor) -> Tensor:
    return (LOW + s * (HIGH - LOW)).clamp(0.0, 1.0)


def chance_open(logit: Tensor, temperature: float = 1.0) -> Tensor:
    """P(z > 0), 0..1."""
    return torch.sigmoid(logit - temperature * math.log(-LOW / HIGH))


class HardConcreteGate(Gate):
    """One task's gates on every weight of a unit, and one more for each of its tensors.

    Args:
        unit: whose parameters they are.
        init: α at the start (published 5: z > 0 with probability 0.993).
        structure: ``"weight"``, a gate for each weight, or ``"row"``, one for each row of a matrix (each output), which
            matrix products can leave out.
    """

    def __init__(self, unit: Unit, init: float = 5.0, structure: str = "weight") -> None:
        super().__init__()
        if structure not in STRUCTURES:
            raise UserError(f"structure must be one of {', '.join(STRUCTURES)}, not {structure!r}")
        if not -30 < init < 30:
            raise UserError(f"init must lie in -30..30, not {init!r}")
        self.shapes = dict(unit.shapes)
        by_row = structure == "row"
        self.logits = nn.ParameterList(
            nn.Parameter(torch.full(_of_rows(shape) if by_row else shape, float(init)))
            for shape in self.shapes.values()
        )
        self.tensor_logits = nn.Parameter(torch.full((len(self.shapes),), float(init)))
        #: whether the support is decided
        self.is_fixed = False

    def relax(self, x: Tensor | None, state: State) -> Decision:
        if self.is_fixed:
            return Decision(specific=self.support()) if self.any() else Decision()
        tensors = hard_concrete(self.tensor_logits, state.temperature, state.generator)
        return Decision(
            specific={
                name: tensors[index] * hard_concrete(logit, state.temperature, state.generator)
                for index, (name, logit) in enumerate(zip(self.shapes, self.logits, strict=True))
            }
        )

    def decide(self, x: Tensor | None = None) -> Decision:
        if self.is_fixed:  # outside of the support deltas are 0
            return Decision(specific=float(self.any()))
        return Decision(specific=self.middle())

    def middle(self) -> dict[str, Tensor]:
        """z̄ of every parameter, of its shape or broadcasting over it."""
        tensors = _stretch(self.tensor_logits.detach().sigmoid())
        return {
            name: tensors[index] * _stretch(logit.detach().sigmoid())
            for index, (name, logit) in enumerate(zip(self.shapes, self.logits, strict=True))
        }

    def expected(self) -> Tensor:
        """Expected number of open gates: Σ P(z > 0) over weights (a row's gate counts as all of them) and tensors."""
        total = chance_open(self.tensor_logits).sum()
        for shape, logit in zip(self.shapes.values(), self.logits, strict=True):
            total = total + chance_open(logit).sum() * (shape.numel() / logit.numel())
        return total

    def support(self) -> dict[str, Tensor]:
        """1.0 for the task's own weights, else 0.0, by parameter, once it is fixed."""
        return {name: getattr(self, f"support_{index}").to(self._dtype) for index, name in enumerate(self.shapes)}

    def any(self) -> bool:
        return any(bool(getattr(self, f"support_{index}").any()) for index in range(len(self.shapes)))

    def fix(self, support: Mapping[str, Tensor]) -> bool:
        """Decide the support. The gates that led to it are dropped."""
        if not self.is_fixed:
            self._dtype, self._device = self.tensor_logits.dtype, self.tensor_logits.device
            self.logits, self.tensor_logits = nn.ParameterList(), None
            self.is_fixed = self.is_sparse = True
        for index, (name, shape) in enumerate(self.shapes.items()):
            mask = support[name].expand(shape).to(self._device).clone()
            self.register_buffer(f"support_{index}", mask, persistent=False)
        return True

    def match(self, names: set[str]) -> None:
        if "support_0" in names and not self.is_fixed:
            self.fix({name: torch.zeros(shape, dtype=torch.bool) for name, shape in self.shapes.items()})

    def own(self, size: int) -> int:
        if self.is_fixed:
            return sum(int(getattr(self, f"support_{index}").sum()) for index in range(len(self.shapes)))
        return sum(
            int((middle > 0).sum()) * (self.shapes[name].numel() // middle.numel())
            for name, middle in self.middle().items()
        )


def _of_rows(shape: torch.Size) -> torch.Size:
    return torch.Size([shape[0], *[1] * (len(shape) - 1)]) if len(shape) > 1 else shape


def hard_concrete_gate(
    unit: Unit, init: float = 5.0, structure: str = "weight", where: str | None = None, **options
) -> Gate:
    """Gates for every weight or row of a unit; closed for good where its name does not match the expression ``where``."""
    try:
        matches = where is None or re.search(where, unit.name)
    except re.error as error:
        raise UserError(f"where={where!r} is not a valid regular expression: {error}") from None
    return HardConcreteGate(unit, init, structure) if matches else ConstantGate(specific=0.0)


def expected_share(gates: Mapping[str, Sequence[Gate]], task: str, *, density: float, **options) -> Tensor:
    """Expected number of open gates ÷ number of weights; zero where the support is fixed.

    Published: the sum, so that λ there is λ here ÷ the number of weights.
    """
    if not 0 < density <= 1:
        raise UserError(f"density must lie in 0..1, above 0 (0.02: 2 % of the weights), not {density!r}")
    learning = [gate for gate in gates[task] if isinstance(gate, HardConcreteGate) and not gate.is_fixed]
    if not learning:
        return torch.zeros(())
    count = sum(shape.numel() for gate in learning for shape in gate.shapes.values())
    return torch.stack([gate.expected() for gate in learning]).sum() / count
