"""The training programs: from settings to finished results folders."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

from accelerate import Accelerator
from torch import nn

from taps.benchmarks.opening import open_benchmark
from taps.data.classification.images import TaskData
from taps.data.opening import make_base, make_preprocessing
from taps.errors import UserError
from taps.methods.registry import METHODS, method_of
from taps.runs import budget_sweep
from taps.runs.adaptation import Experiment, check_budget, prepare_tasks
from taps.runs.multi_task import MultiTask
from taps.runs.setup import make_accelerator
from taps.runs.sub_tasks import SubTasks
from taps.settings.adaptation import AdaptationSettings, JointSettings, SequentialSettings
from taps.settings.multi_task import MultiTaskSettings
from taps.stop_signals import StopSignals
from taps.storage.files import read_tensors, write_tensors
from taps.task_model import TaskModel, adapt


def train_sequential(settings: SequentialSettings) -> None:
    """Adapt one network to one task after another."""
    settings = _with_method(settings)
    if settings.method == "hard_sharing":
        raise UserError("method hard_sharing trains all tasks together: use train_joint.py")
    accelerator = make_accelerator(settings)
    tasks = prepare_tasks(settings, accelerator)
    net = make_base(settings)
    prepare = make_preprocessing(settings, net)
    model = _adapted(settings, net, train_base=False)
    runs = budget_sweep.runs(settings)
    for own in runs:
        check_budget(own, model, tasks)
    with StopSignals() as stop, budget_sweep.shared_start(settings, accelerator) as fork:
        for own in runs:
            path = Path(own.result_path) / own.experiment_name
            with Experiment.start(own, accelerator, tasks, prepare, path, stop, fork=fork) as experiment:
                experiment.announce(model)
                experiment.train_in_sequence(model)
                experiment.finish()
    accelerator.end_training()


def train_joint(settings: JointSettings) -> None:
    """Train one network for many tasks together."""
    settings = _with_method(settings)
    accelerator = make_accelerator(settings)
    tasks = prepare_tasks(settings, accelerator)
    if len(tasks) < 2:
        raise UserError(f"joint training needs at least two tasks, {tasks[0].name} is one; use train_sequential.py")
    with StopSignals() as stop:
        train = _lite if settings.variant == "lite" else _together
        train(settings, accelerator, tasks, stop)
    accelerator.end_training()


def _with_method(settings: AdaptationSettings) -> AdaptationSettings:
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
    return budget_sweep.joined(replace(settings, norm=settings.norm or method.norms[0], budget=budget))


def _adapted(settings: AdaptationSettings, net: nn.Module, train_base: bool) -> TaskModel:
    """Return the network with its units and norms added."""
    options = {"penalty_divisor": 52} if settings.published and settings.method == "taps" else {}
    model = adapt(net, settings.method, norm=settings.norm, layers=settings.layers, train_base=train_base, **options)
    if settings.checkpoint_activations:
        model.checkpoint_activations()
    return model


def _together(settings: JointSettings, accelerator: Accelerator, tasks: list[TaskData], stop: StopSignals) -> None:
    """Train the base and every task's deltas, gates, norms and heads at once."""
    net = make_base(settings)
    prepare = make_preprocessing(settings, net)
    runs = budget_sweep.runs(settings)

    def adapted() -> TaskModel:  # the base is trained, so each run needs its own
        return _adapted(settings, copy.deepcopy(net), train_base=True)

    model = adapted()
    for own in runs:
        check_budget(own, model, tasks)
    with budget_sweep.shared_start(settings, accelerator) as fork:
        for own in runs:
            model = model if own is runs[0] else adapted()
            path = Path(own.result_path) / own.experiment_name
            with Experiment.start(own, accelerator, tasks, prepare, path, stop, fork=fork) as experiment:
                experiment.announce(model)
                experiment.train_together(model)
                experiment.finish()


def _lite(settings: JointSettings, accelerator: Accelerator, tasks: list[TaskData], stop: StopSignals) -> None:
    """Train one network that all tasks share, then one task after another on it, with the memory of one task."""
    path = Path(settings.result_path) / settings.experiment_name
    net = make_base(settings)
    prepare = make_preprocessing(settings, net)
    second = _adapted(settings, copy.deepcopy(net), train_base=False)
    check_budget(settings, second, tasks)
    with Experiment.start(settings, accelerator, tasks, prepare, path, stop, stages=("shared",)) as experiment:
        of_base = replace(
            settings,
            method="hard_sharing",
            norm="frozen",
            epochs=settings.shared_epochs,
            optimizer=settings.shared_optimizer or settings.optimizer,
            accumulate=1 if settings.published else settings.accumulate,
            budget=None,
            layers=None,
            mixup=0.0,
            cutmix=0.0,
        )
        with Experiment.start(of_base, accelerator, tasks, prepare, path / "shared", stop) as shared:
            model = _adapted(of_base, net, train_base=True)
            shared.announce(model)
            shared.train_together(model)
            shared.finish()
        del model, net
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
    accelerator = make_accelerator(settings)
    benchmark = open_benchmark(settings, accelerator)
    kind = SubTasks if method is not None and method.builds_on_base else MultiTask
    with StopSignals() as stop, kind.start(settings, benchmark, accelerator, stop) as run:
        if {"policy", "retrain"} & set(settings.phases):
            run.train()
        if "test" in settings.phases:
            run.test()
    accelerator.end_training()
