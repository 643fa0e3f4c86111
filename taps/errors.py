"""A user's mistake is one exception type with a one-line message."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable


class UserError(ValueError):
    """Something the caller can put right; the message is one line that says what is wrong and what to do.

    The commands print it and end with exit status 2; in Python it is an ordinary ``ValueError``.
    """


class DivergedError(UserError):
    """The training loss is no longer a finite number."""


class Inseparable(Exception):  # noqa: N818 (not an error)
    """This network cannot run several tasks in one pass; the message says why. Callers run them one by one."""


#: what other libraries call an option
_ALIASES: dict[object, str] = {"learning_rate": "lr", "weight_decay": "wd"}


def check_known(kind: str, names: Iterable[object], allowed: Collection, hint: str = "") -> None:
    """Raise the error of :func:`unknown` for the first of ``names`` that is not one of ``allowed``."""
    for name in names:
        if name not in allowed:
            raise unknown(kind, name, allowed, hint)


def check_choice(name: str, value: object, choices: Collection[str]) -> None:
    """Raise a ``UserError`` if the argument ``name`` is not one of a few choices."""
    if value not in choices:
        raise UserError(f"{name} must be one of {', '.join(choices)}, not {value!r}")


def first_line(error: object, limit: int | None = None) -> str:
    """Return the first line of an error's message with text, at most ``limit`` characters; without one the error's type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:limit]


def unknown(kind: str, name: object, allowed: Iterable[str], hint: str = "") -> UserError:
    """The error for a name that is not one of ``allowed``; offers the nearest ones.

    Args:
        kind: what the name should have been, e.g. ``"task"``.
        name: what was given.
        allowed: every accepted name. Long lists are cut to the nearest few.
        hint: a further sentence.
    """
    names = [str(candidate) for candidate in allowed]
    near = difflib.get_close_matches(str(name), names, n=3, cutoff=0.51)
    if name in _ALIASES and _ALIASES[name] in names:
        near = [_ALIASES[name]]
    message = f"unknown {kind} {str(name)!r}"
    if near:
        message += f"; did you mean {' or '.join(repr(candidate) for candidate in near)}?"
    if len(names) <= 20:
        message += f"{'' if near else ';'} allowed: {', '.join(names) if names else 'none yet'}"
    return UserError(f"{message}; {hint}" if hint else message)
