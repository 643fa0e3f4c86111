"""The training programs: from settings to finished results folders."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, TypeVar

import torch
from accelerate import Accelerator

from taps.benchmarks.opening import open_benchmark
from taps.core.modules import evaluating
from taps.data.classification.images import TaskData
from taps.data.classification.mixed_batches import check_batch_size
from taps.errors import UserError, first_line
from taps.methods.registry import METHODS, method_of
from taps.networks.preprocessing import Preprocessing
from taps.runs import multi_task_sweep, parallel, sweep
from taps.runs.adaptation import Experiment, check_budget, prepare_tasks, recipe_of
from taps.runs.multi_task import MultiTask
from taps.runs.setup import make_accelerator, make_model
from taps.runs.sub_tasks import SubTasks
from taps.settings.adaptation import AdaptationSettings, JointSettings, SequentialSettings
from taps.settings.multi_task import MultiTaskSettings
from taps.stop_signals import StopSignals
from taps.storage.files import read_tensors, write_tensors
from taps.storage.run_folder import settle_epochs_of
from taps.task_model import TaskModel
from taps.training.loop import start_file

A = TypeVar("A", bound=AdaptationSettings)


def train_sequential(settings: SequentialSettings) -> None:
    """Adapt one network to one task after another."""
    _train(settings, _in_sequence, train_base=False)


def train_joint(settings: JointSettings) -> None:
    """Train one network for many tasks together."""
    is_lite = settings.variant == "lite"
    _train(settings, _lite if is_lite else _together, train_base=not is_lite)


def _train(settings: A, train: Callable[[Run[A]], None], train_base: bool) -> None:
    """Train the runs that the settings name, one after another."""
    runs = [_with_method(own) for own in sweep.runs(settings)]
    accelerator = make_accelerator(runs[0])
    tasks: dict[int, list[TaskData]] = {}  # by the seed, which divides them
    checked: set[tuple] = set()
    for own in runs:
        if own.method == "hard_sharing" and not train_base:
            raise UserError("method hard_sharing trains all tasks together: use train_joint.py")
        if own.seed not in tasks:
            tasks[own.seed] = prepare_tasks(own, accelerator)
        if isinstance(own, JointSettings) and len(tasks[own.seed]) < 2:
            name = tasks[own.seed][0].name
            raise UserError(f"joint training needs at least two tasks, {name} is one; use train_sequential.py")
        if isinstance(own, JointSettings):  # mistakes are said before earlier runs are replaced
            check_batch_size(own.batch_size * len(tasks[own.seed]), len(tasks[own.seed]))
        several = [task.name for task in tasks[own.seed] if task.has_several_labels]
        if isinstance(own, JointSettings) and several:
            raise UserError(
                f"task {several[0]}: images with several labels are for tasks trained one by one; use train_sequential.py"
            )
        if own.budget is not None or (len(runs) > 1 and (own.method, own.norm) not in checked):
            checked.add((own.method, own.norm))
            model, _ = make_model(own, train_base)
            if own.budget is not None:
                check_budget(own, model, tasks[own.seed])
    with StopSignals() as stop, sweep.shared_start(settings, accelerator) as fork:
        prepared = [Run(own, make_accelerator(own), tasks[own.seed], stop, fork(own)) for own in runs]
        if isinstance(settings, SequentialSettings) and (settings.parallel or settings.address):
            _side_by_side(settings, prepared)
        else:
            for run in prepared:
                train(run)
    accelerator.end_training()


@dataclass(frozen=True)
class Run(Generic[A]):
    """What one run needs: its settings, devices, data, and the folder of states from which it may start."""

    settings: A
    accelerator: Accelerator
    tasks: list[TaskData]
    stop: StopSignals
    fork: Path | None

    def experiment(self, prepare: Preprocessing, **more) -> AbstractContextManager[Experiment]:
        """Return the experiment of this run, in its folder."""
        return Experiment.start(
            self.settings, self.accelerator, self.tasks, prepare, self.path, self.stop, fork=self.fork, **more
        )

    @property
    def stages(self) -> list[str]:
        """Folders in the run's in which tasks are trained side by side."""
        return [f"parallel/{task.name}" for task in self.tasks]

    @property
    def path(self) -> Path:
        return Path(self.settings.result_path) / str(self.settings.experiment_name)


def _with_method(settings: A) -> A:
    """Fill in the method's defaults for settings that are not given.

    Raises:
        UserError: for a method that another program trains, or a budget with a method that has none.
    """
    method = method_of(settings.method)
    if method.policy_gate is not None:
        raise UserError(f"method {method.name} learns a policy and trains again under it: use train_mtl.py")
    if settings.budget is not None and method.budget is None:
        raise UserError(f"--budget is not for method {method.name}: leave --method out, or give --method taps_budget")
    budget = method.budget if settings.budget is None else settings.budget
    settle = settings.settle_epochs
    if settle is None and settings.resume:
        settle = settle_epochs_of(Path(settings.result_path, str(settings.experiment_name)))
    return replace(settings, norm=settings.norm or method.norms[0], budget=budget, settle_epochs=settle)


