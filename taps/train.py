"""The training loop: one loop that executes the phases of any method, for one task or for several at once.

Loss of a step = Σ_t K·n_t/n · (λ_t · task loss_t + λ · phase.penalty · model.penalty(t)), where n_t of the step's n images
belong to the t-th of K tasks: for one task its loss and penalty, for several that appear equally often, or that all see
the same images, the sum of theirs.
A step takes ``accumulate`` batches and the last step of an epoch what is left. The learning rate follows a cosine from
``lr`` in the first epoch towards 0 *after* the last, so no epoch is spent at 0.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from taps import budget, checkpoint, support
from taps.activations import beside_base
from taps.cost import is_tuned
from taps.data.images import mix_seed
from taps.errors import DivergedError, UserError
from taps.methods import ROLES, Phase
from taps.model import TaskModel
from taps.recipe import Recipe, make_optimizer, phase_at
from taps.signals import Interrupted, StopSignals

#: mean loss of a batch from outputs and labels
Criterion = Callable[[Tensor, Tensor], Tensor]


class Sampler(Protocol):
    """What decides the order of a stream of batches, from its seed and the number of its epoch."""

    epoch: int


@dataclass
class Progress:
    """Where a run is.

    Attributes:
        epoch: 0-based; ``batch``: batches of it that are done on each process.
        sums: ``loss``, ``wrong`` and ``images`` of each task over the epoch so far.
        best: best of the numbers that validation gave so far, ``None`` before the first.
        started: phases that have begun.
    """

    epoch: int = 0
    batch: int = 0
    sums: dict[str, dict[str, float]] = field(default_factory=dict)
    best: float | None = None
    started: int = 0


def fit(
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
    state_path: Path | None = None,
    resume: bool = False,
    opened: Path | None = None,
    stop: StopSignals | None = None,
) -> Progress:
    """Train one task, or several together.

    Args:
        model: has the tasks.
        task: one name or several.
        loader, sampler: for one task from :func:`taps.data.images.make_loader`, batches (images, labels); for several
            from :func:`taps.data.tasks.make_task_loader`, batches (images, labels, positions of their tasks), or from
            :func:`taps.data.shared.make_stream`, batches (images, labels by task). Several streams by name, if the
            phases name them.
        recipe: how.
        accelerator: devices, processes and precision; one process on the default device if ``None``.
        criterion: mean loss of a batch from outputs and labels; one for all tasks or one a task.
        validate: returns what is to be reported of each task, and one number, the larger the better, in which the
            epochs of the phases that compete are compared.
        on_epoch: called by the first process after each epoch with a row of numbers a task and whether the epoch is
            the best so far.
        state_path: where the checkpoint is kept, after each epoch and when the run is stopped.
        resume: continue from ``state_path``.
        opened: the state just before a budget decides; written there if it is not, else begun with.
        stop: signals to obey.

    Returns:
        The final counters; ``best`` is the best number that ``validate`` returned.

    Raises:
        DivergedError: if the loss is not finite; the last checkpoint is left as it is.
        UserError: if the checkpoint to continue from is of another run or schedule.
        Interrupted: after saving, if ``stop`` received a signal.
    """
    tasks = (task,) if isinstance(task, str) else tuple(task)
    run = _Run(model, tasks, loader, sampler, recipe, accelerator or Accelerator(), criterion, state_path, stop, opened)
    if resume or (opened is not None and opened.is_file()):
        run.resume(state_path if resume else opened)
    while run.progress.epoch < recipe.epochs:
        phase = run.train_epoch()
        run.check_finite(run.progress.epoch + 1)
        rows = run.numbers(phase)
        is_last = run.progress.epoch + 1 == recipe.epochs
        is_best = validate is None and is_last
        if validate is not None and (is_last or run.validates_now()):
            found, number = validate()
            for row in rows:
                row.update(found[row["task"]])
            # A task of an earlier phase is not what was asked for; the last epoch is, however short its phase.
            competes = phase.competes or phase is run.phases[-1] or is_last or run.is_rounded()
            is_best = competes and (run.progress.best is None or number >= run.progress.best)
            run.progress.best = number if is_best else run.progress.best
        if on_epoch is not None and run.accelerator.is_main_process:
            on_epoch(rows, is_best)
        run.progress = Progress(run.progress.epoch + 1, best=run.progress.best, started=run.progress.started)
        if is_best or is_last or run.progress.epoch % recipe.save_epochs == 0:
            run.save()
        if not is_last and run.stop_requested():
            run.save()
            run.obey()
    set_trainable(run.roles, ROLES)
    run.open_units(None)
    for norm in model.task_norms:
        norm.hold(False)
    run.accelerator.free_memory()
    return run.progress


def set_trainable(roles: dict[str, dict[str, nn.Parameter]], trains: Iterable[str]) -> None:
    """Let the parameters of the roles in ``trains`` learn and the others stand still."""
    trains = set(trains)
    for role, parameters in roles.items():
        for parameter in parameters.values():
            parameter.requires_grad_(role in trains)


class _Run:
    """What :func:`fit` is made of: the state of a training run and the steps that change it."""

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
        opened: Path | None,
    ) -> None:
        self.model, self.tasks, self.recipe = model, tasks, recipe
        self.name = tasks[0] if len(tasks) == 1 else f"{len(tasks)} tasks"
        self.accelerator, self.state_path, self.stop, self.opened = accelerator, state_path, stop, opened
        self.criteria = dict(criterion) if isinstance(criterion, Mapping) else dict.fromkeys(tasks, criterion)
        self.phases = recipe.phases(model)
        self.epochs = [phase_at(self.phases, epoch) for epoch in range(recipe.epochs)]  # the phase each starts in
        recipes = {"main": recipe, **recipe.others}
        self.recipes = {name: recipes[name] for name in dict.fromkeys(phase.optimizer for phase in self.phases)}
        roles = {
            name: {role for phase in self.phases if phase.optimizer == name for role in phase.trains}
            for name in self.recipes
        }
        optimizers = [make_optimizer(model, tasks, own, roles[name]) for name, own in self.recipes.items()]
        loaders = dict(loader) if isinstance(loader, Mapping) else {"train": loader}
        self.samplers = dict(sampler) if isinstance(sampler, Mapping) else {"train": sampler}
        model.to(accelerator.device)
        if recipe.channels_last and accelerator.device.type != "mps":
            _to_channels_last(model)
        self.parallel, *prepared = accelerator.prepare(model, *optimizers, *loaders.values())
        self.optimizers = dict(zip(self.recipes, prepared, strict=False))
        self.loaders = dict(zip(loaders, prepared[len(optimizers) :], strict=True))
        self.forward = torch.compile(self.parallel) if recipe.compile else self.parallel
        self.roles = model.roles(*tasks)
        self.phase: Phase | None = None
        self.progress = Progress()
        self.random_state: dict[str, Tensor] | None = None

    def resume(self, path: Path) -> None:
        """Continue from a checkpoint."""
        record = checkpoint.read_record(path)
        if record is None:
            raise UserError(f"{path} does not exist: there is nothing to continue")
        phases = record["progress"].get("phases")
        if phases != self._schedule() and (phases or any(phase.start for phase in self.phases)):
            raise UserError(
                f"checkpoint {path} was written with another schedule of phases; start again with --overwrite"
            )
        checkpoint.match(path, self.model, self.tasks)
        self._forget_dropped()
        counters, self.random_state = checkpoint.restore(
            path, self.model, self.tasks, self.optimizers, self.accelerator
        )
        if not self.accelerator.is_main_process:  # the sums over all processes go on in the first one
            counters.update(sums={})
        counters.pop("phases", None)
        self.progress = Progress(**counters)

    def _schedule(self) -> list[list]:
        return [[phase.name, phase.epochs, phase.start, phase.beyond] for phase in self.phases]

    def is_rounded(self) -> bool:
        """Whether every task's deltas are what a budget lets its file hold."""
        rounding = any(phase.start == "round" for phase in self.phases[: self.progress.started])
        return rounding and all(
            any(task in unit.deltas and unit.deltas[task].encodings for unit in self.model.units) for task in self.tasks
        )

    def save(self, path: Path | None = None) -> None:
        """Replace the checkpoint, or another file, unless the weights are lost."""
        self.check_finite(self.progress.epoch + (self.progress.batch > 0))
        path = path or self.state_path
        if path is not None:
            counters = {**vars(self.progress), "sums": self._sums(), "phases": self._schedule()}
            checkpoint.save(path, self.model, self.tasks, self.optimizers, self.accelerator, counters)

    def check_finite(self, epoch: int) -> None:
        """Raise a ``DivergedError`` before lost weights replace what is kept."""
        if not all(torch.isfinite(tensor).all() for tensor in checkpoint.moving(self.model, self.tasks).values()):
            raise DivergedError(
                f"{self._which()}: weights are no longer finite in epoch {epoch}{self._kept()}; lower --lr"
            )

    def obey(self) -> None:
        """End the run if any process was asked to stop."""
        if self.stop_requested():
            raise Interrupted(self.stop.received or signal.SIGTERM)

    def validates_now(self) -> bool:
        """Whether the current epoch is one after which the loop validates."""
        so_far = [phase.validates for phase in self.epochs[: self.progress.epoch + 1]]
        return so_far[-1] and sum(so_far) % self.recipe.eval_epochs == 0

    def train_epoch(self) -> Phase:
        """Train what is left of the current epoch; returns the phase of its last step."""
        done, epochs = self.progress.epoch, self.recipe.epochs
        phase, self.phase = self.epochs[done], None
        loader, sampler = self.loaders[phase.data], self.samplers[phase.data]
        self.batches = min(len(loader), self.recipe.limit_batches or len(loader))
        sampler.epoch = sum(earlier.data == phase.data for earlier in self.epochs[:done])
        rest = loader
        if self.progress.batch == 0:
            torch.manual_seed(mix_seed(self.recipe.seed, done, self.accelerator.process_index))
        else:
            rest = self.accelerator.skip_first_batches(loader, self.progress.batch)
            checkpoint.set_random_state(self.random_state or {})
        quiet = None if self.accelerator.is_main_process else True
        options = {"total": self.batches, "initial": self.progress.batch, "disable": quiet, "leave": False}
        with tqdm(desc=f"{self.name} {done + 1}/{epochs}", **options) as bar:
            for window in _windows(islice(rest, self.batches - self.progress.batch), self.recipe.accumulate):
                phase = self._enter_phase(len(window))
                loss = self._step(window, phase)
                if not math.isfinite(loss):
                    raise DivergedError(
                        f"{self._which()}: the loss is {loss} at epoch {done + 1}, batch {self.progress.batch} of "
                        f"{self.batches}{self._kept()}; lower --lr (now {self.recipe.lr})"
                    )
                bar.update(len(window))
                bar.set_postfix(loss=f"{loss / len(self.tasks):.3f}", refresh=False)
                if self.progress.batch < self.batches and self.stop_requested():
                    self.save()
                    self.obey()
        return phase

    def _enter_phase(self, batches: int) -> Phase:
        """The phase of the next step, with its roles learning and its gates decided."""
        epoch = self.progress.epoch
        phase = phase_at(self.phases, epoch + self.progress.batch / self.batches)
        is_last_step = epoch + 1 == self.recipe.epochs and self.progress.batch + batches >= self.batches
        if is_last_step and any(later.start for later in self.phases[self.phases.index(phase) :]):
            phase = self.phases[-1]  # what a budget has to do is done in a short run too
        for begins in self.phases[self.progress.started : self.phases.index(phase) + 1]:
            self._begin(begins)
        if phase is not self.phase:
            self.phase = phase
            set_trainable(self.roles, phase.trains)
            if any(begun.start == "round" for begun in self.phases[: self.progress.started]):
                self._hold_still()
            self._set_modes(phase)
            self.open_units(phase.opened)
            self.model.state.temperature = phase.temperature
            for group in self.optimizers[phase.optimizer].param_groups:
                group["lr"] = group["initial_lr"] * self._decay(phase)
        for task in self.tasks if self.recipe.compile else ():
            for gate in self.model.gates(task):
                gate.decide()  # read before the compiler looks
        return phase

    def _begin(self, phase: Phase) -> None:
        """What is done once when a phase begins; deltas that no gate can ask for any more are dropped."""
        if phase.start == "choose" and self.opened is not None and not self.opened.is_file():
            self.save(self.opened)
        self.progress.started += 1
        for task in self.tasks:
            if phase.start == "choose":
                budget.keep_within(self.model, task, self.recipe.budget)
            elif phase.start == "round":
                budget.hold_within(self.model, task, self.recipe.budget, phase.beyond)
            elif phase.start == "fix":
                self._fix(task)
        if not any("gate" in later.trains for later in self.phases[self.phases.index(phase) :]):
            for unit in self.model.units:
                for task in self.tasks:
                    unit.release(task)
            self._forget_dropped()

    def _hold_still(self) -> None:
        """Deltas that are what files will hold learn no more."""
        for unit in self.model.units:
            for task in self.tasks:
                for delta in unit.deltas[task].held() if task in unit.deltas else ():
                    delta.requires_grad_(False)

    def _fix(self, task: str) -> None:
        """Fix the support of a task's deltas; averages of gradients, which would move weights outside of it, start anew."""
        support.fix_support(self.model, task)
        for unit in self.model.units:
            for parameter in unit.deltas[task].parameters() if task in unit.deltas else ():
                for optimizer in self.optimizers.values():
                    optimizer.state.pop(parameter, None)

    def _forget_dropped(self) -> None:
        """Let go of parameters that the model has no more, and of the optimisers' states of them."""
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
        """Training mode; norms whose roles stand still in this phase leave their running statistics as they are."""
        self.parallel.train()
        for norm in self.model.task_norms:
            norm.hold("norm" not in phase.trains)
            norm.hold("base" not in phase.trains, tasks=False)

    def open_units(self, count: int | None) -> None:
        """Let the gates of the last ``count`` units take part; ``None`` for all."""
        for task in self.tasks:
            gates = self.model.gates(task)
            for index, gate in enumerate(gates):
                gate.opened = count is None or index >= len(gates) - count
                if not gate.opened:
                    gate.requires_grad_(False)  # else weight decay would move it

    def _decay(self, phase: Phase) -> float:
        """The factor on the learning rates of the phase's optimiser in this epoch, counted in epochs that it has."""
        own = [epoch for epoch, other in enumerate(self.epochs) if other.optimizer == phase.optimizer]
        done = sum(epoch < self.progress.epoch for epoch in own)
        return self.recipes[phase.optimizer].learning_rate(done, max(len(own), 1))

    def _step(self, window: list, phase: Phase) -> float:
        """One optimiser step over a window of batches; returns its loss, penalty included."""
        weight = self.recipe.penalty_weight * phase.penalty
        shared = isinstance(window[0][1], Mapping)  # all tasks see all images
        images = sum(len(batch[0]) for batch in window) * (len(self.tasks) if shared else 1)
        parts = [part for batch in window for part in self._parts(batch, phase)]
        optimizer = self.optimizers[phase.optimizer]
        # Penalties couple tasks that a forward pass of one task does not use, which DistributedDataParallel cannot follow.
        by_hand = (shared or not phase.together) and self.accelerator.num_processes > 1
        forward = self.model if by_hand else self.forward
        total = 0.0
        for index, (x, call, labels) in enumerate(parts):
            last = index == len(parts) - 1
            with nullcontext() if last or by_hand else self.accelerator.no_sync(self.parallel):
                precision = self.accelerator.autocast() if by_hand or phase.pull else nullcontext()
                with precision, beside_base(self.model, x) if phase.pull else nullcontext() as gap:
                    output = forward(x, **call)
                loss = phase.pull * gap.value() if phase.pull else torch.zeros((), device=x.device)
                for task, own, targets in _by_task(output, call, labels):
                    loss = loss + self._task_loss(task, own, targets, weight) * (
                        len(self.tasks) * len(targets) / images
                    )
                total += loss.item()
                if not math.isfinite(total):
                    return total
                self.accelerator.backward(loss)
        self.progress.batch += len(window)
        if by_hand:
            self._average_gradients(optimizer)
        optimizer.step()
        optimizer.zero_grad()
        return total

    def _average_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """Give every process the mean of all processes' gradients."""
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = self.accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), "mean")
        for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = part.view_as(parameter)

    def _parts(self, batch, phase: Phase) -> list[tuple[Tensor, dict, Tensor | Mapping[str, Tensor]]]:
        """A batch as the forward passes it takes: images, which tasks the model runs on them, and their labels."""
        x, labels, *which = batch
        if isinstance(labels, Mapping):
            labels = {task: labels[task] for task in self.tasks}
            if phase.together and len(self.tasks) > 1:
                return [(x, {"tasks": self.tasks}, labels)]
            return [(x, {"task": task}, labels[task]) for task in self.tasks]
        if not which:
            return [(x, {"task": self.tasks[0]}, labels)]
        if self.recipe.mixed and phase.together:
            return [(x, {"task": [self.tasks[index] for index in which[0].tolist()]}, labels)]
        present = sorted(set(which[0].tolist()))
        return [(x[which[0] == index], {"task": self.tasks[index]}, labels[which[0] == index]) for index in present]

    def _task_loss(self, task: str, output: Tensor, labels: Tensor, weight: float) -> Tensor:
        """Mean loss of one task's images, penalty included; what it amounts to is noted."""
        loss = self.criteria[task](output, labels) * self.recipe.task_weights.get(task, 1.0)
        if weight:
            loss = loss + weight * self.model.penalty(task)
        sums = self.progress.sums.setdefault(task, {"loss": 0.0, "wrong": 0.0, "images": 0.0})
        sums["loss"] += loss.item() * len(labels)
        sums["images"] += len(labels)
        if _is_classification(output, labels):
            sums["wrong"] += float((output.detach().argmax(1) != labels).sum())
        else:
            sums["wrong"] = math.nan
        return loss

    def numbers(self, phase: Phase) -> list[dict]:
        """What is reported of the epoch that has just been trained, a row a task."""
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
                    "lr": self.recipes[phase.optimizer].lr * self._decay(phase),
                    "penalty": float(self.model.penalty(task).detach()),
                    "tuned_layers": sum(map(is_tuned, rows)) / len(rows),
                    "executed": sum(row["run"] for row in rows) / len(rows),
                    "scores": [row["score"] for row in rows],
                }
            )
        return numbers

    def _sums(self) -> dict[str, dict[str, float]]:
        """The epoch's sums over all processes, for every task."""
        names = ("loss", "wrong", "images")
        sums = {task: self.progress.sums.get(task, dict.fromkeys(names, 0.0)) for task in self.tasks}
        if self.accelerator.num_processes == 1:
            return sums
        values = torch.tensor([[own[name] for name in names] for own in sums.values()], dtype=torch.float32)
        values = self.accelerator.reduce(values.to(self.accelerator.device), "sum").tolist()
        return {task: dict(zip(names, own, strict=True)) for task, own in zip(sums, values, strict=True)}

    def _share_buffers(self) -> None:
        """Give every process the first one's running statistics: those are validated and saved."""
        if self.accelerator.num_processes > 1:
            for _, tensor in self.model.named_buffers():
                tensor.copy_(broadcast(tensor.clone(), from_process=0))

    def stop_requested(self) -> bool:
        """Whether any process was asked to stop; all processes agree on the step."""
        if self.stop is None:
            return False
        if self.accelerator.num_processes == 1:
            return self.stop.received is not None
        flag = torch.tensor(float(self.stop.received is not None), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, "sum") > 0)

    def _which(self) -> str:
        """For messages: what is being trained."""
        return f"task {self.tasks[0]}" if len(self.tasks) == 1 else f"tasks {', '.join(self.tasks)}"

    def _kept(self) -> str:
        """For messages: where the last good state is."""
        if self.state_path is None or not self.state_path.exists():
            return ""
        return f"; the last good state is kept in {self.state_path.parent}"


