r"""DynaShare: a task policy as in AdaShare, and gates that choose again for every sample (arXiv 2305.17305).

    x_{l+1} = u·a(x_l) · f_l(x_l) + (1 − u·a(x_l)) · shortcut(x_l)

with u the task's fixed policy and a(x) an instance gate on block l (ConvNet-AIG, arXiv 1711.11503): global average
pooling → linear to 16 → BatchNorm → ReLU → linear to 2 → straight-through Gumbel-softmax. A target-rate loss holds the
mean of a(x) near a rate t_l. In evaluation a gate takes the larger logit, without noise.

Where the published program differs: each task has instance gates of its own (there they are shared, and see the task
only through the features); the pooling is over all positions whatever the shape (there over a square).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from taps.adapt import Unit
from taps.adashare import gumbel, policy_penalty
from taps.errors import UserError
from taps.gates import ConstantGate, Decision, Gate, State
from taps.layer import evaluating

TARGET_LOSSES = ("gated", "code")
_HIDDEN, _SPEED = 16, 0.1


class InstanceGate(Gate):
    """Each sample's choice for one block.

    Args:
        channels: C of the block's input.
        target: t, the wanted mean rate of running, 0..1.
        channel_dim: where the channels are: 1, or -1 for tokens.
    """

    needs_delta = False

    def __init__(self, channels: int, target: float, channel_dim: int = 1) -> None:
        super().__init__()
        self.channel_dim = channel_dim
        self.target = float(target)
        self.reduce = nn.Linear(channels, _HIDDEN)
        self.normalize = nn.BatchNorm1d(_HIDDEN)
        self.choose = nn.Linear(_HIDDEN, 2)
        nn.init.normal_(self.choose.weight, std=1e-3)
        nn.init.constant_(self.choose.bias, 0.0)
        with torch.no_grad():
            self.choose.bias[0] = 2.0  # most samples run the block at first
        self.register_buffer("average", torch.ones(()))
        self.rate: Tensor | None = None

    def logits(self, x: Tensor) -> Tensor:
        """(B, 2): to run the block and to skip it."""
        dims = [dim for dim in range(1, x.dim()) if dim != self.channel_dim % x.dim()]
        pooled = self.reduce(x.mean(dims).to(self.reduce.weight.dtype))
        alone = self.training and len(pooled) == 1  # which has no statistics of its own
        with evaluating(self.normalize) if alone else nullcontext():
            return self.choose(self.normalize(pooled).relu())

    def relax(self, x: Tensor, state: State) -> Decision:
        if not self.choose.weight.requires_grad:  # it stands still, and decides as it will in evaluation
            return self.decide(x)
        run = gumbel(self.logits(x), state.temperature, True, state.generator)
        self.rate = run.mean()
        with torch.no_grad():
            self.average.lerp_(self.rate.detach().to(self.average), _SPEED)
        return Decision(run=run.to(x.dtype))

    @torch.no_grad()
    def decide(self, x: Tensor | None = None) -> Decision:
        if x is None:
            return Decision(run=float(self.average))
        self.rate = None
        with evaluating(self):
            run, skip = self.logits(x).unbind(1)
        return Decision(run=(run >= skip).to(x.dtype))

    def __getstate__(self) -> dict:
        return {**self.__dict__, "rate": None}  # part of a graph, which cannot be copied


def target_rate(gates: Sequence[Gate], variant: str = "gated") -> Tensor:
    """Σ (t − mean a)² over one task's instance gates that have seen the batch, divided by their number (``"gated"``) or
    by that of all blocks (``"code"``, published)."""
    seen = [gate for gate in gates if isinstance(gate, InstanceGate) and gate.rate is not None]
    if not seen:
        return torch.zeros(())
    total = sum((gate.target - gate.rate) ** 2 for gate in seen)
    return total / (len(seen) if variant == "gated" else len(gates))


def rates(target_rates: float | Sequence[float], count: int) -> list[float]:
    """One target a block: a single number is that of the second half, the first half always runs.

    Raises:
        UserError: for a list of another length, or a rate outside of 0..1.
    """
    values = [float(rate) for rate in ([target_rates] if isinstance(target_rates, (int, float)) else target_rates)]
    if len(values) == 1:
        values = [1.0] * (count // 2) + values * (count - count // 2)
    if len(values) != count:
        raise UserError(
            f"target_rates has {len(values)} values, the network has {count} blocks; give one for each, or one"
        )
    if any(not 0 <= rate <= 1 for rate in values):
        raise UserError(f"target_rates must lie in 0..1, not {values}")
    return values


def instance_gate(unit: Unit, decision: Decision, target_rates: float | Sequence[float] = 0.55, **options) -> Gate:
    """The gate of a block under a given policy: for each sample where the policy runs the block and its target is below 1."""
    target = rates(target_rates, unit.count)[unit.index]
    if decision.run == 0.0 or target == 1.0:
        return ConstantGate(run=decision.run)
    if unit.channels is None:
        raise UserError(f"block {unit.name!r} does not say how many channels its input has, which instance gates need")
    return InstanceGate(unit.channels, target, unit.channel_dim)


def policy_and_rate_penalty(
    gates: Mapping[str, Sequence[Gate]], task: str, *, target_weight: float, target_loss: str, **options
) -> Tensor:
    """AdaShare's penalty while policies are learned; target_weight · the target-rate loss where instance gates are."""
    if target_loss not in TARGET_LOSSES:
        raise UserError(f"target_loss must be one of {', '.join(TARGET_LOSSES)}, not {target_loss!r}")
    value = policy_penalty(gates, task, **options)
    return value + (target_weight * target_rate(gates[task], target_loss)).to(value.device)
