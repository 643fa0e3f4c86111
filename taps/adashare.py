r"""AdaShare: every task learns which residual blocks it runs (NeurIPS 2020, arXiv 1911.12423).

Each task k has two logits for each block l, column 0 to *select* and column 1 to *skip* it; with α = softmax(logits)₀

    x_{l+1} = u · f_l(x_l) + (1 − u) · shortcut(x_l)          u ~ Gumbel-softmax(logits, temperature)

While a policy is learned u is drawn anew for every batch; afterwards policies are sampled from α or taken at α ≥ ½.
Penalties exist in two variants where the paper and its published program differ; both are implemented and named.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from taps.adapt import Unit
from taps.errors import UserError
from taps.gates import Decision, Gate, HardThreshold, State

VARIANTS = ("code", "paper")
SAMPLINGS = ("soft", "hard")


def gumbel_noise(shape: Sequence[int], generator: torch.Generator | None = None) -> Tensor:
    """Standard Gumbel draws in float64, made on the CPU so that every device sees the same ones."""
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64).clamp_(1e-12, 1 - 1e-12)
    return -(-uniform.log()).log()


def gumbel(logits: Tensor, temperature: float, hard: bool, generator: torch.Generator | None = None) -> Tensor:
    """The first of two classes in a draw of the Gumbel-softmax (arXiv 1611.01144, arXiv 1611.00712).

    Args:
        logits: (..., 2).
        temperature: τ > 0.
        hard: exactly 0 or 1, with the soft draw's gradient; else in 0..1.
        generator: of the draws.

    Returns:
        (...).
    """
    noise = gumbel_noise(logits.shape, generator).to(logits)
    soft = ((logits + noise) / temperature).softmax(-1)[..., 0]
    return HardThreshold.apply(soft, 0.5) if hard else soft


class SelectGate(Gate):
    """One task's choice for one block: run it or take its shortcut.

    Args:
        sampling: ``"soft"``, a mixture while learning (published), or ``"hard"``, 0 or 1 with a straight-through gradient.
        init: the logits' start, select and skip; equal logits decide to run.

    Raises:
        UserError: for an unknown sampling.
    """

    needs_delta = False

    def __init__(self, sampling: str = "soft", init: tuple[float, float] = (0.5, 0.5)) -> None:
        super().__init__()
        if sampling not in SAMPLINGS:
            raise UserError(f"sampling must be one of {', '.join(SAMPLINGS)}, not {sampling!r}")
        self.sampling = sampling
        self.logits = nn.Parameter(torch.tensor([float(value) for value in init]))

    def relax(self, x: Tensor | None, state: State) -> Decision:
        return Decision(run=gumbel(self.logits, state.temperature, self.sampling == "hard", state.generator))

    def decide(self, x: Tensor | None = None) -> Decision:
        select, skip = self.logits.detach().tolist()
        return Decision(run=float(select >= skip))

    @property
    def score(self) -> Tensor:
        """α, which reports and pictures show as the gate's score."""
        return self.probability

    @property
    def probability(self) -> Tensor:
        """α, the probability of running the block: a scalar in 0..1."""
        return self.logits.softmax(0)[0]


def sparsity(gates: Sequence[SelectGate], variant: str = "code") -> Tensor:
    """What makes one task skip blocks; only blocks that the curriculum has opened count.

    ``"code"``: the mean of −log(1 − α), which the published program minimises. ``"paper"`` (§3.2): Σ log α, the
    log-likelihood of running them.
    """
    logits = [gate.logits for gate in gates if gate.opened]
    if not logits:
        return torch.zeros((), device=gates[0].logits.device)
    log_run, log_skip = torch.stack(logits).log_softmax(1).unbind(1)
    return -log_skip.mean() if variant == "code" else log_run.sum()


def sharing(a: Sequence[SelectGate], b: Sequence[SelectGate], variant: str = "code") -> Tensor:
    """How different the policies of two tasks are, summed over the L blocks l = 0..L−1.

    ``"code"``: Σ (l+1)/L · abs(logit_a − logit_b) of the logits to select, so that late blocks weigh most.
    ``"paper"`` (§3.2): Σ (L−l)/L · abs(α_a − α_b), so that early blocks weigh most.
    """
    count = len(a)
    place = torch.arange(count, device=a[0].logits.device)
    if variant == "code":
        difference = torch.stack([x.logits[0] - y.logits[0] for x, y in zip(a, b, strict=True)])
        return ((place + 1) / count * difference.abs()).sum()
    difference = torch.stack([x.probability - y.probability for x, y in zip(a, b, strict=True)])
    return ((count - place) / count * difference.abs()).sum()


def select_gate(unit: Unit, sampling: str = "soft", **options) -> Gate:
    """One AdaShare gate a block."""
    return SelectGate(sampling)


def policy_penalty(
    gates: Mapping[str, Sequence[Gate]],
    task: str,
    *,
    sparsity_weight: float,
    sharing_weight: float,
    sparsity_loss: str,
    sharing_loss: str,
    **options,
) -> Tensor:
    """One task's share of the penalty, whose sum over the tasks is

    sparsity_weight · Σ_k sparsity(k) + sharing_weight · Σ_{i<j} sharing(i, j).

    Zero where policies are fixed.
    """
    for name, value in (("sparsity_loss", sparsity_loss), ("sharing_loss", sharing_loss)):
        if value not in VARIANTS:
            raise UserError(f"{name} must be one of {', '.join(VARIANTS)}, not {value!r}")
    learned = {name: list(own) for name, own in gates.items() if all(isinstance(gate, SelectGate) for gate in own)}
    if task not in learned:
        return torch.zeros(())
    own = learned.pop(task)
    pairs = [sharing(own, other, sharing_loss) for other in learned.values()]
    return sparsity_weight * sparsity(own, sparsity_loss) + 0.5 * sharing_weight * sum(pairs, torch.zeros(()))
