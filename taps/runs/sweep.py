"""Several runs from one command: every combination of several sizes, λ, methods and seeds, and a table of them all.

<experiment>/<combination>/…    an ordinary run for each
<experiment>/summary.csv        one row per run
<experiment>/trade_off.png      mean accuracy against size, with the standard deviation over seeds
<experiment>/opened/            states from which runs that have begun alike go on; deleted when the last run is finished

What runs have in common is trained once where that is exact: the warm-up of runs that differ in λ, and the open phase of sizes
that train alike.
"""

from __future__ import annotations

import itertools
import re
import shutil
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from accelerate import Accelerator

from taps.core.method import no_penalty
from taps.data.classification.images import TaskData
from taps.data.opening import read_data
from taps.errors import UserError
from taps.methods.registry import catalog, method_of
from taps.methods.taps_budget import read_size
from taps.plots import layers as layer_plots
from taps.runs.several import check_different, check_folder, earlier_runs, mean_and_spread, report
from taps.settings.adaptation import AdaptationSettings
from taps.settings.declare import as_dict
from taps.storage import run_folder
from taps.storage.files import read_json

#: settings of which a command may name several values
SWEPT = ("method", "lam", "budget", "seed")
A = TypeVar("A", bound=AdaptationSettings)


def is_sweep(options: AdaptationSettings) -> bool:
    """Return whether the options name several runs, or ``--resume`` adds one to those of an earlier command."""
    return (
        options.seeds is not None
        or any(isinstance(getattr(options, name), list) for name in SWEPT)
        or (options.resume and bool(earlier_runs(_folder(options))))
    )


def _folder(options: AdaptationSettings) -> Path:
    return Path(options.result_path) / str(options.experiment_name)


def runs(options: A) -> list[A]:
    """Return the options of each run: the given ones or, for a sweep, one per combination in the experiment's folder.

    λ is for methods with a penalty, and sizes are for methods that keep one.

    Raises:
        UserError: if a value is given twice, or to no method that uses it.
    """
    if not is_sweep(options):
        return [options]
    methods, lams = _several(options.method), _several(options.lam)
    seeds = [options.seed] if options.seeds is None else options.seeds
    budgets = [size.replace(" ", "").lower() for size in _several(options.budget) if size is not None]
    for option, values in (("--method", methods), ("--lam", lams), ("--seeds", seeds)):
        check_different(option, values)
    check_different("--budget", budgets, read_size, "size")
    keeps = {method: method_of(method).budget for method in methods}
    penalised = [method for method in methods if method_of(method).penalty is not no_penalty and keeps[method] is None]
    if budgets and not any(keeps.values()):
        raise UserError(f"--budget is not for method {', '.join(methods)}: leave --method out, or add taps_budget")
    if len(lams) > 1 and not penalised:
        raise UserError(f"--lam has no effect with method {', '.join(methods)}: give one value, or add --method taps")
    before = sorted(earlier_runs(_folder(options))) if options.resume else []
    stored = {path.name: read_json(path / "settings.json") for path in before if _is_of_a_sweep(path.name)}
    known = {tuple(str(own.get(key)) for key in SWEPT): name for name, own in reversed(stored.items())}
    found = []
    for method in methods:
        sizes = (budgets or [keeps[method]]) if keeps[method] else [None]
        for lam, size, seed in itertools.product(
            lams if method in penalised else [AdaptationSettings.lam], sizes, seeds
        ):
            short = f"{lam:g}" if float(f"{lam:g}") == lam else repr(lam)
            values = {"method": method, "lam": lam, "budget": size, "seed": seed}
            alike = [own.get("lam") for own in stored.values() if own.get("method") == method]
            own = {
                method: len({*methods, *(own.get("method", method) for own in stored.values())}) > 1,
                f"lam{short}": method in penalised and len({*lams, *alike}) > 1,
                str(size): size is not None,
                f"seed{seed}": options.seeds is not None or any("seed" in other for other in stored),
            }
            name = "_".join(text for text, is_part in own.items() if is_part) or method
            # A run that was made before there were others of its method or seed has a shorter name.
            name = known.get(tuple(map(str, values.values())), name)
            found.append(replace(options, **values, seeds=None, experiment_name=f"{options.experiment_name}/{name}"))
    return found


