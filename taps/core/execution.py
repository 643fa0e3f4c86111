"""Task selection for each call, and the places of a network whose behaviour depends on the task.

The task is not an attribute of the model: each thread holds an :class:`Execution` while its call runs, so threads that share a
model do not interfere. One task (:class:`OneTask`), a batch of several tasks, a pass shared by several tasks and the passes of
reuse all implement that protocol, and every :class:`Place` delegates its calls to it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from taps.core.checkpointing import (
    NeedsInputGradient,
    is_checkpointed,
    recalled,
    remember,
    running_backward,
    with_learning_input,
    without_reentrant_warning,
)
from taps.core.modules import first_input
from taps.errors import UserError


class Execution(Protocol):
    """Protocol for running one call of the network."""

    def run(self, place: Place, args: tuple, kwargs: dict):
        """Run a place of the network."""

    def read(self, value: Callable[[str | None], object]):
        """Return an attribute of a place whose value depends on the task."""


class OneTask:
    """The execution of one task on all samples; ``None`` means the base alone."""

    def __init__(self, task: str | None) -> None:
        self.task = task

    def run(self, place: Place, args: tuple, kwargs: dict):
        ready = place.ready_for(self.task)
        if ready is not None:
            return ready(*args, **kwargs)
        return place.compute(self.task, place.decision_for(self.task, first_input(args, kwargs)), args, kwargs)

    def read(self, value: Callable[[str | None], object]):
        return value(self.task)


class Call:
    """A call of the network in this thread: its execution and what is known about checkpointing within it."""

    def __init__(self, execution: Execution, inputs_learn: bool = True, recomputes: bool = False) -> None:
        self.execution, self.inputs_learn, self.recomputes = execution, inputs_learn, recomputes
        self.learns = torch.is_grad_enabled()
        self.backward = running_backward()
        self.is_checkpointed = self.repeats = False
        #: running statistics from before the call, kept if the call may have to be repeated
        self.statistics: list[tuple[Tensor, Tensor]] | None = None

    def look_for_checkpoints(self) -> bool:
        """Return whether the current computation will be repeated in the backward pass.

        Raises:
            NeedsInputGradient: if it would get no gradients then.
        """
        if not self.learns or not is_checkpointed():
            return False
        self.is_checkpointed = True
        if not torch.is_grad_enabled() and not self.inputs_learn:
            raise NeedsInputGradient
        return True


class State:
    """State shared by all places of a model: the running calls, and the temperature and random source of its gates.

    Attributes:
        temperature: temperature of relaxations that use one (Gumbel-softmax, hard concrete), > 0.
        generator: source of the gates' random draws; ``None`` uses torch's default generator.
        default: per thread, the task of calls that name none (:meth:`taps.task_model.TaskModel.set_task`).
    """

    def __init__(self) -> None:
        self.temperature: float = 1.0
        #: whether the network also calls layers through lists of its own, where no other module sees them
        self.hides_layers = False
        self.generator: torch.Generator | None = None
        #: whether a call with gradients has succeeded, and whether this required gradients of the inputs
        self.has_learned = self.inputs_have_to_learn = False
        self._thread = threading.local()

    def __getstate__(self) -> dict:
        held = {name: value for name, value in self.__dict__.items() if name != "_thread"}  # a copy runs no calls
        return {**held, "default": self.default}

    def __setstate__(self, state: dict) -> None:
        default = state.get("default")
        self.__dict__.update({name: value for name, value in state.items() if name != "default"})
        self._thread = threading.local()
        self.default = default

    @property
    def default(self) -> str | None:
        return getattr(self._thread, "default", None)

    @default.setter
    def default(self, task: str | None) -> None:
        self._thread.default = task

    @property
    def call(self) -> Call | None:
        """The call that this thread is running, or ``None``."""
        return getattr(self._thread, "call", None)

    @property
    def execution(self) -> Execution:
        """The current execution of this thread; the base alone outside any call.

        Raises:
            UserError: if a layer is rerun in the backward pass of a call that did not record it.
        """
        call, backward = self.call, running_backward()
        if backward != -1 and (call is None or call.backward != backward):
            return recalled(id(self))
        return _BASE if call is None else call.execution

    @property
    def reading(self) -> Execution:
        """The execution that reads of attributes follow: the current one, or in a hook that runs in a backward pass the base."""
        try:
            return self.execution
        except UserError:
            return _BASE

    @property
    def is_recomputing(self) -> bool:
        """Whether a part is computed once more, for gradients or as a shortcut, which must have no side effects."""
        call, backward = self.call, running_backward()
        if call is not None and call.repeats:
            return True
        return backward != -1 and (call is None or call.backward != backward or call.recomputes)

    def again(self, part: Callable, x: Tensor):
        """Call a part of the network that this call has run on the same samples already: running statistics stay as they are."""
        call = self.call
        if call is None:
            return part(x)
        before, call.repeats = call.repeats, True
        try:
            return part(x)
        finally:
            call.repeats = before

    @contextmanager
    def running(self, execution: str | Execution | None, inputs_learn: bool = True) -> Iterator[Call]:
        """Make this thread's calls run ``execution``, or the task of that name, inside the ``with`` block."""
        if execution is None or isinstance(execution, str):
            execution = OneTask(execution)
        outer = self.call
        call = self._thread.call = Call(execution, inputs_learn, self.is_recomputing)
        call.statistics = None if outer is None else outer.statistics
        try:
            yield call
        finally:
            self._thread.call = outer

    def run(self, execution: str | Execution | None, network: Callable, args: tuple, kwargs: dict):
        """Call a network whose places run ``execution``.

        Raises:
            UserError: if checkpointing inside the network would give no gradients.
        """
        learns = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if learns and self.inputs_have_to_learn:
            args, kwargs = with_learning_input(args, kwargs)
        inputs_learn = not learns or any(x.requires_grad for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor))
        with self.running(execution, inputs_learn) as call:
            call.statistics = None if inputs_learn or self.has_learned else []
            try:
                with without_reentrant_warning() if call.statistics is not None else nullcontext():
                    outputs = network(*args, **kwargs)
            except NeedsInputGradient:
                outputs = None
            else:
                self.has_learned |= learns
                if call.is_checkpointed:
                    remember(outputs, id(self), call.execution)
                return outputs
        if call.statistics is None:
            raise UserError(
                "checkpointing was switched on during training: call model.train() once after switching it on"
            )
        with torch.no_grad():
            for tensor, before in reversed(call.statistics):
                tensor.copy_(before)
        self.inputs_have_to_learn = True
        return self.run(execution, network, args, kwargs)

    def forget_checkpoints(self) -> None:
        """Reset what is known about checkpointing, so that the next training call detects it again."""
        self.has_learned = self.inputs_have_to_learn = False


