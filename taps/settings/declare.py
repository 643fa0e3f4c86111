"""Declarations of settings: one frozen dataclass per group, with the name, default, range and help of each setting.

The command-line parser, ``--config`` files, ``settings.yaml`` and the checks of Python arguments are all derived from them.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import inspect
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from taps.errors import UserError, unknown


@dataclass(frozen=True)
class Declaration:
    """The properties of a setting besides its name and default.

    Attributes:
        help: the help text, one line.
        kind: ``int``, ``float``, ``str``, ``bool``; ``"steps"``: a number of steps, or of passes over the training samples such
            as ``"20e"``; ``"share"``: ``0.02`` or ``"2%"``; ``"weights"``: numbers by task, ``TASK=X``.
        low, high: the range of a number; ``above`` excludes ``low`` itself.
        choices: the allowed values.
        nargs: for lists, ``"+"`` or their length.
        metavar: the placeholder of the value in the help, or one for each of several values.
        aliases: other names of the option.
        negatable: whether ``--no-name`` turns a switch off.
        shown: text that the help shows instead of the default.
        repeats: whether ``settings.yaml`` includes the setting, so that a run repeated from it uses the same value.
        may_be_empty: whether a list may have no values.
    """

    help: str
    kind: Any = str
    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    choices: tuple | None = None
    nargs: str | int | None = None
    metavar: str | tuple[str, ...] | None = None
    aliases: tuple[str, ...] = ()
    negatable: bool = False
    shown: str | None = None
    repeats: bool = True
    may_be_empty: bool = False


def setting(default: Any, help: str, kind: Any = str, **more: Any) -> Any:
    """Return a dataclass field that declares a setting; see :class:`Declaration`."""
    metadata = {"setting": Declaration(help, kind, may_be_empty=default == [], **more)}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def several(kind: type, name: str, more: str) -> Any:
    """Return a field like that of another group, of which several values may be given; ``more`` is added to the help."""
    field = next(own for own in dataclasses.fields(kind) if own.name == name)
    declared: Declaration = field.metadata["setting"]
    changed = dataclasses.replace(declared, help=f"{declared.help}; {more}" if declared.help else more, nargs="+")
    return dataclasses.field(default=field.default, metadata={"setting": changed})


@dataclass(frozen=True)
class Settings:
    """The base class of all groups; a program's settings are a class that inherits from several groups.

    Attributes:
        title: heading of the group in the help.
        description, epilog: what the help of a program says before and after its options.
        positional: settings that are positional arguments.
        required: settings without which a program does nothing.
        missing: what it then says.
    """

    title: ClassVar[str] = "options"
    description: ClassVar[str] = ""
    epilog: ClassVar[str] = ""
    positional: ClassVar[tuple[str, ...]] = ()
    required: ClassVar[tuple[str, ...]] = ()
    missing: ClassVar[str] = ""


@dataclass(frozen=True)
class FromFile(Settings):
    """The file that may hold a program's settings."""

    title: ClassVar[str] = "settings"
    config: str | None = setting(
        None, "a YAML file of these settings; the command line takes precedence", metavar="FILE", repeats=False
    )


S = TypeVar("S", bound=Settings)


def declarations(kind: type) -> dict[str, Declaration]:
    """Return the declared settings of a class by name."""
    return {f.name: f.metadata["setting"] for f in dataclasses.fields(kind) if "setting" in f.metadata}


def _groups(kind: type[Settings]) -> Iterator[tuple[str, list[dataclasses.Field]]]:
    """Yield the title and the fields of each group of a class, in order."""
    fields = {field.name: field for field in dataclasses.fields(kind) if "setting" in field.metadata}
    home: dict[str, type] = {}
    for cls in kind.__mro__:
        for name in inspect.get_annotations(cls):
            if name in fields:
                home[name] = cls  # the class that declared it first
    for title in dict.fromkeys(cls.__dict__.get("title", "") for cls in reversed(kind.__mro__)):
        own = [field for name, field in fields.items() if home[name].__dict__.get("title") == title]
        if title and own:
            yield title, own


def check(name: str, value: Any, declared: Declaration) -> Any:
    """Convert a value to its declared kind and check its range.

    Raises:
        ValueError: if the value is not allowed; the message does not name the setting.
    """
    if value is None:
        return None
    if declared.nargs is not None and declared.kind != "weights":
        values = list(value) if isinstance(value, (list, tuple)) else [value]
        if declared.nargs == "+" and not values and not declared.may_be_empty:
            raise ValueError("an empty list is no value")
        if isinstance(declared.nargs, int) and len(values) != declared.nargs:
            raise ValueError(f"{values!r} are not {declared.nargs} values")
        return [_check_one(name, one, declared) for one in values]
    return _check_one(name, value, declared)


