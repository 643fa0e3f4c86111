"""Several tasks on the same samples, with common computation done once.

The tasks run one after another. A module that behaves alike for two tasks and gets the same inputs from both is run only for the
first one; the second one gets the stored output. Nothing is traced or analysed, so that every network gives the same results as
running its tasks one by one. Inputs are the same if they are the same tensors, unchanged since; until a task first computes
something of its own, equal tensors count too, because the network's code has then made them from the same tensors.
In-place activations work on copies where this does not change results.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from functools import wraps
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_structure

from taps.core.checkpointing import without_reentrant_warning
from taps.core.execution import OneTask, Place, State
from taps.core.modules import OF_MODULES, computed_tensors, evaluating, first_input, members
from taps.core.network import Network
from taps.errors import UserError
from taps.multitask.trees import flatten, map_tensors, run_head, tensors


class SharedPass:
    """The stored calls of modules in one pass of several tasks."""

    def __init__(self, tasks: Sequence[str], hides_layers: bool = False) -> None:
        self.tasks, self.hides_layers = tuple(tasks), hides_layers
        self.records: dict[Hashable, list[_Record]] = {}
        self.is_inside = False
        #: ids of the modules of which an attribute was set, so that inputs alone do not determine their outputs
        self.touched: set[int] = set()
        #: ids of the tensors that several tasks may get: the call's own and outputs in the records, which keep them alive
        self.common: set[int] = set()
        self._keys: dict[tuple[int, str], Hashable | None] = {}
        self._of_places: dict[tuple[int, str], Hashable | None] = {}
        self._alike: dict[int, bool] = {}
        self._of_modules: dict[tuple[int, str], Hashable | None] = {}

    def may_be_common(self, inputs: list) -> bool:
        """Return whether other tasks may have given a module the same tensors as these, rather than equal ones."""
        return all(id(x) in self.common or not isinstance(x, Tensor) or isinstance(x, nn.Parameter) for x in inputs)

    def key(self, view: SharedView, module: nn.Module, task: str) -> Hashable | None:
        """Return a key for what a module computes for a task; ``None`` if its parts must be looked up one by one."""
        known = (id(module), task)
        if known not in self._keys:
            self._keys[known] = self._find_key(view, module, task)
        return self._keys[known]

    def changes(self, module: nn.Module, task: str) -> bool:
        """Return whether a module itself, and not only a part of it, gives a task something of its own."""
        return isinstance(module, Place) and (torch.is_grad_enabled() or self._combined_key([module], task) is None)

    def differs(self, view: SharedView, module: nn.Module, key: tuple) -> bool:
        """Return whether a module with this key gives the task gradients of its own, even if its output equals the other tasks'."""
        if not torch.is_grad_enabled() or all(own == "base" for own in key):
            return False
        if id(module) not in self._alike:
            self._alike[id(module)] = len({self.key(view, module, task) for task in self.tasks}) == 1
        return not self._alike[id(module)]

    def _find_key(self, view: SharedView, module: nn.Module, task: str) -> Hashable | None:
        places = view.places(module)
        if not places:
            return () if view.is_common(module) else None
        key = self._sharing_key(module, places, task)
        if key is None or len(places) == 1:
            return key
        same = all(self._sharing_key(module, places, other) == key for other in self.tasks)
        return key if same else None

    def _sharing_key(self, module: nn.Module, places: Sequence[Place], task: str) -> Hashable | None:
        known = (id(module), task)
        if known not in self._of_modules:
            self._of_modules[known] = self._combined_key(places, task)
        return self._of_modules[known]

    def _combined_key(self, places: Sequence[Place], task: str) -> Hashable | None:
        found = []
        for place in places:
            known = (id(place), task)
            if known not in self._of_places:
                self._of_places[known] = place.settled_key(task)
            if self._of_places[known] is None:
                return None
            found.append(self._of_places[known])
        return tuple(found)


