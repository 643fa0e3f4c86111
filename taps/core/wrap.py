"""Wrap a network's units and norms in place."""

from __future__ import annotations

from collections import deque
from types import MethodType
from typing import Any

from torch import nn

from taps.core.execution import Place, State
from taps.core.find import Found, find_layers, is_norm
from taps.core.modules import OF_MODULES, members
from taps.core.norm import TaskNorm
from taps.core.unit import GatedUnit
from taps.errors import UserError


def wrap(
    net: nn.Module, found: list[Found], state: State, norm: str, frozen: bool, by_policy: bool = False
) -> tuple[nn.Module, list[GatedUnit], list[TaskNorm]]:
    """Replace each module found by a :class:`GatedUnit` and each norm by a :class:`TaskNorm`.

    Args:
        net: changed in place; its output without a task stays the same.
        found: the units, in network order.
        state: shared by everything that is wrapped.
        norm: norm policy.
        frozen: whether the base is frozen.
        by_policy: whether norms follow the routes that policies give tasks, instead of whether the preceding layer is tuned.

    Returns:
        The network (a new object only if the network itself is a unit), its units and its norms in network order.

    Raises:
        UserError: if the network is wrapped already.
    """
    if any(isinstance(module, (GatedUnit, TaskNorm)) for module in net.modules()):
        raise UserError("this network is adapted already: add tasks to its model, or adapt a fresh network")
    for unit in found:
        for name in unit.parameter_names:
            parameter = unit.module.get_parameter(name)
            if not parameter.is_floating_point():
                raise UserError(
                    f"unit {unit.name!r}: parameter {name!r} is {parameter.dtype}, deltas need floating point"
                )
    by_module = {id(unit.module): unit for unit in found}
    replacement: dict[int, nn.Module] = {}
    units: list[GatedUnit] = []
    norms: list[TaskNorm] = []
    inside_norm: set[int] = set()
    layers = {id(layer.module) for layer in find_layers(net)}
    feeder: GatedUnit | None = None  # of the next norm; norms fed by a layer that is not a unit stay shared
    for name, module in net.named_modules():
        if id(module) in layers and id(module) not in by_module:
            feeder = None
        if id(module) in by_module:
            unit = by_module[id(module)]
            gated = GatedUnit(name, module, unit.parameter_names, state, unit.shortcut)
            units.append(gated)
            feeder = gated if unit.parameter_names and not by_policy else None
            replacement[id(module)] = gated
        elif id(module) not in inside_norm and is_norm(module):
            around = [index for index, unit in enumerate(found) if unit.contains(Found(name, module, ()))]
            normed = TaskNorm(name, module, state, norm, feeder, frozen, len(units), max(around, default=None))
            inside_norm.update(id(inner) for inner in module.modules())
            norms.append(normed)
            replacement[id(module)] = normed
    for parent in list(net.modules()):
        for child_name, child in list(parent._modules.items()):
            if id(child) in replacement:
                parent._modules[child_name] = replacement[id(child)]
        # Layers that the network also holds in a list or the like, and may call there.
        others = {known: place for known, place in replacement.items() if known != id(parent)}  # not its own methods
        for name, value in list(vars(parent).items()):
            if name not in OF_MODULES and _holds(value, others):
                vars(parent)[name] = _with_places(value, others)
                state.hides_layers = True
    for wrapper in units:
        wrapper.shortcut = replacement.get(id(wrapper.shortcut), wrapper.shortcut)
        inner = list(wrapper.base.modules())
        holds_places = any(isinstance(module, Place) for module in inner)
        wrapper.changes_itself = frozen and not holds_places and next(wrapper.base.buffers(), None) is not None
    return replacement.get(id(net), net), units, norms


def _holds(value: Any, replacement: dict[int, nn.Module], around: tuple[int, ...] = ()) -> bool:
    """Return whether a plain attribute is or holds one of the modules, or a method of one; ``around``: what it is held by."""
    if id(value) in around:
        return False
    held = value.__self__ if isinstance(value, MethodType) else value
    return id(held) in replacement or any(_holds(one, replacement, (*around, id(value))) for one in members(value))


def _with_places(value: Any, replacement: dict[int, nn.Module], around: tuple[int, ...] = ()) -> Any:
    """Return a plain attribute with the modules in it replaced; lists and dictionaries keep their identity."""
    if id(value) in around:
        return value
    if isinstance(value, nn.Module):
        return replacement.get(id(value), value)
    if isinstance(value, MethodType):
        place = replacement.get(id(value.__self__))
        if place is None:
            return value
        is_call = value.__name__ in ("forward", "__call__", "_call_impl", "_wrapped_call_impl")
        if is_call:
            return place
        is_known = hasattr(type(value.__self__), value.__name__)
        return getattr(place, value.__name__) if is_known else MethodType(value.__func__, place)
    if isinstance(value, dict):
        items = [tuple(_with_places(one, replacement, (*around, id(value))) for one in item) for item in value.items()]
        value.clear()
        value.update(items)
    elif isinstance(value, (list, tuple, set, deque)):
        inner = [_with_places(one, replacement, (*around, id(value))) for one in value]
        if isinstance(value, tuple):
            return type(value)(*inner) if hasattr(value, "_fields") else type(value)(inner)
        value.clear()
        (value.update if isinstance(value, set) else value.extend)(inner)
    return value
