"""How to train: the recipe, its phases and its optimiser."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from taps.errors import check_number, unknown
from taps.methods import ROLES, Phase, open_choose_round
from taps.model import TaskModel

OPTIMIZERS = ("sgd", "nag", "adam", "adamw")
DECAYS = ("cosine", "step", "constant")
_POSITIVE = ("epochs", "lr", "score_lr", "delta_lr", "base_lr", "norm_lr", "decay_epochs", "decay_rate", "accumulate",
             "eval_epochs", "save_epochs", "limit_batches")  # fmt: skip
_NOT_NEGATIVE = ("warmup_epochs", "settle_epochs", "penalty_weight", "budget", "momentum", "weight_decay", "gate_weight_decay",
                 "gate_epsilon", "seed")  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Attributes:
        epochs: whole passes over the training images, > 0.
        warmup_epochs: epochs without the penalty, >= 0; may be a fraction.
        settle_epochs: the last epochs, in which gates stand still and nothing is penalised; may be a fraction.
        penalty_weight: λ, >= 0.
        budget: bytes of the task file; instead of a penalty, what it has bytes for is chosen once, after a third of the
            epochs (:mod:`taps.budget`). ``None``: no budget.
        optimizer: ``"sgd"``, ``"nag"`` (SGD with Nesterov momentum), ``"adam"`` or ``"adamw"``.
        lr: learning rate of the first epoch, > 0.
        score_lr: that of the gates; ``None`` is ``lr``.
        delta_lr: that of the deltas; ``None`` is ``lr``.
        base_lr: that of a base that learns too; ``None`` is ``lr``/√K for K tasks, whose gradients add up there.
        norm_lr: that of the tasks' own norms; ``None`` is ``lr``.
        momentum: of sgd and nag.
        weight_decay: on deltas and heads (and the weights of a base that learns too); never on norms.
        gate_weight_decay: on gates.
        gate_epsilon: ε of adam and adamw for gates.
        betas: of adam and adamw.
        decay: how the learning rate falls from epoch to epoch: with a ``"cosine"``, in a ``"step"`` every ``decay_epochs``
            by the factor ``decay_rate``, or it stays ``"constant"``.
        accumulate: batches a step, > 0.
        eval_epochs: validate after every so many epochs and after the last.
        seed: of the order of the data, dropout and the like.
        limit_batches: use only so many batches of an epoch; ``None`` for all.
        compile: run training steps through ``torch.compile``; validation is short and runs as it is.
        mixed: run a batch of several tasks in one forward pass; else task by task, which needs the memory of one.
        task_weights: factors of the tasks' losses; 1 for those that are not named.
        plan: the phases; ``None`` for those of the model's method.
        others: recipes of further optimisers by name, for phases that name them.
        save_epochs: write the checkpoint after every so many epochs, and when the best epoch is found.
        channels_last: keep images and their convolutions' weights in the memory order that CPUs and CUDA run fastest.

    Raises:
        UserError: for a number outside of its range.
    """

    epochs: int = 30
    warmup_epochs: float = 2.0
    settle_epochs: float = 0.0
    penalty_weight: float = 1.0
    budget: int | None = None
    optimizer: str = "sgd"
    lr: float = 0.01
    score_lr: float | None = None
    delta_lr: float | None = None
    base_lr: float | None = None
    norm_lr: float | None = None
    momentum: float = 0.9
    weight_decay: float = 0.0
    gate_weight_decay: float = 0.0
    gate_epsilon: float = 1e-8
    betas: tuple[float, float] = (0.9, 0.999)
    decay: str = "cosine"
    decay_epochs: float = 1.0
    decay_rate: float = 0.5
    accumulate: int = 1
    eval_epochs: int = 1
    seed: int = 0
    limit_batches: int | None = None
    compile: bool = False
    mixed: bool = True
    task_weights: Mapping[str, float] = field(default_factory=dict)
    plan: tuple[Phase, ...] | None = None
    others: Mapping[str, Recipe] = field(default_factory=dict)
    save_epochs: int = 1
    channels_last: bool = True

    def __post_init__(self) -> None:
        for name in (*_POSITIVE, *_NOT_NEGATIVE):
            check_number(name, getattr(self, name), with_low=name in _NOT_NEGATIVE)
        for task, weight in self.task_weights.items():
            check_number(f"task_weights of {task}", weight)

    def phases(self, model: TaskModel) -> tuple[Phase, ...]:
        """The phases of this recipe for the model's method."""
        if self.plan is not None:
            return self.plan
        if self.budget is not None:
            return open_choose_round(self.epochs)
        return model.row.phases(self.epochs, self.warmup_epochs, self.settle_epochs)

    def learning_rate(self, epoch: int, epochs: int | None = None) -> float:
        """The factor on ``lr`` in the 0-based ``epoch`` of ``epochs`` (all of the recipe's, or those that its optimiser has).

        ``"cosine"``: ½(1 + cos(π·epoch/epochs)); ``"step"``: decay_rate^⌊epoch/decay_epochs⌋; ``"constant"``: 1.
        """
        if self.decay == "constant":
            return 1.0
        if self.decay == "step":
            return self.decay_rate ** math.floor(epoch / self.decay_epochs + 1e-9)
        return 0.5 * (1.0 + math.cos(math.pi * epoch / (epochs or self.epochs)))


def phase_at(phases: tuple[Phase, ...], epochs: float) -> Phase:
    """The phase that a run is in after so many epochs; the last one from its start on."""
    for phase in phases[:-1]:
        if epochs < phase.epochs:
            return phase
        epochs -= phase.epochs
    return phases[-1]


def make_optimizer(
    model: TaskModel, tasks: Sequence[str], recipe: Recipe, roles: Collection[str] = ROLES
) -> torch.optim.Optimizer:
    """An optimiser with one parameter group a role; gates have their own learning rate and decay, norms have no decay.

    Raises:
        UserError: for an unknown optimiser or decay.
    """
    if recipe.decay not in DECAYS:
        raise unknown("decay", recipe.decay, DECAYS)
    if recipe.optimizer not in OPTIMIZERS:
        raise unknown("optimizer", recipe.optimizer, OPTIMIZERS)
    rates = {
        "gate": recipe.score_lr,
        "delta": recipe.delta_lr,
        "norm": recipe.norm_lr,
        "base": recipe.lr / math.sqrt(len(tasks)) if recipe.base_lr is None else recipe.base_lr,
    }
    groups = []
    for role, parameters in model.roles(*tasks).items():
        if role not in roles:
            continue
        lr = recipe.lr if rates.get(role) is None else rates[role]
        vectors = [parameter for parameter in parameters.values() if role == "base" and parameter.dim() < 2]
        others = [parameter for parameter in parameters.values() if not (role == "base" and parameter.dim() < 2)]
        decays = {"gate": recipe.gate_weight_decay, "norm": 0.0}.get(role, recipe.weight_decay)
        for chosen, decay in ((others, decays), (vectors, 0.0)):
            if chosen:
                groups.append({"params": chosen, "lr": lr, "initial_lr": lr, "weight_decay": decay, "role": role})
    if recipe.optimizer in ("sgd", "nag"):
        nesterov = recipe.optimizer == "nag" and recipe.momentum > 0
        return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum, nesterov=nesterov)
    kind = torch.optim.Adam if recipe.optimizer == "adam" else torch.optim.AdamW
    for group in groups:
        group["eps"] = recipe.gate_epsilon if group["role"] == "gate" else 1e-8
    return kind(groups, lr=recipe.lr, betas=recipe.betas)
