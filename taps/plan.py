"""Plans: the published workflow of policy methods as lists of phases, from numbers of iterations.

Warm-up → cycles of weight steps on one part of the training data and policy steps on another, with a falling temperature and
a curriculum that opens blocks from the last (AdaShare §3.3) → training again under a policy.
"""

from __future__ import annotations

import math
from argparse import Namespace
from dataclasses import dataclass

from taps.errors import UserError
from taps.methods import METHODS, SETTLED, Phase
from taps.recipe import Recipe

#: the methods that first learn a policy and then train under it
POLICY_METHODS = tuple(name for name, row in METHODS.items() if row.learns_policy)


@dataclass(frozen=True)
class Plan:
    """A stage of training.

    Attributes:
        phases: in order; every phase is a whole number of epochs of the loop.
        batches: steps of an epoch by stream of data.
        recipe: with these phases in it.
    """

    phases: tuple[Phase, ...]
    batches: dict[str, int]
    recipe: Recipe


def _segments(iterations: int, wanted: int) -> tuple[int, int]:
    """(epochs, steps an epoch) that make up ``iterations`` steps, rounded up, with about ``wanted`` steps an epoch."""
    epochs = max(round(iterations / wanted), 1)
    return epochs, math.ceil(iterations / epochs)


def _recipe(options: Namespace, steps: int, seed: int, **changes) -> Recipe:
    """The optimiser of warm-up and retraining; its learning rate falls every ``decay_iterations`` steps."""
    weights = {} if options.task_weights is None else dict(options.task_weights)
    return Recipe(
        penalty_weight=1.0 if options.method in POLICY_METHODS else options.lam,  # whose penalties hold their weights
        optimizer=options.optimizer,
        lr=options.lr,
        base_lr=options.base_lr,
        norm_lr=options.base_lr,
        score_lr=options.score_lr,
        momentum=options.momentum,
        weight_decay=options.wd,
        betas=tuple(options.betas),
        decay=options.decay,
        decay_epochs=(options.decay_iterations or 1) / steps,
        decay_rate=options.decay_rate,
        seed=seed,
        limit_batches=options.limit_batches,
        task_weights=weights,
        **changes,
    )


#: of the last cycle, where no factor for each cycle is given: softer, gates say little; sharper, they have no gradients
LAST_TEMPERATURE = 0.84
#: options that are numbers of steps, or of passes over the training samples
STEPS = ("iterations", "warmup_iterations", "retrain_iterations", "eval_iterations", "decay_iterations")


def resolve_passes(options: Namespace, samples: int) -> None:
    """Turn numbers of passes over ``samples`` training samples, such as ``"69e"``, into numbers of steps.

    Raises:
        UserError: if warm-up takes more steps than there are.
    """
    for name in STEPS:
        value = getattr(options, name)
        if isinstance(value, str):
            setattr(options, name, max(round(float(value[:-1]) * samples / options.batch_size), 1))
    if options.iterations < options.warmup_iterations:
        raise UserError(
            f"--warmup_iterations {options.warmup_iterations} are more than --iterations {options.iterations}"
        )


