"""``taps.fit``: training of one task on a user's own batches."""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields
from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from taps.core.modules import evaluating
from taps.data.seeded import mix_seed
from taps.errors import UserError, check_known, unknown
from taps.methods.taps_budget import check_size, parse_budget
from taps.metrics.losses import CrossEntropy
from taps.networks.preprocessing import Preprocessing, stored_transform
from taps.storage.files import read_json
from taps.storage.run_folder import RunFolder, settle_epochs_of
from taps.storage.task_file import AVERAGE_PRECISION
from taps.task_model import TaskModel
from taps.training.loop import Criterion, check_whole_epochs, is_classification, mixing, run_phases
from taps.training.recipe import Recipe


@dataclass(frozen=True)
class Record:
    """What a training run did.

    Attributes:
        task: name of the task.
        rows: one dict per epoch: ``epoch``, ``phase``, ``train_loss``, ``train_error`` (%), ``lr``, ``tuned_layers`` (0..1),
            ``seconds``, and with validation data ``val_error`` (%) or ``val_loss``.
        best_epoch: the epoch that the model holds, 1-based.
        folder: the task's files, or ``None``.
    """

    task: str
    rows: tuple[dict, ...]
    best_epoch: int
    folder: Path | None

    def curve(self, name: str) -> list:
        """Return one number of every epoch, e.g. ``curve("val_error")``."""
        known = {key: None for row in self.rows for key in row}
        if name not in known:
            raise unknown("number", name, known)
        return [row.get(name) for row in self.rows]


