"""Plans: the published workflow of policy methods as lists of phases, built from numbers of iterations.

Warm-up → cycles of weight steps on one part of the training data and policy steps on another, with a falling temperature and
a curriculum that opens blocks starting from the last (AdaShare §3.3) → retraining under a policy.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
from functools import partial

from taps.core.method import SETTLED, Phase
from taps.errors import UserError
from taps.methods.activation_gap import distance_to_base, distance_to_neighbour
from taps.methods.registry import METHODS
from taps.methods.sparse_delta import begin_support
from taps.settings.choices import LAST_TEMPERATURE
from taps.settings.multi_task import MultiTaskSettings
from taps.training.recipe import Recipe, recipe_from


def learns_policy(method: str) -> bool:
    """Return whether the named method first learns a policy and then trains under it."""
    return method in METHODS and METHODS[method].learns_policy


@dataclass(frozen=True)
class Plan:
    """A stage of training.

    Attributes:
        phases: in order; every phase lasts a whole number of epochs of the loop. ``None``: those of the model's method.
        batches: steps per epoch for each stream of data.
        recipe: the recipe that contains these phases.
    """

    phases: tuple[Phase, ...] | None
    batches: dict[str, int]
    recipe: Recipe


def _segments(iterations: int, wanted: int) -> tuple[int, int]:
    """Return (epochs, steps per epoch) for ``iterations`` steps, rounded up, with about ``wanted`` steps per epoch."""
    epochs = max(round(iterations / wanted), 1)
    return epochs, math.ceil(iterations / epochs)


def _recipe(options: MultiTaskSettings, steps: int, seed: int, **changes) -> Recipe:
    """Return the recipe of warm-up and retraining; its learning rate falls every ``decay_iterations`` steps."""
    weighs_itself = learns_policy(options.method)  # its penalties
    values = {
        "lam": 1.0 if weighs_itself else options.lam,
        "norm_lr": options.base_lr,
        "delta_lr": None,
        "betas": tuple(options.betas),
        "decay_epochs": (options.decay_iterations or 1) / steps,
        "seed": seed,
        "task_weights": options.task_weights or {},
        "step_per_task": bool(options.step_per_task),
    }
    return recipe_from(options, **values | changes)


#: options given in steps, or in passes over the training samples
STEPS = (
    "iterations",
    "warmup_iterations",
    "retrain_iterations",
    "eval_iterations",
    "decay_iterations",
    "pull_iterations",
)


def resolve_passes(options: MultiTaskSettings, samples: int) -> MultiTaskSettings:
    """Return the settings with passes over ``samples`` training samples, such as ``"69e"``, converted to steps.

    Raises:
        UserError: if warm-up takes more steps than there are in total.
    """
    passes = {name: value for name in STEPS if isinstance(value := getattr(options, name), str)}
    steps = {name: max(round(float(text[:-1]) * samples / options.batch_size), 1) for name, text in passes.items()}
    options = replace(options, **steps)
    if options.iterations < options.warmup_iterations:
        raise UserError(
            f"--warmup_iterations {options.warmup_iterations} are more than --iterations {options.iterations}"
        )
    return options


def cycle_steps(options: MultiTaskSettings, sizes: dict[str, int]) -> tuple[int, int]:
    """Return the weight and policy steps per cycle: those of the options, or one pass over the data of each."""
    weights = options.weight_iterations or max(sizes["weights"] // options.batch_size, 1)
    return weights, options.policy_iterations or max(sizes["policy"] // options.batch_size, 1)


def warm_up(options: MultiTaskSettings) -> tuple[Phase, int]:
    """Return the phase before policies are learned, and its steps per epoch.

    With a curriculum every block runs. Without one all choices are mixed in equal parts: the limit of high temperatures.
    """
    epochs, steps = _segments(options.warmup_iterations, options.eval_iterations)
    curriculum = options.curriculum_speed > 0
    start = {"curriculum": 0} if curriculum else {"temperature": math.inf}
    return Phase("warm-up" if curriculum else "pre-train", epochs, penalty=0.0, trains=SETTLED, **start), steps


def pretrain_plan(options: MultiTaskSettings) -> Plan:
    """Return the plan of warm-up alone."""
    phase, steps = warm_up(options)
    recipe = _recipe(options, steps, options.seed, epochs=int(phase.epochs), plan=(phase,))
    recipe = replace(recipe, decay=options.warmup_decay or options.decay)
    return Plan((phase,), {"train": steps}, recipe)


def policy_plan(options: MultiTaskSettings, sizes: dict[str, int], units: int) -> Plan:
    """Return the plan of warm-up and policy learning.

    Args:
        options: settings of the command.
        sizes: number of samples of ``weights`` and ``policy``.
        units: L, the number of blocks.

    Raises:
        UserError: if there are too few iterations for one cycle. With too few to open all blocks there is a warning, since some
            published settings have so few.
    """
    weight_steps, policy_steps = cycle_steps(options, sizes)
    each = weight_steps + policy_steps
    cycles = (options.iterations - options.warmup_iterations) // each
    speed = options.curriculum_speed
    needed = math.ceil(speed * (units - 1)) + 1
    if cycles < 1:
        raise UserError(
            f"--iterations {options.iterations} leave no cycle of {weight_steps} + {policy_steps} steps after "
            f"{options.warmup_iterations} of warm-up: give at least {options.warmup_iterations + needed * each}"
        )
    if cycles < needed:
        warnings.warn(
            f"--iterations {options.iterations} are for {cycles} cycles of {weight_steps} + {policy_steps} steps; to learn the "
            f"policy of all {units} blocks at --curriculum_speed {speed:g} takes {needed}, which is "
            f"{options.warmup_iterations + needed * each} iterations; the first blocks stay in use for every task",
            stacklevel=2,
        )
    batches = {"weights": weight_steps, "policy": policy_steps}
    phases: list[Phase] = []
    epochs = 0
    if options.warmup_iterations:
        phase, batches["train"] = warm_up(options)
        phases.append(phase)
        epochs = int(phase.epochs)
    every = max(round(options.eval_iterations / each), 1)
    decay = options.temperature_decay
    if decay is None:
        decay = min(LAST_TEMPERATURE / options.init_temperature, 1.0) ** (1 / max(cycles - 1, 1))
    for cycle in range(cycles):
        reached = min(math.floor(cycle / speed + 1e-9) + 1, units) if speed else None
        state = {"temperature": options.init_temperature * decay**cycle, "curriculum": reached}
        last = cycle == cycles - 1
        phases.append(
            Phase(
                "weights", 1, penalty=0.0, trains=SETTLED, data="weights", optimizer="weights", together=False,
                validates=False, **state,
            )
        )  # fmt: skip
        phases.append(
            Phase(
                "policy", 1, trains=("gate",), data="policy", optimizer="policy", together=False,
                validates=last or (cycle + 1) % every == 0, competes=reached in (units, None), **state,
            )
        )  # fmt: skip
    steps = batches.get("train", 1)
    main = _recipe(options, steps, options.seed)
    rate, base_rate = options.weights_lr or options.lr, options.weights_lr or options.base_lr
    others = {
        "weights": replace(
            main,
            optimizer=options.weights_optimizer,
            lr=rate,
            base_lr=base_rate,
            norm_lr=base_rate,
            decay="constant",
        ),
        "policy": _policy_recipe(options, each),
    }
    total = epochs + 2 * cycles
    recipe = _recipe(
        options, steps, options.seed, epochs=total, plan=tuple(phases), others=others, save_epochs=max(every, 1)
    )
    return Plan(tuple(phases), batches, replace(recipe, decay=options.warmup_decay or options.decay))


def _policy_recipe(options: MultiTaskSettings, cycle: int) -> Recipe:
    """Return the recipe of policy steps: Adam with its default betas, as in the published programs."""
    recipe = Recipe(optimizer="adam", lr=options.policy_lr, gate_weight_decay=options.policy_wd, decay="constant")
    if not options.policy_decay_iterations:
        return recipe
    cycles = max(options.policy_decay_iterations / cycle, 1)
    return replace(recipe, decay="step", decay_epochs=cycles, decay_rate=0.1, reductions=1)


def base_plan(options: MultiTaskSettings, sizes: dict[str, int], seed: int) -> Plan:
    """Return the plan of the base task of sub-tasks: as many steps as theirs; with ``--frame_pull`` activations are pulled towards
    those of neighbouring frames."""
    plan = weights_plan(options, sizes, seed)
    if not options.frame_pull:
        return plan
    pull = partial(distance_to_neighbour, weight=options.frame_pull)
    phases = (Phase("train", plan.recipe.epochs, extra_loss=pull),)
    return replace(plan, phases=phases, recipe=replace(plan.recipe, plan=phases))


def delta_plan(options: MultiTaskSettings, seed: int) -> Plan:
    """Return the three training steps of a sub-task in efficient computation sharing: gates on individual weights, then the
    weights whose gates are open, then the same weights while activations are pulled towards the base's."""
    steps = min(options.eval_iterations, options.iterations)

    def epochs(iterations: int) -> int:
        return math.ceil(iterations / steps)

    phases = (
        Phase("gates", epochs(options.iterations)),
        Phase(
            "support", epochs(options.retrain_iterations), penalty=0.0, trains=SETTLED, optimizer="support", begin=begin_support,
            competes=not options.pull_iterations,
        ),
        Phase(
            "activations", epochs(options.pull_iterations), penalty=0.0, trains=SETTLED, optimizer="support",
            extra_loss=partial(distance_to_base, weight=options.pull) if options.pull else None,
        ),
    )  # fmt: skip
    phases = tuple(phase for phase in phases if phase.epochs > 0)
    total = int(sum(phase.epochs for phase in phases))
    others = {"support": _recipe(options, steps, seed, epochs=total, delta_lr=options.delta_lr)}
    # The penalty's gradient at a single gate is far smaller than Adam's default ε.
    recipe = _recipe(options, steps, seed, epochs=total, plan=phases, others=others, gate_epsilon=1e-15)
    return Plan(phases, {"train": steps}, recipe)


