"""The training loop: one loop that executes the phases of any method, for one task or for several at once.

Loss of a step = Σ_t K·n_t/n · (λ_t · task loss_t + λ · phase.penalty · model.penalty(t)), where n_t of the step's n images
belong to the t-th of K tasks. For one task this is its loss plus its penalty; for several tasks that appear equally often,
or that all see the same images, it is the sum over the tasks.
A step takes ``accumulate`` batches; the last step of an epoch takes the batches that remain. The learning rate follows a
cosine from ``lr`` in the first epoch towards 0 *after* the last, so no epoch is spent at 0.
"""

from __future__ import annotations

import math
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from tqdm import tqdm

from taps.core.accounting import is_tuned
from taps.core.method import ROLES, Defaults, Phase
from taps.data.seeded import mix_seed
from taps.errors import DivergedError, UserError
from taps.stop_signals import Interrupted, StopSignals
from taps.storage import checkpoint
from taps.storage.run_folder import RunFolder
from taps.task_model import TaskModel
from taps.training.average import WeightAverage
from taps.training.recipe import Recipe, make_optimizer, phase_at

_LINE_SECONDS = 60.0
#: whether losses are read from the device only when they are shown, even on a CPU, where reading costs nothing
DEFERS_LOSS_READS = False
#: mean loss of a batch from outputs and labels
Criterion = Callable[[Tensor, Tensor], Tensor]


class Sampler(Protocol):
    """A sampler that orders a stream of batches by its seed and the epoch number."""

    epoch: int


@dataclass
class Progress:
    """The progress of a run.

    Attributes:
        epoch: 0-based; ``batch``: batches of this epoch that each process has completed.
        sums: ``loss``, ``wrong`` and ``images`` of each task over the epoch so far, numbers or scalars on the device.
        best: best number that validation has returned so far, ``None`` before the first.
        started: phases that have begun.
        risen: the last epoch, 1-based, that was better than all before it; 0 before the first validation that counts.
    """

    epoch: int = 0
    batch: int = 0
    sums: dict[str, dict[str, Any]] = field(default_factory=dict)
    best: float | None = None
    started: int = 0
    risen: int = 0