class OneOfSeveral(OneTask):
    """The execution of one task of a :class:`SharedPass`."""

    def __init__(self, task: str, shared: SharedPass) -> None:
        super().__init__(task)
        self.shared = shared
        #: whether the task has computed anything that may differ from the other tasks
        self.has_differed = shared.hides_layers

    def run(self, place: Place, args: tuple, kwargs: dict):
        ready = place.ready_for(self.task)
        if ready is not None and ready is not place.__dict__["_modules"]["base"]:
            return ready(*args, **kwargs)
        return place.compute(self.task, place.decision_for(self.task, first_input(args, kwargs)), args, kwargs)

    def read(self, value: Callable[[str | None], object]):
        self.has_differed = True
        return super().read(value)

    def reused(self, module: nn.Module) -> None:
        """Hook that is called when a module's stored output is reused."""


class _Record:
    """A call of a module: its inputs and output, and their versions at that time.

    A task that calls a module twice gets an output for each call, as without records: random modules draw twice, and in a program
    that is being exported, where tensors have no values, calls are told apart by their order.
    """

    def __init__(self, inputs: list, structure: object, task: str) -> None:
        self.inputs, self.input_versions, self.structure = inputs, versions(inputs), structure
        #: those that have its output
        self.tasks = {task}
        self.output: object = None

    def answered(self, output: object, parts: list) -> None:
        self.output, self.parts, self.output_versions = output, parts, versions(parts)

    def serves(self, inputs: list, structure: object, by_value: bool) -> bool:
        """Return whether the stored output is valid for these inputs; ``by_value``: equal tensors count as the same."""
        if len(inputs) != len(self.inputs) or structure != self.structure:
            return False
        if versions(self.parts) != self.output_versions:
            return False
        if versions(self.inputs) != self.input_versions:  # their earlier values are no longer known
            return False
        return all(a is b or _is_equal(a, b, by_value) for a, b in zip(inputs, self.inputs, strict=True))


def _is_equal(a: object, b: object, by_value: bool) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        alike = by_value and a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype
        alike = alike and a.requires_grad == b.requires_grad
        return alike and (torch.compiler.is_exporting() or torch.equal(a, b))
    return type(a) is type(b) and isinstance(a, (int, float, str, bool, torch.Size, torch.dtype)) and a == b


def versions(values: Sequence[object]) -> list[int]:
    """Return numbers that change when tensors are changed in place."""
    return [0 if value.is_inference() else value._version for value in values if isinstance(value, Tensor)]


