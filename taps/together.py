"""All tasks on the same batch, in one pass that computes what they share once.

While it runs, :attr:`taps.gates.State.task` is a :class:`Together`, and every unit and norm hands its call to it. A tensor
stays an ordinary one while all tasks agree on it. From their first difference on it is a :class:`Branches`, one tensor a
group of tasks that still agree. Branches travel along the network's own data flow, whatever code it is made of.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from taps.errors import Inseparable
from taps.gates import State


class Together:
    """Several tasks that all see the same samples.

    Args:
        state: of the model.
        tasks: their names.
    """

    def __init__(self, state: State, tasks: Sequence[str]) -> None:
        self.state = state
        self.tasks = tuple(tasks)

    def run(self, module, args: tuple, kwargs: dict):
        """Run a unit or norm once for each group of tasks that want the same of it, on each input that they have."""
        Changes.check((args, kwargs), self.tasks)
        answers, groups = {}, {}
        x = args[0] if args else next(iter(kwargs.values()), None)
        for task in self.tasks:
            with self.state.running(task):
                answers[task] = module.ask(task, select(x, (task,)))
            groups.setdefault(module.shared(answers[task]) or (task,), []).append(task)
        results = []
        for tasks in groups.values():
            inner = tasks[0] if len(tasks) == 1 else Together(self.state, tasks)
            arguments, keywords = select((args, kwargs), tasks)
            plain = [leaf for leaf in tree_flatten((arguments, keywords))[0] if type(leaf) is Tensor]
            with self.state.running(inner):
                versions = [leaf._version for leaf in plain]
                results.append((tuple(tasks), module.carry_out(tasks[0], answers[tasks[0]], arguments, keywords)))
                if len(groups) > 1 and versions != [leaf._version for leaf in plain]:
                    raise Inseparable("a layer changes its input in place")
        return join(results)

    def read(self, value: Callable[[str], object]):
        """An attribute whose value depends on the task."""
        results = []
        for task in self.tasks:
            with self.state.running(task):
                results.append(((task,), value(task)))
        return join(results)


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
        if self.valid and self.watching and isinstance(self.state.task, Together) and Branches not in map(type, args):
            self.watching = False
            try:
                self.check((args, kwargs), self.state.task.tasks)
            finally:
                self.watching = True
        return function(*args, **kwargs)


def run_together(backbone: nn.Module, state: State, x: Tensor, tasks: Sequence[str]):
    """The backbone's output for several tasks on the same batch: a tree of tensors and :class:`Branches`.

    Raises:
        Inseparable: if the network's code cannot be followed.
    """
    with Changes(state), state.running(Together(state, tasks) if len(tasks) > 1 else tasks[0]):
        features = backbone(x)
        Changes.check(features, tasks)
    return features


def run_head(head: nn.Module, features, task: str):
    """A head's output on what its task sees of the backbone's output; a head that works in place gets its own copy."""
    own = select(features, (task,))
    if type(head) not in (nn.Linear, nn.Identity):
        own = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, own)
    return head(own)


class Variants(nn.Module):
    """What is left of a unit or norm when its tasks' decisions are carried out: one plain module a distinct behaviour.

    Args:
        state: of the predictor.
        choices: for each task the name of its variant.
        variants: plain modules by name.
    """

    def __init__(self, state: State, choices: dict[str, Hashable], variants: dict[Hashable, nn.Module]) -> None:
        super().__init__()
        self.state = state
        self.choices = choices
        self.variants = nn.ModuleList(variants.values())
        self._index = {name: index for index, name in enumerate(variants)}

    def ask(self, task: str, x) -> Hashable:
        return self.choices[task]

    def shared(self, answer: Hashable) -> Hashable:
        return answer

    def carry_out(self, task: str, answer: Hashable, args: tuple, kwargs: dict):
        return self.variants[self._index[answer]](*args, **kwargs)

    def forward(self, *args, **kwargs):
        task = self.state.task
        if isinstance(task, str):
            return self.carry_out(task, self.choices[task], args, kwargs)
        return task.run(self, args, kwargs)

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "variants" not in self.__dict__.get("_modules", {}):
                raise

        def value(task: str):
            return getattr(self.variants[self._index[self.choices[task]]], name)

        task = self.state.task
        if task is None:
            return getattr(self.variants[0], name)
        return value(task) if isinstance(task, str) else task.read(value)


class Predictor(nn.Module):
    """From a batch to ``{task: output}``: what tasks share is computed once, and no gate is left to ask.

    Made by :meth:`taps.model.TaskModel.predictor`. ``torch.export`` turns it into one program with many outputs.
    """

    def __init__(self, backbone: nn.Module, heads: nn.ModuleList, tasks: Sequence[str], state: State) -> None:
        super().__init__()
        self.tasks = tuple(tasks)
        self.state = state
        self.backbone = backbone
        self.heads = heads

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = run_together(self.backbone, self.state, x, self.tasks)
        return {task: run_head(head, features, task) for task, head in zip(self.tasks, self.heads, strict=True)}
