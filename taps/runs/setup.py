"""Shared parts of the command-line programs: exit statuses, devices, and the base network of the options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, DistributedDataParallelKwargs

from taps.data.opening import make_base, make_preprocessing
from taps.errors import UserError, unknown
from taps.networks.preprocessing import Preprocessing
from taps.settings.adaptation import AdaptationSettings, JointSettings, SequentialSettings
from taps.settings.declare import build, declarations
from taps.settings.multi_task import MultiTaskSettings
from taps.storage.files import read_json
from taps.storage.run_folder import RunFolder, read_tasks, task_folders
from taps.task_model import TaskModel, adapt


def pick_device(name: str) -> torch.device:
    """Return the device that ``--device`` names; for ``auto`` a GPU if there is one.

    Raises:
        UserError: if it is not available.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
    if not available[name]:
        raise UserError(f"--device {name} is not available on this machine; use --device auto or cpu")
    return torch.device(name)


def make_accelerator(options: AdaptationSettings | MultiTaskSettings) -> Accelerator:
    """Set up devices, processes and precision.

    Raises:
        UserError: if the requested device is not available.
    """
    cpu = pick_device(options.device).type == "cpu"
    precision = {"none": "no", "bf16": "bf16", "fp16": "fp16"}[options.amp]
    if precision == "fp16" and cpu:
        raise UserError("--amp fp16 needs a GPU; use --amp bf16 on the CPU")
    # Closed units under norm="follow" and fixed gates leave parameters without a gradient in some steps.
    some_unused = not isinstance(options, SequentialSettings) or options.norm == "follow"
    some_unused = some_unused or bool(options.budget) or options.settle_epochs != 0
    unused = DistributedDataParallelKwargs(find_unused_parameters=some_unused)
    where = Path(options.result_path) / (options.experiment_name or "")
    trackers = _trackers(getattr(options, "track", None) or ())
    return Accelerator(
        cpu=cpu,
        mixed_precision=precision,
        kwargs_handlers=[unused],
        dataloader_config=DataLoaderConfiguration(non_blocking=not cpu),
        rng_types=[],
        log_with=trackers or None,
        project_dir=where if trackers else None,
    )


def make_model(settings: AdaptationSettings, train_base: bool) -> tuple[TaskModel, Preprocessing]:
    """Return the network that the settings name with its units and norms added, and its preprocessing."""
    net = make_base(settings)
    prepare = make_preprocessing(settings, net)
    options: dict[str, object] = {}
    if settings.method == "taps":
        is_published = settings.published and settings.penalty == "layers"
        options = {"penalty": settings.penalty, "penalty_divisor": 52 if is_published else None}
    model = adapt(net, settings.method, norm=settings.norm, layers=settings.layers, train_base=train_base, **options)
    if settings.checkpoint_activations:
        model.checkpoint_activations()
    return model, prepare


def _trackers(names: Sequence[str]) -> list[str]:
    """Return the names of accelerate's trackers, checked.

    Raises:
        UserError: for an unknown tracker, or one whose package is not installed.
    """
    if not names:
        return []
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    known = {str(kind): kind for kind in LOGGER_TYPE_TO_CLASS}
    for name in names:
        if name not in known:
            raise unknown("tracker", name, known)
        if name not in map(str, get_available_trackers()):
            raise UserError(f"--track {name} needs its package: pip install {name}")
    return list(names)


def read_settings(folder: Path) -> AdaptationSettings:
    """Read the settings of a sequential or joint run; settings that it does not record have their defaults.

    Raises:
        UserError: if the folder holds no run.
    """
    stored = read_json(folder / "settings.json")
    kind = JointSettings if "variant" in stored else SequentialSettings
    known = declarations(kind)
    settings = build(kind, {name: value for name, value in stored.items() if name in known and name != "budget"})
    return replace(settings, budget=stored.get("budget"))


def load_base(folder: Path) -> tuple[torch.nn.Module, AdaptationSettings]:
    """Load the base of a run, not yet adapted, and the run's options.

    Raises:
        UserError: if the folder holds no run, or its base is not available.
    """
    options = read_settings(folder)
    base = RunFolder(folder).base_path
    return make_base(options, base if base.is_file() else None), options


def load_run(
    folder: Path, names: Sequence[str] | None = None, device: torch.device | str = "cpu"
) -> tuple[TaskModel, Preprocessing]:
    """Load the model of a finished run with its tasks, in evaluation mode, and its image preprocessing.

    Args:
        folder: a results folder.
        names: the tasks to load; ``None`` for all.
        device: device of the model.

    Raises:
        UserError: if the folder holds no run, or its base is not available.
    """
    names = list(read_tasks(folder)) if names is None else names
    net, options = load_base(folder)
    prepare = make_preprocessing(options, net)
    model = adapt(net, options.method, norm=options.norm, layers=options.layers, train_base=False).to(device)
    folders = task_folders(folder) if names else {}
    for name in names:
        model.load_task(folders.get(name, folder / name), name=name)
    return model.eval(), prepare