def run_phases(
    model: TaskModel,
    task: str | Sequence[str],
    loader: DataLoader | Mapping[str, DataLoader],
    sampler: Sampler | Mapping[str, Sampler],
    recipe: Recipe,
    accelerator: Accelerator | None = None,
    *,
    criterion: Criterion | Mapping[str, Criterion] = nn.functional.cross_entropy,
    validate: Callable[[], tuple[dict[str, dict], float]] | None = None,
    on_epoch: Callable[[list[dict], bool], None] | None = None,
    keep: Callable[[list[dict]], None] | None = None,
    folder: RunFolder | None = None,
    fork: Path | None = None,
    stop: StopSignals | None = None,
    done: int = 0,
    best: float | None = None,
) -> Progress:
    """Train one task, or several together, from the start or from the folder's checkpoint.

    Args:
        model: the model, with the tasks already added.
        task: one name or several.
        loader, sampler: for one task, from :func:`taps.data.classification.images.make_loader`: batches (images, labels).
            For several tasks, from :func:`taps.data.classification.mixed_batches.make_task_loader`: batches (images, labels,
            positions of their tasks); or from :func:`taps.data.multi_label.make_stream`: batches (images, labels by task).
            If the phases name streams, several streams by name.
        recipe: how to train.
        accelerator: devices, processes and precision; one process on the default device if ``None``.
        criterion: mean loss of a batch from outputs and labels; one for all tasks or one per task.
        validate: returns the numbers to report for each task, and a single number (larger is better) by which the epochs
            of competing phases are compared.
        on_epoch: called by the first process after each epoch with one row of numbers per task and whether the epoch is
            the best so far.
        keep: called by the first process with the rows of each epoch that is the best so far, to save its result.
        folder: holds the metrics and the checkpoint, which is written every ``recipe.save_epochs`` epochs, after a best or last
            epoch, and when stopped; training goes on from one of the same tasks. ``None``: nothing is kept.
        fork: a file with the state just before a phase with ``forks``; written if it is missing, else the run starts from it. Runs
            that their method trains in different ways use different files beside it.
        stop: signals that end the run.
        done: epochs that the model has been trained for, after which training goes on; ``best``: their best number.

    Returns:
        The final counters; ``best`` is the best number that ``validate`` returned.

    Raises:
        DivergedError: if the loss is not finite; the last checkpoint is left unchanged.
        UserError: if the checkpoint to continue from belongs to another run or schedule.
        Interrupted: after saving, if ``stop`` received a signal.
    """
    tasks = (task,) if isinstance(task, str) else tuple(task)
    started = time.perf_counter()
    state_path = None if folder is None else folder.state_path
    state = None if state_path is None else checkpoint.read(state_path)
    if state is not None:
        reached = state.record["progress"]["epoch"], state.record["progress"]["batch"]
        # A checkpoint of the epochs that are done is of another schedule.
        if state.record["tasks"] != list(tasks) or (done and reached <= (done, 0)):
            state = None
    for own in tasks if folder is not None else ():
        folder.keep_metrics(own, done if state is None else state.record["progress"]["epoch"])
    fork = None if done else fork  # its state is of the epochs that are done
    run = _Run(model, tasks, loader, sampler, recipe, accelerator or Accelerator(), criterion, state_path, stop, fork)
    run.progress.epoch, run.progress.best = done, best
    if state is None and run.fork is not None:
        state = checkpoint.read(run.fork)
    if state is not None:
        run.resume(state)
        del state  # its tensors
    elif done and folder is not None:
        run.save()  # the task's files are replaced before the next checkpoint, and could not be trained on
    try:
        while run.progress.epoch < recipe.epochs and not run.is_out_of_patience():
            phase = run.train_epoch()
            run.check_finite(run.progress.epoch + 1)
            if validate is not None and run.stop_requested():  # validation may take longer than there is time
                run.save()
                run.stop_if_requested()
            rows = run.numbers(phase)
            is_last = run.progress.epoch + 1 == recipe.epochs
            validates = validate is not None and (is_last or run.validates_now())
            stored = phase.stored if validates or is_last else None
            undo = [] if stored is None else [stored(model, task) for task in tasks]
            if validate is not None and validates:
                is_best = run.validate(validate, rows, run.competes(phase) or is_last)
            else:
                is_best = validate is None and is_last
            now = time.perf_counter()
            rows = [{**row, "seconds": round((now - started) / len(rows), 3)} for row in rows]
            started = now
            if run.accelerator.is_main_process:
                with run.averaged():
                    if folder is not None:
                        folder.add_metrics(rows)
                    if on_epoch is not None:
                        on_epoch(rows, is_best)
                    if keep is not None and is_best:
                        keep(rows)
            for give_back in () if is_last else undo:
                give_back()
            ended = run.progress
            run.progress = Progress(ended.epoch + 1, best=ended.best, started=ended.started, risen=ended.risen)
            if is_best or is_last or run.progress.epoch % recipe.save_epochs == 0:
                run.save()
            if not is_last and run.stop_requested():
                run.save()
                run.stop_if_requested()
    finally:
        set_trainable(run.roles, ROLES)
        run.set_curriculum(None)
        for norm in model.task_norms:
            norm.freeze_running_stats(False)
        run.accelerator.free_memory()
    return run.progress


def set_trainable(roles: dict[str, dict[str, nn.Parameter]], trains: Iterable[str]) -> None:
    """Make the parameters of the roles in ``trains`` trainable and freeze the others."""
    trains = set(trains)
    for role, parameters in roles.items():
        for parameter in parameters.values():
            parameter.requires_grad_(role in trains)


def start_file(fork: Path, defaults: Defaults) -> Path:
    """Return the file of a shared start, whose name says what the runs that begin with it have in common."""
    rate = () if defaults.rate == 1.0 else (f"rate{defaults.rate:g}",)
    return fork.with_stem("_".join((fork.stem, defaults.optimizer, defaults.decay, *defaults.adaptive, *rate)))


def check_whole_epochs(phases: Iterable[Phase], recipe: Recipe) -> None:
    """Raise a ``UserError`` for settings that need every epoch to have the values of the file, which a budget's have not."""
    if any(callable(phase.competes) for phase in phases):
        if recipe.patience is not None:
            raise UserError("patience cannot be combined with a budget: weights are rounded only in the last epochs")
        if recipe.ema_decay is not None:
            raise UserError(
                "ema_decay cannot be combined with a budget: averages do not survive the rounding of weights"
            )


