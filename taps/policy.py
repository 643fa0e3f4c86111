"""Policies: what each task does with each unit, learned as probabilities, sampled or rounded to 0 and 1, kept as readable JSON.

{"format": 1, "backbone": "resnet18", "units": ["layer1.0", …],
 "tasks": {"semseg": {"probability": [0.91, …], "run": [1, …], "own": [0.05, …], "specific": [0, …]}, …}}

``own`` and ``specific`` are there where tasks may have weights of their own, ``inside`` where units hold others: for each the
index of its holder or null.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from taps.errors import UserError
from taps.files import read_json, write_json
from taps.gates import Decision, Gate, reached
from taps.model import TaskModel

FORMAT = 1
#: share of the largest possible entropy above which a draw says more of its seed than of what was learned
UNIFORM = 0.9

#: (run, specific) of the three things a task can do with a unit: share it, have its own, skip it
_CHOICES = ((1.0, 0.0), (1.0, 1.0), (0.0, 0.0))
_SKIPPED = 2


@dataclass(frozen=True)
class Policy:
    """What each task does with each unit.

    Attributes:
        backbone: name of the network.
        units: names of its units in network order.
        probability: of running every unit by task, 0..1 (AdaShare's α).
        run: 1.0 or 0.0 for every unit by task.
        own: probability of running it with weights of the task's own, 0..probability; empty where no task has any.
        specific: 1.0 where the task does so, else 0.0; empty where no task has any.
        inside: for each unit the index of the one that holds it and without which it is not run, or ``None``; empty where
            no unit holds another.
    """

    backbone: str
    units: tuple[str, ...]
    probability: Mapping[str, tuple[float, ...]]
    run: Mapping[str, tuple[float, ...]]
    own: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    specific: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    inside: tuple[int | None, ...] = ()

    @classmethod
    def of(cls, model: TaskModel) -> Policy:
        """What the model's gates have learned; of each unit what is most probable."""
        probability, run, own, specific = {}, {}, {}, {}
        for task in model.tasks:
            rows = model.report(task)
            probability[task] = tuple(row["run"] if row["score"] is None else row["score"] for row in rows)
            run[task] = tuple(row["run"] for row in rows)
            chances = [_probabilities(gate) for gate in model.gates(task)]
            if any(chance is not None for chance in chances):
                own[task] = tuple(0.0 if chance is None else chance[1] for chance in chances)
                specific[task] = tuple(row["specific"] for row in rows)
        inside = model.inside if any(place is not None for place in model.inside) else ()
        return cls(model.base_name, tuple(unit.name for unit in model.units), probability, run, own, specific, inside)

    def entries(self, task: str) -> tuple[tuple[float, float], ...]:
        """(run, specific) of every unit, as :meth:`taps.model.TaskModel.follow` takes them."""
        specific = self.specific.get(task) or (0.0,) * len(self.run[task])
        return tuple(zip(self.run[task], specific, strict=True))

    def chances(self, task: str) -> list[tuple[float, float, float]]:
        """Probabilities of sharing, owning and skipping every unit."""
        own = self.own.get(task) or (0.0,) * len(self.units)
        return [(max(run - mine, 0.0), mine, 1.0 - run) for run, mine in zip(self.probability[task], own, strict=True)]

    def _with(self, choices: Mapping[str, list[int]]) -> Policy:
        inside = self.inside or (None,) * len(self.units)
        decided = {
            task: [decision[:2] for decision in reached((Decision(*_CHOICES[index]) for index in own), inside)]
            for task, own in choices.items()
        }
        run = {task: tuple(entry[0] for entry in own) for task, own in decided.items()}
        specific = {task: tuple(entry[1] for entry in own) for task, own in decided.items() if task in self.own}
        return replace(self, run=run, specific=specific)

    def sample(self, generator: torch.Generator | None = None) -> Policy:
        """A policy drawn unit by unit from the probabilities; ``generator`` on the CPU."""
        choices = {}
        for task, values in self.probability.items():
            if task in self.own:
                p = torch.tensor(self.chances(task), dtype=torch.float64)
                choices[task] = torch.multinomial(p, 1, generator=generator)[:, 0].tolist()
            else:
                run = torch.bernoulli(torch.tensor(values, dtype=torch.float64), generator=generator).tolist()
                choices[task] = [0 if runs else 2 for runs in run]
        return self._with(choices)

    def argmax(self) -> Policy:
        """The most probable policy."""
        return self.top(1)[0]

    def top(self, count: int) -> list[Policy]:
        """The ``count`` most probable policies, the most probable one first; fewer where there are fewer.

        Of those that differ only inside of units that are not run, the most probable one counts.
        """
        best: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
        length = len(self.units)
        for task in self.probability:
            for unit, chances in enumerate(self.chances(task)):
                offered = [(-math.log(p), index) for index, p in enumerate(chances) if p > 0]
                held = [(min(offered)[0], _SKIPPED)]  # whatever is chosen there
                holder = self.inside[unit] if self.inside else None
                longer = [
                    (cost + own, (*path, index))
                    for cost, path in best
                    for own, index in (offered if holder is None or path[holder - unit] != _SKIPPED else held)
                ]
                best = heapq.nsmallest(count, longer)
        return [
            self._with({t: list(path[i * length : (i + 1) * length]) for i, t in enumerate(self.probability)})
            for _, path in best
        ]

    def entropy(self, task: str) -> float:
        """Mean entropy of a unit's choices ÷ the largest possible one: 0 where all is decided, 1 where nothing is.

        Units that offer one choice only take no part.
        """
        shares = []
        for chances in self.chances(task):
            offered = [p for p in chances if p > 0]
            if len(offered) > 1:
                shares.append(-sum(p * math.log(p) for p in offered) / math.log(len(offered)))
        return sum(shares) / len(shares) if shares else 0.0

    def doubt(self) -> str | None:
        """One line of warning where the probabilities are so even that draws are decided by their seed, else ``None``."""
        entropies = {task: self.entropy(task) for task in self.probability}
        even = [f"{task} {value:.2f}" for task, value in entropies.items() if value > UNIFORM]
        if not even:
            return None
        return (
            f"the policy is nearly uniform (entropy, 1 is a coin toss: {', '.join(even)}): its draws depend on the seed more "
            "than on what was learned; learn it longer, at a lower temperature, or take the most probable one"
        )

    def similarity(self, a: str, b: str) -> float:
        """How alike two tasks' probabilities are: 1 − mean total variation (of two choices mean abs(α_a − α_b)), 0..1."""
        pairs = zip(self.chances(a), self.chances(b), strict=True)
        return 1.0 - sum(abs(p - q) for x, y in pairs for p, q in zip(x, y, strict=True)) / (2 * len(self.units))

    def write(self, path: Path) -> None:
        tasks = {}
        for task, run in self.run.items():
            tasks[task] = {
                "probability": [round(value, 6) for value in self.probability[task]],
                "run": list(map(int, run)),
            }
            if task in self.own:
                tasks[task]["own"] = [round(value, 6) for value in self.own[task]]
                tasks[task]["specific"] = list(map(int, self.specific[task]))
        nested = {"inside": list(self.inside)} if self.inside else {}
        units = {"backbone": self.backbone, "units": list(self.units), **nested}
        write_json(path, {"format": FORMAT, **units, "tasks": tasks})

    def check_fits(self, model: TaskModel, tasks: list[str], path: Path) -> None:
        """Raise a ``UserError`` unless the policy is for the model's units and has these tasks; ``path``: for the message."""
        units = tuple(unit.name for unit in model.units)
        if self.units != units or self.backbone != model.base_name:
            raise UserError(
                f"policy {path} is for {self.backbone} with {len(self.units)} units, this network is {model.base_name} "
                f"with {len(units)}: their units differ"
            )
        missing = [task for task in tasks if task not in self.run]
        if missing:
            raise UserError(f"policy {path} has no task {missing[0]!r}; it has {', '.join(self.run)}")


def _probabilities(gate: Gate) -> list[float] | None:
    """Those of a gate with three choices."""
    found = getattr(gate, "probabilities", None)
    return None if found is None else found.detach().tolist()


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
        having = {task: row for task, row in stored["tasks"].items() if "own" in row}
        own = {task: tuple(map(float, row["own"])) for task, row in having.items()}
        specific = {task: tuple(map(float, row["specific"])) for task, row in having.items()}
        backbone = str(stored["backbone"])
        inside = tuple(None if place is None else int(place) for place in stored.get("inside", ()))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is damaged: {type(error).__name__} {error}") from None
    if inside and (len(inside) != len(units) or any(p is not None and not 0 <= p < i for i, p in enumerate(inside))):
        raise UserError(f'{path}: "inside" must name for each of the {len(units)} units an earlier one, or null')
    for task in run:
        columns = {"run": run[task], "probability": probability[task]}
        if task in own:
            columns.update(own=own[task], specific=specific[task])
        for name, column in columns.items():
            if len(column) != len(units):
                raise UserError(f"{path}: task {task!r} has {len(column)} entries of {name!r} for {len(units)} units")
        decided = [value for name in ("run", "specific") for value in columns.get(name, ())]
        chances = [value for name in ("probability", "own") for value in columns.get(name, ())]
        if any(value not in (0.0, 1.0) for value in decided) or any(not 0 <= p <= 1 for p in chances):
            raise UserError(f"{path}: task {task!r} has entries that are no 0 or 1, or probabilities outside of 0..1")
        if any(specific > run for run, specific in zip(run[task], specific.get(task, ()), strict=False)):
            raise UserError(f"{path}: task {task!r} has weights of its own in a unit that it does not run")
    return Policy(backbone, units, probability, run, own, specific, inside)