def _check_one(name: str, value: Any, declared: Declaration) -> Any:
    kind = declared.kind
    if kind == "weights":
        if isinstance(value, Mapping):
            pairs = dict(value)
        else:
            given = [value] if isinstance(value, str) else value
            if not isinstance(given, (list, tuple)) or not all(isinstance(one, (str, tuple)) for one in given):
                raise ValueError(f"{value!r} is not a weight per task, such as {{depth: 2.0}}")
            pairs = dict(task_weight(one) if isinstance(one, str) else one for one in given)
        for weight in pairs.values():
            if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < math.inf:
                raise ValueError(f"{weight!r} is not a number of at least 0")
        return pairs
    if kind == "steps" and isinstance(value, str) and value.endswith("e"):
        _number(value[:-1], float, Declaration("", low=0, high=1e6, above=True))
        return value
    if kind == "share":
        return _share(value)
    if kind is bool:
        if not isinstance(value, bool):
            raise ValueError(f"{value!r} is not true or false")
        return value
    if kind is str:
        if not isinstance(value, (str, Path)):
            raise ValueError(f"{value!r} is not a text")
        value = str(value)
    else:
        value = _number(value, int if kind == "steps" else kind, declared)
    if declared.choices is not None and value not in declared.choices:
        raise ValueError(not_one_of(value, declared.choices))
    return value


def not_one_of(value: object, choices: Iterable[object]) -> str:
    """Return the message for a value that is not one of the choices: the nearest choice, and all of them."""
    names = [str(choice) for choice in choices]
    near = difflib.get_close_matches(str(value), names, n=1)
    return f"{value!r} is not one of {f'(did you mean {near[0]}?) ' if near else ''}{', '.join(names)}"


