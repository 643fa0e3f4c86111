"""Task selection for each call, and the places of a network whose behaviour depends on the task.

The task is not an attribute of the model: each thread holds an :class:`Execution` while its call runs, so threads that share a
model do not interfere. One task (:class:`OneTask`), a batch of several tasks, a pass shared by several tasks and the passes of
reuse all implement that protocol, and every :class:`Place` delegates its calls to it.

Activation checkpointing (``torch.utils.checkpoint``) reruns a part of the network during the backward pass, after the call has
returned. Therefore every node of the autograd graph that was created in such a call stores the call's execution.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from taps.errors import UserError


class Execution(Protocol):
    """Protocol for running one call of the network.

    Attributes:
        tasks: names of the tasks, ``None`` for the base alone.
    """

    @property
    def tasks(self) -> tuple[str | None, ...]: ...

    def run(self, place: Place, args: tuple, kwargs: dict):
        """Run a place of the network."""

    def read(self, value: Callable[[str | None], object]):
        """Return an attribute of a place whose value depends on the task."""


class OneTask:
    """The execution of one task on all samples; ``None`` means the base alone."""

    def __init__(self, task: str | None) -> None:
        self.task = task

    @property
    def tasks(self) -> tuple[str | None, ...]:
        return (self.task,)

    def run(self, place: Place, args: tuple, kwargs: dict):
        ready = place.ready.get(self.task)
        if ready is not None and not place.training:
            return ready(*args, **kwargs)
        return place.compute(self.task, place.decision_for(self.task, first_input(args, kwargs)), args, kwargs)

    def read(self, value: Callable[[str | None], object]):
        return value(self.task)


class NeedsInputGradient(Exception):  # noqa: N818 (a signal, not an error)
    """Signal that ``use_reentrant=True`` checkpointing gives no gradients unless an input of the checkpointed part has one."""


class Call:
    """A call of the network in this thread: its execution and what is known about checkpointing within it."""

    def __init__(self, execution: Execution, inputs_learn: bool = True, recomputes: bool = False) -> None:
        self.execution, self.inputs_learn, self.recomputes = execution, inputs_learn, recomputes
        self.learns = torch.is_grad_enabled()
        self.backward = -1 if torch.compiler.is_compiling() else torch._C._current_graph_task_id()
        self.is_checkpointed = False
        #: running statistics from before the call, kept if the call may have to be repeated
        self.statistics: list[tuple[Tensor, Tensor]] | None = None

    def look_for_checkpoints(self) -> bool:
        """Return whether the current computation will be repeated in the backward pass."""
        if not self.learns or torch.compiler.is_compiling():
            return False
        if not torch.is_grad_enabled():  # within a training call, only use_reentrant=True disables gradients
            self.is_checkpointed = True
            if not self.inputs_learn:
                raise NeedsInputGradient
            return True
        if torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
            self.is_checkpointed = True
            return True
        return False


class State:
    """State shared by all places of a model: the running calls, and the temperature and random source of its gates.

    Attributes:
        temperature: temperature of relaxations that use one (Gumbel-softmax, hard concrete), > 0.
        generator: source of the gates' random draws; ``None`` uses torch's default generator.
        default: per thread, the task of calls that name none (:meth:`taps.task_model.TaskModel.set_task`).
    """

    def __init__(self) -> None:
        self.temperature: float = 1.0
        self.generator: torch.Generator | None = None
        #: whether a call with gradients has succeeded, and whether this required gradients of the inputs
        self.has_learned = self.inputs_have_to_learn = False
        self._thread = threading.local()

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_thread"}  # a copy runs no calls

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._thread = threading.local()

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
        call = self.call
        if not torch.compiler.is_compiling():
            backward = torch._C._current_graph_task_id()
            if backward != -1 and (call is None or call.backward != backward):
                return self._of_forward_pass()
        return _BASE if call is None else call.execution

    @property
    def is_recomputing(self) -> bool:
        """Whether part of an earlier call is being recomputed for its gradients, which must have no side effects."""
        if torch.compiler.is_compiling():
            return False
        call, backward = self.call, torch._C._current_graph_task_id()
        return backward != -1 and (call is None or call.backward != backward or call.recomputes)

    def _of_forward_pass(self) -> Execution:
        node = torch._C._current_autograd_node()
        execution = None if node is None else _metadata(node).get(id(self))
        if execution is None:
            raise UserError(
                "a layer runs again in the backward pass of a call that is not known: checkpoint parts of the network, each "
                "by itself and not inside of one another, or whole calls model(x, task=…)"
            )
        return execution

    def _remember(self, outputs, execution: Execution) -> None:
        """Store the execution in every autograd node that led to the outputs."""
        nodes = [leaf.grad_fn for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
        while nodes:
            node = nodes.pop()
            if node is not None and id(self) not in _metadata(node):
                _metadata(node)[id(self)] = execution
                nodes.extend(following for following, _ in node.next_functions)

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
            args, kwargs = _learning(args, kwargs)
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
                    self._remember(outputs, call.execution)
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


def _metadata(node: torch.autograd.graph.Node) -> dict:
    return node.metadata  # type: ignore[return-value]  # an attribute, unlike in the stub


@contextmanager
def without_reentrant_warning() -> Iterator[None]:
    """Suppress torch's warning about checkpoints whose inputs need no gradient, for trial calls and calls that need none."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="None of the inputs have requires_grad=True")
        yield