def weights_plan(options: MultiTaskSettings, sizes: dict[str, int], seed: int) -> Plan:
    """Return the plan of training under a given policy, or without one: one phase in which everything is trained.

    Where retraining starts from the weights of policy learning, methods without policies take as many weight steps as
    policy learning and retraining together, so that all networks are trained equally long.
    """
    total, row = options.retrain_iterations, METHODS.get(options.method)
    builds_on_base = row is not None and row.builds_on_base
    if not learns_policy(options.method) and options.retrain_from == "policy" and not builds_on_base:
        weight_steps, policy_steps = cycle_steps(options, sizes)
        cycles = max(options.iterations - options.warmup_iterations, 0) // (weight_steps + policy_steps)
        total += options.warmup_iterations + cycles * weight_steps
    if builds_on_base:  # as many steps as a sub-task has
        total += options.iterations + options.pull_iterations
    epochs, steps = _segments(total, options.eval_iterations)
    settle = 0.0
    if row is not None and row.gates_learn_under_policy and options.settle_iterations:
        if options.settle_iterations >= total:
            raise UserError(
                f"--settle_iterations {options.settle_iterations} leave none of {total} steps for gates to learn"
            )
        settle = options.settle_iterations / steps
        if epochs > 1:  # whole epochs, as runs of earlier versions have them
            settle = min(max(round(settle), 1), epochs - 1)
    if not learns_policy(options.method):  # the method's own phases
        warm = min(options.warmup_iterations / steps, epochs)
        return Plan(None, {"train": steps}, _recipe(options, steps, seed, epochs=epochs, warmup_epochs=warm))
    phases = (Phase("retrain", epochs - settle), Phase("settle", settle, penalty=0.0, trains=SETTLED))
    phases = tuple(phase for phase in phases if phase.epochs > 0)
    recipe = _recipe(options, steps, seed, epochs=epochs, plan=phases)
    return Plan(phases, {"train": steps}, recipe)