def fit(
    model: TaskModel,
    task: str,
    train_loader: Iterable,
    val_loader: Iterable | None = None,
    *,
    epochs: int = 30,
    lam: float = 1.0,
    budget: int | str | None = None,
    criterion: Criterion = nn.functional.cross_entropy,
    optimizer: str | Callable[[list[dict]], torch.optim.Optimizer] | None = None,
    folder: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    classes: list[str] | None = None,
    preprocessing: Preprocessing | Mapping | None = None,
    report: Callable[[dict, bool], None] | None = None,
    accelerator: Accelerator | None = None,
    **recipe,
) -> Record:
    """Train one task of a model on batches of (inputs, labels), with the loop of the commands.

    After training, the task is frozen in the model, in the state of its best epoch on ``val_loader`` or else of its last epoch,
    and the model is in evaluation mode. If an exception or Ctrl-C ends training, the task is as it was before; with ``folder``,
    the same call with ``resume=True`` continues.

    Args:
        model: a model whose base is frozen, with the task added.
        task: the task's name.
        train_loader: any iterable with a length, such as a ``DataLoader``, of pairs (inputs, labels).
        val_loader: the same for validation; the best epoch is the one with the highest accuracy, or, if the labels are not
            classes, with the lowest loss.
        epochs: number of passes over ``train_loader``.
        lam: weight λ of the sparsity penalty.
        budget: instead of ``lam``, the size of the task's file (``"3%"`` of the base, ``"600KB"``), for a model with
            ``method="taps_budget"``.
        criterion: mean loss of a batch from outputs and labels.
        optimizer: ``"sgd"``, ``"nag"``, ``"adam"``, ``"adamw"``, ``"split"`` (for deltas momentum normalised in part by layer,
            or Adam with a large budget; Adam for norms and head), or a function from parameter groups (dicts with ``params``,
            ``lr`` and ``weight_decay``) to an optimiser. By default ``"sgd"``, with a budget ``"split"``.
        folder: receives the task's files, the epochs' numbers and the checkpoint; ``None``: nothing is kept.
        resume: continue the run in ``folder`` from its checkpoint, or start it if there is none.
        overwrite: replace an earlier run in ``folder``.
        classes: class names in the order of the outputs; by default those of ``train_loader.dataset``, if it has any.
        preprocessing: how images become inputs, for :meth:`taps.task_model.TaskModel.transform`; by default the size of the
            training images with the normalisation of the base's weights.
        report: called after each epoch with its numbers and whether it is the best so far.
        accelerator: devices and precision; by default a GPU if there is one, where the model then stays.
        **recipe: further fields of :class:`taps.training.recipe.Recipe`: ``lr=0.01``, ``momentum``, ``wd``, ``score_lr``,
            ``warmup_epochs``, ``settle_epochs``, ``accumulate``, ``limit_batches``, ``seed``, …

    Returns:
        The numbers of every epoch.

    Raises:
        UserError: for an unknown task or option, a loader that is empty or yields anything but pairs, or labels out of range.
        DivergedError: if the loss is no longer finite.
    """
    model.check_task(task)
    accelerator = accelerator or Accelerator()
    _check_possible(model, task, accelerator)
    check_known("option of taps.fit", recipe, [field.name for field in fields(Recipe)])
    if budget is not None and model.method.budget is None:
        raise UserError(
            f"method {model.method.name!r} does not support a size budget; adapt the base with method='taps_budget'"
        )
    if budget is None:
        budget = model.method.budget
    unused = [name for name in ("warmup_epochs", "settle_epochs", "score_lr") if name in recipe and budget is not None]
    if unused:
        raise UserError(f"{unused[0]}= is not used with a budget: leave one of them out")
    if recipe.get("patience") is not None and val_loader is None:
        raise UserError("patience= needs val_loader=")
    if callable(optimizer):
        recipe["make_optimizer"], optimizer = optimizer, None
    if isinstance(preprocessing, Mapping):
        stored_transform(preprocessing)  # refuses what is incomplete
    if resume and folder is not None and recipe.get("settle_epochs") is None:
        recipe["settle_epochs"] = settle_epochs_of(Path(folder))
    plan = Recipe(epochs=epochs, lam=lam, budget=budget, optimizer=optimizer, **recipe)
    if plan.label_smoothing:
        if criterion is not nn.functional.cross_entropy:
            raise UserError("label_smoothing= applies only to the default criterion, cross-entropy")
        criterion = CrossEntropy(plan.label_smoothing)
    outputs = getattr(model.heads[task], "out_features", None)
    default = criterion is nn.functional.cross_entropy or isinstance(criterion, CrossEntropy)
    norms = any(isinstance(norm.norms.get(task), nn.modules.batchnorm._BatchNorm) for norm in model.task_norms)
    own = (task, outputs, plan.seed, accelerator, default)
    train = UserLoader(train_loader, "train_loader", *own, has_norms=norms)
    validation = None if val_loader is None else UserLoader(val_loader, "val_loader", *own)
    about = _description(model, task, train_loader, train, outputs, classes, preprocessing, criterion)
    check_whole_epochs(plan.phases(model), plan)
    mixing(plan, model, [task])
    if budget is not None:
        check_size(model, task, parse_budget(budget, model))
    kept = None if folder is None else Path(folder)
    if kept is not None:
        _check_folder(kept, epochs, resume, overwrite)
    settings = {"task": task, "program": "taps.fit", "method": model.method.name, **_plain(plan)}
    devices = [accelerator.device] if accelerator.device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices),  # the caller's draws do not depend on the run's seed
        nullcontext(kept) if kept is not None else tempfile.TemporaryDirectory() as place,
        _open(Path(place), settings, resume, overwrite) as run,
    ):
        model.describe_task(task, **about)
        head = copy.deepcopy(model.heads[task])
        with _restored_if_interrupted(model, task):
            _train(model, task, train, validation, plan, accelerator, criterion, run, report)
        rows = [row for row in run.rows if row["task"] == task]
        model.remove_task(task)
        model.load_task(run.task_path(task), name=task, head=head)
        model.to(memory_format=torch.contiguous_format).eval()  # the order of sums of a model loaded from files
        best = model.about(task)["epoch"]
        return Record(task, tuple(rows), best, None if kept is None else kept / task)


def _check_possible(model: TaskModel, task: str, accelerator: Accelerator) -> None:
    """Raise a ``UserError`` for a model, task or accelerator that :func:`fit` cannot train with."""
    if accelerator.gradient_accumulation_steps != 1:
        raise UserError(
            "accumulate gradients with accumulate=, not by the accelerator, which would divide them once more"
        )
    if accelerator.num_processes > 1:
        raise UserError(
            "taps.fit runs in one process; for several, use the commands with accelerate launch or torchrun"
        )
    if not model.parameters_of(task):
        raise UserError(
            f"task {task!r} is frozen: load it with load_task(…, trainable=True), or remove it and add it again to train anew"
        )
    if model.train_base:
        raise UserError(
            "taps.fit trains one task on a frozen base; adapt it with train_base=False, or use train_joint.py"
        )


def _check_folder(folder: Path, epochs: int, resume: bool, overwrite: bool) -> None:
    """Raise a ``UserError`` if a folder holds a run that is neither to be continued nor replaced, or one of other lengths."""
    if folder.is_dir() and any(folder.iterdir()) and not (resume or overwrite):
        raise UserError(
            f"{folder} exists: give resume=True to continue that run, overwrite=True to replace it, or another folder"
        )
    record = folder / "settings.json"
    begun = read_json(record).get("epochs", epochs) if resume and record.is_file() else epochs
    if begun != epochs:
        raise UserError(
            f"{folder} was begun with epochs={begun}: continue it with as many, or train again in another folder"
        )


