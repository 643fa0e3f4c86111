"""Methods: each is a row that says which units, which gate, which penalty and which phases.

A row is data. The core (:mod:`taps.gates`, :mod:`taps.layer`, :mod:`taps.adapt`, :mod:`taps.model`, :mod:`taps.train`)
reads rows and knows no method by name; a new method is a new row, added with ``taps.METHODS["name"] = Method(...)``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from taps.adapt import Found, Unit, find_everything, find_layers
from taps.adashare import policy_penalty, select_gate
from taps.automtl import choice_gate, choice_penalty
from taps.blocks import find_blocks
from taps.dynashare import instance_gate, policy_and_rate_penalty
from taps.gates import ConstantGate, Decision, Gate, ThresholdGate
from taps.skips import find_choices
from taps.sparse import expected_share, hard_concrete_gate

#: what can be trained, by role; every trainable tensor of a model has exactly one
ROLES = ("base", "delta", "gate", "norm", "head")


@dataclass(frozen=True)
class Phase:
    """A stretch of training, executed by :func:`taps.train.fit`.

    Attributes:
        name: shown in progress bars and metrics.
        epochs: its length, > 0; fractions of an epoch are allowed where only one stream of data is used. The last one has what
            the others leave of a run, and may have 0 where it has a ``start``: its one step is then the run's last.
        penalty: factor on the penalty weight λ during this phase.
        trains: the roles that learn; the others stand still, batch statistics of a base that stands still too.
        data: the stream of batches it takes, by name.
        optimizer: the one that makes its steps, by name; each has its own state and learning rates.
        temperature: of gates that have one, > 0.
        opened: how many units a curriculum has opened, counted from the last; ``None`` for all.
        together: whether tasks on the same samples run in one pass that shares what they have in common; else one
            after another, in the memory of one.
        validates: whether its epochs count when the loop validates every so many.
        competes: whether its epochs compete for the best one, as those of the last phase, and those with all
            deltas rounded, always do.
        start: what is done once when it begins: ``"choose"``, a budget closes gates (:func:`taps.budget.keep_within`), or
            ``"round"``, deltas become what files will hold (:func:`taps.budget.hold_within`), and rounded ones learn no more,
            or ``"fix"``, gates on single weights decide (:func:`taps.support.fix_support`).
        beyond: where it starts with ``"round"``: only tasks are rounded in which that makes a larger error than this.
        pull: weight of the distance between the task's activations and the base's (:mod:`taps.activations`).
    """

    name: str
    epochs: float
    penalty: float = 1.0
    trains: tuple[str, ...] = ROLES
    data: str = "train"
    optimizer: str = "main"
    temperature: float = 1.0
    opened: int | None = None
    together: bool = True
    validates: bool = True
    competes: bool = False
    start: str | None = None
    beyond: float = -1.0
    pull: float = 0.0


#: errors of rounding, ‖δ̂ − δ‖ / ‖δ‖ of a layer, beyond which norms and head have much, or anything, to make up for
_COARSE, _NOTICED = 0.7, 0.05
#: everything but the gates: decisions stand, the rest goes on learning
SETTLED = tuple(role for role in ROLES if role != "gate")


def one_phase(epochs: float, warmup: float, settle: float) -> tuple[Phase, ...]:
    """Training that has no gates to decide."""
    return (Phase("train", epochs),)


def warmup_penalty_settle(epochs: float, warmup: float, settle: float) -> tuple[Phase, ...]:
    """``warmup`` epochs without the penalty, then with it, then ``settle`` epochs in which the gates stand still.

    ``settle=0`` is the published schedule, counted exactly.
    """
    warmup = min(warmup, epochs)
    settle = min(settle, epochs - warmup)
    phases = (
        Phase("warm-up", warmup, penalty=0.0),
        Phase("train", epochs - warmup - settle),
        Phase("settle", settle, penalty=0.0, trains=SETTLED),
    )
    return tuple(phase for phase in phases if phase.epochs > 0)


def open_choose_round(epochs: float) -> tuple[Phase, ...]:
    """The schedule of a budget: a third with every unit open, then with those it has bytes for; at last deltas are what files
    will hold and norms and head make up for the rounding: in the last sixth where that is coarse, in the last twelfth where it
    can be noticed, else in the last step."""
    return (
        Phase("open", epochs / 3, penalty=0.0, trains=SETTLED),
        Phase("settle", epochs / 2, penalty=0.0, trains=SETTLED, start="choose"),
        Phase("round", epochs / 12, penalty=0.0, trains=SETTLED, start="round", beyond=_COARSE),
        Phase("round", epochs / 12, penalty=0.0, trains=SETTLED, start="round", beyond=_NOTICED),
        Phase("round", 0.0, penalty=0.0, trains=("norm", "head"), start="round"),
    )


def gates_then_support(epochs: float, warmup: float, settle: float) -> tuple[Phase, ...]:
    """The first two steps of efficient computation sharing: half of the training learns gates on every weight, half the
    weights inside of what they have left."""
    return (
        Phase("gates", epochs / 2),
        Phase("support", epochs / 2, penalty=0.0, trains=SETTLED, start="fix"),
    )


def no_penalty(gates: Mapping[str, Sequence[Gate]], task: str, **options) -> Tensor:
    """Zero: a method without anything to keep small."""
    return torch.zeros(())


def mean_absolute_score(gates: Mapping[str, Sequence[Gate]], task: str, **options) -> Tensor:
    """(1/L) Σ |s_i| over the task's L units (TAPS §3). L is the real number of units of the network."""
    return torch.stack([gate.score for gate in gates[task]]).abs().mean()


