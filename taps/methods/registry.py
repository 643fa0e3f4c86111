"""Registry of methods by name.

A method is one file in this folder that calls :func:`register` at its top level; nothing else has to be changed. Programs add
their own with ``taps.METHODS["name"] = taps.Method(...)``.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, cast

from taps.errors import UserError, unknown

if TYPE_CHECKING:
    from taps.core.method import Method

_FOLDER = Path(__file__).parent
_FIRST = ("taps", "taps_budget", "baselines")  # then the others by name


class Registry(MutableMapping[str, "Method"]):
    """Methods by name; the files of this folder are imported on first access."""

    def __init__(self) -> None:
        self._rows: dict[str, Method] = {}
        self._is_loaded = False

    def _load(self) -> dict[str, Method]:
        if not self._is_loaded:
            self._is_loaded = True
            for module in _modules():
                import_module(f"taps.methods.{module}")
            order = dict.fromkeys(_read())  # whichever file was imported first
            self._rows = {name: self._rows[name] for name in {**order, **self._rows}}
        return self._rows

    def __getitem__(self, name: str) -> Method:
        rows = self._load()
        if name not in rows:
            raise KeyError(name)
        return rows[name]

    def __setitem__(self, name: str, method: Method) -> None:
        self._load()
        self.add(name, method)

    def add(self, name: str, method: Method) -> None:
        if name in self._rows:
            raise UserError(f"a method {name!r} is registered already; choose another name")
        self._rows[name] = replace(method, name=name)

    def __delitem__(self, name: str) -> None:
        del self._load()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._load())

    def __len__(self) -> int:
        return len(self._load())


METHODS = Registry()


def register(name: str, method: Method) -> None:
    """Register a method under a name.

    Raises:
        UserError: if the name is taken.
    """
    METHODS.add(name, method)


def method_of(name: str) -> Method:
    """Return the method of a name.

    Raises:
        UserError: for an unknown name.
    """
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    return METHODS[name]


def catalog(without: Sequence[str] = ()) -> dict[str, str]:
    """Return the methods' summaries by name, read from the files because importing them takes as long as importing torch.

    Args:
        without: fields of :class:`taps.core.method.Method`; methods that set one of them are left out.
    """
    known = METHODS._load() if METHODS._is_loaded else METHODS._rows
    found = {} if METHODS._is_loaded else _read(without)
    return found | {
        name: method.summary for name, method in known.items() if not any(getattr(method, field) for field in without)
    }


def _read(without: Sequence[str] = ()) -> dict[str, str]:
    found = {}
    for module in _modules():
        text = (_FOLDER / f"{module}.py").read_text(encoding="utf-8")
        for node in ast.parse(text).body:
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and _is_register(node.value):
                name, row = node.value.args[0], cast(ast.Call, node.value.args[1])
                fields = {keyword.arg: keyword.value for keyword in row.keywords}
                if not fields.keys() & set(without):
                    found[ast.literal_eval(name)] = ast.literal_eval(fields.get("summary") or row.args[0])
    return found


def _is_register(call: ast.Call) -> bool:
    return isinstance(call.func, ast.Name) and call.func.id == "register" and isinstance(call.args[1], ast.Call)


def _modules() -> list[str]:
    """Return the names of the files of this folder that register methods."""
    found = [path.stem for path in sorted(_FOLDER.glob("*.py")) if "\nregister(" in path.read_text(encoding="utf-8")]
    return [*(name for name in _FIRST if name in found), *(name for name in found if name not in _FIRST)]
