"""Outputs of networks as trees of tensors: tuples, lists, dictionaries and dataclasses of any depth."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from functools import partial
from operator import itemgetter

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten


def _is_dataclass(value: object) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _opened(tree):
    """Return the tree with each dataclass wrapped as :class:`_Opened`."""
    return tree_map(lambda leaf: _Opened(leaf) if _is_dataclass(leaf) else leaf, tree)


class _Opened:
    """A dataclass instance and its fields."""

    def __init__(self, value) -> None:
        self.value = value
        self.fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}

    def filled(self, fields):
        new = copy.copy(self.value)
        for name, value in fields.items():
            object.__setattr__(new, name, value)  # works for frozen dataclasses too
        return new


def flatten(tree) -> tuple[list, Callable[[list], object]]:
    """Return the leaves of a tree and a function that builds a tree of the same structure from other leaves."""
    if isinstance(tree, Tensor):
        return [tree], itemgetter(0)
    leaves, spec = tree_flatten(_opened(tree))
    parts: list = []
    builders: list[tuple[int, Callable[[list], object]]] = []
    for leaf in leaves:
        if isinstance(leaf, _Opened):
            inner, of_fields = flatten(leaf.fields)
            builders.append((len(inner), partial(_refilled, leaf, of_fields)))
            parts.extend(inner)
        else:
            builders.append((1, itemgetter(0)))
            parts.append(leaf)

    def build(values: list):
        found, start = [], 0
        for size, make in builders:
            found.append(make(values[start : start + size]))
            start += size
        return tree_unflatten(found, spec)

    return parts, build


def _refilled(leaf: _Opened, of_fields: Callable[[list], object], values: list) -> object:
    return leaf.filled(of_fields(values))


def tensors(tree) -> list[Tensor]:
    """Return the tensors of a tree."""
    return [leaf for leaf in flatten(tree)[0] if isinstance(leaf, Tensor)]


def map_tensors(function: Callable[[Tensor], object], tree):
    """Return the tree with ``function`` applied to each of its tensors."""
    leaves, build = flatten(tree)
    return build([function(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves])


def run_head(head: nn.Module, features):
    """Return a head's output; a head that may work in place gets a copy, since tasks can share the same features."""
    if type(head) not in (nn.Linear, nn.Identity):
        features = map_tensors(Tensor.clone, features)
    return head(features)
