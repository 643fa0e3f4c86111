"""Training recipes, with their phases and optimisers."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from types import SimpleNamespace

import torch
from timm.models import group_parameters

from taps.core.execution import Place
from taps.core.method import ROLES, Phase
from taps.core.network import Network
from taps.errors import UserError
from taps.settings.adaptation import Optimization, Schedule
from taps.settings.choices import DECAYS
from taps.settings.declare import Settings, as_dict, check_values, setting
from taps.training.split_optimizer import SplitOptimizer, root_mean_square


@dataclass(frozen=True)
class Recipe(Optimization, Schedule):
    """A training recipe: the settings of :class:`taps.settings.adaptation.Schedule` and
    :class:`taps.settings.adaptation.Optimization`, plus those below.

    Attributes:
        budget: for methods with a size budget (:mod:`taps.methods.taps_budget`), the size of the task file: bytes, or a text
            such as ``"10%"`` of the base or ``"600KB"``. ``None``: the method's own.
        delta_lr: learning rate of the deltas; ``None`` is ``lr``.
        base_lr: learning rate of a base that is trained too; ``None`` is ``lr``/√K for K tasks, whose gradients add up there.
        norm_lr: learning rate of the tasks' own norms; ``None`` is ``lr``.
        gate_weight_decay: weight decay on gates.
        gate_epsilon: ε of adam and adamw for gates.
        betas: β of adam and adamw.
        decay: how learning rates fall from epoch to epoch: ``"cosine"``; ``"poly"``, with power 0.9; ``"step"``,
            by the factor ``decay_rate`` every ``decay_epochs``; or ``"constant"``. ``None``: the method's default.
        reductions: how often ``"step"`` reduces rates at most; ``None``: as often as there are epochs for it.
        compile: run training steps through ``torch.compile``; validation is short and not compiled.
        step_per_task: take an optimiser step after each task's loss, instead of one after the sum of all.
        mixed: run a batch of several tasks in one forward pass; otherwise task by task, which needs only the memory of one.
        task_weights: factors on the tasks' losses; 1 for tasks that are not named.
        plan: the phases; ``None`` for those of the model's method.
        others: recipes of further optimisers by name, for phases that name them.
        save_epochs: write the checkpoint every ``save_epochs`` epochs, and whenever an epoch is the best so far.
        make_optimizer: function from parameter groups to the optimiser, instead of ``optimizer``.
        channels_last: keep images and the weights of image convolutions in the memory order that is fastest on CPUs and CUDA.

    Raises:
        UserError: for a value outside its range.
    """

    budget: int | str | None = None  # type: ignore[assignment]
    delta_lr: float | None = setting(None, "", float, low=0, above=True)
    base_lr: float | None = setting(None, "", float, low=0, above=True)
    norm_lr: float | None = setting(None, "", float, low=0, above=True)
    gate_weight_decay: float = setting(0.0, "", float, low=0)
    gate_epsilon: float = setting(1e-8, "", float, low=0)
    betas: tuple[float, float] = (0.9, 0.999)
    decay: str | None = setting(None, "", choices=DECAYS)
    decay_epochs: float = setting(1.0, "", float, low=0, above=True)
    decay_rate: float = setting(0.5, "", float, low=0, above=True)
    reductions: int | None = setting(None, "", int, low=1)
    compile: bool = False
    step_per_task: bool = False
    mixed: bool = True
    task_weights: Mapping[str, float] = setting({}, "", "weights")
    plan: tuple[Phase, ...] | None = None
    others: Mapping[str, Recipe] = field(default_factory=dict)
    save_epochs: int = setting(1, "", int, low=1)
    make_optimizer: Callable[[list[dict]], torch.optim.Optimizer] | None = None
    channels_last: bool = True

    def __post_init__(self) -> None:
        check_values(self)
        if self.lr_warmup_epochs and self.lr_warmup_epochs >= self.epochs:
            raise UserError(
                f"lr_warmup_epochs: {self.lr_warmup_epochs} leaves none of {self.epochs} epochs at the full rate"
            )
        is_size = isinstance(self.budget, (str, int)) and not isinstance(self.budget, bool)
        if self.budget is not None and (not is_size or (isinstance(self.budget, int) and self.budget < 0)):
            raise UserError(f"budget: {self.budget!r} is not a number of bytes or a size such as '10%'")

    def phases(self, model: Network) -> tuple[Phase, ...]:
        """Return the phases of this recipe for the model's method.

        Raises:
            UserError: if there are none.
        """
        phases = self.plan if self.plan is not None else tuple(model.method.phases(model, self))
        if not phases:
            raise UserError(f"method {model.method.name!r} has a schedule without phases; it needs at least one")
        return phases

    def learning_rate(self, epoch: int, epochs: int | None = None, decay: str = "cosine") -> float:
        """Return the factor on ``lr`` in the 0-based ``epoch`` of ``epochs`` (all of the recipe's, or those of its optimiser).

        ``decay`` is the method's, for recipes that have none of their own.

        ``"cosine"``: ½(1 + cos(π·epoch/epochs)); ``"poly"``: (1 − epoch/epochs)^0.9;
        ``"step"``: decay_rate^⌊epoch/decay_epochs⌋; ``"constant"``: 1. The first
        ``lr_warmup_epochs`` rise linearly, and the rest are counted from there.
        """
        epochs, rising = epochs or self.epochs, self.lr_warmup_epochs
        if epoch < rising:
            return (epoch + 1) / (rising + 1)
        epoch, epochs = epoch - rising, max(epochs - rising, 1)
        decay = self.decay or decay
        if decay == "constant":
            return 1.0
        if decay == "poly":
            return (1.0 - epoch / epochs) ** 0.9
        if decay == "step":
            passed = math.floor(epoch / self.decay_epochs + 1e-9)
            return self.decay_rate ** (passed if self.reductions is None else min(passed, self.reductions))
        return 0.5 * (1.0 + math.cos(math.pi * epoch / epochs))


def recipe_from(settings: Settings, **changes) -> Recipe:
    """Return the recipe with the values that settings of the same names have, other than the ``changes``."""
    known = {own.name for own in fields(Recipe)}
    return Recipe(**{name: own for name, own in as_dict(settings).items() if name in known} | changes)


def phase_at(phases: tuple[Phase, ...], epochs: float) -> Phase:
    """Return the phase of a run after ``epochs`` epochs; the last phase has no end."""
    for phase in phases[:-1]:
        if epochs < phase.epochs:
            return phase
        epochs -= phase.epochs
    return phases[-1]


def make_optimizer(
    model: Network, tasks: Sequence[str], recipe: Recipe, roles: Collection[str] = ROLES
) -> torch.optim.Optimizer:
    """Return an optimiser with one parameter group per role; gates have their own learning rate and decay, norms no decay."""
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
        decays = {"gate": recipe.gate_weight_decay, "norm": 0.0}.get(role, recipe.wd)
        for chosen, decay in ((others, decays), (vectors, 0.0)):
            for factor, some in _by_factor(model, chosen, recipe.layer_decay).items() if chosen else ():
                rate = lr * factor
                groups.append({"params": some, "lr": rate, "initial_lr": rate, "weight_decay": decay, "role": role})
    if recipe.make_optimizer is not None:
        made = recipe.make_optimizer(groups)
        for group in made.param_groups:  # a function may make groups of its own
            group.setdefault("initial_lr", group["lr"])
            group.setdefault("role", "delta")
        return made
    defaults = model.method.defaults(model, recipe)
    # In float16 the squares of Adam vanish.
    half = any(own.dtype == torch.float16 for group in groups for own in group["params"])
    optimizer = recipe.optimizer or ("sgd" if half else defaults.optimizer)
    if optimizer == "split":
        return SplitOptimizer(
            groups, recipe.momentum, recipe.betas, defaults.adaptive, defaults.rate, _sizes(model, tasks)
        )
    if optimizer in ("sgd", "nag"):
        nesterov = optimizer == "nag" and recipe.momentum > 0
        return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum, nesterov=nesterov)
    kind = torch.optim.Adam if optimizer == "adam" else torch.optim.AdamW
    for group in groups:
        group["eps"] = recipe.gate_epsilon if group["role"] == "gate" else 1e-8
    return kind(groups, lr=recipe.lr, betas=recipe.betas)


def _sizes(model: Network, tasks: Sequence[str]) -> dict[torch.Tensor, float]:
    """Return for each delta the root mean square of the weights that it is added to, at least a quarter of the whole network's:
    biases and new layers may be zero. Without any weights, nothing is returned."""
    sizes: dict[torch.Tensor, float] = {}
    for unit in model.units:
        own = {name: float(w.detach().float().square().mean().sqrt()) for name, w in unit.base_parameters().items()}
        held = [unit.deltas[task] for task in tasks if task in unit.deltas]
        sizes.update({deltas[name]: size for deltas in held for name, size in own.items()})
    least = root_mean_square(sizes) / 4
    return {delta: max(size, least) for delta, size in sizes.items()} if least else {}


def _by_factor(
    model: Network, parameters: list[torch.nn.Parameter], decay: float
) -> dict[float, list[torch.nn.Parameter]]:
    """Return the parameters by their factor on the learning rate: ``decay`` to the power of the distance from the head."""
    if decay == 1.0:
        return {1.0: parameters}
    distance = _distances(model)
    groups: dict[float, list[torch.nn.Parameter]] = {}
    for parameter in parameters:
        groups.setdefault(decay ** distance.get(id(parameter), 0), []).append(parameter)
    return groups


def _distances(model: Network) -> dict[int, int]:
    """Return the distance of each parameter, by identity, from the head: in blocks as timm groups them, else in units."""
    base = dict(_base_parameters(model.backbone))
    first = len(model.units) - 1
    if hasattr(model.backbone, "group_matcher"):
        names = [*base, "head.fc.weight"]  # a name that no block has, for the head that tasks have instead
        named = SimpleNamespace(named_parameters=lambda: ((name, None) for name in names))
        groups = group_parameters(named, model.backbone.group_matcher(), reverse=True)
        depths = {name: groups["head.fc.weight"] - groups[name] for name in base}
    else:
        units = enumerate(model.units)
        depths = {_full(unit, name): first - index for index, unit in units for name, _ in unit.base.named_parameters()}
        for norm in model.task_norms:
            own = first - max(norm.position - 1, 0)
            depths.update((_full(norm, name), own) for name, _ in norm.base.named_parameters())
    named_parameters = [*base.items()]
    for unit in model.units:
        held = [unit.deltas[task] for task in unit.deltas]
        named_parameters += [(_full(unit, name), deltas[name]) for deltas in held for name in unit.parameter_names]
    for norm in model.task_norms:
        copies = [norm.norms[task] for task in norm.norms]
        named_parameters += [(_full(norm, name), own) for copied in copies for name, own in copied.named_parameters()]
    return {id(parameter): depths.get(name, first) for name, parameter in named_parameters}


def _full(place: Place, name: str) -> str:
    return f"{place.name}.{name}" if place.name else name


def _base_parameters(module: torch.nn.Module, prefix: str = "") -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yield the base's parameters with their names in the unwrapped network."""
    while isinstance(module, Place):
        module = module.base
    yield from ((prefix + name, parameter) for name, parameter in module._parameters.items() if parameter is not None)
    for name, child in module.named_children():
        yield from _base_parameters(child, f"{prefix}{name}.")