def _learning(args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Return a call's inputs with the first one requiring a gradient."""
    x = first_input(args, kwargs)
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise UserError("checkpointing with use_reentrant=True needs a floating-point input; use use_reentrant=False")
    x = x if x.requires_grad else x.detach().requires_grad_()
    return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): x})


_BASE = OneTask(None)


def first_input(args: tuple, kwargs: dict):
    """Return the first argument of a call, which is the input that gates see."""
    return args[0] if args else next(iter(kwargs.values()), None)


class TaskDict(nn.Module):
    """Modules by task name. Unlike ``nn.ModuleDict`` it accepts any name, including ``items`` and ``train``."""

    def __getitem__(self, task: str):
        return self._modules[task]

    def __setitem__(self, task: str, module: nn.Module) -> None:
        self._modules[task] = module

    def __delitem__(self, task: str) -> None:
        del self._modules[task]

    def __contains__(self, task: object) -> bool:
        return task in self._modules

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)

    def get(self, task: str | None):
        return self._modules.get(task)  # type: ignore[arg-type]


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

    def forward(self, *args, **kwargs):
        call = self.state.call
        if call is not None and call.learns:
            call.look_for_checkpoints()
        return self.state.execution.run(self, args, kwargs)

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "base" not in self.__dict__.get("_modules", {}):
                raise
        return self.attribute(name)

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
        ready = None if self.training else self.ready.get(task)
        if ready is not None:
            return self.ready_key(ready)
        decision = self.settled_decision(task)
        return None if decision is None else self.sharing_key(decision)

    def ready_key(self, ready: nn.Module) -> Hashable | None:
        """Return the sharing key of a module in :attr:`ready`."""
        return "base" if ready is self.base else None

    def uses_batch_statistics(self) -> bool:
        """Return whether outputs depend on the other samples in the batch, so that each task's samples must run separately."""
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


def computed_tensors(module: nn.Module) -> dict[int, object]:
    """Return a ``memo`` for ``copy.deepcopy`` with detached copies of the tensors that hooks computed with a graph.

    Pruning and the old forms of weight and spectral normalisation leave such a tensor in their module after each call, and
    torch refuses to copy it; the next call computes it again.
    """
    tensors = (value for inner in module.modules() for value in vars(inner).values() if isinstance(value, Tensor))
    return {id(tensor): tensor.detach().clone() for tensor in tensors if not tensor.is_leaf}


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


def with_tensors(module: nn.Module, tensors: Mapping[str, Tensor], copy_buffers: bool = False) -> nn.Module:
    """Return a shallow copy of a module with some parameters (dotted names) replaced; the module itself is not changed.

    The copy shares everything else, including later in-place changes. With ``copy_buffers`` the buffers are copied too.
    """
    module = getattr(type(module), "_unseen", lambda same: same)(module)
    plain = object.__new__(type(module))
    plain.__dict__ = dict(module.__dict__)
    plain._parameters = dict(module._parameters)
    plain._modules = dict(module._modules)
    if copy_buffers:
        plain._buffers = {
            name: buffer if buffer is None else buffer.clone() for name, buffer in module._buffers.items()
        }
    inner: dict[str, dict[str, Tensor]] = {name: {} for name in module._modules} if copy_buffers else {}
    for name, tensor in tensors.items():
        child, dot, rest = name.partition(".")
        if dot:
            inner.setdefault(child, {})[rest] = tensor
        else:
            plain._parameters[name] = tensor  # type: ignore[assignment]
    for child, own in inner.items():
        module_of = module._modules[child]
        plain._modules[child] = None if module_of is None else with_tensors(module_of, own, copy_buffers)
    return plain


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Use evaluation mode inside the ``with`` block and restore each module's mode afterwards."""
    modes = [inner for inner in module.modules() if inner.training] if module.training else []
    if modes:
        module.eval()
    try:
        yield
    finally:
        for inner in modes:
            inner.training = True
