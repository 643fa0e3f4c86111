r"""AutoMTL: each task shares, owns or skips every layer (NeurIPS 2022, arXiv 2110.13076).

Each task has three logits for each layer. With p = softmax((logits + Gumbel noise)/τ) over shared, own and skipped

    y = p₀ · f(x; W) + p₁ · f(x; W + δ) + p₂ · stand-in(x)
      = (p₀ + p₁) · f(x; W + p₁/(p₀ + p₁) · δ) + p₂ · stand-in(x)

since convolutions and matrix products are linear in their weights: the layer runs once, not twice. The published code trains
copies of W; here own weights are W + δ, which move with W while δ holds the task's difference from it. Pre-training, in which
all choices have equal weight, is the limit τ → ∞.

If whole residual blocks are skipped instead of individual layers (``skip="blocks"``), the gate of a layer chooses between share and
own, and the gate of its block decides whether to run the block.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from taps.core.execution import State
from taps.core.find import Unit
from taps.core.gate import Decision, Gate
from taps.core.method import Method, fixed_gate
from taps.errors import UserError, check_choice
from taps.methods.gumbel import gumbel_noise
from taps.methods.registry import register
from taps.methods.stand_ins import find_choices
from taps.settings.choices import COSTS


class ChoiceGate(Gate):
    """One task's choice for one layer: share, own or skip.

    Args:
        unit: the layer, which is never skipped if it has no stand-in; or a block, which is never owned because its layers
            have their own gates.
    """

    def __init__(self, unit: Unit) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(3))
        self.size, self.stand_in_size, self.stride, self.parent = (
            unit.size,
            unit.stand_in_size,
            unit.stride,
            unit.parent,
        )
        self.needs_delta = unit.size > 0
        self.offered = (True, self.needs_delta, unit.stand_in_size is not None)
        self.products = sum(shape.numel() for shape in unit.shapes.values() if len(shape) > 1)  # not biases
        self.channel_dim = unit.channel_dim
        self.weight = (unit.depths - unit.depth) / unit.depths
        self.positions = 1.0
        self._noise: tuple[Tensor, float] | None = None

    def _softmax(self, logits: Tensor) -> Tensor:
        """Return the probabilities of the three choices, zero for those that are not offered."""
        return logits.where(torch.tensor(self.offered, device=logits.device), -math.inf).softmax(0)

    @property
    def probabilities(self) -> Tensor:
        """π: probabilities of share, own and skip, shape (3,)."""
        return self._softmax(self.logits)

    def draw(self) -> Tensor:
        """Return the draw p that the last training pass used, or π if there was none."""
        if self._noise is None:
            return self.probabilities
        noise, temperature = self._noise
        return self._softmax((self.logits + noise) / temperature)

    def relax(self, x: Tensor | None, state: State) -> Decision:
        self._see(x)
        self._noise = (gumbel_noise(self.logits.shape, state.generator).to(self.logits), state.temperature)
        p = self.draw()
        run = p[0] + p[1]
        specific = p[1] / run.clamp(min=torch.finfo(run.dtype).tiny)
        return Decision(run=1.0 if self.stand_in_size is None else run, specific=specific if self.needs_delta else 0.0)

    def decide(self, x: Tensor | None = None) -> Decision:
        self._see(x)
        logits = zip(self.logits.detach().tolist(), self.offered, strict=True)
        shared, own, skipped = (value if offered else -math.inf for value, offered in logits)
        if skipped > max(shared, own):
            return Decision(run=0.0)
        return Decision(specific=float(own > shared))

    def _see(self, x: Tensor | None) -> None:
        if isinstance(x, Tensor):
            positions = x.shape[2:] if self.channel_dim == 1 else x.shape[1:-1]
            self.positions = math.prod(positions) / self.stride

    def costs(self, kind: str) -> tuple[float, float]:
        """Return the costs of running and skipping the layer: parameters, or multiplications per sample as last seen."""
        if kind == "macs":
            return self.positions * self.products, self.positions * (self.stand_in_size or 0)
        return self.size, self.stand_in_size or 0

    @property
    def score(self) -> Tensor:
        """The probability of running the layer, shown in reports and plots."""
        return 1.0 - self.probabilities[2]


def choice_gate(unit: Unit, **options) -> Gate:
    """Return a three-way gate for a layer, or a two-way gate for a block."""
    return ChoiceGate(unit)


def preference(gates: Sequence[ChoiceGate], scale: float = 1.0) -> Tensor:
    r"""Return one task's share of the published regulariser (§3.3), which weighs shallow layers more:

    Σ_l (L − l)/L · [softplus(c · (p₁ − p₀)) + softplus(c · (p₂ − p₀))]

    with the draw p that the forward pass used, depth l = 1..L of each layer and c = ``scale``: 1 in the paper, 6 in the
    published code's policy steps. The term of p₂ is left out for layers that cannot be skipped, and blocks do not count.
    """
    total = torch.zeros((), device=gates[0].logits.device)
    for gate in gates:
        if not gate.needs_delta:
            continue
        shared, own, skipped = gate.draw()
        term = softplus(scale * (own - shared))
        if gate.stand_in_size is not None:
            term = term + softplus(scale * (skipped - shared))
        total = total + gate.weight * term
    return total


def expected_cost(gates: Mapping[str, Sequence[ChoiceGate]], kind: str) -> Tensor:
    """Return the expected cost of all tasks, divided by that of one network per task.

    Args:
        gates: by task, in network order.
        kind: ``"parameters"``: shared weights count once if any task uses them, own weights once per task, a stand-in once if
            any task skips; ``"macs"``: multiplications of one separate pass per task.
    """
    needed, single = [], 0.0
    running: list[Tensor] = []  # per unit, the probability that each task runs it
    for column in zip(*gates.values(), strict=True):
        p = torch.stack([gate.probabilities for gate in column])
        if column[0].parent is not None:
            p = p * running[column[0].parent][:, None]
        running.append(p[:, 0] + p[:, 1])
        size, stand_in = column[0].costs(kind)
        single += size * len(column)
        if kind == "macs":
            needed.append((size * running[-1] + stand_in * p[:, 2]).sum())
        else:
            used = 1 - (1 - p).prod(0)
            needed.append(size * (used[0] + p[:, 1].sum()) + stand_in * used[2])
    return torch.stack(needed).sum() / max(single, 1)


def choice_penalty(
    gates: Mapping[str, Sequence[Any]],
    task: str,
    *,
    preference_weight: float,
    policy_scale: float,
    cost_weight: float,
    cost: str,
    cost_target: float,
    **options,
) -> Tensor:
    """Return one task's share of the penalty, whose sum over the K tasks is

    preference_weight · Σ_k preference(k) + cost_weight · max(0, expected cost / cost_target − 1)².

    It is zero when policies are fixed.
    """
    check_choice("cost", cost, COSTS)
    if not cost_target > 0:
        raise UserError(f"cost_target must be above 0 (1: as much as one network a task), not {cost_target!r}")
    learned = {name: list(own) for name, own in gates.items() if all(isinstance(gate, ChoiceGate) for gate in own)}
    if task not in learned:
        return torch.zeros(())
    value = preference_weight * preference(learned[task], policy_scale)
    if cost_weight:
        over = (expected_cost(learned, cost) / cost_target - 1.0).clamp(min=0.0)
        value = value + cost_weight / len(learned) * over**2
    return value


register(
    "automtl",
    Method(
        summary="each task shares, owns or skips every single layer, or skips whole blocks",
        source="AutoMTL, NeurIPS 2022, arXiv 2110.13076",
        gate=choice_gate,
        select=find_choices,
        select_options=("skip",),
        penalty=choice_penalty,
        options={
            "preference_weight": 5e-4,
            "policy_scale": 1.0,
            "cost_weight": 0.0,
            "cost": "parameters",
            "cost_target": 0.5,
            "skip": "layers",
        },
        norms=("follow", "frozen", "task"),
        trains_base=True,
        learns_policy=True,
        policy_gate=fixed_gate,
    ),
)