class SharedView:
    """A view of a network whose modules remember their calls during a pass; it has the same modules with the same state.

    Args:
        root: the network; its structure must not change.
        state: state of its model.
        common: if each task has its own network, ids of the modules that these have in common.
        differing: ids of the modules in which this network differs from others.
        of_some: for the ids of the modules that some of the others have too, whether no more of them have any part of it.
    """

    def __init__(
        self,
        root: nn.Module,
        state: State,
        common: Set[int] | None = None,
        differing: Set[int] = frozenset(),
        of_some: Mapping[int, bool] = MappingProxyType({}),
    ) -> None:
        self.root, self.state, self.common = root, state, common
        self.differing, self.of_some = differing, of_some
        self._forget()

    def _forget(self) -> None:
        self._seen: dict[int, tuple[nn.Module, nn.Module]] = {}
        self._places: dict[int, list[Place]] = {}
        self._collections: dict[int, list] = {}
        self._classes: dict[type, type] = {}
        #: whether in-place activations work on copies, unless the network relies on the change of their input
        self.copies = True
        self._is_checked = False

    def __getstate__(self) -> dict:  # a copy rebuilds everything that is keyed by the identity of modules
        return {"root": self.root, "state": self.state, "common": None, "differing": frozenset(), "of_some": {}}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._forget()

    def run(self, execution: OneOfSeveral, args: tuple, kwargs: dict):
        """Call the network with the execution of one of several tasks."""
        self.check_copies(args, kwargs)
        execution.shared.common.update(map(id, tensors((args, kwargs))))
        return self.state.run(execution, self.of(self.root), args, kwargs)

    def check_copies(self, args: tuple, kwargs: dict) -> None:
        """Test once whether the network gives the same results with copies; timm's and torchvision's networks are known to."""
        root = self.root.base if isinstance(self.root, Place) else self.root
        known = self._is_checked or type(root).__module__.split(".")[0] in ("timm", "torchvision")
        if known or torch.compiler.is_exporting():
            return
        if not any(getattr(module, "inplace", False) for module in self.root.modules()):
            self._is_checked = True
            return
        with evaluating(self.root), without_reentrant_warning(), torch.random.fork_rng(devices=[]), torch.no_grad():
            plain = flatten(self.state.run(None, self.root, *_copied(args, kwargs)))[0]
            seen = flatten(self.state.run(None, self.of(self.root), *_copied(args, kwargs)))[0]
        self.copies = all(torch.equal(a, b) for a, b in zip(plain, seen, strict=True) if isinstance(a, Tensor))
        self._is_checked = True  # only now, for other threads

    def places(self, module: nn.Module) -> list[Place]:
        """Return the places in a module, including the module itself."""
        if id(module) not in self._places:
            self._places[id(module)] = _places_of(module, self.state.hides_layers)
        return self._places[id(module)]

    def contents(self, module: nn.Module) -> list[tuple[int, ...]]:
        """Return what the lists and dictionaries hold that are attributes of a module or of its parts, by identity."""
        held = self._collections.get(id(module))
        if held is None:
            own = (part for part in module.modules() if not type(part).__module__.startswith("taps.core."))
            plain = (value for part in own for name, value in vars(part).items() if name not in OF_MODULES)
            held = [value for value in plain if isinstance(value, (list, dict, set, deque))]
            self._collections[id(module)] = held
        return [tuple(map(id, members(one))) for one in held] if held else held

    def is_common(self, module: nn.Module) -> bool:
        """Return whether a module without places is the same object for all tasks."""
        return self.common is None or id(module) in self.common or id(module) in self.of_some or not module._modules

    def _remembering(self, kind: type) -> type:
        if kind not in self._classes:
            names = {"__slots__": ("_taps_module", "_taps_view"), "__module__": kind.__module__}
            self._classes[kind] = type(
                kind.__name__, (_Remembering, kind), {**names, "__qualname__": kind.__qualname__}
            )
        return self._classes[kind]

    def of(self, module: nn.Module) -> nn.Module:
        """Return this view's version of the module."""
        if isinstance(module, torch.jit.ScriptModule):
            return module
        known = self._seen.get(id(module))
        if known is None:
            seen: Any = object.__new__(self._remembering(type(module)))
            object.__setattr__(
                seen, "__dict__", module.__dict__
            )  # shared state: modes, buffers and hooks are the module's
            object.__setattr__(seen, "_taps_view", self)
            object.__setattr__(seen, "_taps_module", module)
            known = self._seen[id(module)] = (seen, module)
        return known[0]