def _is_of_a_sweep(name: str) -> bool:
    """Return whether a run's name is one that :func:`runs` gives."""
    methods = "|".join(sorted(catalog(), key=len, reverse=True))
    part = rf"(?:{methods}|lam[\d.e+-]+|[\d.]+(?:%|[kmg]?i?b)?|seed\d+)"
    return re.fullmatch(rf"{part}(?:_{part})*", name) is not None


def _several(value: object) -> list:
    return list(value) if isinstance(value, list) else [value]


@contextmanager
def shared_start(options: AdaptationSettings, accelerator: Accelerator) -> Iterator[Callable[[A], Path | None]]:
    """Yield, for training, a function from a run's options to the folder of the states from which it may start.

    After the ``with`` block the table, ``summary.csv`` and the picture of all runs are written.

    Raises:
        UserError: if the experiment's folder is itself a run, or its states belong to other settings.
    """
    if not is_sweep(options):
        yield lambda own: None
        return
    path = _folder(options)
    if accelerator.is_main_process:
        check_folder(path, options.resume or options.overwrite)
        replaced = earlier_runs(path) if options.overwrite else []
        other = [run.name for run in replaced if not _is_of_a_sweep(run.name)]
        if other:
            raise UserError(f"{path} also holds the run {other[0]}; move that away before overwriting")
        locked = [run_folder.RunFolder(run) for run in replaced]
        for folder in locked:
            folder.lock()
        for folder in locked:
            shutil.rmtree(folder.path)
            folder.release()
        settings = {name: value for name, value in as_dict(options).items() if name not in (*SWEPT, "seeds")}
        if options.resume:
            record = path / "opened" / "settings.json"  # which an unfinished sweep has
            epochs = read_json(record).get("epochs", options.epochs) if record.is_file() else options.epochs
            if epochs != options.epochs:
                raise UserError(f"{path} was stopped: finish it with --resume --epochs {epochs}, and extend it then")
            _check_alike(options, settings, path)
        opened = run_folder.RunFolder.open(path / "opened", settings, options.resume, options.overwrite)
    accelerator.wait_for_everyone()

    def folder(own: AdaptationSettings) -> Path | None:
        begins_alike = own.budget is not None or own.warmup_epochs > 0
        return path / "opened" / f"{own.method}_seed{own.seed}" if begins_alike else None

    yield folder
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(path / "opened")
        opened.release()
        _show(path, accelerator)


def _check_alike(options: AdaptationSettings, settings: Mapping, path: Path) -> None:
    """Refuse to add runs to a table whose other runs of the same method were trained otherwise, or on other images."""
    data: dict[int, dict[str, TaskData]] = {}  # by the seed, which may divide them
    new = {(own.method, own.budget is None) for own in runs(options)}
    named = {Path(str(own.experiment_name)).name for own in runs(options)}
    for run in earlier_runs(path):
        stored = read_json(run / "settings.json")
        if run.name not in named and (stored.get("method"), stored.get("budget") is None) in new:
            run_folder.RunFolder(run).check_alike(settings)
            seed = int(stored.get("seed", options.seed))
            if seed not in data:
                data[seed] = {task.name: task for task in read_data(options.dataset, replace(options, seed=seed))}
            for name, digest in stored.get("data", {}).items():
                if name in data[seed] and not data[seed][name].is_known_as(digest):
                    raise UserError(
                        f"{run} was trained on other images of task {name}; choose another --experiment_name"
                    )


