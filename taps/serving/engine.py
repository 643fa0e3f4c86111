"""Answers for a batch of images, each with the tasks that it is asked for, from one model."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from taps.errors import UserError, first_line
from taps.metrics.cost import seconds
from taps.runs.prediction import ranked
from taps.serving.folder import ServedFolder, StoredTask
from taps.task_model import TaskModel, empty_model, host_options

#: the reason for which a task is not answered when its files have changed since the image was prepared
CHANGED = "changed"


@dataclass(frozen=True)
class Item:
    """One prepared image and the tasks that it is asked for.

    Attributes:
        image: (3, H, W) in float32.
        tasks: version of each task by name, as in :class:`taps.serving.folder.StoredTask`.
        top: number of classes to return.
    """

    image: np.ndarray
    tasks: dict[str, str]
    top: int


#: an item's answer: for each task the most probable classes with their probabilities, or the reason why there are none
Answer = dict[str, tuple[tuple[str, float], ...] | str]


class Engine:
    """A model that answers for the tasks in a folder as they are on disk.

    Args:
        root: the folder of tasks.
        base: file with the weights of the base, if the tasks' files do not say where they are.
        keep: largest number of tasks in memory.
        device: where the model runs.

    Raises:
        UserError: if the folder has no usable task, or the base cannot be had.
    """

    def __init__(self, root: Path, base: str | None = None, keep: int = 64, device: torch.device | str = "cpu") -> None:
        self.folder = ServedFolder(root)
        if not self.folder.tasks:
            reason = next(iter(self.folder.refused.values()), f"{root} holds no task")
            raise UserError(reason)
        self.keep, self.device, self._base = keep, torch.device(device), base
        first = next(iter(self.folder.tasks.values())).description
        self._fingerprint = first["base"]["fingerprint"]
        self._seen = self.folder.tasks
        self.model, self._hosts = self._model()
        self._format = self._fastest_format(int((first.get("preprocessing") or {}).get("input_size", 224)))
        self.model.to(memory_format=self._format)
        self._unusable: dict[tuple, str] = {}  # by stamp of the files
        self._held: dict[str, str] = {}  # version by task, the least recently used first
        self._costs: dict[tuple, dict[str, int]] = {}

    def _alike(self) -> dict[str, StoredTask]:
        """Return the tasks of the model's base."""
        tasks = self.folder.tasks.items()
        return {name: task for name, task in tasks if task.description["base"]["fingerprint"] == self._fingerprint}

    def _model(self) -> tuple[TaskModel, dict]:
        """Return a model for the tasks in the folder, without any task, and the options it was made with."""
        alike = self._alike()
        found = {name: task.description for name, task in alike.items()}
        model = empty_model(found, {name: task.folder for name, task in alike.items()}, self._base)
        return model.to(self.device).eval(), host_options(found)

    def _adapt_to_folder(self) -> bool:
        """Make the model anew if tasks have come that it has no place for; return whether it did."""
        if self.folder.tasks is self._seen:
            return False
        self._seen = self.folder.tasks
        descriptions = [task.description for task in self._alike().values()]
        if self.model.method.learns_policy or any(own.get("policy") is not None for own in descriptions):
            return False  # such tasks run only in a model made for them
        if not descriptions or host_options({str(key): own for key, own in enumerate(descriptions)}) == self._hosts:
            return False
        try:
            self.model, self._hosts = self._model()
        except UserError:
            return False
        self.model.to(memory_format=self._format)
        for known in (self._held, self._unusable, self._costs):
            known.clear()
        return True

    @torch.inference_mode()
    def _fastest_format(self, side: int) -> torch.memory_format:
        """Return the memory format in which the base is fastest here; for convolutions on CPUs it differs by up to a half."""
        fastest: dict[torch.memory_format, float] = {}
        net = copy.deepcopy(self.model.backbone)
        for memory_format in (torch.contiguous_format, torch.channels_last):
            net.to(memory_format=memory_format)
            x = torch.zeros(8, 3, side, side, device=self.device).to(memory_format=memory_format)
            fastest[memory_format] = min(seconds(partial(net, x), x.device) for _ in range(4))
        return min(fastest, key=lambda own: fastest[own])

    def answer(self, items: Sequence[Item]) -> list[Answer]:
        """Return the answers to several items, with shared computation done once.

        Images that are asked for one task each run as one batch of different tasks. Images that are asked for several run with
        all others that are asked for the same ones, in one pass that computes once what these tasks share.
        """
        answers: list[Answer] = [{} for _ in items]
        groups: dict[tuple, list[int]] = {}
        for index, item in enumerate(items):
            wanted = tuple(item.tasks.items())
            groups.setdefault((item.image.shape, wanted if len(wanted) > 1 else ()), []).append(index)
        for (_, wanted), members in groups.items():
            x = torch.from_numpy(np.stack([items[index].image for index in members]))
            x = x.to(self.device, memory_format=self._format)
            if wanted:
                for start in range(0, len(wanted), self.keep):
                    self._answer_several(x, dict(wanted[start : start + self.keep]), items, answers, members)
                    self._make_room()
            else:
                self._answer_mixed(x, items, answers, members)
                self._make_room()
        self._mark_changed(items, answers)
        return answers

    def _answer_several(
        self, x: Tensor, wanted: dict[str, str], items: Sequence[Item], answers: list[Answer], members: Sequence[int]
    ) -> None:
        reasons = self._hold(wanted)
        for index in members:
            answers[index].update(reasons)
        usable = [name for name in wanted if name not in reasons]
        top = max(items[index].top for index in members)
        for name, output in _outputs(usable, lambda names: self.model.predict(x, tasks=names)).items():
            every = [output] * len(members) if isinstance(output, str) else self._ranked(name, output, top)
            for index, own in zip(members, every, strict=True):
                answers[index][name] = own if isinstance(own, str) else own[: items[index].top]

    @torch.no_grad()
    def _answer_mixed(self, x: Tensor, items: Sequence[Item], answers: list[Answer], members: Sequence[int]) -> None:
        asked = [next(iter(items[index].tasks.items())) for index in members]
        reasons = self._hold(dict(asked))
        usable = [
            row for row, (name, version) in enumerate(asked) if not reasons.get(name) and self._held[name] == version
        ]
        for index, (name, _) in zip(members, asked, strict=True):
            answers[index][name] = reasons.get(name, CHANGED)

        def run(names: Sequence[str]) -> dict[str, list]:
            rows = [row for row in usable if asked[row][0] in names]
            found: dict[str, list] = {name: [] for name in names}
            for row, output in zip(rows, self.model(x[rows], task=[asked[row][0] for row in rows]), strict=True):
                found[asked[row][0]].append((members[row], output))
            return found

        for name, of_rows in _outputs(list(dict.fromkeys(asked[row][0] for row in usable)), run).items():
            if isinstance(of_rows, str):
                answered = [members[row] for row in usable if asked[row][0] == name]
                of_rows = [(index, of_rows) for index in answered]
            for index, output in of_rows:
                is_reason = isinstance(output, str)
                answers[index][name] = output if is_reason else self._ranked(name, output[None], items[index].top)[0]

    def _ranked(self, name: str, output: Tensor, top: int) -> Sequence[tuple[tuple[str, float], ...] | str]:
        try:
            found = ranked(self.model, name, output, top)
        except UserError as error:
            return [str(error)] * len(output)
        finite = [all(math.isfinite(probability) for _, probability in own) for own in found]
        return [
            own if is_finite else f"the output of task {name!r} is not finite"
            for own, is_finite in zip(found, finite, strict=True)
        ]

    def _mark_changed(self, items: Sequence[Item], answers: Sequence[Answer]) -> None:
        """Withdraw answers of tasks whose files have changed meanwhile, since it is not known which ones were read."""
        self.folder.refresh({name for item in items for name in item.tasks})
        for item, answer in zip(items, answers, strict=True):
            for name, version in item.tasks.items():
                now = self.folder.tasks.get(name)
                if now is None or now.version != version:
                    answer[name] = CHANGED

    def _hold(self, wanted: dict[str, str]) -> dict[str, str]:
        """Put tasks into the model; return the reason for each that cannot be used."""
        reasons = self._try_to_hold(wanted)
        if any(reason != CHANGED for reason in reasons.values()) and self._adapt_to_folder():
            reasons = self._try_to_hold(wanted)
        return reasons

    def _try_to_hold(self, wanted: dict[str, str]) -> dict[str, str]:
        self.folder.refresh({*wanted, *self._held})
        for name in [name for name in self._held if name not in self.folder.tasks]:
            self._drop(name)
        reasons: dict[str, str] = {}
        for name, version in wanted.items():
            task = self.folder.tasks.get(name)
            reason = CHANGED if task is None or task.version != version else self._load(task)
            if reason is not None:
                reasons[name] = reason
        return reasons

    def _load(self, task: StoredTask) -> str | None:
        """Put a task into the model unless it is there; return the reason if it cannot be used."""
        held = self._held.get(task.name)
        if held is not None:
            del self._held[task.name]  # to be put last
            if held != task.version:
                self.model.remove_task(task.name)
        if held != task.version:
            if task.stamp in self._unusable:
                return self._unusable[task.stamp]
            try:
                self.model.load_task(task.folder, name=task.name)
            except UserError as error:
                self._unusable[task.stamp] = str(error)
                return str(error)
            except OSError as error:  # perhaps not for long, such as a file that is being replaced
                return f"{error.filename or task.folder}: {error.strerror or error}"
        self._held[task.name] = task.version
        return None

    def _drop(self, name: str) -> None:
        del self._held[name]
        self.model.remove_task(name)

    def _make_room(self) -> None:
        for name in [*self._held][: max(len(self._held) - self.keep, 0)]:
            self._drop(name)

    def cost(self, shape: Sequence[int], tasks: dict[str, str]) -> dict[str, int]:
        """Return the MACs of tasks on one image of this shape: in one pass, and in one pass each.

        Args:
            shape: (3, H, W).
            tasks: versions by name; a task that is no longer there counts nothing.
        """
        total = dict.fromkeys(("macs", "macs_separate", "macs_heads"), 0)
        wanted = list(tasks.items())
        for start in range(0, len(wanted), self.keep):
            some = dict(wanted[start : start + self.keep])
            reasons = self._hold(some)
            names = tuple(sorted(name for name in some if name not in reasons))
            for key, own in (self._known_cost(tuple(shape), names) if names else {}).items():
                total[key] += own
            self._make_room()
        return total

    def _known_cost(self, shape: tuple[int, ...], names: tuple[str, ...]) -> dict[str, int]:
        key = (shape, tuple((name, self._held[name]) for name in names))
        if key not in self._costs:
            if len(self._costs) >= 100:
                self._costs.clear()
            self._costs[key] = self.model.predict_cost(torch.zeros(1, *shape, device=self.device), names)
        return self._costs[key]


def _outputs(names: Sequence[str], run: Callable[[Sequence[str]], Mapping[str, Any]]) -> dict[str, Any]:
    """Return the tasks' outputs, run together or, if that fails, one by one; for a task that fails alone, the reason."""
    if not names:
        return {}
    try:
        return dict(run(names))
    except Exception as error:  # whatever the network of a task raises concerns that task alone
        if len(names) == 1:
            return {names[0]: f"task {names[0]!r} cannot be run: {first_line(error, 200)}"}
    return {name: output for one in names for name, output in _outputs([one], run).items()}
