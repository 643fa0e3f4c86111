"""Normalisation layers with per-task copies of their affine parameters and running statistics."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn

from taps.core.execution import Place, State
from taps.core.modules import TaskDict, shared_hooks, with_tensors
from taps.core.unit import GatedUnit


@dataclass(frozen=True)
class Fading:
    """A task's copy of a norm that gives way to the base's: share · own(x) + (1 − share) · base(x)."""

    own: nn.Module
    share: float


class TaskNorm(Place):
    """A norm of the base with optional copies for tasks.

    Policies: with ``"task"`` every task uses its copy; with ``"follow"`` it uses its copy only while the unit that feeds the norm
    is tuned, so that shared parts are shared exactly, and where tasks skip blocks, tasks that took the same route share a copy;
    with ``"frozen"`` every task uses the base's norm. While the base is frozen, its own norm stays in evaluation mode and its
    statistics never change.

    Args:
        name: the norm's dotted name in the unwrapped network.
        base: the norm.
        state: shared by all places of the model.
        policy: ``"task"``, ``"follow"`` or ``"frozen"``.
        feeder: the preceding layer in network order, if it is a unit.
        frozen: whether the base is frozen.
        position: number of units that start before it in network order.
        parent: index of the enclosing unit, ``None`` if there is none.
    """

    def __init__(
        self,
        name: str,
        base: nn.Module,
        state: State,
        policy: str,
        feeder: GatedUnit | None,
        frozen: bool,
        position: int = 0,
        parent: int | None = None,
    ) -> None:
        super().__init__()
        self.name, self.policy, self.state, self.frozen = name, policy, state, frozen
        self.position, self.parent = position, parent
        self.base = base
        self.norms = TaskDict()
        self.ready: dict[str | None, nn.Module] = {}
        self._contents: dict[int, tuple] = {}
        self._always: set[str] = set()
        self._fading: dict[str, float] = {}
        self._feeder = (feeder,)  # in a tuple, so that it is not registered as a submodule
        self._is_made = True

    # -- tasks ---------------------------------------------------------------------------------------------------

    def add_task(self, *tasks: str, always: bool = False) -> None:
        """Give ``tasks`` one common copy if the policy requires it or ``always`` is set."""
        if not always and (self.policy == "frozen" or (self.policy == "follow" and self._feeder[0] is None)):
            return
        norm = copy.deepcopy(self.base, shared_hooks(self.base))
        norm.requires_grad_(True)
        for task in tasks:
            self.norms[task] = norm.train(self.training)

    def use_always(self, task: str) -> None:
        """Make ``task`` use its copy whatever the policy says, as a task that was trained under another policy does."""
        self._always.add(task)

    def fade(self, task: str, share: float) -> None:
        """Blend the copy of a task that uses the base's norm into it with this weight, 0 ≤ share < 1, while it trains."""
        self._fading[task] = share if task in self.norms and self.active(task) is None else 0.0

    def remove_task(self, task: str) -> None:
        self.ready.pop(task, None)
        self._always.discard(task)
        self._fading.pop(task, None)
        if task in self.norms:
            norm = self.norms[task]
            del self.norms[task]
            if all(self.norms[other] is not norm for other in self.norms):
                self._contents.pop(id(norm), None)

    def share(self, groups: list[list[str]]) -> None:
        """Give each group of tasks its own copy, or none if there is only one group; a group that has one keeps it."""
        for tasks in groups:
            others = {id(self.norms[task]) for task in self.norms if task not in tasks}
            held = {id(self.norms.get(task)) for task in tasks}
            if len(groups) > 1 and len(held) == 1 and tasks[0] in self.norms and not held & others:
                continue
            for task in tasks:
                self.remove_task(task)
            if len(groups) > 1:
                self.add_task(*tasks, always=True)

    def settle(self, task: str) -> None:
        """Prepare for a task that is no longer trained."""
        self.prepare(task)

    def prepare(self, task: str) -> None:
        self.ready[task] = self.active(task) or self.base

    def set_in_base(self, name: str, value) -> None:
        for task in self.norms:
            setattr(self.norms[task], name, value)
        super().set_in_base(name, value)

    def follows(self, unit: GatedUnit) -> bool:
        """Return whether this norm is task-specific only while ``unit`` is tuned."""
        return self.policy == "follow" and self._feeder[0] is unit

    def active(self, task: str | None) -> nn.Module | None:
        """Return the task's copy if it is in use, else ``None``."""
        norm = self.norms.get(task)
        if task is None or norm is None or self.policy == "task" or task in self._always or self._feeder[0] is None:
            return norm
        return norm if self._feeder[0].gates[task].decide().uses_delta else None

    # -- running -------------------------------------------------------------------------------------------------

    def decision_for(self, task: str | None, x: Tensor | None) -> nn.Module | Fading | None:
        if task is not None and self.training and self._fading.get(task):
            return Fading(self.norms[task], self._fading[task])
        return self.active(task)

    def settled_decision(self, task: str | None) -> nn.Module | Fading:
        return self.decision_for(task, None) or self.base

    def sharing_key(self, norm: nn.Module | Fading | None) -> Hashable:
        """Return ``"base"`` or a key for the copy; copies that are not trained any more have equal keys if their contents are."""
        if isinstance(norm, Fading):
            return id(norm.own), norm.share
        if norm is None or norm is self.base:
            return "base"
        own = norm.parameters() if norm._modules else norm._parameters.values()
        if norm.training or any(parameter is not None and parameter.requires_grad for parameter in own):
            return id(norm)
        # Without inner modules the dictionaries give the same tensors in a fraction of the time.
        plain = (norm._parameters.values(), norm._buffers.values())
        held = chain(norm.parameters(), norm.buffers()) if norm._modules else chain(*plain)
        tensors = [tensor for tensor in held if tensor is not None and tensor.is_floating_point()]
        version = tuple((id(tensor), tensor._version) for tensor in tensors)
        known = self._contents.get(id(norm))
        if known is None or known[0] != version:
            flat = (tensor.detach().cpu().reshape(-1).view(torch.uint8) for tensor in tensors)
            contents = hash(tuple(tensor.numpy().tobytes() for tensor in flat))
            known = self._contents[id(norm)] = (version, contents)
        return known[1]

    def ready_key(self, ready: nn.Module) -> Hashable | None:
        return self.sharing_key(ready)

    def uses_batch_statistics(self, norm: nn.Module | Fading | None) -> bool:
        used = norm.own if isinstance(norm, Fading) else norm or self.base
        return used.training and next(used.buffers(), None) is not None

    def compute(self, task: str | None, norm: nn.Module | Fading | None, args: tuple, kwargs: dict):
        if isinstance(norm, Fading):
            own, base = self.compute(task, norm.own, args, kwargs), self.compute(task, None, args, kwargs)
            return torch.lerp(base, own, norm.share)
        norm = self.base if norm is None else norm
        if norm.training:
            if self.state.is_recomputing:  # this batch has already updated the statistics
                return with_tensors(norm, {}, copy_buffers=True)(*args, **kwargs)
            call = self.state.call
            if call is not None and call.statistics is not None:
                call.statistics.extend((buffer, buffer.clone()) for buffer in norm.buffers())
        return norm(*args, **kwargs)

    def freeze_running_stats(self, frozen: bool, tasks: bool = True) -> None:
        """Make norms use batch statistics without updating their running statistics, or end this.

        Args:
            frozen: whether to freeze the running statistics.
            tasks: whether to include the tasks' norms, not only the base's.
        """
        for norm in (self.base, *(self.norms[task] for task in self.norms if tasks)):
            for inner in norm.modules():
                if isinstance(inner, nn.modules.batchnorm._BatchNorm):
                    if frozen:
                        inner.__dict__.setdefault("_momentum", inner.momentum)
                        inner.momentum = 0.0
                    elif "_momentum" in inner.__dict__:
                        inner.momentum = inner.__dict__.pop("_momentum")

    def train(self, mode: bool = True) -> TaskNorm:
        super().train(mode)
        if self.frozen:
            self.base.eval()
        for ready in self.ready.values():  # those of tasks that are no longer trained
            ready.eval()
        return self

    def attribute(self, name: str):
        return self.state.reading.read(lambda task: getattr(self.active(task) or self.base, name))

    def merged(self, task: str, memo: dict) -> nn.Module:
        return copy.deepcopy(self.active(task) or self.base, memo)


def norm_tensors(norm: nn.Module) -> dict[str, Tensor]:
    """Return a norm's affine parameters and running statistics, without the batch counter, which is not a weight."""
    return {name: tensor for name, tensor in norm.state_dict().items() if not name.endswith("num_batches_tracked")}


@contextmanager
def batch_statistics(module: nn.Module, wanted: bool = True) -> Iterator[None]:
    """Make norms use batch statistics inside the ``with`` block if ``wanted``, without updating their running ones."""
    norms = [inner for inner in module.modules() if isinstance(inner, TaskNorm)] if wanted else []
    modes = {inner: inner.training for norm in norms for inner in norm.modules()}
    for norm in norms:
        norm.train()
        norm.freeze_running_stats(True)
    try:
        yield
    finally:
        for norm in norms:
            norm.freeze_running_stats(False)
        for inner, mode in modes.items():
            inner.training = mode