def _train(
    model: TaskModel,
    task: str,
    train: UserLoader,
    validation: UserLoader | None,
    plan: Recipe,
    accelerator: Accelerator,
    criterion: Criterion,
    run: RunFolder,
    report: Callable[[dict, bool], None] | None,
) -> None:
    """Train the task and leave its best epoch in the run's folder."""

    def validate() -> tuple[dict[str, dict], float]:
        name, value = evaluate_loss_or_error(model, task, validation, criterion, accelerator, plan.limit_batches)
        return {task: {name: value}}, -value

    def keep(best: list[dict]) -> None:
        model.save_task(task, run.task_path(task), {"epoch": best[0]["epoch"]}, compact=plan.budget is not None)

    def on_epoch(new: list[dict], is_best: bool) -> None:
        if report is not None:
            report(new[0], is_best)

    try:
        run_phases(
            model,
            task,
            train,
            train,
            plan,
            accelerator,
            criterion=criterion,
            validate=None if validation is None else validate,
            on_epoch=on_epoch,
            keep=keep,
            folder=run,
        )
    finally:  # half precision is for training alone
        accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        model.__dict__.pop("_is_accelerate_prepared", None)


@contextmanager
def _restored_if_interrupted(model: TaskModel, task: str) -> Iterator[None]:
    """Give a task its state from before if an exception ends the ``with`` block."""
    places = [modules for unit in model.units for modules in (unit.gates, unit.deltas)]
    places += [*(norm.norms for norm in model.task_norms), model.heads]
    before = [(modules, copy.deepcopy(modules[task])) for modules in places if task in modules]
    try:
        yield
    except BaseException:
        device = next(model.backbone.parameters()).device  # to which training may have moved the model
        for modules, held in before:
            modules[task] = held.to(device)
        for norm in model.task_norms:
            norm.fade(task, 0.0)
        raise


def _open(path: Path, settings: dict, resume: bool, overwrite: bool) -> RunFolder:
    """Open the folder of a run, with messages that name arguments rather than options."""
    try:
        return RunFolder.open(path, settings, resume, overwrite)
    except UserError as error:
        raise UserError(str(error).replace("another --experiment_name", "another folder=").replace("--", "")) from None


def _plain(recipe: Recipe) -> dict:
    """Return the values of a recipe that a settings file can hold."""
    simple = (bool, int, float, str, type(None))
    values = {"betas": list(recipe.betas), "task_weights": dict(recipe.task_weights)}
    return {**{name: value for name, value in asdict(recipe).items() if isinstance(value, simple)}, **values}


def _description(model, task, given, train, outputs, classes, preprocessing, criterion) -> dict:
    """Return what ``task.json`` will say about the task's classes and images."""
    binary = isinstance(criterion, nn.BCEWithLogitsLoss) or criterion is nn.functional.binary_cross_entropy_with_logits
    about: dict = {"metric": "accuracy" if train.has_classes else AVERAGE_PRECISION if binary else None}
    names = classes if classes is not None else getattr(getattr(given, "dataset", None), "classes", None)
    if names is not None and len(names) == outputs:
        about["classes"] = [str(name) for name in names]
    elif classes is not None:
        raise UserError(f"task {task!r} has {outputs} outputs, classes= has {len(classes)} names")
    if isinstance(preprocessing, Preprocessing):
        about["preprocessing"] = preprocessing.describe()
    elif preprocessing is not None:
        about["preprocessing"] = dict(preprocessing)
    elif model.about(task).get("preprocessing") is None:
        shape = train.input_shape
        if len(shape) == 4 and shape[1] == 3 and shape[2] == shape[3]:
            about["preprocessing"] = model.default_preprocessing(shape[3]).describe()
    return about


@torch.no_grad()
def evaluate_loss_or_error(
    model: TaskModel,
    task: str,
    loader: UserLoader,
    criterion: Criterion,
    accelerator: Accelerator,
    limit: int | None = None,
) -> tuple[str, float]:
    """Return ``"val_error"`` in percent if the labels are classes, else ``"val_loss"``, over all samples of at most ``limit``
    batches."""
    wrong, loss, count = 0.0, 0.0, 0
    with evaluating(model):
        for x, labels in islice(loader, limit):
            with accelerator.autocast():
                output = model(x, task=task)
                loss += float(criterion(output, labels)) * len(labels)
            if is_classification(output, labels):
                wrong += float((output.argmax(1) != labels).sum())
            else:
                wrong = math.nan
            count += len(labels)
    return ("val_loss", loss / count) if math.isnan(wrong) else ("val_error", 100.0 * wrong / count)


