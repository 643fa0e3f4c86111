"""Several multi-task runs from one command, over seeds and policies, and a table of them all.

<experiment>/seed<n>/, <experiment>/policy<k>_seed<n>/    an ordinary run for each
<experiment>/summary.csv                                  one row per run
<experiment>/seeds.png                                    Δ_T and executed blocks of every run

Runs that differ in the policy alone have the same single-task networks, which the first of them trains.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from taps.errors import UserError
from taps.plots import policies as policy_plots
from taps.runs.several import check_different, check_folder, earlier_runs, mean_and_spread, report
from taps.settings.declare import as_dict
from taps.settings.multi_task import MultiTaskSettings
from taps.storage.files import read_json
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
    policies = settings.policy if isinstance(settings.policy, list) else [settings.policy]
    seeds = [settings.seed] if settings.seeds is None else settings.seeds
    for option, values in (("--policy", policies), ("--seeds", seeds)):
        check_different(option, values)
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
    later = settings.phases == ["test"] or ("policy" not in settings.phases and learns_policy(settings.method))
    check_folder(path, settings.resume or settings.overwrite or later)
    if later:
        return found
    ours = {name: value for name, value in as_dict(settings).items() if name not in ("seed", "seeds", "policy")}
    ours = {
        name: value for name, value in ours.items() if name not in STEPS or isinstance(value, int)
    }  # runs have steps
    for folder in set(earlier_runs(path)) - {Path(own.result_path, str(own.experiment_name)) for own in found}:
        RunFolder(folder).check_alike(ours)
    return found


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
    for folder in sorted(earlier_runs(path), key=_numbered):
        if (folder / "summary.json").is_file():
            rows.append(
                ({**read_json(folder / "settings.json"), "run": folder.name}, read_json(folder / "summary.json"))
            )
    if not rows:
        return
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
            mean_and_spread([one["delta_t"] for one in found], "+.2f"),
            mean_and_spread([100 * one["executed_blocks"] for one in found], ".1f"),
            mean_and_spread([one.get("macs_x_single") for one in found], ".3f"),
        )
        for name, found in by_policy.items()
    ]
    figure = policy_plots.runs({name: _points(found) for name, found in by_policy.items()})
    report(path, _csv(rows), ("seeds.png", figure), [heads, *cells], "lrrrr", say)


def _points(found: Sequence[dict]) -> list[tuple[float, float]]:
    return [(100 * one["executed_blocks"], one["delta_t"]) for one in found if one["delta_t"] is not None]


def _csv(rows: Sequence[tuple[dict, dict]]) -> list[list]:
    """Return one row per run after the heads: what was varied, and its results in all and per task and metric."""
    keys = ("delta_t", "executed_blocks", "macs_x_single", "parameters_x_single", "seconds")
    metrics = list(dict.fromkeys((t, m) for _, summary in rows for t, own in summary["tasks"].items() for m in own))
    table: list[list] = [["run", "method", "policy", "seed", *keys, *(f"{t}:{m}" for t, m in metrics)]]
    for own, summary in rows:
        values = [summary.get(key) for key in keys] + [summary["tasks"].get(t, {}).get(m) for t, m in metrics]
        table.append([*(own[key] for key in ("run", "method", "policy", "seed")), *values])
    return table