def _checked_model(settings: AdaptationSettings, train_base: bool) -> tuple[TaskModel, Preprocessing]:
    """Return a run's model and preprocessing, before its folder is opened, whose earlier contents may be deleted.

    Raises:
        UserError: if the network does not take images of this size.
    """
    model, prepare = make_model(settings, train_base)
    side = settings.input_size
    try:
        with evaluating(model), torch.no_grad():
            model.features(torch.zeros(1, 3, side, side, dtype=next(model.backbone.parameters()).dtype))
    except Exception as error:  # of any network
        reason = first_line(error, 200)
        raise UserError(f"{settings.model_type} does not take images of --input_size {side}: {reason}") from None
    return model, prepare


def _in_sequence(run: Run[SequentialSettings]) -> None:
    """Train one task after another, on a base that stays as it is."""
    model, prepare = _checked_model(run.settings, train_base=False)
    with run.experiment(prepare, stages=run.stages) as experiment:
        begun, epochs = [*(run.path / "parallel").glob("*")], run.settings.epochs
        left = [path for path in begun if experiment.folder.finished_epochs(path.name) >= epochs]
        run.accelerator.wait_for_everyone()
        for path in left if run.accelerator.is_main_process else ():
            shutil.rmtree(path)  # the process was killed after it had moved the task into the run
        if len(begun) > len(left):
            raise UserError(f"{run.path} was begun with --parallel; continue it with --parallel")
        experiment.announce(model)
        experiment.train_in_sequence(model)
        experiment.finish()


def _side_by_side(settings: SequentialSettings, runs: Sequence[Run]) -> None:
    """Train the tasks of all runs side by side."""
    jobs: list[parallel.Job] = []
    experiments: list[Experiment] = []
    with ExitStack() as stack:
        for run in runs:
            model, prepare = _checked_model(run.settings, train_base=False)
            experiment = stack.enter_context(run.experiment(prepare, stages=run.stages))
            experiment.announce(model)
            experiments.append(experiment)
            label = f"{run.path.name} " if len(runs) > 1 else ""
            defaults = model.method.defaults(model, recipe_of(run.settings))
            for task in experiment.unfinished:
                start = experiment.start_of(task.name)
                start = None if start is None else start_file(start, defaults)
                jobs.append(parallel.Job(experiment, task.name, len(model.units), label, start))
        parallel.train(settings, jobs, runs[0].stop)
        for experiment in experiments:
            experiment.finish()


def _together(run: Run[JointSettings]) -> None:
    """Train the base and every task's deltas, gates, norms and heads at once."""
    model, prepare = _checked_model(run.settings, train_base=True)
    with run.experiment(prepare) as experiment:
        experiment.announce(model)
        experiment.train_together(model)
        experiment.finish()


def _lite(run: Run[JointSettings]) -> None:
    """Train one network that all tasks share, then one task after another on it, with the memory of one task."""
    settings, accelerator, path = run.settings, run.accelerator, run.path
    second, prepare = _checked_model(settings, train_base=False)
    run = replace(run, fork=None)  # each run trains its own shared network
    with run.experiment(prepare, stages=("shared",)) as experiment:
        of_base = replace(
            settings,
            method="hard_sharing",
            norm="frozen",
            epochs=settings.shared_epochs,
            optimizer=settings.shared_optimizer or settings.optimizer,
            base_lr=settings.lr if settings.published and settings.base_lr is None else settings.base_lr,
            accumulate=1 if settings.published else settings.accumulate,
            budget=None,
            layers=None,
            track=None,  # a run has one set of trackers
        )
        with Experiment.start(of_base, accelerator, run.tasks, prepare, path / "shared", run.stop) as shared:
            model, _ = make_model(of_base, train_base=True)
            shared.announce(model)
            shared.train_together(model)
            shared.finish()
        del model
        base = read_tensors(shared.folder.base_path)
        if accelerator.is_main_process and not experiment.folder.base_path.is_file():
            write_tensors(experiment.folder.base_path, base)
        accelerator.wait_for_everyone()
        second.load_base(base)
        experiment.announce(second)
        experiment.train_in_sequence(second, heads=path / "shared")
        experiment.finish(before=sum(row["seconds"] for row in shared.folder.rows))


def train_multi_task(settings: MultiTaskSettings) -> None:
    """Learn policies, train under them and test, or run the stages of a method without policies."""
    method = METHODS.get(settings.method)
    if method is not None and method.budget is not None:
        raise UserError(f"method {method.name} keeps a size: use train_sequential.py or train_joint.py")
    kind = SubTasks if method is not None and method.builds_on_base else MultiTask
    runs = multi_task_sweep.runs(settings)
    with StopSignals() as stop:
        for own in runs:
            accelerator = make_accelerator(own)
            with kind.start(own, open_benchmark(own, accelerator), accelerator, stop) as run:
                if {"policy", "retrain"} & set(own.phases):
                    run.train()
                if "test" in own.phases:
                    run.test()
        if multi_task_sweep.is_sweep(settings) and accelerator.is_main_process:
            multi_task_sweep.show(settings, accelerator.print)
    accelerator.end_training()
