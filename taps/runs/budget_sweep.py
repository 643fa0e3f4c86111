"""Accuracy against size from few runs: runs that differ only in the size of ``--budget`` share one open phase.

<experiment>/<size>/…           an ordinary run, one per size
<experiment>/trade_off.png      mean accuracy against bytes
<experiment>/opened/            states at the end of the open phase; deleted when the last run is finished
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from accelerate import Accelerator

from taps.errors import UserError
from taps.methods.taps_budget import read_size
from taps.plots import layers as layer_plots
from taps.plots import style
from taps.settings.adaptation import AdaptationSettings
from taps.settings.declare import as_dict
from taps.storage import run_folder


def joined(options: AdaptationSettings) -> AdaptationSettings:
    """Return the options of one size as those of a sweep if ``--resume`` adds it to the sizes of an earlier one."""
    path = Path(options.result_path) / (options.experiment_name or "")
    is_sweep = not (path / "settings.json").is_file() and any(path.glob("*/settings.json"))
    if isinstance(options.budget, str) and options.resume and is_sweep:
        return replace(options, budget=[options.budget])
    return options


def runs(options: AdaptationSettings) -> list[AdaptationSettings]:
    """Return the options of each run: the given ones or, with several sizes, one per size in the experiment's folder.

    Raises:
        UserError: if a size is given twice.
    """
    if not isinstance(options.budget, list):
        return [options]
    sizes = [size.replace(" ", "").lower() for size in options.budget]
    known: dict[tuple[float, bool], str] = {}
    for size in sizes:
        other = known.get(read_size(size))
        if other is not None:
            raise UserError(f"--budget names one size twice: {other} and {size}")
        known[read_size(size)] = size
    name = options.experiment_name
    return [replace(options, budget=size, experiment_name=f"{name}/{size}") for size in sizes]


@contextmanager
def shared_start(options: AdaptationSettings, accelerator: Accelerator) -> Iterator[Path | None]:
    """Yield the folder of the states from which the runs start, for the ``with`` block of training; ``None`` for one run.

    Raises:
        UserError: if the experiment's folder is itself a run, or its states belong to other settings.
    """
    if not isinstance(options.budget, list):
        yield None
        return
    path = Path(options.result_path) / options.experiment_name
    if accelerator.is_main_process:
        if (path / "settings.json").is_file():
            raise UserError(f"{path} is a run of one size; choose another --experiment_name")
        if any(path.glob("*/settings.json")) and not (options.resume or options.overwrite):
            raise UserError(
                f"experiment folder {path} exists; continue it or add sizes with --resume, replace it with --overwrite, or "
                "choose another --experiment_name"
            )
        settings = {name: value for name, value in as_dict(options).items() if name != "budget"}
        opened = run_folder.RunFolder.open(path / "opened", settings, options.resume, options.overwrite)
    accelerator.wait_for_everyone()
    yield path / "opened"
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(path / "opened")
        opened.release()
        _show(path, accelerator)


def _show(path: Path, accelerator: Accelerator) -> None:
    """Write the table and the picture of the finished runs."""
    found = dict(sorted(run_folder.find_runs(path).items(), key=lambda run: run[1].summary["bytes_x_base"]))
    lines = ["size    accuracy %  tuned layers %  bytes a task"]
    for size, run in found.items():
        tasks = run.summary["tasks"].values()
        tuned, of_task = (sum(task[key] for task in tasks) / len(tasks) for key in ("tuned_layers", "bytes"))
        lines.append(f"{size:6}  {run.summary['mean_accuracy']:10.2f}  {100 * tuned:14.1f}  {of_task:12,.0f}")
    figure = layer_plots.trade_off({size: run.summary for size, run in found.items()}, size="bytes_x_base")
    style.save(figure, path / "trade_off.png")
    accelerator.print("\n" + "\n".join(lines) + f"\npicture: {path / 'trade_off.png'}")