class _Run:
    """The state of a training run and the steps that change it, used by :func:`run_phases`."""

    def __init__(
        self,
        model: TaskModel,
        tasks: tuple[str, ...],
        loader: DataLoader | Mapping[str, DataLoader],
        sampler: Sampler | Mapping[str, Sampler],
        recipe: Recipe,
        accelerator: Accelerator,
        criterion: Criterion | Mapping[str, Criterion],
        state_path: Path | None,
        stop: StopSignals | None,
        fork: Path | None,
    ) -> None:
        self.model, self.tasks, self.recipe = model, tasks, recipe
        self.name = tasks[0] if len(tasks) == 1 else f"{len(tasks)} tasks"
        self.accelerator, self.state_path, self.stop, self.fork = accelerator, state_path, stop, fork
        self.criteria = dict(criterion) if isinstance(criterion, Mapping) else dict.fromkeys(tasks, criterion)
        defaults = model.method.defaults(model, recipe)
        self.phases, self.decay, self.rate = recipe.phases(model), defaults.decay, defaults.rate
        if fork is not None:
            self.fork = start_file(fork, defaults)
        self.epochs = [phase_at(self.phases, epoch) for epoch in range(recipe.epochs)]  # the phase each starts in
        recipes = {"main": recipe, **recipe.others}
        self.recipes = {name: recipes[name] for name in dict.fromkeys(phase.optimizer for phase in self.phases)}
        roles = {
            name: {role for phase in self.phases if phase.optimizer == name for role in phase.trains}
            for name in self.recipes
        }
        check_whole_epochs(self.phases, recipe)
        optimizers = [make_optimizer(model, tasks, own, roles[name]) for name, own in self.recipes.items()]
        loaders = dict(loader) if isinstance(loader, Mapping) else {"train": loader}
        self.samplers = dict(sampler) if isinstance(sampler, Mapping) else {"train": sampler}
        for module in (model, *self.criteria.values()):
            if isinstance(module, torch.nn.Module):
                module.to(accelerator.device)
        if recipe.channels_last and accelerator.device.type != "mps":
            _to_channels_last(model)
        self.parallel, *prepared = accelerator.prepare(model, *optimizers, *loaders.values())
        self.optimizers = dict(zip(self.recipes, prepared, strict=False))
        self.loaders = dict(zip(loaders, prepared[len(optimizers) :], strict=True))
        if recipe.compile:
            model.hold_buffers()
        self.forward = torch.compile(self.parallel) if recipe.compile else self.parallel
        self.roles = model.roles(*tasks)
        self.mix = mixing(recipe, model, tasks)
        self.mix_classes = [model.heads[task].out_features for task in self.mix]
        for (
            unit
        ) in model.units:  # of tasks that were loaded to be trained: deltas with an encoding would stay as they are
            for name in tasks:
                if name in unit.deltas:
                    unit.deltas[name].drop_encodings()
        self.average = None if recipe.ema_decay is None else WeightAverage(model, tasks, recipe.ema_decay)
        self.phase: Phase | None = None
        self.progress = Progress()
        self.random_state: dict[str, Tensor] | None = None

    def resume(self, state: checkpoint.Checkpoint) -> None:
        """Continue from a checkpoint."""
        counters = state.record["progress"]
        # "rate" was not stored before version 0.18, whose rates did not depend on a size
        rate = counters.pop("rate", 1.0)
        for group in (group for optimizer in self.optimizers.values() for group in optimizer.param_groups):
            group.update({name: group[name] * rate / self.rate for name in ("lr", "initial_lr")})
        self.rate = rate
        phases = [list(phase[:2]) for phase in counters.pop("phases", None) or ()]
        if phases != self._schedule() and (phases or any(phase.begin for phase in self.phases)):
            raise UserError(
                f"checkpoint {state.path} was written with another schedule of phases; start again with --overwrite"
            )
        state.restore_structure(self.model, self.tasks)
        self._forget_dropped()
        self.random_state = state.restore(self.model, self.tasks, self.optimizers, self.accelerator)
        if self.average is not None:
            self.average.load(state.part("average"))
        if not self.accelerator.is_main_process:  # the first process continues the sums over all processes
            counters.update(sums={})
        self.progress = Progress(**counters)

    def _schedule(self) -> list[list]:
        return [[phase.name, phase.epochs] for phase in self.phases]

    def averaged(self) -> AbstractContextManager:
        """Exchange the weights for their average in the ``with`` block, if there is one."""
        return nullcontext() if self.average is None else self.average.in_use()

    def competes(self, phase: Phase) -> bool:
        """Return whether the epochs of a phase compete for the best epoch."""
        if callable(phase.competes):
            return phase is self.phases[-1] or all(phase.competes(self.model, task) for task in self.tasks)
        return phase.competes or phase is self.phases[-1]

    def save(self, path: Path | None = None) -> None:
        """Write the checkpoint, or another file, unless the weights are no longer finite."""
        self.check_finite(self.progress.epoch + (self.progress.batch > 0))
        path = path or self.state_path
        if path is not None:
            counters = {**vars(self.progress), "sums": self._sums(), "phases": self._schedule(), "rate": self.rate}
            average = None if self.average is None else self.average.values
            checkpoint.save(path, self.model, self.tasks, self.optimizers, self.accelerator, counters, average)

    def check_finite(self, epoch: int) -> None:
        """Raise a ``DivergedError`` before non-finite weights overwrite a good checkpoint."""
        if not all(torch.isfinite(tensor).all() for tensor in checkpoint.moving(self.model, self.tasks).values()):
            raise DivergedError(
                f"{self._which()}: weights are no longer finite in epoch {epoch}{self._kept()}; lower --lr"
            )

    def stop_if_requested(self) -> None:
        """End the run if any process was asked to stop."""
        if self.stop_requested():
            raise Interrupted(self.stop.received or signal.SIGTERM)

    def is_out_of_patience(self) -> bool:
        """Return whether validation has not improved for ``patience`` epochs."""
        progress, patience = self.progress, self.recipe.patience
        has_validated = progress.epoch % self.recipe.eval_epochs == 0 or self.recipe.plan is not None
        return patience is not None and has_validated and 0 < progress.risen <= progress.epoch - patience

    def validates_now(self) -> bool:
        """Return whether the loop validates after the current epoch."""
        so_far = [phase.validates for phase in self.epochs[: self.progress.epoch + 1]]
        return so_far[-1] and sum(so_far) % self.recipe.eval_epochs == 0

    def validate(self, validate: Callable[[], tuple[dict[str, dict], float]], rows: list[dict], competes: bool) -> bool:
        """Validate, add the numbers to the rows, and return whether the epoch, if it ``competes``, is the best so far.

        Epochs of earlier phases may not meet the settings (e.g. a budget) yet, and do not compete.
        """
        with self.averaged():
            found, number = validate()
        number = -math.inf if math.isnan(number) else number
        for row in rows:
            row.update(found[row["task"]])
        best = self.progress.best
        if not competes or (best is not None and number < best):
            return False
        if best is None or number > best:
            self.progress.risen = self.progress.epoch + 1
        self.progress.best = number
        return True

    def train_epoch(self) -> Phase:
        """Train the rest of the current epoch and return the phase of its last step."""
        done, epochs = self.progress.epoch, self.recipe.epochs
        phase, self.phase = self.epochs[done], None
        loader, sampler = self.loaders[phase.data], self.samplers[phase.data]
        self.batches = min(len(loader), self.recipe.limit_batches or len(loader))
        sampler.epoch = sum(earlier.data == phase.data for earlier in self.epochs[:done])
        if self.progress.batch >= self.batches:  # the run was stopped between the last step and validation
            last = (self.batches - 1) // self.recipe.accumulate * self.recipe.accumulate
            self.progress.batch, size = last, self.batches - last
            phase, self.progress.batch = self._enter_phase(size), self.batches
            checkpoint.set_random_state(self.random_state or {})
            return phase
        rest = loader
        if self.progress.batch == 0:
            torch.manual_seed(mix_seed(self.recipe.seed, done, self.accelerator.process_index))
        else:
            skip = getattr(loader, "skipping", partial(self.accelerator.skip_first_batches, loader))
            rest = skip(self.progress.batch)
            checkpoint.set_random_state(self.random_state or {})
        quiet = None if self.accelerator.is_main_process else True
        options = {"total": self.batches, "initial": self.progress.batch, "disable": quiet, "leave": False}
        said = shown = time.monotonic()
        loss = math.nan
        with tqdm(desc=f"{self.name} {done + 1}/{epochs}", **options) as bar:
            for window in _windows(islice(rest, self.batches - self.progress.batch), self.recipe.accumulate):
                phase = self._enter_phase(len(window))
                total = self._step(window, phase)
                bar.update(len(window))
                if isinstance(total, float) or self.progress.batch >= self.batches or time.monotonic() > shown + 1:
                    loss, shown = float(total), time.monotonic()
                    if not math.isfinite(loss):
                        raise DivergedError(
                            f"{self._which()}: the loss is {loss} at epoch {done + 1}, batch {self.progress.batch} of "
                            f"{self.batches}{self._kept()}; lower --lr (now {self.recipe.lr})"
                        )
                    bar.set_postfix(loss=f"{loss / len(self.tasks):.3f}", refresh=False)
                if bar.disable and self.accelerator.is_main_process and time.monotonic() - said >= _LINE_SECONDS:
                    said = time.monotonic()  # without a terminal, a line now and then takes the bar's place
                    where = f"{self.name} {done + 1}/{epochs}: {self.progress.batch} of {self.batches} batches"
                    tqdm.write(f"{where}, loss {loss / len(self.tasks):.3f}", file=sys.stderr)
                if self.progress.batch < self.batches and self.stop_requested():
                    self.save()
                    self.stop_if_requested()
        return phase

    def _enter_phase(self, batches: int) -> Phase:
        """Enter and return the phase of the next step: make its roles trainable and let its gates decide."""
        epoch = self.progress.epoch
        phase = phase_at(self.phases, epoch + self.progress.batch / self.batches)
        is_last_step = epoch + 1 == self.recipe.epochs and self.progress.batch + batches >= self.batches
        if is_last_step and any(later.begin for later in self.phases[self.phases.index(phase) :]):
            phase = self.phases[-1]  # a short run must also begin every phase
        for begins in self.phases[self.progress.started : self.phases.index(phase) + 1]:
            self._begin(begins)
        if phase is not self.phase:
            self.phase = phase
            set_trainable(self.roles, phase.trains)
            self._freeze_encoded()
            self._set_modes(phase)
            self.set_curriculum(phase.curriculum)
            self.model.state.temperature = phase.temperature
            for group in self.optimizers[phase.optimizer].param_groups:
                group["lr"] = group["initial_lr"] * self._decay(phase)
        if phase.each_step is not None:
            begun = sum(earlier.epochs for earlier in self.phases[: self.phases.index(phase)])
            passed = epoch + self.progress.batch / self.batches - begun
            for task in self.tasks:
                phase.each_step(self.model, task, min(max(passed / phase.epochs, 0.0), 1.0) if phase.epochs else 1.0)
        gates = [gate for task in self.tasks for gate in self.model.gates(task)]
        if self.accelerator.device.type != "cpu":
            for kind in {type(gate) for gate in gates}:  # before norms ask for decisions one by one
                kind.read_together([gate for gate in gates if type(gate) is kind])
        for gate in gates if self.recipe.compile else ():
            gate.decide()  # read before the compiler looks
        return phase

    def _begin(self, phase: Phase) -> None:
        """Run the actions due once when a phase begins, and drop deltas that no gate can use any more."""
        if phase.forks and self.fork is not None and not self.fork.is_file():
            self.save(self.fork)
        self.progress.started += 1
        if phase.begin is not None:
            self._share_buffers()  # sizes of norms follow from running statistics, on which all processes must agree
        for task in self.tasks if phase.begin is not None else ():
            for parameter in phase.begin(self.model, task):
                for optimizer in self.optimizers.values():
                    optimizer.state.pop(parameter, None)
        if not any("gate" in later.trains for later in self.phases[self.phases.index(phase) :]):
            for unit in self.model.units:
                for task in self.tasks:
                    if task in unit.deltas and not unit.gates[task].decide().uses_delta:
                        del unit.deltas[task]
            self._forget_dropped()

    def _freeze_encoded(self) -> None:
        """Freeze deltas that already have the values that files will hold."""
        for unit in self.model.units:
            for task in self.tasks:
                for delta in unit.deltas[task].unmoved() if task in unit.deltas else ():
                    delta.requires_grad_(False)

    def _forget_dropped(self) -> None:
        """Forget parameters that the model no longer has, together with their optimiser states."""
        held = {id(parameter) for parameter in self.model.parameters()}
        self.roles = {
            role: {name: parameter for name, parameter in parameters.items() if id(parameter) in held}
            for role, parameters in self.roles.items()
        }
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["params"] = [parameter for parameter in group["params"] if id(parameter) in held]
            for parameter in [parameter for parameter in optimizer.state if id(parameter) not in held]:
                del optimizer.state[parameter]

    def _set_modes(self, phase: Phase) -> None:
        """Set training mode; norms whose roles are frozen in this phase keep their running statistics."""
        self.parallel.train()
        for norm in self.model.task_norms:
            norm.freeze_running_stats("norm" not in phase.trains)
            norm.freeze_running_stats("base" not in phase.trains, tasks=False)

    def set_curriculum(self, count: int | None) -> None:
        """Include only the gates of the last ``count`` units in training; ``None`` for all."""
        for task in self.tasks:
            gates = self.model.gates(task)
            for index, gate in enumerate(gates):
                gate.in_curriculum = count is None or index >= len(gates) - count
                if not gate.in_curriculum:
                    gate.requires_grad_(False)  # else weight decay would move it

    def _decay(self, phase: Phase) -> float:
        """Return the learning-rate factor of the phase's optimiser in this epoch, counting only epochs that use it."""
        own = [epoch for epoch, other in enumerate(self.epochs) if other.optimizer == phase.optimizer]
        done = sum(epoch < self.progress.epoch for epoch in own)
        return self.recipes[phase.optimizer].learning_rate(done, max(len(own), 1), self.decay)

    def _read(self, number: Tensor) -> float | Tensor:
        """Return a scalar: its value if reading it is free, else the scalar itself, so that no step waits for the device."""
        if self.accelerator.device.type == "cpu" and not DEFERS_LOSS_READS:
            return number.item()
        return number.detach().to(torch.float32 if number.device.type == "mps" else torch.float64)

    def _step(self, window: list, phase: Phase) -> float | Tensor:
        """Take one optimiser step over a window of batches and return its loss, penalty included."""
        weight = self.recipe.lam * phase.penalty
        separate = isinstance(window[0], Mapping)  # each task has a batch of its own
        shared = not separate and isinstance(window[0][1], Mapping)  # all tasks see all images
        if separate:
            images = sum(len(batch[task][0]) for batch in window for task in self.tasks)
        else:
            images = sum(len(batch[0]) for batch in window) * (len(self.tasks) if shared else 1)
        parts = [(part, batch[1] if shared else {}) for batch in window for part in self._parts(batch, phase)]
        optimizer = self.optimizers[phase.optimizer]
        # DistributedDataParallel cannot follow penalties on tasks that take no part in the forward pass.
        by_hand = (
            shared or separate or not phase.together or self.recipe.step_per_task
        ) and self.accelerator.num_processes > 1
        forward = self.model if by_hand else self.forward
        scale = len(window) if self.recipe.gradients == "sum" else 1
        total: float | Tensor = 0.0
        for index, (part, every) in enumerate(parts):
            x, call, labels = self._mixed(part)
            last = index == len(parts) - 1
            with (
                nullcontext()
                if last or by_hand or self.recipe.step_per_task
                else self.accelerator.no_sync(self.parallel)
            ):
                watched = nullcontext() if phase.extra_loss is None else phase.extra_loss(self.model, x, every)
                with self.accelerator.autocast() if by_hand or phase.extra_loss else nullcontext(), watched as extra:
                    output = self._forward(forward, x, call)
                loss = torch.zeros((), device=x.device) if extra is None else extra.value()
                for task, own, targets in _by_task(output, call, labels):
                    loss = loss + self._task_loss(task, own, targets, weight) * (
                        len(self.tasks) * len(targets) / images
                    )
                total = total + self._read(loss)
                if isinstance(total, float) and not math.isfinite(total):
                    return total
                self.accelerator.backward(loss if scale == 1 else scale * loss)
            if last or self.recipe.step_per_task:
                self._apply_gradients(optimizer, by_hand)
        self.progress.batch += len(window)
        return total

    def _apply_gradients(self, optimizer: torch.optim.Optimizer, by_hand: bool) -> None:
        """Take a step; ``by_hand``: average the gradients over the processes first."""
        if by_hand:
            self._average_gradients(optimizer)
        if self.recipe.clip_grad is not None:
            learned = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            self.accelerator.unscale_gradients(
                optimizer
            )  # not those of other optimisers, which may have the same parameters
            torch.nn.utils.clip_grad_norm_(learned, self.recipe.clip_grad)
        optimizer.step()
        optimizer.zero_grad()
        if self.average is not None:
            self.average.update()

    def _forward(self, forward: Callable, x: Tensor, call: dict):
        try:
            return forward(x, **call)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise UserError(
                f"a batch norm sees one value per channel: batches of {len(x)} with inputs of {tuple(x.shape[2:])} are too small; "
                "give a larger --batch_size or --input_size"
            ) from None

    def _mixed(self, part: tuple) -> tuple:
        """Blend the images of a forward pass by mixup or CutMix, each task's with one another."""
        x, call, labels = part
        if not self.mix:
            return part
        if isinstance(labels, Mapping):
            raise UserError(
                "mixup and CutMix are for tasks with images of their own, not for several on the same images"
            )
        if isinstance(call["task"], str):
            x, labels = self.mix[call["task"]](x, labels)
            return x, call, labels
        blended, shares = torch.empty_like(x), x.new_zeros(len(x), max(self.mix_classes))
        for task, rows in _rows(call["task"]).items():
            blended[rows], own = self.mix[task](x[rows], labels[rows])
            shares[rows, : own.shape[1]] = own.to(shares.dtype)
        return blended, call, shares

    def _average_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """Average the gradients over all processes; a parameter without one on any process keeps none and is not moved."""
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        there = torch.tensor([p.grad is not None for p in parameters], device=self.accelerator.device).float()
        wanted = self.accelerator.reduce(there, "sum").tolist()
        parameters = [p for p, count in zip(parameters, wanted, strict=True) if count]
        if not parameters:
            return
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = self.accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), "mean")
        for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = part.view_as(parameter)

    def _parts(self, batch, phase: Phase) -> list[tuple[Tensor, dict, Tensor | Mapping[str, Tensor]]]:
        """Split a batch into forward passes: images, the tasks that the model runs on them, and their labels."""
        if isinstance(batch, Mapping):
            return [(batch[task][0], {"task": task}, batch[task][1]) for task in self.tasks]
        x, labels, *which = batch
        if isinstance(labels, Mapping):
            labels = {task: labels[task] for task in self.tasks}
            if phase.together and len(self.tasks) > 1 and not self.recipe.step_per_task:
                return [(x, {"tasks": self.tasks}, labels)]
            return [(x, {"task": task}, labels[task]) for task in self.tasks]
        if not which:
            return [(x, {"task": self.tasks[0]}, labels)]
        if self.recipe.mixed and phase.together and not self.recipe.step_per_task:
            return [(x, {"task": [self.tasks[index] for index in which[0].tolist()]}, labels)]
        present = sorted(set(which[0].tolist()))
        return [(x[which[0] == index], {"task": self.tasks[index]}, labels[which[0] == index]) for index in present]

    def _task_loss(self, task: str, output: Tensor, labels: Tensor, weight: float) -> Tensor:
        """Return the mean loss of one task's images, penalty included, and add it to the epoch's sums."""
        loss = self.criteria[task](output, labels) * self.recipe.task_weights.get(task, 1.0)
        if weight:
            loss = loss + weight * self.model.penalty(task)
        sums = self.progress.sums.setdefault(task, {"loss": 0.0, "wrong": 0.0, "images": 0.0})
        sums["loss"] = sums["loss"] + self._read(loss) * len(labels)
        sums["images"] += len(labels)
        if self.mix and isinstance(labels, Tensor) and labels.dim() == 2:
            labels = labels.argmax(1)  # the larger part of a blend
        if is_classification(output, labels):
            sums["wrong"] = sums["wrong"] + self._read((output.detach().argmax(1) != labels).sum())
        else:
            sums["wrong"] = math.nan
        return loss

    def numbers(self, phase: Phase) -> list[dict]:
        """Return the numbers to report for the epoch just trained, one row per task."""
        self._share_buffers()
        numbers = []
        for task, sums in self._sums().items():
            rows = self.model.report(task)
            numbers.append(
                {
                    "task": task,
                    "epoch": self.progress.epoch + 1,
                    "phase": phase.name,
                    "train_loss": sums["loss"] / max(sums["images"], 1.0),
                    "train_error": None
                    if math.isnan(sums["wrong"])
                    else 100.0 * sums["wrong"] / max(sums["images"], 1.0),
                    "lr": self._rate(phase),
                    "penalty": float(self.model.penalty(task).detach()),
                    "tuned_layers": sum(map(is_tuned, rows)) / len(rows),
                    "executed": sum(row["run"] for row in rows) / len(rows),
                    "scores": [row["score"] for row in rows],
                }
            )
        return numbers

    def _rate(self, phase: Phase) -> float:
        """Return the learning rate of the weights: of deltas if there are any, else of the base, norms or heads."""
        rates = {group["role"]: group["lr"] for group in self.optimizers[phase.optimizer].param_groups}
        return next(rates[role] for role in ("delta", "base", "norm", "head", *rates) if role in rates)

    def _sums(self) -> dict[str, dict[str, float]]:
        """Return the epoch's sums over all processes for every task."""
        names = ("loss", "wrong", "images")
        sums = {}
        for task in self.tasks:
            own = self.progress.sums.get(task, dict.fromkeys(names, 0.0))
            sums[task] = {name: float(own[name]) for name in names}
        if self.accelerator.num_processes == 1:
            return sums
        values = torch.tensor([[own[name] for name in names] for own in sums.values()], dtype=torch.float32)
        values = self.accelerator.reduce(values.to(self.accelerator.device), "sum").tolist()
        return {task: dict(zip(names, own, strict=True)) for task, own in zip(sums, values, strict=True)}

    def _share_buffers(self) -> None:
        """Copy the first process's running statistics, which are validated and saved, to every process."""
        if self.accelerator.num_processes > 1:
            averaged = () if self.average is None else self.average.values.values()
            for tensor in (*(own for _, own in self.model.named_buffers()), *averaged):
                tensor.copy_(broadcast(tensor.clone(), from_process=0))

    def stop_requested(self) -> bool:
        """Return whether any process was asked to stop; all processes agree on the step."""
        if self.stop is None:
            return False
        if self.accelerator.num_processes == 1:
            return self.stop.received is not None
        flag = torch.tensor(float(self.stop.received is not None), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, "sum") > 0)

    def _which(self) -> str:
        """Return the trained tasks, for messages."""
        return f"task {self.tasks[0]}" if len(self.tasks) == 1 else f"tasks {', '.join(self.tasks)}"

    def _kept(self) -> str:
        """Return where the last good state is, for messages."""
        if self.state_path is None or not self.state_path.exists():
            return ""
        return f"; the last good state is kept in {self.state_path.parent}"


