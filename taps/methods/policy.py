"""Policies: whether each task shares, owns or skips each unit. They are learned as probabilities and stored as readable JSON.

{"format": 1, "backbone": "resnet18", "units": ["layer1.0", …],
 "tasks": {"semseg": {"probability": [0.91, …], "run": [1, …], "own": [0.05, …], "specific": [0, …]}, …}}

``own`` and ``specific`` are present if tasks may have their own weights; ``inside`` is present if units contain others, and holds
for each unit the index of the enclosing unit or null.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from taps.core.gate import Decision, Gate, propagate_skips
from taps.core.network import Network
from taps.errors import UserError
from taps.storage.files import read_json, write_json

FORMAT = 1


#: share of the largest possible entropy above which a draw depends more on its seed than on what was learned
UNIFORM = 0.9


#: (run, specific) of the three choices for a unit: share, own, skip
_CHOICES = ((1.0, 0.0), (1.0, 1.0), (0.0, 0.0))


_SKIPPED = 2


@dataclass(frozen=True)
class Policy:
    """The choice of each task for each unit: share, own or skip.

    Attributes:
        backbone: name of the network.
        units: names of its units in network order.
        probability: by task, the probability of running each unit, 0..1 (AdaShare's α).
        run: by task, 1.0 for each unit that is run, else 0.0.
        own: by task, the probability of running each unit with own weights, 0..probability; empty if no task may own any.
        specific: by task, 1.0 for each unit that is run with own weights, else 0.0; empty if no task may own any.
        parents: for each unit the index of the enclosing unit, with which it is skipped, or ``None``; empty if units are not
            nested.
    """

    backbone: str
    units: tuple[str, ...]
    probability: Mapping[str, tuple[float, ...]]
    run: Mapping[str, tuple[float, ...]]
    own: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    specific: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    parents: tuple[int | None, ...] = ()

    @classmethod
    def of(cls, model: Network, opened: int | None = None) -> Policy:
        """Return the policy that the model's gates have learned, with the most probable choice for each unit.

        Args:
            model: the model.
            opened: number of units, counted from the last, that policies were learned for; the others run in every policy.
                ``None``: those that the curriculum has reached.
        """
        probability, run, own, specific = {}, {}, {}, {}
        for task in model.tasks:
            rows = model.report(task)
            gates = model.gates(task)
            first = 0 if opened is None else len(gates) - opened
            learned = [gate.in_curriculum and index >= first for index, gate in enumerate(gates)]
            probability[task] = tuple(
                1.0 if not own else row["run"] if row["score"] is None else row["score"]
                for own, row in zip(learned, rows, strict=True)
            )
            run[task] = tuple(row["run"] for row in rows)
            chances = [_probabilities(gate) if own else None for gate, own in zip(gates, learned, strict=True)]
            if any(chance is not None for chance in chances):
                own[task] = tuple(0.0 if chance is None else chance[1] for chance in chances)
                specific[task] = tuple(row["specific"] for row in rows)
        inside = model.parents if any(parent is not None for parent in model.parents) else ()
        return cls(model.base_name, tuple(unit.name for unit in model.units), probability, run, own, specific, inside)

    def entries(self, task: str) -> tuple[tuple[float, float], ...]:
        """Return (run, specific) of every unit, as :meth:`taps.task_model.TaskModel.follow` takes them."""
        specific = self.specific.get(task) or (0.0,) * len(self.run[task])
        return tuple(zip(self.run[task], specific, strict=True))

    def probabilities(self, task: str) -> list[tuple[float, float, float]]:
        """Return the probabilities of sharing, owning and skipping every unit."""
        own = self.own.get(task) or (0.0,) * len(self.units)
        return [(max(run - mine, 0.0), mine, 1.0 - run) for run, mine in zip(self.probability[task], own, strict=True)]

    def _with(self, choices: Mapping[str, list[int]]) -> Policy:
        parents = self.parents or (None,) * len(self.units)
        decided = {
            task: propagate_skips((Decision(*_CHOICES[index]) for index in own), parents)
            for task, own in choices.items()
        }
        run = {task: tuple(float(d.run) for d in own) for task, own in decided.items()}
        specific = {
            task: tuple(float(d.specific) for d in own)  # type: ignore[arg-type]
            for task, own in decided.items()
            if task in self.own
        }
        return replace(self, run=run, specific=specific)

    def sample(self, generator: torch.Generator | None = None) -> Policy:
        """Draw a policy unit by unit from the probabilities; ``generator`` must be on the CPU."""
        choices = {}
        for task, values in self.probability.items():
            if task in self.own:
                p = torch.tensor(self.probabilities(task), dtype=torch.float64)
                choices[task] = torch.multinomial(p, 1, generator=generator)[:, 0].tolist()
            else:
                run = torch.bernoulli(torch.tensor(values, dtype=torch.float64), generator=generator).tolist()
                choices[task] = [0 if runs else 2 for runs in run]
        return self._with(choices)

    def argmax(self) -> Policy:
        """Return the most probable policy."""
        return self.top(1)[0]

    def top(self, count: int) -> list[Policy]:
        """Return the ``count`` most probable policies in order of decreasing probability; fewer if there are not as many.

        Of policies that differ only inside skipped units, only the most probable one is returned.
        """
        best: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
        length = len(self.units)
        for task in self.probability:
            for unit, chances in enumerate(self.probabilities(task)):
                offered = [(-math.log(p), index) for index, p in enumerate(chances) if p > 0]
                held = [(min(offered)[0], _SKIPPED)]  # the choice has no effect inside a skipped unit
                holder = self.parents[unit] if self.parents else None
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
        """Return the mean entropy of the units' choices ÷ the largest possible one: 0 if all are decided, 1 if none is.

        Units with only one choice do not count.
        """
        shares = []
        for chances in self.probabilities(task):
            offered = [p for p in chances if p > 0]
            if len(offered) > 1:
                shares.append(-sum(p * math.log(p) for p in offered) / math.log(len(offered)))
        return sum(shares) / len(shares) if shares else 0.0

    def uncertainty_warning(self) -> str | None:
        """Return a one-line warning if the probabilities are so even that draws are decided by their seed, else ``None``."""
        entropies = {task: self.entropy(task) for task in self.probability}
        even = [f"{task} {value:.2f}" for task, value in entropies.items() if value > UNIFORM]
        if not even:
            return None
        return (
            f"the policy is nearly uniform (entropy, 1 is a coin toss: {', '.join(even)}): its draws depend on the seed more "
            "than on what was learned; learn it longer, at a lower temperature, or take the most probable one"
        )

    def similarity(self, a: str, b: str) -> float:
        """Return the similarity of two tasks, 0..1: 1 − mean total variation (with two choices, 1 − mean abs(α_a − α_b))."""
        pairs = zip(self.probabilities(a), self.probabilities(b), strict=True)
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
        nested = {"inside": list(self.parents)} if self.parents else {}
        units = {"backbone": self.backbone, "units": list(self.units), **nested}
        write_json(path, {"format": FORMAT, **units, "tasks": tasks})

    def check_fits(self, model: Network, tasks: list[str], path: Path) -> None:
        """Raise a ``UserError`` unless the policy fits the model's units and has these tasks; ``path`` is for the message."""
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
    """Return the probabilities of a gate with three choices, else ``None``."""
    found = getattr(gate, "probabilities", None)
    return None if found is None else found.detach().tolist()


def read_policy(path: Path) -> Policy:
    """Read a policy from its file.

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
            raise UserError(
                f"{path}: task {task!r} has entries that are neither 0 nor 1, or probabilities outside of 0..1"
            )
        if any(specific > run for run, specific in zip(run[task], specific.get(task, ()), strict=False)):
            raise UserError(f"{path}: task {task!r} has weights of its own in a unit that it does not run")
    return Policy(backbone, units, probability, run, own, specific, inside)
