r"""Sparse deltas: each task learns for every single weight whether to change it (efficient computation sharing, ICCV 2023, §3).

A weight is W + z_T · z · δ with hard-concrete gates (Louizos et al., arXiv 1712.01312): one per weight and one per
tensor (structured diff pruning, arXiv 2012.07463). With u ~ U(0, 1) and logit α

    s = sigmoid((log u − log(1 − u) + α)/τ)      z = clip(l + s · (r − l), 0, 1)      P(z > 0) = sigmoid(α − τ · log(−l/r))

The penalty is the expected number of open gates. After that the support is fixed, gates are folded into the deltas, and the
deltas keep learning inside it. Decisions use the gate's middle z̄ (s = sigmoid(α)); the published code draws them, also in tests.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from taps.core.accounting import own_norm_parameters
from taps.core.execution import State
from taps.core.find import Unit, find_everything
from taps.core.gate import ConstantGate, Decision, Gate
from taps.core.method import SETTLED, Lengths, Method, Phase, fixed_gate
from taps.core.network import Network
from taps.errors import UserError, check_choice
from taps.methods.registry import register
from taps.settings.choices import STRUCTURES

LOW, HIGH = -1.5, 1.5  # published l and r


def hard_concrete(
    logit: Tensor, temperature: float = 1.0, generator: torch.Generator | None = None, uniform: Tensor | None = None
) -> Tensor:
    """Draw z, 0..1, from the hard-concrete distribution for every logit α, with gradients to α.

    Args:
        logit: α, any shape.
        temperature: τ > 0.
        generator: source of the uniform draws, which are made on the CPU so that they are the same for every device.
        uniform: draws to use instead, 0..1.
    """
    if uniform is None:
        uniform = torch.rand(logit.shape, generator=generator)
    noise = torch.logit(uniform, eps=1e-4).to(logit)
    return _stretch(torch.sigmoid((noise + logit) / temperature))


def _stretch(s: Tensor) -> Tensor:
    return (LOW + s * (HIGH - LOW)).clamp(0.0, 1.0)


def chance_open(logit: Tensor, temperature: float = 1.0) -> Tensor:
    """Return P(z > 0), 0..1."""
    return torch.sigmoid(logit - temperature * math.log(-LOW / HIGH))


class HardConcreteGate(Gate):
    """One task's gates on a unit: one per weight, and one more per tensor.

    Args:
        unit: description of the unit.
        init: initial α (published 5: z > 0 with probability 0.993).
        structure: ``"weight"``, one gate per weight, or ``"row"``, one per row of a matrix (per output), which matrix products
            can skip.
    """

    def __init__(self, unit: Unit, init: float = 5.0, structure: str = "weight") -> None:
        super().__init__()
        check_choice("structure", structure, STRUCTURES)
        if not -30 < init < 30:
            raise UserError(f"init must lie in -30..30, not {init!r}")
        self.shapes = dict(unit.shapes)
        by_row = structure == "row"
        self.logits = nn.ParameterList(
            nn.Parameter(torch.full(_of_rows(shape) if by_row else shape, float(init)))
            for shape in self.shapes.values()
        )
        self.tensor_logits: Any = nn.Parameter(torch.full((len(self.shapes),), float(init)))
        #: whether the support is fixed
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
        if self.is_fixed:  # deltas are 0 outside the support
            return Decision(specific=float(self.any()))
        return Decision(specific=self.middle())

    def middle(self) -> dict[str, Tensor]:
        """Return z̄ of every parameter, in its shape or broadcastable to it."""
        tensors = _stretch(self.tensor_logits.detach().sigmoid())
        return {
            name: tensors[index] * _stretch(logit.detach().sigmoid())
            for index, (name, logit) in enumerate(zip(self.shapes, self.logits, strict=True))
        }

    def expected(self) -> Tensor:
        """Return the expected number of open gates: Σ P(z > 0) over weights (a row's gate counts as all of them) and tensors."""
        total = chance_open(self.tensor_logits).sum()
        for shape, logit in zip(self.shapes.values(), self.logits, strict=True):
            total = total + chance_open(logit).sum() * (shape.numel() / logit.numel())
        return total

    def support(self) -> dict[str, Tensor]:
        """Return the fixed support by parameter: 1.0 for the task's own weights, else 0.0."""
        return {name: getattr(self, f"support_{index}").to(self._dtype) for index, name in enumerate(self.shapes)}

    def any(self) -> bool:
        return any(bool(getattr(self, f"support_{index}").any()) for index in range(len(self.shapes)))

    def fix_support(self, support: Mapping[str, Tensor]) -> bool:
        """Fix the support and drop the gates that led to it."""
        if not self.is_fixed:
            self._dtype, self._device = self.tensor_logits.dtype, self.tensor_logits.device
            self.logits, self.tensor_logits = nn.ParameterList(), None
            self.is_fixed = self.is_sparse = True
        for index, (name, shape) in enumerate(self.shapes.items()):
            mask = support[name].expand(shape).to(self._device).clone()
            self.register_buffer(f"support_{index}", mask, persistent=False)
        return True

    def restore_structure(self, names: set[str]) -> None:
        if "support_0" in names and not self.is_fixed:
            self.fix_support({name: torch.zeros(shape, dtype=torch.bool) for name, shape in self.shapes.items()})

    def task_parameters(self, size: int) -> int:
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
    """Return gates for every weight or row of a unit, or a closed constant gate if ``where`` does not match its name."""
    try:
        matches = where is None or re.search(where, unit.name)
    except re.error as error:
        raise UserError(f"where={where!r} is not a valid regular expression: {error}") from None
    return HardConcreteGate(unit, init, structure) if matches else ConstantGate(specific=0.0)


def expected_share(gates: Mapping[str, Sequence[Gate]], task: str, *, density: float, **options) -> Tensor:
    """Return the expected number of open gates ÷ number of weights; zero if the support is fixed.

    The published penalty is the sum, so that λ there is λ here ÷ the number of weights.
    """
    if not 0 < density <= 1:
        raise UserError(f"density must lie in 0..1, above 0 (0.02: 2 % of the weights), not {density!r}")
    learning = [gate for gate in gates[task] if isinstance(gate, HardConcreteGate) and not gate.is_fixed]
    if not learning:
        return torch.zeros(())
    count = sum(shape.numel() for gate in learning for shape in gate.shapes.values())
    return torch.stack([gate.expected() for gate in learning]).sum() / count


@torch.no_grad()
def fix_support(model: Network, task: str, density: float | None = None) -> int:
    """Fix a task's support and fold its gates into its deltas: δ ← z̄ · δ inside and 0 outside.

    Weights with open gates remain the task's own. If the density allows fewer, those with the largest z̄ · abs(δ) remain; with
    gates per row, whole rows are ranked by their root mean square.

    Args:
        model: a model of a method with gates on individual weights.
        task: its name.
        density: largest share of the base's parameters for deltas and the task's own norms together, 0..1; ``None``: the method's
            option, where 1 keeps all weights with open gates.

    Returns:
        Number of weights in the support.

    Raises:
        UserError: if the task has no gates on individual weights, or no weight fits in addition to its norms.
    """
    model.check_task(task)
    density = model.options.get("density", 1.0) if density is None else density
    allowed = max_weights(model, task, density)
    changes = []  # per parameter: unit, name, and for each group of weights with a common gate: change, number of weights, z̄
    for unit in model.units:
        gate = unit.gates[task]
        if not isinstance(gate, HardConcreteGate) or gate.is_fixed:
            continue
        middle = gate.middle()
        for name in unit.parameter_names:
            delta = unit.deltas[task][name]
            delta.mul_(middle[name])
            each = delta.numel() // middle[name].numel()
            size = delta.square().reshape(middle[name].numel(), each).mean(1).sqrt()
            changes.append((unit, name, size, each, middle[name]))
    level = _level(allowed, changes)
    total = 0
    masks: dict[int, dict[str, Tensor]] = {}
    for unit, name, size, _, share in changes:
        mask = (size > level).view(share.shape).expand(unit.deltas[task][name].shape)
        unit.deltas[task][name].mul_(mask)
        masks.setdefault(id(unit), {})[name] = mask
        total += int(mask.sum())
    for unit in model.units:
        if id(unit) in masks:
            unit.gates[task].fix_support(masks[id(unit)])
    model.policies[task] = tuple((1.0, unit.gates[task].decide().specific) for unit in model.units)
    return total


def max_weights(model: Network, task: str, density: float) -> float:
    """Return how many weights of the base a task may change.

    Args:
        model, task, density: as in :func:`fix_support`.

    Raises:
        UserError: if the task has no gates on individual weights, the density is not above 0 and at most 1, or the task's norms
            alone take all of it.
    """
    if not any(isinstance(unit.gates[task], HardConcreteGate) for unit in model.units):
        raise UserError(
            f"task {task!r} has no gate on individual weights: where={model.options.get('where')!r} matches no layer"
        )
    if not 0 < density <= 1:
        raise UserError(f"density must lie in 0..1, above 0 (0.02: 2 % of the weights), not {density!r}")
    norms = own_norm_parameters(model, [task])
    allowed = density * model.base_parameters - norms
    if allowed < 1:
        raise UserError(
            f"a density of {100 * density:g} % has no room for individual weights: the task's own norms take "
            f"{100 * norms / model.base_parameters:.2g} % of the base; give a larger density, or norm frozen"
        )
    return allowed


def _level(allowed: float, changes: list) -> float:
    """Return the size of change above which weights are the task's own, so that they do not exceed ``allowed``."""
    size = torch.cat([size for _, _, size, _, _ in changes])
    each = torch.cat([torch.full_like(size, count) for _, _, size, count, _ in changes])
    order = size.argsort(descending=True)
    kept = int((each[order].cpu().double().cumsum(0) <= allowed).sum())  # not every device has float64
    return float(size[order[kept]]) if kept < len(order) else 0.0


def begin_support(model: Network, task: str) -> Iterable[Tensor]:
    """Fix the support at the start of a phase; return the deltas, whose running averages would move weights outside it."""
    fix_support(model, task)
    return [parameter for unit in model.units if task in unit.deltas for parameter in unit.deltas[task].parameters()]


def gates_then_support(model: Network, lengths: Lengths) -> tuple[Phase, ...]:
    """Return the first two steps of efficient computation sharing: the first half of training learns gates on every weight, the
    second half the weights inside the resulting support."""
    return (
        Phase("gates", lengths.epochs / 2),
        Phase("support", lengths.epochs / 2, penalty=0.0, trains=SETTLED, begin=begin_support),
    )


register(
    "sparse_delta",
    Method(
        summary="each task changes individual weights of a base task's network",
        source="Efficient Computation Sharing for Multi-Task Visual Scene Understanding, ICCV 2023",
        gate=hard_concrete_gate,
        select=find_everything,
        penalty=expected_share,
        phases=gates_then_support,
        options={"init": 5.0, "structure": "weight", "density": 1.0, "where": None},
        norms=("task", "follow", "frozen"),
        builds_on_base=True,
        policy_gate=fixed_gate,
    ),
)