class UserLoader:
    """A user's iterable of batches in the form that the loop takes: checked, on the device, and in an order that the epoch decides.

    Random draws of the loader follow the seed and the epoch, so that a run can continue in the middle of an epoch. This covers
    torch's generator, which ``DataLoader`` and torchvision's transforms use.

    Attributes:
        input_shape: shape of the first batch's inputs.
        has_classes: whether the labels are class indices.

    Args:
        batches: yields pairs (inputs, labels).
        name: its name in messages.
        task: the task, for messages.
        classes: number of classes, or ``None`` if unknown.
        seed: seed of the run.
        accelerator: the device.
        default_criterion: whether the loss is cross-entropy, which needs one class index per sample.
        has_norms: whether training takes two samples at least.

    Raises:
        UserError: if it has no length, or is empty.
    """

    def __init__(
        self,
        batches: Iterable,
        name: str,
        task: str,
        classes: int | None,
        seed: int,
        accelerator: Accelerator,
        default_criterion: bool = False,
        has_norms: bool = False,
    ) -> None:
        if isinstance(batches, Dataset) and not isinstance(batches, IterableDataset):
            raise UserError(f"{name} is a Dataset; wrap it in a DataLoader")
        try:
            with torch.random.fork_rng([]):  # a DataLoader draws a seed
                once = iter(batches) is batches
        except TypeError:
            raise UserError(f"{name} is {type(batches).__name__}; give a DataLoader or a list of batches") from None
        if once:
            raise UserError(f"{name} can be read only once; give a DataLoader or a list of batches")
        try:
            size = len(batches)  # type: ignore[arg-type]
        except TypeError:
            raise UserError(f"{name} has no length; give a DataLoader over a data set with a length") from None
        if size == 0:
            raise UserError(f"{name} is empty: it has no batch for task {task!r}")
        self.batches, self.name, self.task, self.classes = batches, name, task, classes
        self.seed, self.device = seed, accelerator.device
        self.default_criterion, self.has_norms = default_criterion, has_norms
        self.epoch = 0
        first, labels = next(iter(self))
        self.input_shape, self.has_classes = tuple(first.shape), labels.dim() == 1 and not labels.is_floating_point()

    def __len__(self) -> int:
        return len(self.batches)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.skipping(0)

    def skipping(self, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Return an iterator over the batches of the current epoch after the first ``count``, which are read here."""
        outside = torch.get_rng_state()
        torch.default_generator.manual_seed(mix_seed(self.seed, self.epoch, 1))
        batches = iter(self.batches)
        before = [self._checked(index, batch) for index, batch in enumerate(islice(batches, count + 1))][count:]
        torch.set_rng_state(outside)
        return self._rest(before, batches, count)

    def _rest(self, before: list, batches: Iterator, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        yield from before
        for index, batch in enumerate(batches, start=count + len(before)):
            yield self._checked(index, batch)

    def _checked(self, index: int, batch: object) -> tuple[Tensor, Tensor]:
        if not (isinstance(batch, (tuple, list)) and len(batch) == 2 and all(isinstance(x, Tensor) for x in batch)):
            found = f"{len(batch)} values" if isinstance(batch, (tuple, list)) else type(batch).__name__
            raise UserError(f"{self.name}, batch {index}: expected a pair (inputs, labels) of tensors, found {found}")
        x, labels = batch
        where = f"{self.name}, batch {index}"
        if not x.dim() or not labels.dim():
            raise UserError(f"{where}: inputs and labels need a first dimension, the samples")
        if len(x) != len(labels) or not len(x):
            raise UserError(f"{where}: {len(x)} inputs with {len(labels)} labels")
        if len(x) == 1 and self.has_norms:
            raise UserError(f"{where}: one sample is not enough for batch normalisation; use drop_last=True")
        if self.default_criterion and (labels.dim() != 1 or labels.dtype != torch.int64):
            raise UserError(
                f"{where}: cross-entropy needs labels of shape (B,) and type int64, found {tuple(labels.shape)} and "
                f"{labels.dtype}; give criterion= for others"
            )
        if self.default_criterion and self.classes is not None:
            bad = ((labels < 0) | (labels >= self.classes)).nonzero()
            if len(bad):
                row = int(bad[0])
                raise UserError(
                    f"{self.name}, batch {index}, sample {row}: label {int(labels[row])} of task {self.task!r} is out of "
                    f"range 0..{self.classes - 1}"
                )
        return x.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)
