"""Several multi-task runs from one command, over seeds and policies, and a table of them all.

<experiment>/seed<n>/, <experiment>/policy<k>_seed<n>/    an ordinary run for each
<experiment>/summary.csv                                  one row per run
<experiment>/seeds.png                                    Δ_T and executed blocks of every run

Runs that differ in the policy alone have the same single-task networks, which the first of them trains.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from tabulate import tabulate

from taps.errors import UserError
from taps.plots import policies as policy_plots
from taps.plots import style
from taps.settings.declare import as_dict
from taps.settings.multi_task import MultiTaskSettings
from taps.storage.files import csv_text, read_json, write_text
from taps.storage.run_folder import RunFolder
from taps.training.schedules import STEPS, learns_policy


def is_sweep(settings: MultiTaskSettings) -> bool:
    """Return whether the settings name several runs."""
    return settings.seeds is not None or isinstance(settings.policy, list)


def runs(settings: MultiTaskSettings) -> list[MultiTaskSettings]:
    """Return the settings of each run.

    Raises:
        UserError: if a seed or a policy is named twice, or the experiment's folder is itself a run.
    """
    if not is_sweep(settings):
        return [settings]
    path = Path(settings.result_path) / str(settings.experiment_name)
    if (path / "settings.json").is_file():
        raise UserError(f"{path} is a single run; choose another --experiment_name")
    policies = settings.policy if isinstance(settings.policy, list) else [settings.policy]
    seeds = [settings.seed] if settings.seeds is None else settings.seeds
    for option, values in (("--policy", policies), ("--seeds", seeds)):
        twice = next((value for index, value in enumerate(values) if value in values[:index]), None)
        if twice is not None:
            raise UserError(f"{option} names {twice} twice")
    found = []
    for seed in seeds:
        first: Path | None = None
        for number, policy in enumerate(policies, start=1):
            parts = [f"policy{number}"] * (len(policies) > 1) + [f"seed{seed}"] * (settings.seeds is not None)
            name = f"{settings.experiment_name}/{'_'.join(parts)}"
            _check_policy(Path(settings.result_path, name), policy, number)
            single = settings.single_task
            if single == "measure" and first is not None and "test" in settings.phases:
                single = str(first)
            found.append(
                replace(settings, seed=seed, seeds=None, policy=policy, experiment_name=name, single_task=single)
            )
            first = first or Path(settings.result_path, name)
    if settings.phases == ["test"] or ("policy" not in settings.phases and learns_policy(settings.method)):
        return found  # later phases of the same runs
    if any(path.glob("*/settings.json")) and not (settings.resume or settings.overwrite):
        raise UserError(
            f"experiment folder {path} exists; continue it or add runs with --resume, replace runs with --overwrite, or choose "
            "another --experiment_name"
        )
    ours = {name: value for name, value in as_dict(settings).items() if name not in ("seed", "seeds", "policy")}
    ours = {
        name: value for name, value in ours.items() if name not in STEPS or isinstance(value, int)
    }  # runs have steps
    for folder in _earlier(path) - {Path(own.result_path, str(own.experiment_name)) for own in found}:
        RunFolder(folder).check_alike(ours)
    return found


def _earlier(path: Path) -> set[Path]:
    """Return the folders of the runs in an experiment's folder."""
    return {inner.parent for inner in path.glob("*/settings.json")}


def _check_policy(path: Path, policy: object, number: int) -> None:
    """Refuse to go on with another policy than a run's, which another order of ``--policy`` would cause."""
    stored = read_json(path / "settings.json").get("policy") if (path / "settings.json").is_file() else policy
    if stored != policy:
        raise UserError(
            f"{path} was trained under {stored}, --policy now has {policy} in place {number}; keep the order"
        )


def _numbered(path: Path) -> list:
    """Return the key by which ``seed10`` comes after ``seed9``."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]


def show(settings: MultiTaskSettings, say: Callable[[str], None]) -> None:
    """Write the table, ``summary.csv`` and the picture of the finished runs, also those of earlier commands."""
    path = Path(settings.result_path) / str(settings.experiment_name)
    rows = []
    for folder in sorted(_earlier(path), key=_numbered):
        if (folder / "summary.json").is_file():
            rows.append(
                ({**read_json(folder / "settings.json"), "run": folder.name}, read_json(folder / "summary.json"))
            )
    if not rows:
        return
    write_text(path / "summary.csv", _csv(rows))
    by_policy: dict[str, list[dict]] = {}
    for own, summary in rows:
        by_policy.setdefault(str(own["policy"] or own["method"]), []).append(summary)
    folders = [Path(name).parent.name for name in by_policy]
    if all(folders) and len(set(folders)) == len(folders):  # paths of policies, which their folders tell apart
        by_policy = dict(zip(folders, by_policy.values(), strict=True))
    heads = ("policy", "runs", "Δ_T %", "blocks run %", "MACs × single")
    cells = [
        (
            name,
            str(len(found)),
            _mean([one["delta_t"] for one in found], "+.2f"),
            _mean([100 * one["executed_blocks"] for one in found], ".1f"),
            _mean([one.get("macs_x_single") for one in found], ".3f"),
        )
        for name, found in by_policy.items()
    ]
    style.save(policy_plots.runs({name: _points(found) for name, found in by_policy.items()}), path / "seeds.png")
    table = tabulate(cells, heads, tablefmt="plain", disable_numparse=True, colalign=("left", *["right"] * 4))
    say(f"\n{table}\ntable of runs: {path / 'summary.csv'}\npicture: {path / 'seeds.png'}")


def _mean(values: Sequence[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    spread = f" ± {statistics.stdev(known):{form.lstrip('+')}}" if len(known) > 1 else ""
    return f"{statistics.mean(known):{form}}{spread}"


def _points(found: Sequence[dict]) -> list[tuple[float, float]]:
    return [(100 * one["executed_blocks"], one["delta_t"]) for one in found if one["delta_t"] is not None]


def _csv(rows: Sequence[tuple[dict, dict]]) -> str:
    """Return one row per run: what was varied, and its results in all and per task and metric."""
    keys = ("delta_t", "executed_blocks", "macs_x_single", "parameters_x_single", "seconds")
    metrics = list(dict.fromkeys((t, m) for _, summary in rows for t, own in summary["tasks"].items() for m in own))
    table: list[list] = [["run", "method", "policy", "seed", *keys, *(f"{t}:{m}" for t, m in metrics)]]
    for own, summary in rows:
        values = [summary.get(key) for key in keys] + [summary["tasks"].get(t, {}).get(m) for t, m in metrics]
        table.append([*(own[key] for key in ("run", "method", "policy", "seed")), *values])
    return csv_text(table)