def mixing(recipe: Recipe, model: TaskModel, tasks: Sequence[str]) -> dict[str, Callable]:
    """Return mixup and CutMix of each task's images and labels, drawn at random if the recipe has both; empty if it has none."""
    kinds = {v2.MixUp: recipe.mixup, v2.CutMix: recipe.cutmix}
    mixes: dict[str, Callable] = {}
    for task in tasks if any(kinds.values()) else ():
        classes = getattr(model.heads[task], "out_features", None)
        if classes is None:
            raise UserError(
                f"mixup and CutMix are for tasks that classify, by a linear head; task {task!r} has another"
            )
        mixes[task] = v2.RandomChoice([kind(alpha=a, num_classes=classes) for kind, a in kinds.items() if a])
    return mixes


def _to_channels_last(model: nn.Module) -> None:
    """Reorder the memory of image convolutions' weights and their deltas; values, names and files stay the same."""
    for parameter in model.parameters():
        if parameter.dim() == 4:
            # a copy, since .contiguous() leaves 1 × 1 kernels with strides that their gradients will not have
            parameter.data = torch.empty_like(parameter.data, memory_format=torch.channels_last).copy_(parameter.data)


def is_classification(output: object, labels: object) -> bool:
    """Return whether the labels are class indices, one per row of the output."""
    if not isinstance(output, Tensor) or not isinstance(labels, Tensor) or labels.is_floating_point():
        return False
    return output.dim() == 2 and output.shape[1] > 1 and labels.dim() == 1


def _by_task(output, call: dict, labels: Tensor | Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield each task's outputs and labels in a forward pass."""
    if isinstance(labels, Mapping):
        yield from ((task, output[task], labels[task]) for task in labels)
    elif isinstance(call["task"], str):
        yield call["task"], output, labels
    else:
        for task, own in _rows(call["task"]).items():
            outputs = output[own] if isinstance(output, Tensor) else torch.stack([output[row] for row in own])
            targets = labels[own]  # of blended images shares of as many classes as the largest task has
            yield task, outputs, targets[:, : outputs.shape[1]] if targets.dim() == 2 else targets


def _rows(names: Sequence[str]) -> dict[str, list[int]]:
    """Return the rows of each task in a batch."""
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        rows.setdefault(name, []).append(row)
    return rows


def _windows(batches: Iterable, size: int) -> Iterator[list]:
    batches = iter(batches)
    while window := list(islice(batches, size)):
        yield window