def _to_channels_last(model: nn.Module) -> None:
    """Reorder the memory of image convolutions' weights and their deltas; values, names and files stay the same."""
    for parameter in model.parameters():
        if parameter.dim() == 4:
            # a copy, since .contiguous() leaves 1 × 1 kernels with strides that their gradients will not have
            parameter.data = torch.empty_like(parameter.data, memory_format=torch.channels_last).copy_(parameter.data)


def _is_classification(output: Tensor, labels: Tensor) -> bool:
    return output.dim() == 2 and labels.dim() == 1


def _by_task(output, call: dict, labels: Tensor | Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Each task's outputs and labels in a forward pass."""
    if isinstance(labels, Mapping):
        yield from ((task, output[task], labels[task]) for task in labels)
    elif isinstance(call["task"], str):
        yield call["task"], output, labels
    else:
        rows: dict[str, list[int]] = {}
        for row, name in enumerate(call["task"]):
            rows.setdefault(name, []).append(row)
        for task, own in rows.items():
            yield (
                task,
                output[own] if isinstance(output, Tensor) else torch.stack([output[row] for row in own]),
                labels[own],
            )


def _windows(batches: Iterable, size: int) -> Iterator[list]:
    batches = iter(batches)
    while window := list(islice(batches, size)):
        yield window
