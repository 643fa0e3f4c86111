"""The definition of a method: its units, gate, penalty and training phases."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from taps.core.find import Found, Unit, find_layers
from taps.core.gate import ConstantGate, Decision, Gate

#: a :class:`taps.core.network.Network`, whose module imports this one
Model = Any
#: roles of trainable tensors; every trainable tensor of a model has exactly one
ROLES = ("base", "delta", "gate", "norm", "head")
#: all roles except gates: decisions are fixed while everything else keeps learning
SETTLED = tuple(role for role in ROLES if role != "gate")


class Lengths(Protocol):
    """The lengths that define a schedule (:class:`taps.training.recipe.Recipe`): epochs, and a budget if one is requested."""

    @property
    def epochs(self) -> int: ...
    @property
    def warmup_epochs(self) -> float: ...
    @property
    def settle_epochs(self) -> float | None: ...
    @property
    def budget(self) -> int | str | None: ...


class ExtraLoss(Protocol):
    """A loss added to the tasks' losses, known after the forward pass."""

    def value(self) -> Tensor:
        """Return the loss, a scalar."""


@dataclass(frozen=True)
class Phase:
    """A phase of training, executed by :func:`taps.training.loop.run_phases`.

    Attributes:
        name: shown in progress bars and metrics.
        epochs: its length, > 0; fractions of an epoch are allowed if only one data stream is used. The last phase takes the rest of
            the run, and may have length 0 if it has a ``begin``: its only step is then the last of the run.
        penalty: factor on the penalty weight λ during this phase.
        trains: the roles that learn; the others are frozen, as are the batch statistics of a frozen base.
        data: name of the data stream that provides its batches.
        optimizer: name of the optimiser that makes its steps; each has its own state and learning rates.
        temperature: temperature of gates that use one, > 0.
        curriculum: number of units, counted from the last, that the curriculum has reached; ``None`` for all.
        together: whether tasks on the same samples run in one pass that shares common computation; otherwise they run one
            after another, with the memory needs of one.
        validates: whether its epochs count towards the validation interval.
        competes: whether its epochs are candidates for the best epoch, as those of the last phase always are; or a function of a
            model and the task that returns this.
        begin: called once per task at the start of the phase, with the model and the task. Returns the parameters whose running
            averages of gradients are no longer valid.
        each_step: called once per task before each step, with the model, the task and the part of the phase that is done, 0 to 1.
        stored: called once per task at the end of an epoch, before validation, with the model and the task. Gives the task the
            values that its file will hold, and returns a function that restores its own, with which training goes on.
        forks: whether runs that differ only from this phase on may start from a common state, that just before ``begin``.
        extra_loss: function of the model, a batch and its labels by task; returns a context manager for the forward pass that
            yields a loss to add.
    """

    name: str
    epochs: float
    penalty: float = 1.0
    trains: tuple[str, ...] = ROLES
    data: str = "train"
    optimizer: str = "main"
    temperature: float = 1.0
    curriculum: int | None = None
    together: bool = True
    validates: bool = True
    competes: bool | Callable[[Model, str], bool] = False
    begin: Callable[[Model, str], Iterable[Tensor]] | None = None
    each_step: Callable[[Model, str, float], None] | None = None
    stored: Callable[[Model, str], Callable[[], None]] | None = None
    forks: bool = False
    extra_loss: Callable[[Model, Tensor, Mapping[str, Tensor]], AbstractContextManager[ExtraLoss]] | None = None


class Defaults(NamedTuple):
    """How a method's runs train unless a recipe says otherwise.

    Attributes:
        optimizer: one of :data:`taps.settings.choices.OPTIMIZERS`.
        decay: how learning rates fall, one of :data:`taps.settings.choices.DECAYS`.
        adaptive: roles that Adam trains if the optimiser is ``"split"``.
        rate: factor on all learning rates of that optimiser.
    """

    optimizer: str = "sgd"
    decay: str = "cosine"
    adaptive: tuple[str, ...] = ("norm", "head")
    rate: float = 1.0


def as_published(model: Model, lengths: Lengths) -> Defaults:
    """Return SGD whose learning rate follows a cosine."""
    return Defaults()


def one_phase(model: Model, lengths: Lengths) -> tuple[Phase, ...]:
    """Return a single phase, for training without gates to decide."""
    return (Phase("train", lengths.epochs),)


def no_penalty(gates: Mapping[str, Sequence[Gate]], task: str, **options) -> Tensor:
    """Return zero, for methods without a penalty."""
    return torch.zeros(())


def fixed_gate(unit: Unit, decision: Decision, **options) -> Gate:
    """Return a gate with the policy's decision, whatever the input."""
    return ConstantGate(run=decision.run, specific=decision.specific)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Method:
    """A method of sharing a network between tasks.

    Attributes:
        summary: one-line description.
        source: its publication.
        gate: function of a unit's description and the method's options that makes one task's gate on the unit.
        select: function that finds the units of a network; ``select_options`` names the options that it takes too.
        penalty: function of every task's gates in network order, a task's name and the method's options; returns a scalar.
        phases: function of a model and the lengths of a run; returns the phases of training, at least one.
        options: names and defaults of the options that ``gate``, ``policy_gate``, ``penalty`` and ``select`` take.
        norms: the norm policies that the method supports, the default first.
        trains_base: whether the base network is trained too, unless :func:`taps.adapt` overrides this.
        learns_policy: whether one network is trained for all tasks and a policy determines how each task uses it.
        builds_on_base: whether the base is a network trained on one task, on which the other tasks are built.
        policy_gate: for these two kinds of methods, function that makes the gate of a unit from its description, the policy's
            decision (run and specific are 0.0 or 1.0) and the method's options.
        gates_learn_under_policy: whether gates made by ``policy_gate`` learn while the network is trained under a policy.
        budget: for methods that keep a budget, the default size of task files (``"10%"``).
        defaults: function of a model and the lengths of a run; returns how it trains unless a recipe says otherwise.
        name: name under which the method is registered.
    """

    summary: str
    source: str
    gate: Callable[..., Gate]
    select: Callable[..., list[Found]] = find_layers
    penalty: Callable[..., Tensor] = no_penalty
    phases: Callable[[Model, Lengths], tuple[Phase, ...]] = one_phase
    options: Mapping[str, object] = field(default_factory=dict)
    norms: tuple[str, ...] = ("task", "follow", "frozen")
    trains_base: bool = False
    learns_policy: bool = False
    builds_on_base: bool = False
    policy_gate: Callable[..., Gate] | None = None
    gates_learn_under_policy: bool = False
    budget: str | None = None
    defaults: Callable[[Model, Lengths], Defaults] = as_published
    select_options: tuple[str, ...] = ()
    name: str = ""

    def find_units(self, net: nn.Module, options: Mapping[str, object]) -> list[Found]:
        """Return the units of a network, given the values of the method's options."""
        return self.select(net, **{name: options[name] for name in self.select_options})