class _Remembering:
    """Mixin for the class of each module of a :class:`SharedView`."""

    __slots__ = ()

    def __init_subclass__(cls) -> None:
        """Hide the class from what a network's own classes do with their subclasses."""

    @property
    def _modules(self) -> dict[str, nn.Module | None]:
        inner = self.__dict__["_modules"]
        view = _view_of(self)
        return (
            inner
            if view is None
            else {name: None if child is None else view.of(child) for name, child in inner.items()}
        )

    @_modules.setter
    def _modules(self, modules: dict[str, nn.Module | None]) -> None:
        self.__dict__["_modules"] = modules

    @property
    def inplace(self) -> bool:  # an activation that changes its input would invalidate the stored one
        view = _view_of(self)
        own = self.__dict__["inplace"] if "inplace" in self.__dict__ else super().inplace  # type: ignore[misc]
        return own and (view is None or not view.copies)

    @inplace.setter
    def inplace(self, value: bool) -> None:
        self.__dict__["inplace"] = value

    def _unseen(self) -> nn.Module:  # no plain name, which a parameter of the module might have
        """Return the module itself."""
        return self if _view_of(self) is None else self._taps_module  # type: ignore[attr-defined,return-value]

    def __hash__(self) -> int:
        return hash(self._unseen())

    def __eq__(self, other: object) -> bool:  # networks look for modules in collections
        return self._unseen() is (other._unseen() if isinstance(other, _Remembering) else other)

    def __setattr__(self, name: str, value: object) -> None:
        known = self.__dict__.get(name)
        is_same = type(known) is type(value) and isinstance(value, _PLAIN) and known == value
        super().__setattr__(name, value)
        view = None if is_same else _view_of(self)
        call = None if view is None else view.state.call
        if call is not None and isinstance(call.execution, OneOfSeveral):
            call.execution.shared.touched.add(id(self._taps_module))  # type: ignore[attr-defined]

    def __getattr__(self, name: str):
        child, view = self.__dict__["_modules"].get(name), _view_of(self)
        if child is None or view is None or (isinstance(self, Place) and name not in ("base", "shortcut")):
            return super().__getattr__(name)  # type: ignore[misc]
        return view.of(child)

    def __call__(self, *args, **kwargs):
        # A tracer identifies modules by their position in a network, which these do not have.
        run = self.forward if torch.compiler.is_exporting() else super().__call__  # type: ignore[attr-defined,misc]
        view = _view_of(self)
        call = None if view is None else view.state.call
        if view is None or call is None or not isinstance(call.execution, OneOfSeveral) or call.look_for_checkpoints():
            return run(*args, **kwargs)
        module, execution = self._taps_module, call.execution  # type: ignore[attr-defined]
        shared = execution.shared
        if shared.is_inside:
            return run(*args, **kwargs)
        if shared.touched and _is_touched(module, shared):
            execution.has_differed = True
            return run(*args, **kwargs)
        is_of_some = id(module) in view.of_some
        is_own = id(module) in view.differing and not is_of_some
        key = None if is_own else shared.key(view, module, execution.task)
        if key is None:
            execution.has_differed |= is_own or shared.changes(module, execution.task)
            return run(*args, **kwargs)
        inputs, form = _leaves(args, kwargs)
        held = view.contents(module)
        structure = (form, held) if held else form
        differs = is_of_some or shared.differs(view, module, key)
        record = None
        if not execution.has_differed or shared.may_be_common(inputs):
            records = shared.records.setdefault((id(module), key), [])
            for known in records:
                if execution.task in known.tasks:
                    continue
                if known.serves(inputs, structure, by_value=not execution.has_differed):
                    known.tasks.add(execution.task)
                    execution.reused(module)
                    execution.has_differed |= differs
                    return known.output
            record = _Record(inputs, structure, execution.task)
        shared.is_inside = view.of_some.get(id(module), True)
        try:
            output = run(*args, **kwargs)
        finally:
            shared.is_inside = False
        execution.has_differed |= differs
        if (held and held != view.contents(module)) or (shared.touched and _is_touched(module, shared)):
            execution.has_differed = True
        elif record is not None:
            parts = [output] if isinstance(output, Tensor) else flatten(output)[0]
            if all(isinstance(part, Tensor) for part in parts):
                record.answered(output, parts)
                records.append(record)
                shared.common.update(map(id, parts))
        return output


#: types of attributes that say no more when they are set to an equal value
_PLAIN = (int, float, str, torch.Size, type(None))


def _is_touched(module: nn.Module, shared: SharedPass) -> bool:
    """Return whether an attribute of a module or of a part of it was set in this pass."""
    return any(id(part) in shared.touched for part in module.modules())


def _view_of(module: object) -> SharedView | None:
    try:
        return object.__getattribute__(module, "_taps_view")
    except AttributeError:  # made by the network's code, for example a slice of an ``nn.Sequential``
        return None


