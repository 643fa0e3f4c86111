r"""AdaShare: each task learns which residual blocks to run (NeurIPS 2020, arXiv 1911.12423).

Each task k has two logits for each block l, column 0 to *select* and column 1 to *skip* it; with α = softmax(logits)₀

    x_{l+1} = u · f_l(x_l) + (1 − u) · shortcut(x_l)          u ~ Gumbel-softmax(logits, temperature)

While the policy is learned, u is drawn anew for every batch; afterwards policies are sampled from α or decided by α ≥ ½.
The paper and the published code differ in the penalties; both variants are implemented (``"paper"`` and ``"code"``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from taps.core.execution import State
from taps.core.find import Unit
from taps.core.gate import Decision, Gate
from taps.core.method import Method, fixed_gate
from taps.errors import check_choice
from taps.methods.blocks import find_blocks
from taps.methods.gumbel import gumbel
from taps.methods.registry import register
from taps.settings.choices import GATE_SAMPLINGS, VARIANTS


class SelectGate(Gate):
    """One task's choice for one block: run it or use its shortcut.

    Args:
        sampling: ``"soft"``, a mixture in training (published), or ``"hard"``, 0 or 1 with a straight-through gradient.
        init: initial logits of select and skip; with equal logits the block is run.

    Raises:
        UserError: for an unknown sampling.
    """

    needs_delta = False

    def __init__(self, sampling: str = "soft", init: tuple[float, float] = (0.5, 0.5)) -> None:
        super().__init__()
        check_choice("sampling", sampling, GATE_SAMPLINGS)
        self.sampling = sampling
        self.logits = nn.Parameter(torch.tensor([float(value) for value in init]))

    def relax(self, x: Tensor | None, state: State) -> Decision:
        return Decision(run=gumbel(self.logits, state.temperature, self.sampling == "hard", state.generator))

    def decide(self, x: Tensor | None = None) -> Decision:
        select, skip = self.logits.detach().tolist()
        return Decision(run=float(select >= skip))

    @property
    def score(self) -> Tensor:
        """α, shown as the gate's score in reports and plots."""
        return self.probability

    @property
    def probability(self) -> Tensor:
        """α, the probability of running the block: a scalar in 0..1."""
        return self.logits.softmax(0)[0]


def sparsity(gates: Sequence[SelectGate], variant: str = "code") -> Tensor:
    """Return the penalty that makes one task skip blocks; only blocks that the curriculum has reached count.

    ``"code"``: the mean of −log(1 − α), which the published code minimises. ``"paper"`` (§3.2): Σ log α, the
    log-likelihood of running the blocks.
    """
    logits: list[Tensor] = [gate.logits for gate in gates if gate.in_curriculum]
    if not logits:
        return torch.zeros((), device=gates[0].logits.device)
    log_run, log_skip = torch.stack(logits).log_softmax(1).unbind(1)
    return -log_skip.mean() if variant == "code" else log_run.sum()


def sharing(a: Sequence[SelectGate], b: Sequence[SelectGate], variant: str = "code") -> Tensor:
    """Return the difference between the policies of two tasks, summed over the L blocks l = 0..L−1.

    ``"code"``: Σ (l+1)/L · abs(logit_a − logit_b) of the select logits, so that late blocks have the largest weight.
    ``"paper"`` (§3.2): Σ (L−l)/L · abs(α_a − α_b), so that early blocks have the largest weight.
    """
    count = len(a)
    place = torch.arange(count, device=a[0].logits.device)
    if variant == "code":
        difference = torch.stack([x.logits[0] - y.logits[0] for x, y in zip(a, b, strict=True)])
        return ((place + 1) / count * difference.abs()).sum()
    difference = torch.stack([x.probability - y.probability for x, y in zip(a, b, strict=True)])
    return ((count - place) / count * difference.abs()).sum()


def select_gate(unit: Unit, sampling: str = "soft", **options) -> Gate:
    """Return an AdaShare gate for a block."""
    return SelectGate(sampling)


def policy_penalty(
    gates: Mapping[str, Sequence[Any]],
    task: str,
    *,
    sparsity_weight: float,
    sharing_weight: float,
    sparsity_loss: str,
    sharing_loss: str,
    **options,
) -> Tensor:
    """Return one task's share of the penalty, whose sum over the tasks is

    sparsity_weight · Σ_k sparsity(k) + sharing_weight · Σ_{i<j} sharing(i, j).

    It is zero when policies are fixed.
    """
    check_choice("sparsity_loss", sparsity_loss, VARIANTS)
    check_choice("sharing_loss", sharing_loss, VARIANTS)
    learned = {name: list(own) for name, own in gates.items() if all(isinstance(gate, SelectGate) for gate in own)}
    if task not in learned:
        return torch.zeros(())
    own = learned.pop(task)
    pairs = [sharing(own, other, sharing_loss) for other in learned.values()]
    return sparsity_weight * sparsity(own, sparsity_loss) + 0.5 * sharing_weight * sum(pairs, torch.zeros(()))


#: sampling of gates in training, and the weights and variants of the two penalties
OPTIONS = {
    "sampling": "soft",
    "sparsity_weight": 0.05,
    "sharing_weight": 0.05,
    "sparsity_loss": "code",
    "sharing_loss": "code",
}

register(
    "adashare",
    Method(
        summary="one network learns for all tasks; each learns which residual blocks it runs",
        source="AdaShare, NeurIPS 2020, arXiv 1911.12423",
        gate=select_gate,
        select=find_blocks,
        penalty=policy_penalty,
        options=OPTIONS,
        norms=("follow", "frozen", "task"),
        trains_base=True,
        learns_policy=True,
        policy_gate=fixed_gate,
    ),
)