def _number(value: Any, kind: type, declared: Declaration) -> Any:
    try:
        if isinstance(value, bool) or (kind is int and isinstance(value, float) and value != int(value)):
            raise ValueError
        number = kind(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    low, high = declared.low, declared.high
    inside = (number > low if declared.above else number >= low) and number <= high and number < math.inf
    if not inside:
        wanted = "a whole number" if kind is int else "a number"
        limit = "" if low == -math.inf else f" above {low:g}" if declared.above else f" of at least {low:g}"
        raise ValueError(f"{value!r} is not {wanted}{limit}" + (f" and at most {high:g}" if high < math.inf else ""))
    return number


def _share(value: Any) -> float:
    text = str(value)
    try:
        share = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        share = math.nan
    if not 0 < share <= 1:
        raise ValueError(f"{text!r} is not a share above 0 and up to 100%, such as 2%")
    return share


def task_weight(text: str) -> tuple[str, float]:
    """Parse ``TASK=X``.

    Raises:
        ValueError: for any other text.
    """
    name, _, value = text.partition("=")
    try:
        weight = float(value)
    except ValueError:
        weight = -1.0
    if not name or not 0 <= weight < math.inf:
        raise ValueError(f"{text!r} is not TASK=X with a number X of at least 0")
    return name, weight


def build(kind: type[S], *layers: Mapping[str, Any]) -> S:
    """Build settings from several layers of values; later layers take precedence, and ``None`` counts as no value.

    Raises:
        UserError: for a value that its declaration does not allow.
    """
    values = {name: value for layer in layers for name, value in layer.items() if value is not None}
    known = declarations(kind)
    for name, value in values.items():
        try:
            values[name] = check(name, value, known[name]) if name in known else value
        except ValueError as error:
            raise UserError(f"{name}: {error}") from None
    return kind(**values)


def check_values(settings: object) -> None:
    """Check values against their declared ranges; for ``__post_init__`` of classes that users construct in Python.

    Raises:
        UserError: for a value out of range, with the setting and its range.
    """
    for name, declared in declarations(type(settings)).items():
        try:
            check(name, getattr(settings, name), declared)
        except ValueError as error:
            raise UserError(f"{name}: {error}") from None


# -- the command line ----------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line and suggest the nearest option."""

    def error(self, message: str) -> None:  # type: ignore[override]
        match = re.search(r"unrecognized arguments: (-\S+)", message)
        if match:
            given = match.group(1).split("=")[0]
            near = difflib.get_close_matches(given, self._option_string_actions, n=1)
            message = f"unknown option {given}" + (f"; did you mean {near[0]}?" if near else "; see --help")
        self.exit(2, f"error: {message}\n")


class _Given(argparse.Action):
    """An action that checks a value and stores it."""

    declared: Declaration

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        try:
            if self.declared.kind == "weights":
                values = dict(task_weight(text) for text in values)
            setattr(namespace, self.dest, check(self.dest, values, self.declared))
        except ValueError as error:
            parser.error(f"argument {option_string or self.dest}: {error}")


def make_parser(kind: type[Settings], presets: Mapping[str, Mapping[str, Any]] | None = None) -> Parser:
    """Return a parser of a program's settings; settings that are not on the command line are absent from its result.

    Args:
        kind: the settings class.
        presets: other sets of defaults by name; the help shows what each changes in the one before it, and the first in the
            declared defaults.
    """
    parser = Parser(
        description=kind.description, epilog=kind.epilog, allow_abbrev=False, argument_default=argparse.SUPPRESS
    )
    for title, fields in _groups(kind):
        group = parser.add_argument_group(title)
        for field in fields:
            _add(group, field, presets or {}, field.name in kind.positional)
    return parser


def _add(group, field: dataclasses.Field, presets: Mapping[str, Mapping[str, Any]], is_positional: bool) -> None:
    declared: Declaration = field.metadata["setting"]
    text = " ".join(filter(None, [declared.help, _default_text(field, declared, presets)])).replace("%", "%%")
    if is_positional:
        metavar = declared.metavar or field.name.upper()
        nargs = "*" if declared.nargs == "+" else "?"  # the file of --config may hold it instead
        group.add_argument(field.name, nargs=nargs, default=argparse.SUPPRESS, metavar=metavar, help=text)
        return
    names = [f"--{field.name}", *declared.aliases]
    if declared.kind is bool:
        action = argparse.BooleanOptionalAction if declared.negatable else "store_true"
        group.add_argument(*names, action=action, help=text)
        return
    action = group.add_argument(
        *names,
        action=_Given,
        nargs=declared.nargs,
        metavar=declared.metavar or ("{" + ",".join(map(str, declared.choices)) + "}" if declared.choices else None),
        help=text,
    )
    action.declared = declared


def _default_text(field: dataclasses.Field, declared: Declaration, presets: Mapping[str, Mapping[str, Any]]) -> str:
    default = field.default
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    parts, before = [], default
    if declared.shown:
        parts.append(f"default: {declared.shown}")
    elif default is False:
        parts += ["default: False"] if declared.negatable else []
    elif default is not None and default not in ("", []):
        parts.append(f"default: {_shown(default)}")
    for name, values in presets.items():
        value = values.get(field.name)
        if value not in (None, {}, before):
            parts.append(f"{name}: {_shown(value)}")
            before = value
    return f"({'; '.join(parts)})" if parts else ""


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return " ".join(f"{name}={number:g}" for name, number in value.items())
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


# -- files ---------------------------------------------------------------------------------------------------------


def as_dict(settings: Settings, kind: type[Settings] | None = None) -> dict[str, Any]:
    """Return every declared setting with its value, or those that ``kind`` declares, from which its class inherits."""
    return {name: getattr(settings, name) for name in declarations(kind or type(settings))}


def as_yaml(settings: Settings) -> str:
    """Return the settings that are needed to repeat a run, as YAML for ``--config``."""
    import yaml

    values = {name: getattr(settings, name) for name, own in declarations(type(settings)).items() if own.repeats}
    return yaml.safe_dump({name: v for name, v in values.items() if v is not None}, sort_keys=False, allow_unicode=True)


def _read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """Return the settings in a file, and the line of each."""
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        values, node = yaml.safe_load(text), yaml.compose(text, Loader=yaml.SafeLoader)
    except (OSError, ValueError, yaml.YAMLError) as error:  # also a date that no calendar has
        raise UserError(f"--config {path} cannot be read: {str(error).splitlines()[0]}") from None
    if not isinstance(values, dict):
        raise UserError(f"--config {path} does not hold name: value lines")
    lines: dict[str, int] = {}
    for key, _ in node.value:
        if key.value in lines:
            raise UserError(f"{path}, line {key.start_mark.line + 1}: {key.value} appears twice")
        lines[key.value] = key.start_mark.line + 1
    return {str(name): value for name, value in values.items()}, lines


def read_config(
    kind: type[Settings],
    path: Path,
    ignored: Sequence[str] = (),
    rest: dict[str, Any] | None = None,
    others: Sequence[type[Settings]] = (),
    ignore_unknown: bool = False,
    convert: Callable[[Mapping[str, Any], Path, bool], dict[str, Any] | None] | None = None,
) -> dict[str, Any]:
    """Read the settings in a YAML or JSON file.

    Args:
        kind: the program's settings class.
        path: the file.
        ignored: entries that are not settings but may be present.
        rest: receives the settings in the file that only ``others`` declare; ``None`` refuses them.
        others: settings classes of other programs.
        ignore_unknown: leave out unknown entries instead of refusing them.
        convert: returns the settings that the contents of another program's file stand for, or ``None`` for a file of this one.

    Raises:
        UserError: if the file cannot be read, names an unknown setting, or holds a value that is not allowed; with the line.
    """
    values, lines = _read_yaml(path)
    known, found = declarations(kind), {}
    try:
        converted = None if convert is None else convert(values, path, ignore_unknown)
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} holds a value of another type than the published program's: {error}") from None
    for name, value in (values if converted is None else converted).items():
        if name in known:
            try:
                if known[name].repeats or "versions" not in values:  # the record of a run has all of them
                    found[name] = check(name, value, known[name])
            except ValueError as error:
                raise UserError(f"{path}, line {lines.get(name, 1)}: {name}: {error}") from None
        elif rest is not None and any(name in declarations(other) for other in others):
            rest[name] = value
        elif name not in ignored and not ignore_unknown:
            raise unknown(f"setting in {path}, line {lines.get(name, 1)}:", name, known)
    return found