def threshold_gate(unit: Unit, **options) -> Gate:
    """One TAPS gate a unit; options as in :class:`taps.gates.ThresholdGate`."""
    return ThresholdGate(**options)


def always_own(unit: Unit) -> Gate:
    """Every unit uses the task's delta."""
    return ConstantGate(specific=1.0)


def always_base(unit: Unit) -> Gate:
    """No unit uses a delta."""
    return ConstantGate(specific=0.0)


def fixed_gate(unit: Unit, decision: Decision, **options) -> Gate:
    """What a policy decided, whatever the input."""
    return ConstantGate(run=decision.run, specific=decision.specific)


@dataclass(frozen=True)
class Method:
    """One way of sharing a network between tasks.

    Attributes:
        summary: one line for people.
        source: where it is published.
        gate: makes the gate of one task on one unit from the unit's description and the method's options.
        select: finds the units of a network; ``select_options``: names of the options that it takes too.
        penalty: from every task's gates in network order, a task's name and the method's options to a scalar.
        phases: from the numbers of all, of warm-up and of settling epochs to the phases of training.
        options: names and defaults of the options that ``gate``, ``fixed``, ``penalty`` and ``select`` take.
        norms: the norm policies that make sense, the default one first.
        trains_base: whether the base network learns too, unless :func:`taps.adapt` is told otherwise.
        fixed: for a method that first learns a policy and then trains under it, makes the gate of a unit from its
            description, what the policy decided (run and specific are 0.0 or 1.0), and the method's options.
        budget: the size of task files unless another is asked for, as in :func:`taps.budget.parse_budget`; ``None``: any.
    """

    summary: str
    source: str
    gate: Callable[..., Gate]
    select: Callable[..., list[Found]] = find_layers
    penalty: Callable[..., Tensor] = no_penalty
    phases: Callable[[float, float, float], tuple[Phase, ...]] = one_phase
    options: Mapping[str, object] = field(default_factory=dict)
    norms: tuple[str, ...] = ("task", "follow", "frozen")
    trains_base: bool = False
    fixed: Callable[..., Gate] | None = None
    budget: str | None = None
    select_options: tuple[str, ...] = ()

    @property
    def learns_policy(self) -> bool:
        """Whether one network learns for all tasks and a policy says what each does with it."""
        return self.fixed is not None and self.trains_base

    @property
    def builds_on_base(self) -> bool:
        """Whether the base is a network that one task has trained and the others are built on."""
        return self.fixed is not None and not self.trains_base


_POLICY = {
    "sampling": "soft",
    "sparsity_weight": 0.05,
    "sharing_weight": 0.05,
    "sparsity_loss": "code",
    "sharing_loss": "code",
}

METHODS: dict[str, Method] = {
    "taps": Method(
        summary="learn, layer by layer, whether the task needs its own weights",
        source="Task Adaptive Parameter Sharing, CVPR 2022, arXiv 2203.16708",
        gate=threshold_gate,
        penalty=mean_absolute_score,
        phases=warmup_penalty_settle,
        options={"threshold": 0.1, "score_init": 0.15, "ste": "code"},
    ),
    "taps_budget": Method(
        summary="every layer learns, then the file's bytes go to the layers and bits that keep most of it",
        source="this library; bits by reverse water-filling",
        gate=threshold_gate,
        options={"threshold": 0.1, "score_init": 0.15, "ste": "code"},
        norms=("follow", "task", "frozen"),
        budget="10%",
    ),
    "finetune": Method(
        summary="every weight is the task's own: the upper bound in size",
        source="full fine-tuning",
        gate=always_own,
        select=find_everything,
    ),
    "norm_only": Method(
        summary="only the norms and the head are the task's own",
        source="K for the price of 1, ICLR 2019, arXiv 1810.10703",
        gate=always_base,
        norms=("task",),
    ),
    "linear_probe": Method(
        summary="only the head is the task's own: the lower bound in size",
        source="linear classifier probe",
        gate=always_base,
        norms=("frozen",),
    ),
    "hard_sharing": Method(
        summary="one network learns for all tasks, which differ in their heads alone",
        source="Multitask Learning, Machine Learning 28, 1997",
        gate=always_base,
        norms=("frozen",),
        trains_base=True,
    ),
    "adashare": Method(
        summary="one network learns for all tasks; each learns which residual blocks it runs",
        source="AdaShare, NeurIPS 2020, arXiv 1911.12423",
        gate=select_gate,
        select=find_blocks,
        penalty=policy_penalty,
        options=_POLICY,
        norms=("follow", "frozen", "task"),
        trains_base=True,
        fixed=fixed_gate,
    ),
    "automtl": Method(
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
        fixed=fixed_gate,
    ),
    "sparse_delta": Method(
        summary="each task changes single weights of a base task's network",
        source="Efficient Computation Sharing for Multi-Task Visual Scene Understanding, ICCV 2023",
        gate=hard_concrete_gate,
        select=find_everything,
        penalty=expected_share,
        phases=gates_then_support,
        options={"init": 5.0, "structure": "weight", "density": 1.0, "where": None},
        norms=("task", "follow", "frozen"),
        fixed=fixed_gate,
    ),
    "dynashare": Method(
        summary="as adashare, and each sample chooses again among its task's blocks",
        source="DynaShare, arXiv 2305.17305",
        gate=select_gate,
        select=find_blocks,
        penalty=policy_and_rate_penalty,
        options={**_POLICY, "target_rates": 0.55, "target_weight": 25.0, "target_loss": "gated"},
        norms=("follow", "frozen", "task"),
        trains_base=True,
        fixed=instance_gate,
    ),
}
