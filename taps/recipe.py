"""How to train: the recipe, its phases and its optimiser."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from taps.errors import unknown
from taps.methods import Phase, open_then_settle
from taps.model import TaskModel

OPTIMIZERS = ("sgd", "nag", "adam", "adamw")


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Attributes:
        epochs: whole passes over the training images, > 0.
        warmup_epochs: epochs without the penalty, >= 0; may be a fraction.
        settle_epochs: the last epochs, in which gates stand still and nothing is penalised; may be a fraction.
        penalty_weight: λ, >= 0.
        budget: bytes of the task file; instead of a penalty, the gates are decided once after the warm-up epochs so
            that it is kept (:func:`taps.budget.keep_within`). ``None``: no budget.
        optimizer: ``"sgd"``, ``"nag"`` (SGD with Nesterov momentum), ``"adam"`` or ``"adamw"``.
        lr: learning rate of the first epoch, > 0.
        score_lr: that of the gates; ``None`` is ``lr``.
        base_lr: that of a base that learns too; ``None`` is ``lr``/√K for K tasks, whose gradients add up there.
        momentum: of sgd and nag.
        weight_decay: on deltas and heads (and the weights of a base that learns too); never on gates and norms.
        accumulate: batches a step, > 0.
        eval_epochs: validate after every so many epochs and after the last.
        seed: of the order of the data, dropout and the like.
        limit_batches: use only so many batches of an epoch; ``None`` for all.
        compile: run training steps through ``torch.compile``; validation is short and runs as it is.
        mixed: run a batch of several tasks in one forward pass; else task by task, which needs the memory of one.
        channels_last: keep images and their convolutions' weights in the memory order that CPUs and CUDA run fastest.
    """

    epochs: int = 30
    warmup_epochs: float = 2.0
    settle_epochs: float = 0.0
    penalty_weight: float = 1.0
    budget: int | None = None
    optimizer: str = "sgd"
    lr: float = 0.01
    score_lr: float | None = None
    base_lr: float | None = None
    momentum: float = 0.9
    weight_decay: float = 0.0
    accumulate: int = 1
    eval_epochs: int = 1
    seed: int = 0
    limit_batches: int | None = None
    compile: bool = False
    mixed: bool = True
    channels_last: bool = True

    def phases(self, model: TaskModel) -> tuple[Phase, ...]:
        """The phases of this recipe for the model's method."""
        if self.budget is not None:
            return open_then_settle(self.epochs, self.warmup_epochs)
        return model.row.phases(self.epochs, self.warmup_epochs, self.settle_epochs)

    def learning_rate(self, epoch: int) -> float:
        """The factor on ``lr`` in the 0-based ``epoch``: ½(1 + cos(π·epoch/epochs))."""
        return 0.5 * (1.0 + math.cos(math.pi * epoch / self.epochs))


def phase_at(phases: tuple[Phase, ...], epochs: float) -> Phase:
    """The phase that a run is in after so many epochs; the last one from its start on."""
    for phase in phases[:-1]:
        if epochs < phase.epochs:
            return phase
        epochs -= phase.epochs
    return phases[-1]


def make_optimizer(model: TaskModel, tasks: Sequence[str], recipe: Recipe) -> torch.optim.Optimizer:
    """An optimiser with one parameter group a role; gates have their own learning rate, gates and norms no decay.

    Raises:
        UserError: for an unknown optimiser.
    """
    if recipe.optimizer not in OPTIMIZERS:
        raise unknown("optimizer", recipe.optimizer, OPTIMIZERS)
    rates = {
        "gate": recipe.score_lr,
        "base": recipe.lr / math.sqrt(len(tasks)) if recipe.base_lr is None else recipe.base_lr,
    }
    groups = []
    for role, parameters in model.roles(*tasks).items():
        lr = recipe.lr if rates.get(role) is None else rates[role]
        vectors = [parameter for parameter in parameters.values() if role == "base" and parameter.dim() < 2]
        others = [parameter for parameter in parameters.values() if not (role == "base" and parameter.dim() < 2)]
        for chosen, decays in ((others, role not in ("gate", "norm")), (vectors, False)):
            if chosen:
                decay = recipe.weight_decay if decays else 0.0
                groups.append({"params": chosen, "lr": lr, "initial_lr": lr, "weight_decay": decay, "role": role})
    if recipe.optimizer in ("sgd", "nag"):
        nesterov = recipe.optimizer == "nag" and recipe.momentum > 0
        return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum, nesterov=nesterov)
    return (torch.optim.Adam if recipe.optimizer == "adam" else torch.optim.AdamW)(groups, lr=recipe.lr)
