"""The training loop: one loop that executes the phases of any method, for one task or for several at once.

Loss of a step = Σ_t K·n_t/n · (task loss_t + λ · phase.penalty · model.penalty(t)), where n_t of the step's n images
belong to the t-th of K tasks: for one task its loss and penalty, for several that appear equally often the sum of theirs.
A step takes ``accumulate`` batches and the last step of an epoch what is left. The learning rate follows a cosine from
``lr`` in the first epoch towards 0 *after* the last, so no epoch is spent at 0.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from taps import budget, checkpoint
from taps.cost import is_tuned
from taps.data.images import EpochSampler, mix_seed
from taps.data.tasks import TaskSampler
from taps.errors import DivergedError
from taps.methods import ROLES, Phase
from taps.model import TaskModel
from taps.recipe import Recipe, make_optimizer, phase_at
from taps.signals import Interrupted, StopSignals


@dataclass
class Progress:
    """Where a run is.

    Attributes:
        epoch: 0-based; ``batch``: batches of it that are done on each process.
        sums: ``loss``, ``wrong`` and ``images`` of each task over the epoch so far.
        best: best validation accuracy so far (a mean over tasks), ``None`` before the first.
        decided: whether a budget has settled the gates.
    """

    epoch: int = 0
    batch: int = 0
    sums: dict[str, dict[str, float]] = field(default_factory=dict)
    best: float | None = None
    decided: bool = False


def fit(
    model: TaskModel,
    task: str | Sequence[str],
    loader: DataLoader,
    sampler: EpochSampler | TaskSampler,
    recipe: Recipe,
    accelerator: Accelerator | None = None,
    *,
    criterion: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy,
    validate: Callable[[], dict[str, float]] | None = None,
    on_epoch: Callable[[list[dict], bool], None] | None = None,
    state_path: Path | None = None,
    resume: bool = False,
    stop: StopSignals | None = None,
) -> Progress:
    """Train one task, or several together.

    Args:
        model: has the tasks.
        task: one name or several.
        loader, sampler: for one task from :func:`taps.data.images.make_loader`, batches (images, labels); for several
            from :func:`taps.data.tasks.make_task_loader`, batches (images, labels, positions of their tasks).
        recipe: how.
        accelerator: devices, processes and precision; one process on the default device if ``None``.
        criterion: mean loss of a batch from outputs and labels.
        validate: returns each task's accuracy in 0..100; epochs of the last phase compete for the best mean.
        on_epoch: called by the first process after each epoch with a row of numbers a task and whether the epoch is
            the best so far.
        state_path: where the checkpoint is kept, after each epoch and when the run is stopped.
        resume: continue from ``state_path``.
        stop: signals to obey.

    Returns:
        The final counters; ``best`` is the best validation accuracy.

    Raises:
        DivergedError: if the loss is not finite; the last checkpoint is left as it is.
        Interrupted: after saving, if ``stop`` received a signal.
    """
    tasks = (task,) if isinstance(task, str) else tuple(task)
    run = _Run(model, tasks, loader, sampler, recipe, accelerator or Accelerator(), criterion, state_path, stop)
    if resume:
        run.resume()
    while run.progress.epoch < recipe.epochs:
        phase = run.train_epoch()
        run.check_finite(run.progress.epoch + 1)
        rows = run.numbers(phase)
        is_last = run.progress.epoch + 1 == recipe.epochs
        is_best = validate is None and is_last
        if validate is not None and (is_last or (run.progress.epoch + 1) % recipe.eval_epochs == 0):
            accuracies = validate()
            for row in rows:
                row["val_error"] = 100.0 - accuracies[row["task"]]
            accuracy = sum(accuracies.values()) / len(accuracies)
            # A task of an earlier phase is not what was asked for; the last epoch is, however short its phase.
            competes = phase is run.phases[-1] or is_last
            is_best = competes and (run.progress.best is None or accuracy >= run.progress.best)
            run.progress.best = accuracy if is_best else run.progress.best
        if on_epoch is not None and run.accelerator.is_main_process:
            on_epoch(rows, is_best)
        run.progress = Progress(run.progress.epoch + 1, best=run.progress.best, decided=run.progress.decided)
        run.save()
        if not is_last:
            run.obey()
    set_trainable(run.roles, ROLES)
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
        loader: DataLoader,
        sampler: EpochSampler | TaskSampler,
        recipe: Recipe,
        accelerator: Accelerator,
        criterion: Callable,
        state_path: Path | None,
        stop: StopSignals | None,
    ) -> None:
        self.model, self.tasks, self.sampler, self.recipe = model, tasks, sampler, recipe
        self.name = tasks[0] if len(tasks) == 1 else f"{len(tasks)} tasks"
        self.accelerator, self.criterion, self.state_path, self.stop = accelerator, criterion, state_path, stop
        optimizer = make_optimizer(model, tasks, recipe)
        model.to(accelerator.device)
        if recipe.channels_last and accelerator.device.type != "mps":
            _to_channels_last(model)
        self.parallel, self.optimizer, self.loader = accelerator.prepare(model, optimizer, loader)
        self.forward = torch.compile(self.parallel) if recipe.compile else self.parallel
        self.phases = recipe.phases(model)
        self.roles = model.roles(*tasks)
        self.batches = min(len(self.loader), recipe.limit_batches or len(self.loader))
        self.progress = Progress()
        self.random_state: dict[str, Tensor] | None = None

    def resume(self) -> None:
        """Continue from the checkpoint."""
        counters, self.random_state = checkpoint.restore(
            self.state_path, self.model, self.tasks, self.optimizer, self.accelerator
        )
        if not self.accelerator.is_main_process:  # the sums over all processes go on in the first one
            counters.update(sums={})
        self.progress = Progress(**counters)

    def save(self) -> None:
        """Replace the checkpoint, unless the weights are lost."""
        self.check_finite(self.progress.epoch + (self.progress.batch > 0))
        if self.state_path is not None:
            counters = {**vars(self.progress), "sums": self._sums()}
            checkpoint.save(self.state_path, self.model, self.tasks, self.optimizer, self.accelerator, counters)

    def check_finite(self, epoch: int) -> None:
        """Raise a ``DivergedError`` before lost weights replace what is kept."""
        if not all(torch.isfinite(tensor).all() for tensor in checkpoint.moving(self.model, self.tasks).values()):
            raise DivergedError(
                f"{self._which()}: weights are no longer finite in epoch {epoch}{self._kept()}; lower --lr"
            )

    def obey(self) -> None:
        """End the run if any process was asked to stop."""
        if self._stop_requested():
            raise Interrupted(self.stop.received or signal.SIGTERM)

    def train_epoch(self) -> Phase:
        """Train what is left of the current epoch; returns the phase of its last step."""
        done, epochs = self.progress.epoch, self.recipe.epochs
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * self.recipe.learning_rate(done)
        self.parallel.train()
        self.sampler.epoch = done
        rest = self.loader
        if self.progress.batch == 0:
            torch.manual_seed(mix_seed(self.recipe.seed, done, self.accelerator.process_index))
        else:
            rest = self.accelerator.skip_first_batches(self.loader, self.progress.batch)
            checkpoint.set_random_state(self.random_state or {})
        phase = phase_at(self.phases, done)
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
                if self.progress.batch < self.batches and self._stop_requested():
                    self.save()
                    self.obey()
        return phase

    def _enter_phase(self, batches: int) -> Phase:
        """The phase of the next step, with its roles learning and its gates decided."""
        epoch = self.progress.epoch
        phase = phase_at(self.phases, epoch + self.progress.batch / self.batches)
        set_trainable(self.roles, phase.trains)
        is_last_step = epoch + 1 == self.recipe.epochs and self.progress.batch + batches >= self.batches
        if self.recipe.budget is not None and not self.progress.decided and (phase is self.phases[-1] or is_last_step):
            for task in self.tasks:
                budget.keep_within(self.model, task, self.recipe.budget)
            self.progress.decided = True
        for task in self.tasks if self.recipe.compile else ():
            for gate in self.model.gates(task):
                gate.decide()  # read before the compiler looks
        return phase

    def _step(self, window: list, phase: Phase) -> float:
        """One optimiser step over a window of batches; returns its loss, penalty included."""
        weight = self.recipe.penalty_weight * phase.penalty
        images = sum(len(batch[1]) for batch in window)
        parts = [part for batch in window for part in self._parts(batch)]
        total = 0.0
        for index, (x, labels, names) in enumerate(parts):
            last = index == len(parts) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.parallel):
                output = self.forward(x, task=names)
                loss = torch.zeros((), device=labels.device)
                for task, rows in _rows(names).items():
                    own = output if rows is None else _pick(output, rows)
                    targets = labels if rows is None else labels[rows]
                    loss = loss + self._task_loss(task, own, targets, weight) * (
                        len(self.tasks) * len(targets) / images
                    )
                total += loss.item()
                if not math.isfinite(total):
                    return total
                self.accelerator.backward(loss)
        self.progress.batch += len(window)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total

    def _parts(self, batch) -> list[tuple[Tensor, Tensor, str | list[str]]]:
        """A batch as the forward passes it takes: images, labels, and the name of their task or one name an image."""
        x, labels, *which = batch
        if not which:
            return [(x, labels, self.tasks[0])]
        if self.recipe.mixed:
            return [(x, labels, [self.tasks[index] for index in which[0].tolist()])]
        present = sorted(set(which[0].tolist()))
        return [(x[which[0] == index], labels[which[0] == index], self.tasks[index]) for index in present]

    def _task_loss(self, task: str, output: Tensor, labels: Tensor, weight: float) -> Tensor:
        """Mean loss of one task's images, penalty included; what it amounts to is noted."""
        loss = self.criterion(output, labels)
        if weight:
            loss = loss + weight * self.model.penalty(task)
        sums = self.progress.sums.setdefault(task, {"loss": 0.0, "wrong": 0.0, "images": 0.0})
        sums["loss"] += loss.item() * len(labels)
        sums["images"] += len(labels)
        if output.dim() == 2 and labels.dim() == 1:
            sums["wrong"] += float((output.detach().argmax(1) != labels).sum())
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
                    "train_error": 100.0 * sums["wrong"] / max(sums["images"], 1.0),
                    "lr": self.recipe.lr * self.recipe.learning_rate(self.progress.epoch),
                    "penalty": float(self.model.penalty(task).detach()),
                    "tuned_layers": sum(map(is_tuned, rows)) / len(rows),
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

    def _stop_requested(self) -> bool:
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


def _rows(names: str | list[str]) -> dict[str, list[int] | None]:
    """The rows of each task; ``None`` where all rows are one task's."""
    if isinstance(names, str):
        return {names: None}
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        rows.setdefault(name, []).append(row)
    return rows


def _pick(output: Tensor | list, rows: list[int]) -> Tensor:
    return output[rows] if isinstance(output, Tensor) else torch.stack([output[row] for row in rows])


def _windows(batches: Iterable, size: int) -> Iterator[list]:
    batches = iter(batches)
    while window := list(islice(batches, size)):
        yield window
