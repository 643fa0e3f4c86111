"""Policies: which units each task runs, learned as probabilities, sampled or rounded to 0 and 1, kept as readable JSON.

{"format": 1, "backbone": "resnet18", "units": ["layer1.0", …],
 "tasks": {"semseg": {"probability": [0.91, …], "run": [1, …]}, …}}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from taps.errors import UserError
from taps.files import read_json, write_json
from taps.model import TaskModel

FORMAT = 1


@dataclass(frozen=True)
class Policy:
    """Which units each task runs.

    Attributes:
        backbone: name of the network.
        units: names of its units in network order.
        probability: α of every unit by task, 0..1.
        run: 1.0 or 0.0 for every unit by task.
    """

    backbone: str
    units: tuple[str, ...]
    probability: Mapping[str, tuple[float, ...]]
    run: Mapping[str, tuple[float, ...]]

    @classmethod
    def of(cls, model: TaskModel) -> Policy:
        """What the model's gates have learned; a unit is run where that is at least as probable as not."""
        probability, run = {}, {}
        for task in model.tasks:
            rows = model.report(task)
            probability[task] = tuple(row["run"] if row["score"] is None else row["score"] for row in rows)
            run[task] = tuple(row["run"] for row in rows)
        return cls(model.base_name, tuple(unit.name for unit in model.units), probability, run)

    def sample(self, generator: torch.Generator | None = None) -> Policy:
        """A policy drawn unit by unit from the probabilities (Bernoulli); ``generator`` on the CPU."""
        drawn = {
            task: tuple(torch.bernoulli(torch.tensor(values, dtype=torch.float64), generator=generator).tolist())
            for task, values in self.probability.items()
        }
        return Policy(self.backbone, self.units, self.probability, drawn)

    def similarity(self, a: str, b: str) -> float:
        """How alike two tasks' probabilities are: 1 − mean abs(α_a − α_b), 0..1."""
        pairs = zip(self.probability[a], self.probability[b], strict=True)
        return 1.0 - sum(abs(x - y) for x, y in pairs) / len(self.units)

    def write(self, path: Path) -> None:
        tasks = {
            task: {"probability": [round(value, 6) for value in self.probability[task]], "run": list(map(int, run))}
            for task, run in self.run.items()
        }
        write_json(path, {"format": FORMAT, "backbone": self.backbone, "units": list(self.units), "tasks": tasks})

    def check_fits(self, model: TaskModel, tasks: list[str], path: Path) -> None:
        """Raise a ``UserError`` unless the policy is for the model's units and has these tasks; ``path``: for the message."""
        units = tuple(unit.name for unit in model.units)
        if self.units != units or self.backbone != model.base_name:
            raise UserError(
                f"policy {path} is for {self.backbone} with {len(self.units)} blocks, this network is {model.base_name} "
                f"with {len(units)}: their blocks differ"
            )
        missing = [task for task in tasks if task not in self.run]
        if missing:
            raise UserError(f"policy {path} has no task {missing[0]!r}; it has {', '.join(self.run)}")


def read_policy(path: Path) -> Policy:
    """A policy from its file.

    Raises:
        UserError: if it is missing, damaged or of another format version.
    """
    stored = read_json(path)
    if stored.get("format") != FORMAT:
        raise UserError(f"{path} has format version {stored.get('format')!r}; this library reads version {FORMAT}")
    try:
        units = tuple(map(str, stored["units"]))
        probability = {task: tuple(map(float, row["probability"])) for task, row in stored["tasks"].items()}
        run = {task: tuple(map(float, row["run"])) for task, row in stored["tasks"].items()}
        backbone = str(stored["backbone"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is damaged: {type(error).__name__} {error}") from None
    for task in run:
        if not len(run[task]) == len(probability[task]) == len(units):
            raise UserError(f"{path}: task {task!r} has {len(run[task])} entries for {len(units)} units")
        if any(value not in (0.0, 1.0) for value in run[task]) or any(not 0 <= p <= 1 for p in probability[task]):
            raise UserError(f"{path}: task {task!r} has entries that are no 0 or 1, or probabilities outside of 0..1")
    return Policy(backbone, units, probability, run)