def cycle_steps(options: Namespace, sizes: dict[str, int]) -> tuple[int, int]:
    """Weight and policy steps of a cycle: as the options say, or one pass over the data of each."""
    weights = options.weight_iterations or max(sizes["weights"] // options.batch_size, 1)
    return weights, options.policy_iterations or max(sizes["policy"] // options.batch_size, 1)


def warm_up(options: Namespace) -> tuple[Phase, int]:
    """The phase before policies are learned, and its steps an epoch.

    With a curriculum every block runs. Without one every choice takes part, all of them alike: the limit of high temperatures.
    """
    epochs, steps = _segments(options.warmup_iterations, options.eval_iterations)
    curriculum = options.curriculum_speed > 0
    start = {"opened": 0} if curriculum else {"temperature": math.inf}
    return Phase("warm-up" if curriculum else "pre-train", epochs, penalty=0.0, trains=SETTLED, **start), steps


def pretrain_plan(options: Namespace) -> Plan:
    """Warm-up alone."""
    phase, steps = warm_up(options)
    recipe = _recipe(options, steps, options.seed, epochs=int(phase.epochs), plan=(phase,))
    return Plan((phase,), {"train": steps}, recipe)


def policy_plan(options: Namespace, sizes: dict[str, int], units: int) -> Plan:
    """Warm-up and policy learning.

    Args:
        options: of the command.
        sizes: number of samples of ``weights`` and ``policy``.
        units: L, number of blocks.

    Raises:
        UserError: if the iterations do not suffice to open all blocks.
    """
    weight_steps, policy_steps = cycle_steps(options, sizes)
    each = weight_steps + policy_steps
    cycles = (options.iterations - options.warmup_iterations) // each
    speed = options.curriculum_speed
    needed = math.ceil(speed * (units - 1)) + 1
    if cycles < needed:
        raise UserError(
            f"--iterations {options.iterations} leave {max(cycles, 0)} cycles of {weight_steps} + {policy_steps} steps after "
            f"{options.warmup_iterations} of warm-up; to open {units} blocks at --curriculum_speed {speed:g} "
            f"takes {needed}: give at least {options.warmup_iterations + needed * each} iterations"
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
        opened = min(math.floor(cycle / speed + 1e-9) + 1, units) if speed else None
        state = {"temperature": options.init_temperature * decay**cycle, "opened": opened}
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
                validates=last or (cycle + 1) % every == 0, competes=opened in (units, None), **state,
            )
        )  # fmt: skip
    steps = batches.get("train", 1)
    main = _recipe(options, steps, options.seed)
    alternating = {"decay": "constant", "task_weights": main.task_weights, "betas": main.betas}
    others = {
        "weights": Recipe(
            optimizer=options.weights_optimizer,
            lr=options.weights_lr or options.lr,
            base_lr=options.weights_lr or options.base_lr,
            norm_lr=options.weights_lr or options.base_lr,
            momentum=options.momentum,
            weight_decay=options.wd,
            **alternating,
        ),
        "policy": Recipe(optimizer="adam", lr=options.policy_lr, gate_weight_decay=options.policy_wd, **alternating),
    }
    total = epochs + 2 * cycles
    recipe = _recipe(
        options, steps, options.seed, epochs=total, plan=tuple(phases), others=others, save_epochs=max(every, 1)
    )
    return Plan(tuple(phases), batches, recipe)


def delta_plan(options: Namespace, seed: int) -> Plan:
    """The three steps of a sub-task of efficient computation sharing: gates on single weights, the weights that they leave, and
    these again while activations are pulled to the base's."""
    steps = min(options.eval_iterations, options.iterations)

    def epochs(iterations: int) -> int:
        return math.ceil(iterations / steps)

    phases = (
        Phase("gates", epochs(options.iterations)),
        Phase(
            "support", epochs(options.retrain_iterations), penalty=0.0, trains=SETTLED, optimizer="support", start="fix",
            competes=not options.pull_iterations,
        ),
        Phase(
            "activations", epochs(options.pull_iterations), penalty=0.0, trains=SETTLED, optimizer="support",
            pull=options.pull,
        ),
    )  # fmt: skip
    phases = tuple(phase for phase in phases if phase.epochs > 0)
    total = int(sum(phase.epochs for phase in phases))
    others = {"support": _recipe(options, steps, seed, epochs=total, delta_lr=options.delta_lr)}
    # The penalty's gradient at a single gate is far below the term that Adam adds to its denominators.
    recipe = _recipe(options, steps, seed, epochs=total, plan=phases, others=others, gate_epsilon=1e-15)
    return Plan(phases, {"train": steps}, recipe)


def weights_plan(options: Namespace, sizes: dict[str, int], seed: int) -> Plan:
    """Training under a given policy, or without one: one phase in which everything learns.

    Where policies are retrained from the weights of policy learning, methods without policies take as many weight steps as
    those have had then, so that all networks are trained equally long.
    """
    total = options.retrain_iterations
    if options.method not in POLICY_METHODS and options.retrain_from == "policy":
        weight_steps, policy_steps = cycle_steps(options, sizes)
        cycles = max(options.iterations - options.warmup_iterations, 0) // (weight_steps + policy_steps)
        total += options.warmup_iterations + cycles * weight_steps
    row = METHODS.get(options.method)
    if row is not None and row.builds_on_base:  # as many steps as a sub-task has
        total += options.iterations + options.pull_iterations
    epochs, steps = _segments(total, options.eval_iterations)
    settle = 0
    if row is not None and "target_rates" in row.options and options.settle_iterations:
        if options.settle_iterations >= total:
            raise UserError(
                f"--settle_iterations {options.settle_iterations} leave none of {total} steps for gates to learn"
            )
        settle = min(max(round(options.settle_iterations / steps), 1), epochs - 1)
    phases = (
        Phase("retrain" if options.method in POLICY_METHODS else "train", epochs - settle),
        Phase("settle", settle, penalty=0.0, trains=SETTLED),
    )
    if options.method == "taps":
        warm = min(options.warmup_iterations / steps, epochs)
        phases = (Phase("warm-up", warm, penalty=0.0), Phase("train", epochs - warm))
    phases = tuple(phase for phase in phases if phase.epochs > 0)
    recipe = _recipe(options, steps, seed, epochs=epochs, plan=phases)
    return Plan(phases, {"train": steps}, recipe)
