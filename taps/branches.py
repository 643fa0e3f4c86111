"""Tensors that have become different ones for different tasks, and travel through a network's code as if they were one."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from taps.errors import Inseparable
from taps.gates import State


class Branches:
    """A tensor that has become a different one for different tasks; to the code of a network it looks like a tensor.

    Every torch function and method runs once for each group of tasks that agree on all of its arguments.

    Args:
        parts: groups of tasks and the tensor each of them sees; a task is in one group.
    """

    __class__ = property(lambda self: Tensor)  # so that isinstance(x, Tensor) in a network's code holds

    def __init__(self, parts: list[tuple[tuple[str, ...], Tensor]]) -> None:
        self.parts = parts

    def of(self, task: str) -> Tensor:
        return next(tensor for tasks, tensor in self.parts if task in tasks)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return _each(function, args, kwargs or {})

    def __getattr__(self, name: str):
        attribute = getattr(Tensor, name)
        if callable(attribute):
            return functools.partial(_each_of, attribute, self)
        return _each(lambda tensor: getattr(tensor, name), (self,), {})

    def __bool__(self) -> bool:
        return _each(bool, (self,), {})

    def __int__(self) -> int:
        return _each(int, (self,), {})

    def __float__(self) -> float:
        return _each(float, (self,), {})

    def __len__(self) -> int:
        return len(self.parts[0][1])

    def __iter__(self):
        return iter(self.unbind(0))

    def __hash__(self) -> int:
        return id(self)


def _each_of(method, self, *args, **kwargs):
    return _each(method, (self, *args), kwargs)


def _operator(name: str):
    method = getattr(Tensor, name)
    return lambda self, *args: _each(method, (self, *args), {})


_BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor")
for _name in (
    *(f"__{prefix}{name}__" for name in _BINARY for prefix in ("", "r", "i")),
    *("__lt__", "__le__", "__gt__", "__ge__", "__eq__", "__ne__"),
    *("__neg__", "__abs__", "__invert__", "__getitem__", "__setitem__"),
):
    if hasattr(Tensor, _name):
        setattr(Branches, _name, _operator(_name))


def select(tree, tasks: Sequence[str]):
    """What ``tasks`` see of a tree of values: an ordinary tensor where they agree, else fewer branches."""

    def of_leaf(leaf):
        if type(leaf) is not Branches:
            return leaf
        kept = [(tuple(task for task in group if task in tasks), tensor) for group, tensor in leaf.parts]
        kept = [(group, tensor) for group, tensor in kept if group]
        return kept[0][1] if len(kept) == 1 else Branches(kept)

    return tree_map(of_leaf, tree)


def join(results: list[tuple[tuple[str, ...], object]]):
    """One value out of those of several groups of tasks."""
    if len(results) == 1:
        return results[0][1]
    flat = [(tasks, *tree_flatten(value)) for tasks, value in results]
    spec = flat[0][2]
    if any(other != spec for _, _, other in flat):
        raise Inseparable("a layer returns differently built values for different tasks")
    leaves = []
    for index in range(len(flat[0][1])):
        column = [(tasks, values[index]) for tasks, values, _ in flat]
        first = column[0][1]
        if isinstance(first, Tensor):
            parts: dict[int, tuple[tuple[str, ...], Tensor]] = {}
            for tasks, value in column:
                for group, tensor in value.parts if type(value) is Branches else [(tasks, value)]:
                    parts[id(tensor)] = (parts.get(id(tensor), ((), None))[0] + group, tensor)
            leaves.append(Branches([*parts.values()]) if len(parts) > 1 else next(iter(parts.values()))[1])
        elif all(type(value) is type(first) and value == first for _, value in column):
            leaves.append(first)
        else:
            raise Inseparable("the network decides by values that differ between tasks")
    return tree_unflatten(leaves, spec)


def _each(function, args: tuple, kwargs: dict):
    """Call ``function`` once for each group of tasks that agree on every argument."""
    with Changes.checked_here():
        return _each_group(function, args, kwargs)


def _each_group(function, args: tuple, kwargs: dict):
    branches = [leaf for leaf in tree_flatten((args, kwargs))[0] if type(leaf) is Branches]
    groups: dict[tuple[int, ...], list[str]] = {}
    for task in (task for group, _ in branches[0].parts for task in group):
        groups.setdefault(tuple(id(branch.of(task)) for branch in branches), []).append(task)
    in_place = _works_in_place(function, kwargs)
    if in_place:
        if "out" in kwargs:
            raise Inseparable("the network writes into a tensor (out=) that tasks share")
        args = (_owned(args[0], [*groups.values()]), *args[1:])
    results = []
    for group in groups.values():
        arguments, keywords = select((args, kwargs), group)
        Changes.check((arguments, keywords), group)
        results.append((tuple(group), function(*arguments, **keywords)))
        if in_place:
            Changes.record(arguments[0], group)
    return join(results)


def _works_in_place(function, kwargs: dict) -> bool:
    name = getattr(function, "__name__", "")
    if kwargs.get("inplace") or "out" in kwargs or name == "__setitem__":
        return True
    if name.startswith("__"):
        return name.startswith("__i") and name[3:-2] in _BINARY
    return name.endswith("_")


def _owned(target, groups: list[list[str]]) -> Branches:
    """A target of an in-place function in which no two groups share memory."""
    if type(target) is not Branches:
        Changes.record(target, ())  # x += y gives the name x a new value; every other name of it is out of date
        return Branches([(tuple(group), target.clone()) for group in groups])
    parts = []
    for members, tensor in target.parts:
        inside = [tuple(group) for group in groups if group[0] in members]
        if len(inside) > 1:
            Changes.record(tensor, ())
        parts.extend((group, tensor.clone() if len(inside) > 1 else tensor) for group in inside)
    target.parts = parts
    return target


class Changes(TorchFunctionMode):
    """Remembers memory that in-place functions changed, and for which tasks; refuses to use it for others."""

    current: Changes | None = None

    def __init__(self, state: State) -> None:
        super().__init__()
        self.state = state
        self.watching = True
        self.valid: dict[StorageWeakRef, frozenset[str]] = {}

    @classmethod
    def record(cls, tensor: Tensor, tasks: Sequence[str]) -> None:
        """From now on the memory of ``tensor`` holds what ``tasks`` see, and only they."""
        if cls.current is not None:
            valid = {reference: those for reference, those in cls.current.valid.items() if not reference.expired()}
            reference = StorageWeakRef(tensor.untyped_storage())
            valid[reference] = frozenset(tasks) & valid.get(reference, frozenset(tasks))
            cls.current.valid = valid

    @classmethod
    def check(cls, tree, tasks: Sequence[str]) -> None:
        """Raise ``Inseparable`` if ``tasks`` would read memory that is out of date for one of them."""
        if cls.current is None or not cls.current.valid:
            return
        for leaf in tree_flatten(tree)[0]:
            if isinstance(leaf, Tensor) and type(leaf) is not Branches:
                those = cls.current.valid.get(StorageWeakRef(leaf.untyped_storage()))
                if those is not None and not those.issuperset(tasks):
                    raise Inseparable("the network changes a tensor in place that other tasks use again")

    @classmethod
    @contextmanager
    def checked_here(cls) -> Iterator[None]:
        """Inside, functions on the tensors of one group of tasks are not taken for functions on what all share."""
        changes = cls.current
        before = changes is not None and changes.watching
        try:
            if changes is not None:
                changes.watching = False
            yield
        finally:
            if changes is not None:
                changes.watching = before

    def __enter__(self) -> Changes:
        self.outer, Changes.current = Changes.current, self
        return super().__enter__()

    def __exit__(self, *error) -> None:
        Changes.current = self.outer
        super().__exit__(*error)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tasks = getattr(self.state.task, "tasks", None)  # those that share what is computed now
        if self.valid and self.watching and tasks and Branches not in map(type, args):
            self.watching = False
            try:
                self.check((args, kwargs), tasks)
            finally:
                self.watching = True
        return function(*args, **kwargs)