def _copied(args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    return map_tensors(Tensor.clone, (args, kwargs))  # type: ignore[return-value]


def _leaves(args: tuple, kwargs: dict) -> tuple[list, object]:
    """Return a call's inputs, and what else a stored output depends on: their structure, and whether gradients are wanted."""
    if not kwargs and all(isinstance(value, Tensor) for value in args):
        return list(args), torch.is_grad_enabled()
    return flatten((args, kwargs))[0], (torch.is_grad_enabled(), tree_structure((args, kwargs)))


def outputs(model: Network, view: SharedView, args: tuple, kwargs: dict, tasks: Sequence[str]) -> dict[str, Tensor]:
    """Return every task's output on the same batch in the model's current mode; see :meth:`taps.task_model.TaskModel.predict`."""
    if len(tasks) == 1:
        return {tasks[0]: model.heads[tasks[0]](model.run(tasks[0], args, kwargs))}
    args, kwargs = outside_of_inference(args, kwargs)
    shared, found = SharedPass(tasks, model.state.hides_layers), {}
    with _outside_of_inference():
        for task, given in zip(tasks, _unchanged(args, kwargs), strict=False):
            found[task] = run_head(model.heads[task], view.run(OneOfSeveral(task, shared), *given))
    return found


def _unchanged(args: tuple, kwargs: dict) -> Iterator[tuple[tuple, dict]]:
    """Yield a call's inputs again and again, as copies once a network has changed them in place."""
    if torch.compiler.is_compiling() or torch.compiler.is_exporting():
        while True:
            yield args, kwargs
    before, known = map_tensors(torch.clone, (args, kwargs)), versions(tensors((args, kwargs)))
    while True:
        yield args, kwargs
        if versions(tensors((args, kwargs))) != known:
            args, kwargs = map_tensors(torch.clone, before)  # type: ignore[misc]
            known = versions(tensors((args, kwargs)))


@contextmanager
def _outside_of_inference() -> Iterator[None]:
    """Leave inference mode inside the ``with`` block, because it does not track changes of tensors."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


def outside_of_inference(args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Return inputs whose changes are tracked, with copies of inference tensors."""
    if not any(tensor.is_inference() for tensor in tensors((args, kwargs))):
        return args, kwargs
    with torch.inference_mode(False):
        return map_tensors(lambda t: t.clone() if t.is_inference() else t, (args, kwargs))  # type: ignore[return-value]


def tracked(function: Callable) -> Callable:
    """Decorator of methods that compute without gradients, and need to see which tensors are changed in place."""

    @wraps(function)
    def run(self, *args, **kwargs):
        with torch.inference_mode(False), torch.no_grad():
            args, kwargs = outside_of_inference(args, kwargs)
            return function(self, *args, **kwargs)

    return run


class Predictor(nn.Module):
    """A module from a batch to ``{task: output}`` that does shared computation once and contains no gates.

    Made by :meth:`taps.task_model.TaskModel.predictor`. ``torch.export`` turns it into one program with many outputs.

    Args:
        networks: plain network of each task; they share modules and tensors.
        heads: head of each task.
    """

    def __init__(self, networks: Mapping[str, nn.Module], heads: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.tasks = tuple(networks)
        self.networks, self.heads = nn.ModuleList(networks.values()), nn.ModuleList(heads.values())
        self.state = State()
        self._find_views()

    def _find_views(self) -> None:
        modules = [{id(module): module for module in network.modules()} for network in self.networks]
        tensors_of = [{id(t) for t in (*network.parameters(), *network.buffers())} for network in self.networks]
        common, same = set.intersection(*map(set, modules)), set.intersection(*tensors_of)
        holders: dict[int, set[int]] = {}
        for index, own in enumerate(modules):
            for known in own:
                holders.setdefault(known, set()).add(index)

        def differs(module: nn.Module) -> bool:
            loose = (*module._parameters.values(), *module._buffers.values())
            return not module._modules or any(tensor is not None and id(tensor) not in same for tensor in loose)

        self._views = []
        for network, own in zip(self.networks, modules, strict=True):
            differing = {i for i, module in own.items() if i not in common and differs(module)}
            of_some = {
                i: all(holders[id(part)] == holders[i] for part in module.modules())
                for i, module in own.items()
                if i not in common and len(holders[i]) > 1
            }
            self._views.append(SharedView(network, self.state, common, differing, of_some))

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._find_views()

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_views"}

    def forward(self, x: Tensor | None = None, **inputs) -> dict[str, Tensor]:
        args, kwargs = outside_of_inference(() if x is None else (x,), inputs)
        shared, found = SharedPass(self.tasks, self.state.hides_layers), {}
        with _outside_of_inference():
            each = zip(self.tasks, self._views, self.heads, _unchanged(args, kwargs), strict=False)
            for task, view, head, given in each:
                found[task] = run_head(head, view.run(OneOfSeveral(task, shared), *given))
        return found


def predictor(model: Network, tasks: Sequence[str]) -> Predictor:
    """Return one module for all tasks; see :meth:`taps.task_model.TaskModel.predictor`. The model must be in evaluation mode.

    Raises:
        ValueError: if a decision depends on the input, so that no fixed network is equivalent.
    """
    if not tasks:
        raise UserError("a predictor needs at least one task")
    places, hides = (*model.units, *model.task_norms), model.state.hides_layers
    parts = list(_parts(model.backbone))
    if hides:  # modules with lists of places come after these
        parts.sort(key=lambda module: not isinstance(module, Place))
    modules = {module: _places_of(module, hides) for module in parts}
    copies: dict[tuple, nn.Module] = {}  # copies of modules, by their behaviour
    tensors_of = computed_tensors(model.backbone)  # copies of tensors that belong to no place
    networks = {}
    for task in tasks:
        keys: dict[Place, Hashable] = {place: place.settled_key(task) or (task,) for place in places}
        memo: dict[int, Any] = dict(tensors_of)
        for module, inner in modules.items():
            name = (module, *(keys[place] for place in inner))
            if name not in copies:
                if isinstance(module, Place):
                    copies[name] = module.merged(task, dict(memo))
                else:
                    copies[name] = copy.deepcopy(module, memo)
            memo[id(module)] = copies[name]
        networks[task] = memo[id(model.backbone)]
        loose = (tensor for module in modules for tensor in (*module._parameters.values(), *module._buffers.values()))
        tensors_of.update((id(tensor), memo[id(tensor)]) for tensor in loose if id(tensor) in memo)
    heads = {task: copy.deepcopy(model.heads[task]) for task in tasks}
    made = Predictor(networks, heads).eval()
    made.state.hides_layers = model.state.hides_layers
    made.networks.requires_grad_(False)
    return made


def _places_of(module: nn.Module, hides_layers: bool) -> list[Place]:
    """Return the places in a module, including the module itself and, if ``hides_layers``, those that it holds in collections."""
    found = [inner for inner in module.modules() if isinstance(inner, Place)]
    if hides_layers:
        own = (part for part in module.modules() if not type(part).__module__.startswith("taps.core."))
        held = [value for part in own for name, value in vars(part).items() if name not in OF_MODULES]
        found += [place for place in _places_in(held, ()) if place not in found]
    return found


def _places_in(value: Any, around: tuple[int, ...]) -> Iterator[Place]:
    if isinstance(value, Place):
        yield value
        return
    for one in members(value) if id(value) not in around else ():
        yield from _places_in(one, (*around, id(value)))


def _parts(module: nn.Module, is_inside: bool = False) -> Iterator[nn.Module]:
    """Yield a network's modules, inner ones first, without those that a place copies by itself: parts of norms, and of units whose
    weights tasks may change."""
    parts = module.children()
    if isinstance(module, Place):
        parts = (part for part in (module.base, getattr(module, "shortcut", None)) if part is not None)
        is_inside = is_inside or bool(getattr(module, "parameter_names", True))
    for part in parts:
        yield from _parts(part, is_inside)
    if isinstance(module, Place) or not is_inside:
        yield module