_BASE = OneTask(None)


class Place(nn.Module):
    """A module of the network whose computation depends on the task.

    For each task, :meth:`decision_for` returns a *decision* and :meth:`compute` applies it. Executions of several tasks use the
    same two methods, and one call serves all tasks with the same :meth:`sharing_key`.
    """

    name: str
    state: State
    base: nn.Module
    #: for each task that is no longer trained, the plain module that replaces the place in evaluation mode
    ready: dict[str | None, nn.Module]
    #: whether the place has all attributes of its own; further ones are those of the base module
    _is_made = False

    @property  # type: ignore[misc]
    def __class__(self):
        """The base's class while a call is running: some networks ask for the type of a child (``isinstance``) in ``forward``."""
        state, base = self.__dict__.get("state"), self.__dict__.get("_modules", {}).get("base")
        if base is None or state is None or (state.call is None and running_backward() == -1):
            return type(self)
        return base.__class__

    def forward(self, *args, **kwargs):
        call = self.state.call
        if call is not None and call.learns:
            call.look_for_checkpoints()
        return self.state.execution.run(self, args, kwargs)

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Protocols that a class implements, such as copying, concern the place itself.
            if "base" not in self.__dict__.get("_modules", {}) or (name.startswith("__") and name.endswith("__")):
                raise
        return self.attribute(name)

    def __setattr__(self, name: str, value) -> None:
        is_own = (
            not self._is_made or name.startswith("_") or name == "forward" or name in {**self.__dict__, **self._modules}
        )
        if is_own or not hasattr(self.base, name):
            super().__setattr__(name, value)
        elif isinstance(value, (Tensor, nn.Module)) or hasattr(type(self), name):
            raise UserError(
                f"{self.name}.{name} cannot be replaced in an adapted network: change the network before adapting it"
            )
        else:
            self.set_in_base(name, value)

    def set_in_base(self, name: str, value) -> None:
        """Set an attribute, such as a stride, of the base module and of what was made from it."""
        setattr(self.base, name, value)
        for task in [task for task in self.ready if task is not None]:
            self.prepare(task)

    def ready_for(self, task: str | None) -> nn.Module | None:
        """Return the module in :attr:`ready` if it may replace the place for a task now."""
        return None if self.training else self.ready.get(task)

    def prepare(self, task: str) -> None:
        """Make the module in :attr:`ready` that replaces the place for a task, if one can."""
        raise NotImplementedError

    def attribute(self, name: str):
        """Return an attribute of the base module as the current task sees it."""
        raise NotImplementedError

    def decision_for(self, task: str | None, x: Tensor | None):
        """Return the decision for a task (``None``: the base alone), given the first input ``x``."""
        raise NotImplementedError

    def sharing_key(self, decision) -> Hashable | None:
        """Return a key for the result, equal for all tasks that compute the same; ``None`` if this task shares it with no other."""
        raise NotImplementedError

    def settled_decision(self, task: str | None):
        """Return the decision for a task if it depends neither on the input nor on chance, else ``None``."""
        raise NotImplementedError

    def settled_key(self, task: str | None) -> Hashable | None:
        """Return the :meth:`sharing_key` of the settled decision, ``None`` if there is none."""
        ready = self.ready_for(task)
        if ready is not None:
            return self.ready_key(ready)
        decision = self.settled_decision(task)
        return None if decision is None else self.sharing_key(decision)

    def ready_key(self, ready: nn.Module) -> Hashable | None:
        """Return the sharing key of a module in :attr:`ready`."""
        return "base" if ready is self.base else None

    def uses_batch_statistics(self, decision) -> bool:
        """Return whether under this decision outputs depend on the other samples in the batch, so that tasks run separately."""
        return False

    def compute(self, task: str | None, decision, args: tuple, kwargs: dict):
        """Apply the decision."""
        raise NotImplementedError

    def stand_in(self) -> Mapping[str, Tensor]:
        """Return the parameters that wrapping added to the network, by name: those that are not in the base module."""
        return {}

    def merged(self, task: str, memo: dict) -> nn.Module:
        """Return an ordinary module that is equivalent to this place for ``task``; ``memo`` is as in ``copy.deepcopy``."""
        raise NotImplementedError


def plain_state(module: nn.Module, prefix: str = "", parameters_only: bool = False) -> dict[str, Tensor]:
    """Return a wrapped network's base tensors under their original names, and the stand-in parameters of its places."""
    added: dict[str, Tensor] = {}
    while isinstance(module, Place):
        added.update((f"{prefix}shortcut.{name}", tensor.detach()) for name, tensor in module.stand_in().items())
        module = module.base
    state = {prefix + name: tensor.detach() for name, tensor in module._parameters.items() if tensor is not None}
    state.update(added)
    for name, tensor in module._buffers.items() if not parameters_only else ():
        if tensor is not None and name not in module._non_persistent_buffers_set:
            state[prefix + name] = tensor.detach()
    for name, child in module.named_children():
        state.update(plain_state(child, f"{prefix}{name}.", parameters_only))
    return state
