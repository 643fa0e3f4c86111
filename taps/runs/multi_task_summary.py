"""The summary of a multi-task run, its table and its policy pictures."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from taps.errors import UserError
from taps.methods.policy import read_policy
from taps.metrics.relative_gain import Metrics, delta_t
from taps.plots import policies as policy_plots
from taps.storage.files import read_json
from taps.storage.task_tables import plain_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def read_reference(path: Path, tasks: Sequence[str], metrics_of: str) -> Metrics:
    """Read single-task results: ``summary.json`` of a run, or a JSON file ``{"tasks": {task: {metric: value}}}``.

    Args:
        path: the folder of the run, or the file.
        tasks: names of the tasks.
        metrics_of: the way in which metrics are computed, ``"exact"`` or ``"published"``.

    Raises:
        UserError: if the file lacks a task, or its run computed metrics in the other way.
    """
    record = path / "settings.json" if path.is_dir() else path.with_name("settings.json")
    path = path / "summary.json" if path.is_dir() else path
    stored = read_json(path)
    other = read_json(record).get("metrics", metrics_of) if record.is_file() else metrics_of
    if other != metrics_of:
        raise UserError(f"{path} has --metrics {other}, which mean something else than --metrics {metrics_of}")
    metrics = stored.get("single_task")
    if metrics is None and stored.get("method", "single_task") == "single_task":
        metrics = stored.get("tasks")
    for task in tasks:
        own = metrics.get(task) if isinstance(metrics, dict) else None
        if not isinstance(own, dict) or not own:
            raise UserError(f"{path} has no single-task results of task {task!r}")
        wrong = [name for name, value in own.items() if not isinstance(value, (int, float)) or not math.isfinite(value)]
        if wrong:
            raise UserError(f"{path}: {wrong[0]} of task {task} is {own[wrong[0]]!r}, not a number")
    return {task: metrics[task] for task in tasks}


def summarise(method: str, seed: int, seconds: float, found: dict, single: Metrics | None) -> dict:
    """Return the contents of ``summary.json`` (see ``results/README.md``)."""
    rows = found["retrains"]
    gains = {stage: delta_t(row["tasks"], single) for stage, row in rows.items()} if single else {}

    def mean(key: str) -> float | None:
        values = [row[key] for row in rows.values()]
        return sum(values) / len(values) if values else None

    own = [sum(sum(line) / len(line) for line in row["own"].values()) / len(row["own"]) for row in rows.values()]
    executed = [
        sum(sum(own) / len(own) for own in row["executed"].values()) / len(row["executed"]) for row in rows.values()
    ]
    summary = {
        "method": method,
        "seed": seed,
        "seconds": round(seconds, 1),
        "delta_t": sum(gains.values()) / len(gains) if gains else (0.0 if method == "single_task" else None),
        "executed_blocks": sum(executed) / len(executed) if executed else 1.0,
        "own_units": sum(own) / len(own) if own else 1.0,
        **{
            key: mean(key) if rows else 1.0
            for key in (
                "macs_x_single", "macs_x_single_with_heads", "parameters_x_single", "parameters_x_single_with_heads",
                "time_x_single", "time_x_single_with_heads",
            )
        },
        "tasks": found["tasks"],
        "single_task": single,
    }  # fmt: skip
    if rows:
        summary["best"] = found["best"]
        summary["retrains"] = {
            stage: {"delta_t": gains.get(stage), "executed_blocks": share, "tasks": row["tasks"]}
            for (stage, row), share in zip(rows.items(), executed, strict=True)
        }
        summary["spread"] = {
            task: {
                name: statistics.stdev(row["tasks"][task][name] for row in rows.values()) if len(rows) > 1 else 0.0
                for name in own
            }
            for task, own in found["tasks"].items()
        }
        summary["delta_t_spread"] = statistics.stdev(gains.values()) if len(gains) > 1 else 0.0
    return summary


def table(summary: Mapping) -> str:
    """Return the summary as text, one row per metric of each task."""
    single, spread, best = summary["single_task"], summary.get("spread"), summary.get("best")
    many = len(summary.get("retrains", ())) > 1
    of_columns = {"test": summary["tasks"]}
    if many:
        of_columns |= {"spread": spread, "best": summary["retrains"][best]["tasks"]}
    if single and summary["method"] != "single_task":
        of_columns["single"] = single
    rows = [
        (task, name, *(f"{values[task].get(name, math.nan):.3f}" for values in of_columns.values()))
        for task, own in summary["tasks"].items()
        for name in own
    ]
    lines = [plain_table(("task", "metric", *of_columns), rows, "ll" + "r" * len(of_columns))]
    if summary["delta_t"] is not None and summary["method"] != "single_task":
        text = f"Δ_T {summary['delta_t']:+.2f} % against single-task networks"
        if many:
            text += (
                f" (mean of {len(summary['retrains'])}, spread {summary['delta_t_spread']:.2f}, "
                f"best by validation {summary['retrains'][best]['delta_t']:+.2f})"
            )
        lines.append(text)
    lines.append(
        f"units run {100 * summary['executed_blocks']:.1f} %, with weights of a task's own "
        f"{100 * summary['own_units']:.1f} %; × one network a task: MACs {summary['macs_x_single']:.3f} "
        f"({summary['macs_x_single_with_heads']:.3f} with heads), parameters {summary['parameters_x_single']:.3f} "
        f"({summary['parameters_x_single_with_heads']:.3f}), time {summary['time_x_single']:.3f} "
        f"({summary['time_x_single_with_heads']:.3f})"
    )
    lines.append(f"method {summary['method']}, {summary['seconds']:.0f} s of training")
    return "\n".join(lines)


def policy_pictures(folder: Path) -> dict[str, Figure]:
    """Return the figures ``policy`` and ``similarity`` of a finished run; none for methods without policies.

    Raises:
        UserError: if the folder holds no finished multi-task run.
    """
    if not (folder / "summary.json").is_file():
        raise UserError(f"{folder} holds no finished run; make one with: python train_mtl.py")
    stages = [
        path.parent for path in sorted(folder.glob("retrain_*/policy.json")) if (path.parent / "summary.json").is_file()
    ]
    if not stages:
        return {}
    learned = read_policy(stages[0] / "policy.json")
    tested = {stage.name: read_json(stage / "summary.json") for stage in stages}
    executed = {name: row["executed"] for name, row in tested.items()}
    own = {name: row["own"] for name, row in tested.items()} if learned.own else {}
    return {"policy": policy_plots.policy(learned, executed, own), "similarity": policy_plots.similarity(learned)}
