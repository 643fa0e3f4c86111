"""The training loop: one loop that executes the phases of any method.

Loss of a step = task loss + λ · phase.penalty · model.penalty(task). Gradients are averaged over the ``accumulate``
batches of a step, weighted by their numbers of images, and the last step of an epoch takes what is left. The learning
rate follows a cosine from ``lr`` in the first epoch towards 0 *after* the last, so no epoch is spent at 0.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
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
from taps.errors import DivergedError, unknown
from taps.methods import ROLES, Phase, open_then_settle
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
        momentum: of sgd and nag.
        weight_decay: on deltas and heads (and the base where it is trained); never on gates and norms.
        accumulate: batches a step, > 0.
        eval_epochs: validate after every so many epochs and after the last.
        seed: of the order of the data, dropout and the like.
        limit_batches: use only so many batches of an epoch; ``None`` for all.
        compile: run training steps through ``torch.compile``; validation is short and runs as it is.
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
    momentum: float = 0.9
    weight_decay: float = 0.0
    accumulate: int = 1
    eval_epochs: int = 1
    seed: int = 0
    limit_batches: int | None = None
    compile: bool = False
    channels_last: bool = True

    def phases(self, model: TaskModel) -> tuple[Phase, ...]:
        """The phases of this recipe for the model's method."""
        if self.budget is not None:
            return open_then_settle(self.epochs, self.warmup_epochs)
        return model.row.phases(self.epochs, self.warmup_epochs, self.settle_epochs)

    def learning_rate(self, epoch: int) -> float:
        """The factor on ``lr`` in the 0-based ``epoch``: ½(1 + cos(π·epoch/epochs))."""
        return 0.5 * (1.0 + math.cos(math.pi * epoch / self.epochs))


@dataclass
class Progress:
    """Where a run is.

    Attributes:
        epoch: 0-based; ``batch``: batches of it that are done on each process.
        loss, wrong, images: sums over the epoch so far.
        best: best validation accuracy so far, ``None`` before the first.
        decided: whether a budget has settled the gates.
    """

    epoch: int = 0
    batch: int = 0
    loss: float = 0.0
    wrong: float = 0.0
    images: float = 0.0
    best: float | None = None
    decided: bool = False


class Interrupted(BaseException):
    """The run was asked to stop; it has saved its state. ``status`` is the exit status for a command."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.status = 128 + number


class StopSignals(AbstractContextManager):
    """Inside the ``with`` block Ctrl-C and SIGTERM are noted in ``received`` instead of ending the program at once.

    A second Ctrl-C does end it.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number


def make_optimizer(model: TaskModel, task: str, recipe: Recipe) -> torch.optim.Optimizer:
    """An optimiser with one parameter group a role; gates have their own learning rate, gates and norms no decay.

    Raises:
        UserError: for an unknown optimiser.
    """
    if recipe.optimizer not in OPTIMIZERS:
        raise unknown("optimizer", recipe.optimizer, OPTIMIZERS)
    groups = []
    for role, parameters in model.roles(task).items():
        lr = recipe.score_lr if role == "gate" and recipe.score_lr is not None else recipe.lr
        decay = 0.0 if role in ("gate", "norm") else recipe.weight_decay
        groups.append(
            {"params": list(parameters.values()), "lr": lr, "initial_lr": lr, "weight_decay": decay, "role": role}
        )
    if recipe.optimizer in ("sgd", "nag"):
        nesterov = recipe.optimizer == "nag" and recipe.momentum > 0
        return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum, nesterov=nesterov)
    return (torch.optim.Adam if recipe.optimizer == "adam" else torch.optim.AdamW)(groups, lr=recipe.lr)


def phase_at(phases: tuple[Phase, ...], epochs: float) -> Phase:
    """The phase that a run is in after so many epochs; the last one from its start on."""
    for phase in phases[:-1]:
        if epochs < phase.epochs:
            return phase
        epochs -= phase.epochs
    return phases[-1]


