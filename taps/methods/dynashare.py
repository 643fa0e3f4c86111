r"""DynaShare: a task policy as in AdaShare, and gates that choose for each sample (arXiv 2305.17305).

    x_{l+1} = u·a(x_l) · f_l(x_l) + (1 − u·a(x_l)) · shortcut(x_l)

with u the task's fixed policy and a(x) an instance gate on block l (ConvNet-AIG, arXiv 1711.11503): global average
pooling → linear to 16 → BatchNorm → ReLU → linear to 2 → straight-through Gumbel-softmax. A target-rate loss keeps the
mean of a(x) near a rate t_l. In evaluation a gate chooses the larger logit, without noise.

Differences from the published code: each task has its own instance gates (there they are shared and depend on the task
only through the features), and pooling is over all positions of any shape (there over a square).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from taps.core.execution import State
from taps.core.find import Unit
from taps.core.gate import ConstantGate, Decision, Gate
from taps.core.method import Method
from taps.core.modules import evaluating
from taps.errors import UserError, check_choice
from taps.methods.adashare import OPTIONS, policy_penalty, select_gate
from taps.methods.blocks import find_blocks
from taps.methods.gumbel import gumbel
from taps.methods.registry import register
from taps.settings.choices import TARGET_LOSSES

_HIDDEN, _SPEED = 16, 0.1


class InstanceGate(Gate):
    """Each sample's choice for one block.

    Args:
        channels: C of the block's input.
        target: t, the wanted mean rate of running, 0..1.
        channel_dim: the channel dimension: 1, or -1 for tokens.
    """

    needs_delta = False
    uses_input = True

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
        self.average: Tensor
        self.register_buffer("average", torch.ones(()))
        self.rate: Tensor | None = None

    def logits(self, x: Tensor) -> Tensor:
        """Return the logits of running and of skipping the block, (B, 2)."""
        dims = [dim for dim in range(1, x.dim()) if dim != self.channel_dim % x.dim()]
        pooled = self.reduce(x.mean(dims).to(self.reduce.weight.dtype))
        alone = self.training and len(pooled) == 1  # a single sample has no batch statistics
        with evaluating(self.normalize) if alone else nullcontext():
            return self.choose(self.normalize(pooled).relu())

    def relax(self, x: Tensor | None, state: State) -> Decision:
        if not self.choose.weight.requires_grad:  # it is frozen, and decides as in evaluation
            return self.decide(x)
        if x is None:
            return self.decide()
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
    """Return Σ (t − mean a)² over one task's instance gates that have seen the batch, divided by their number (``"gated"``) or by
    the number of all blocks (``"code"``, published)."""
    seen = [gate for gate in gates if isinstance(gate, InstanceGate) and gate.rate is not None]
    if not seen:
        return torch.zeros(())
    total = torch.stack([(gate.target - gate.rate).square() for gate in seen if gate.rate is not None]).sum()
    return total / (len(seen) if variant == "gated" else len(gates))


def rates(target_rates: float | Sequence[float], count: int) -> list[float]:
    """Return one target per block; a single number applies to the second half, while the first half always runs.

    Raises:
        UserError: for a list of another length, or a rate outside 0..1.
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
    """Return a block's gate under a policy: one that decides per sample if the policy runs the block with a target below 1."""
    target = rates(target_rates, unit.count)[unit.index]
    if decision.run == 0.0 or target == 1.0:
        return ConstantGate(run=float(decision.run))
    if unit.channels is None:
        raise UserError(f"block {unit.name!r} does not say how many channels its input has, which instance gates need")
    return InstanceGate(unit.channels, target, unit.channel_dim)


def policy_and_rate_penalty(
    gates: Mapping[str, Sequence[Gate]], task: str, *, target_weight: float, target_loss: str, **options
) -> Tensor:
    """Return AdaShare's penalty while policies are learned, plus target_weight · the target-rate loss of the instance gates."""
    check_choice("target_loss", target_loss, TARGET_LOSSES)
    value = policy_penalty(gates, task, **options)
    return value + (target_weight * target_rate(gates[task], target_loss)).to(value.device)


register(
    "dynashare",
    Method(
        summary="as adashare, and each sample chooses again among its task's blocks",
        source="DynaShare, arXiv 2305.17305",
        gate=select_gate,
        select=find_blocks,
        penalty=policy_and_rate_penalty,
        options={**OPTIONS, "target_rates": 0.55, "target_weight": 25.0, "target_loss": "gated"},
        norms=("follow", "frozen", "task"),
        trains_base=True,
        learns_policy=True,
        policy_gate=instance_gate,
        gates_learn_under_policy=True,
    ),
)