def _show(path: Path, accelerator: Accelerator) -> None:
    """Write the table and the picture of the finished runs."""
    found = _without_copies(run_folder.find_runs(path))
    groups: dict[tuple, dict[str, run_folder.Run]] = {}
    for name, run in found.items():
        groups.setdefault(_without_seed(run), {})[name] = run
    rows = [_Row(list(own.values())) for own in groups.values()]
    rows.sort(key=lambda row: (row.method, row.summary["bytes_x_base"]))
    by_name = {row.name: row for row in rows}
    figure = layer_plots.trade_off(
        {name: row.summary for name, row in by_name.items()},
        groups={name: row.method for name, row in by_name.items()},
        labels={name: row.label for name, row in by_name.items()},
        size="bytes_x_base",
        spread={name: row.spread for name, row in by_name.items()},
    )
    metric = rows[0].summary.get("metric", "accuracy")
    heads = ("λ or size", "method", "runs", f"{metric} %", "tuned layers %", "bytes per task", "bytes × base")
    table = [heads, *(row.cells() for row in rows)]
    report(path, _csv(found), ("trade_off.png", figure), table, "llrrrrr", accelerator.print)


def _without_copies(found: Mapping[str, run_folder.Run]) -> dict[str, run_folder.Run]:
    """Drop runs with the settings of an earlier one, such as ``lam1_seed0`` beside ``lam1``."""
    known: dict[tuple, str] = {}
    for name, run in found.items():
        known.setdefault((*_without_seed(run), run.settings.get("seed")), name)
    return {name: found[name] for name in known.values()}


def _without_seed(run: run_folder.Run) -> tuple:
    tasks = tuple(sorted(run.summary["tasks"]))
    return (*(str(run.settings.get(name)) for name in SWEPT if name != "seed"), tasks)


def _tuned(run: run_folder.Run) -> float:
    return statistics.mean(task["tuned_layers"] for task in run.summary["tasks"].values())


class _Row:
    """Runs that differ only in the seed."""

    def __init__(self, runs: Sequence[run_folder.Run]) -> None:
        self.settings, self.runs = runs[0].settings, runs
        self.method = str(self.settings["method"])
        budget = self.settings.get("budget")
        is_penalised = method_of(self.method).penalty is not no_penalty and budget is None
        self.label = str(budget) if budget is not None else f"λ {self.settings['lam']:g}" if is_penalised else ""
        self.name = f"{self.method} {self.label}".strip()
        keys = ("mean_accuracy", "bytes_x_base")
        self.summary: dict[str, Any] = {key: statistics.mean(run.summary[key] for run in runs) for key in keys}
        self.summary.update({"metric": runs[0].summary["metric"]} if "metric" in runs[0].summary else {})
        self.spread = statistics.stdev(run.summary["mean_accuracy"] for run in runs) if len(runs) > 1 else 0.0

    def cells(self) -> tuple[str, ...]:
        size = statistics.mean(task["bytes"] for run in self.runs for task in run.summary["tasks"].values())
        accuracy = mean_and_spread([run.summary["mean_accuracy"] for run in self.runs], ".2f")
        tuned = 100 * statistics.mean(map(_tuned, self.runs))
        fixed = f"{tuned:.1f}", f"{size:,.0f}", f"{self.summary['bytes_x_base']:.3f}"
        return (self.label, self.method, str(len(self.runs)), accuracy, *fixed)


def _csv(found: Mapping[str, run_folder.Run]) -> list[list]:
    """Return one row per run after the heads: what was varied, and its results in all and per task."""
    tasks = list(dict.fromkeys(task for run in found.values() for task in run.summary["tasks"]))
    keys = ("mean_accuracy", "parameters_x_base", "bytes_x_base", "seconds")
    metric = next((run.summary["metric"] for run in found.values() if "metric" in run.summary), "accuracy")
    rows: list[list] = [["run", *SWEPT, *keys, "tuned_layers", *(f"{metric}:{task}" for task in tasks)]]
    for name, run in found.items():
        accuracies = [run.summary["tasks"].get(task, {}).get("accuracy", "") for task in tasks]
        values = [run.settings.get(key, "") for key in SWEPT] + [run.summary[key] for key in keys]
        rows.append([name, *values, _tuned(run), *accuracies])
    return rows