def fit(
    model: TaskModel,
    task: str,
    loader: DataLoader,
    sampler: EpochSampler,
    recipe: Recipe,
    accelerator: Accelerator | None = None,
    *,
    criterion: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy,
    validate: Callable[[], float] | None = None,
    on_epoch: Callable[[dict, bool], None] | None = None,
    state_path: Path | None = None,
    resume: bool = False,
    stop: StopSignals | None = None,
) -> Progress:
    """Train one task.

    Args:
        model: has the task.
        task: its name.
        loader, sampler: from :func:`taps.data.images.make_loader`; batches are (images, labels).
        recipe: how.
        accelerator: devices, processes and precision; one process on the default device if ``None``.
        criterion: mean loss of a batch from outputs and labels.
        validate: returns an accuracy in 0..100; epochs of the last phase compete for the best.
        on_epoch: called by the first process after each epoch with its numbers and whether it is the best so far.
        state_path: where the checkpoint is kept, after each epoch and when the run is stopped.
        resume: continue from ``state_path``.
        stop: signals to obey.

    Returns:
        The final counters; ``best`` is the best validation accuracy.

    Raises:
        DivergedError: if the loss is not finite; the last checkpoint is left as it is.
        Interrupted: after saving, if ``stop`` received a signal.
    """
    accelerator = accelerator or Accelerator()
    optimizer = make_optimizer(model, task, recipe)
    model.to(accelerator.device)
    if recipe.channels_last and accelerator.device.type != "mps":
        _to_channels_last(model)
    parallel, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    forward = torch.compile(parallel) if recipe.compile else parallel
    phases = recipe.phases(model)
    roles = model.roles(task)
    batches = min(len(loader), recipe.limit_batches or len(loader))
    progress, random_state = Progress(), None
    if resume:
        counters, random_state = checkpoint.restore(state_path, model, task, optimizer, accelerator)
        if not accelerator.is_main_process:
            counters.update(loss=0.0, wrong=0.0, images=0.0)
        progress = Progress(**counters)

    def save() -> None:
        if not all(torch.isfinite(tensor).all() for tensor in model.task_state(task).values()):
            kept = f"; an earlier state is kept in {state_path.parent}" if state_path and state_path.exists() else ""
            raise DivergedError(
                f"task {task}: weights are no longer finite in epoch {progress.epoch}{kept}; lower --lr"
            )
        if state_path is not None:
            counters = dict(vars(progress))
            if accelerator.num_processes > 1:  # sums over the processes; the first one goes on with them
                for name in ("loss", "wrong", "images"):
                    value = torch.tensor(counters[name], device=accelerator.device, dtype=torch.float32)
                    counters[name] = float(accelerator.reduce(value, "sum"))
            checkpoint.save(state_path, model, task, optimizer, accelerator, counters)

    while progress.epoch < recipe.epochs:
        epoch = progress.epoch
        factor = recipe.learning_rate(epoch)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        parallel.train()
        current: Phase | None = None
        sampler.epoch = epoch
        if progress.batch == 0:
            torch.manual_seed(mix_seed(recipe.seed, epoch, accelerator.process_index))
        elif random_state is not None:
            checkpoint.set_random_state(random_state)
        rest = accelerator.skip_first_batches(loader, progress.batch) if progress.batch else loader
        bar = tqdm(
            total=batches,
            initial=progress.batch,
            desc=f"{task} {epoch + 1}/{recipe.epochs}",
            disable=None if accelerator.is_main_process else True,
            leave=False,
        )
        phase = phase_at(phases, epoch)
        for window in _windows(islice(rest, batches - progress.batch), recipe.accumulate):
            phase = phase_at(phases, epoch + progress.batch / batches)
            if phase is not current:
                current = phase
                set_trainable(roles, phase.trains)
                for gate in model.gates(task) if recipe.compile else ():
                    gate.decide()  # before the compiler looks
            is_last_step = epoch + 1 == recipe.epochs and progress.batch + len(window) >= batches
            if recipe.budget is not None and not progress.decided and (phase is phases[-1] or is_last_step):
                budget.keep_within(model, task, recipe.budget)
                progress.decided = True
            loss = _step(
                forward, parallel, model, task, window, optimizer, accelerator, criterion, recipe, phase, progress
            )
            if not math.isfinite(loss):
                kept = f"; the state after epoch {epoch} is kept in {state_path.parent}" if state_path and epoch else ""
                raise DivergedError(
                    f"task {task}: the loss is {loss} at epoch {epoch + 1}, batch {progress.batch} of {batches}{kept}; "
                    f"lower --lr (now {recipe.lr})"
                )
            bar.update(len(window))
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            if _stop_requested(stop, accelerator) and progress.batch < batches:
                bar.close()
                save()
                raise Interrupted(stop.received or signal.SIGTERM)
        bar.close()
        _share_buffers(model, task, accelerator)
        numbers = _epoch_numbers(model, task, progress, accelerator, recipe, phase)
        # A task of an earlier phase is not what was asked for; the last epoch is, however short its phase.
        competes = phase is phases[-1] or epoch + 1 == recipe.epochs
        is_best = False
        if validate is not None and ((epoch + 1) % recipe.eval_epochs == 0 or epoch + 1 == recipe.epochs):
            accuracy = validate()
            numbers["val_error"] = 100.0 - accuracy
            is_best = competes and (progress.best is None or accuracy >= progress.best)
            progress.best = accuracy if is_best else progress.best
        if on_epoch is not None and accelerator.is_main_process:
            on_epoch(numbers, is_best or (validate is None and epoch + 1 == recipe.epochs))
        progress = Progress(epoch=epoch + 1, best=progress.best, decided=progress.decided)
        save()
        if _stop_requested(stop, accelerator) and progress.epoch < recipe.epochs:
            raise Interrupted(stop.received or signal.SIGTERM)
    set_trainable(roles, ROLES)
    accelerator.free_memory()
    return progress


