"""Small tools for modules: by task, with other tensors, in another mode. Nothing here knows gates or executions."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from threading import RLock
from types import MethodType
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.func import functional_call

#: names of the attributes that every module has
OF_MODULES = frozenset(vars(nn.Module()))


def first_input(args: tuple, kwargs: dict):
    """Return the first argument of a call, which is the input that gates see."""
    return args[0] if args else next(iter(kwargs.values()), None)


def members(value: object) -> tuple:
    """Return what a collection holds, keys of dictionaries too; nothing for anything else."""
    if isinstance(value, dict):
        return (*value, *value.values())
    return tuple(value) if isinstance(value, (list, tuple, set, deque)) else ()


def is_square(tensor: Tensor) -> bool:
    """Return whether a tensor is a square matrix, as masks of positions are."""
    return tensor.dim() == 2 and tensor.shape[0] == tensor.shape[1]


def at_rows(args: tuple, kwargs: dict, rows: Tensor) -> tuple[tuple, dict]:
    """Return the arguments of a call for some of its samples; what does not have a row per sample belongs to all."""
    x = first_input(args, kwargs)

    def cut(value):
        has_rows = isinstance(value, Tensor) and value.dim() and len(value) == len(x)
        return value[rows] if value is x or (has_rows and not is_square(value)) else value

    return tuple(map(cut, args)), {name: cut(value) for name, value in kwargs.items()}


class TaskDict(nn.Module):
    """Modules by task name. Unlike ``nn.ModuleDict`` it accepts any name, including ``items`` and ``train``."""

    def __getitem__(self, task: str):
        return self._modules[task]

    # A new dictionary for each change, so that threads that iterate over the tasks are not disturbed.
    def __setitem__(self, task: str, module: nn.Module) -> None:
        self.__dict__["_modules"] = {**self._modules, task: module}

    def __delitem__(self, task: str) -> None:
        left = dict(self._modules)
        del left[task]
        self.__dict__["_modules"] = left

    def __contains__(self, task: object) -> bool:
        return task in self._modules

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)

    def get(self, task: str | None):
        return self._modules.get(task)  # type: ignore[arg-type]


def computed_tensors(module: nn.Module) -> dict[int, object]:
    """Return a ``memo`` for ``copy.deepcopy`` with detached copies of the tensors that hooks computed with a graph.

    Pruning and the old forms of weight and spectral normalisation leave such a tensor in their module after each call, and
    torch refuses to copy it; the next call computes it again.
    """
    tensors = (value for inner in module.modules() for value in vars(inner).values() if isinstance(value, Tensor))
    return {id(tensor): tensor.detach().clone() for tensor in tensors if not tensor.is_leaf}


def shared_hooks(module: nn.Module) -> dict[int, object]:
    """Return a ``memo`` for ``copy.deepcopy`` with which copies call the module's own hooks until these are removed."""
    inner = (vars(own) for own in module.modules())
    return {
        id(held): held
        for own in inner
        for name, held in own.items()
        if "_hooks" in name and isinstance(held, dict) and held
    }


def unseen(module: nn.Module) -> nn.Module:
    """Return the module behind the recording view that shared passes put in its place."""
    return getattr(type(module), "_unseen", lambda same: same)(module)


def without_caches(module: nn.Module) -> nn.Module:
    """Return the module after emptying the dictionaries in which its parts cache what they computed from their parameters."""
    for inner in module.modules():
        for cache in _caches(inner).values():
            cache.clear()
    return module


def _caches(module: nn.Module) -> dict[str, dict]:
    return {name: value for name, value in vars(module).items() if type(value) is dict and "cache" in name}


def with_tensors(module: nn.Module, tensors: Mapping[str, Tensor], copy_buffers: bool = False) -> nn.Module:
    """Return a shallow copy of a module with some parameters (dotted names) replaced; the module itself is not changed.

    The copy shares everything else, including later in-place changes. With ``copy_buffers`` the buffers are copied too.
    """
    module = unseen(module)
    plain = object.__new__(type(module))
    plain.__dict__ = dict(module.__dict__)
    plain._parameters = dict(module._parameters)
    plain._modules = dict(module._modules)
    _rebind(module, plain)
    if keeps_state(module):
        _hand_back(module, plain)
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


def as_function(module: nn.Module, tensors: Mapping[str, Tensor], copy_buffers: bool = False) -> Callable:
    """Return a function that calls a module with some parameters replaced: a copy by :func:`with_tensors`, or while a compiler
    traces torch's own way, since not every version of it can trace the copying."""
    if copy_buffers or not torch.compiler.is_compiling():
        return with_tensors(module, tensors, copy_buffers)
    module, held = unseen(module), dict(tensors)
    return lambda *args, **kwargs: functional_call(module, held, args, kwargs, tie_weights=False)


def _rebind(module: nn.Module, plain: nn.Module) -> None:
    """Make what a module holds besides its tensors belong to a shallow copy: a forward of its own, as hooks of accelerate set, and
    dictionaries in which it caches what it computes from its parameters, as timm's attention biases do."""
    own = plain.__dict__
    if own.get("_compiled_call_impl") is not None:
        own["_compiled_call_impl"] = None
    forward = own.get("forward")
    if forward is not None:  # accelerate keeps the earlier one, too
        bound = {
            name: value for name, value in own.items() if isinstance(value, MethodType) and value.__self__ is module
        }
        own.update({name: MethodType(value.__func__, plain) for name, value in bound.items()})
    if isinstance(forward, partial):
        held = tuple(plain if value is module else value for value in forward.args)
        own["forward"] = partial(forward.func, *held, **forward.keywords)
    own.update({name: {} for name in _caches(module)})


def keeps_state(module: nn.Module) -> bool:
    """Return whether a module may set attributes when it is called; those of torch and timm do not."""
    return not type(module).__module__.startswith(("torch.", "timm."))


def _hand_back(module: nn.Module, plain: nn.Module) -> None:
    """Give a module the attributes that a shallow copy of it sets when it is called, which the network may read."""
    before = dict(vars(plain))

    def after(plain: nn.Module, args: object, output: object) -> None:
        changed = {name: value for name, value in dict(vars(plain)).items() if before.get(name, before) is not value}
        vars(module).update({name: value for name, value in changed.items() if name not in OF_MODULES})
        before.update(changed)

    plain._forward_hooks = OrderedDict(module._forward_hooks)
    plain._forward_hooks[-1] = after  # torch counts from 0


class _Modes(NamedTuple):
    """The modules of one that were in training mode, and a list with an entry per thread that uses it in evaluation mode."""

    training: list[nn.Module]
    users: list[None]


_MODES: WeakKeyDictionary[nn.Module, _Modes] = WeakKeyDictionary()
_MODES_LOCK = RLock()  # a network's own train() may come here


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Use evaluation mode inside the ``with`` block and restore each module's mode afterwards, when the last thread leaves it."""
    look = getattr(type(module), "_in_training", None)
    with _MODES_LOCK:
        held = _MODES.get(module)
        if module.training if look is None else look(module):  # perhaps again, inside of another block
            held = _MODES.setdefault(module, held or _Modes([], []))
            held.training.extend(inner for inner in module.modules() if inner.training)
            module.eval()
        if held is not None:
            held.users.append(None)
    try:
        yield
    finally:
        if held is not None:
            with _MODES_LOCK:
                held.users.pop()
                if not held.users:
                    _MODES.pop(module, None)
                    for inner in held.training:
                        inner.training = True