def _share_buffers(model: TaskModel, task: str, accelerator: Accelerator) -> None:
    """Give every process the first one's running statistics: those are validated and saved."""
    if accelerator.num_processes > 1:
        buffers = {name for name, _ in model.named_buffers()}
        for name, tensor in model.task_state(task).items():
            if name in buffers:
                tensor.copy_(broadcast(tensor.clone(), from_process=0))


def set_trainable(roles: dict[str, dict[str, nn.Parameter]], trains: Iterable[str]) -> None:
    """Let the parameters of the roles in ``trains`` learn and the others stand still."""
    trains = set(trains)
    for role, parameters in roles.items():
        for parameter in parameters.values():
            parameter.requires_grad_(role in trains)


def _to_channels_last(model: nn.Module) -> None:
    """Reorder the memory of image convolutions' weights and their deltas; values, names and files stay the same."""
    for parameter in model.parameters():
        if parameter.dim() == 4:
            # a copy, since .contiguous() leaves 1 × 1 kernels with strides that their gradients will not have
            parameter.data = torch.empty_like(parameter.data, memory_format=torch.channels_last).copy_(parameter.data)


def _windows(batches: Iterable, size: int) -> Iterator[list]:
    batches = iter(batches)
    while window := list(islice(batches, size)):
        yield window


def _step(
    forward: Callable,
    parallel: nn.Module,
    model: TaskModel,
    task: str,
    window: list,
    optimizer,
    accelerator: Accelerator,
    criterion: Callable,
    recipe: Recipe,
    phase: Phase,
    progress: Progress,
) -> float:
    """One optimiser step over a window of batches; returns the mean loss, penalty included."""
    weight = recipe.penalty_weight * phase.penalty
    images = sum(len(labels) for _, labels in window)
    total = 0.0
    for index, (x, labels) in enumerate(window):
        last = index == len(window) - 1
        with nullcontext() if last else accelerator.no_sync(parallel):
            output = forward(x, task=task)
            loss = criterion(output, labels)
            if weight:
                loss = loss + weight * model.penalty(task)
            loss = loss * (len(labels) / images)
            total += loss.item()
            if not math.isfinite(total):
                return total
            accelerator.backward(loss)
        progress.batch += 1
        progress.images += len(labels)
        if output.dim() == 2 and labels.dim() == 1:
            progress.wrong += float((output.detach().argmax(1) != labels).sum())
    progress.loss += total * images
    optimizer.step()
    optimizer.zero_grad()
    return total


def _stop_requested(stop: StopSignals | None, accelerator: Accelerator) -> bool:
    """Whether any process was asked to stop; all processes agree on the step."""
    if stop is None:
        return False
    if accelerator.num_processes == 1:
        return stop.received is not None
    flag = torch.tensor(float(stop.received is not None), device=accelerator.device)
    return bool(accelerator.reduce(flag, "sum") > 0)


def _epoch_numbers(
    model: TaskModel, task: str, progress: Progress, accelerator: Accelerator, recipe: Recipe, phase: Phase
) -> dict:
    sums = torch.tensor([progress.loss, progress.wrong, progress.images], dtype=torch.float64)
    if accelerator.num_processes > 1:
        sums = accelerator.reduce(sums.to(accelerator.device, torch.float32), "sum").cpu()
    loss, wrong, images = sums.tolist()
    rows = model.report(task)
    return {
        "task": task,
        "epoch": progress.epoch + 1,
        "phase": phase.name,
        "train_loss": loss / images,
        "train_error": 100.0 * wrong / images,
        "lr": recipe.lr * recipe.learning_rate(progress.epoch),
        "penalty": float(model.penalty(task).detach()),
        "tuned_layers": sum(map(is_tuned, rows)) / len(rows),
        "scores": [row["score"] for row in rows],
    }


@torch.no_grad()
def accuracy(
    model: TaskModel,
    task: str,
    loader: DataLoader,
    accelerator: Accelerator,
    num_classes: int,
    limit_batches: int | None = None,
    title: str = "",
) -> float:
    """Top-1 accuracy in percent over every image of a prepared loader, each counted once."""
    from torchmetrics.classification import MulticlassAccuracy  # a second of import that --help need not wait for

    training = model.training
    model.eval()
    metric = MulticlassAccuracy(num_classes=num_classes, average="micro").to(accelerator.device)
    count = min(len(loader), limit_batches or len(loader))
    quiet = None if accelerator.is_main_process else True
    for x, labels in tqdm(islice(loader, count), total=count, desc=title or task, disable=quiet, leave=False):
        with accelerator.autocast():
            output = model(x, task=task)
        metric.update(*accelerator.gather_for_metrics((output.argmax(1), labels)))
    model.train(training)
    return 100.0 * float(metric.compute())
