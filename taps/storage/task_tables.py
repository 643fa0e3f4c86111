"""Text tables of stored tasks, as ``taps tasks`` prints them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from tabulate import tabulate

from taps.core.accounting import is_tuned
from taps.errors import UserError
from taps.storage.library import Library
from taps.storage.task_file import common_metric


def list_table(library: Library) -> str:
    """Return a table with one row per task: accuracy, tuned layers, size, method and base."""
    rows = []
    for name, description in library.descriptions.items():
        account, accuracy, base = description["accounting"], description.get("accuracy"), description["base"]
        rows.append(
            (
                name,
                "–" if accuracy is None else f"{accuracy:.2f}",
                f"{account['tuned_units']}/{account['units']}",
                f"{account['parameters']:,}",
                f"{description['bytes']:,}",
                description["method"],
                description["norm"],
                f"{base['name']} {base['fingerprint'][:8]}",
            )
        )
    heads = (
        "task",
        f"{common_metric(library.descriptions.values())} %",
        "tuned layers",
        "parameters",
        "bytes",
        "method",
        "norm",
        "base",
    )
    return plain_table(heads, rows, "lrrrrlll")


_ROLES = (("deltas", "delta"), ("norms", "norm"), ("head", "head"))


def show_table(description: dict) -> str:
    """Return the properties of one task and a table with one row per layer: parameters, score and whether it is tuned."""
    account, classes, base = description["accounting"], description.get("classes"), description["base"]
    accuracy = description.get("accuracy")
    names = f"{len(classes)}: {', '.join(classes[:8])}{', …' if len(classes) > 8 else ''}" if classes else "not stored"
    about = {
        "task": description["task"],
        "base": f"{base['name']}, fingerprint {base['fingerprint']}",
        "method": f"{description['method']}, norm={description['norm']}, options {description['options']}",
        "classes": names,
        description.get("metric") or "accuracy": "not tested" if accuracy is None else f"{accuracy:.2f} %",
        "stored": f"{description['bytes']:,} bytes: "
        + ", ".join(f"{role} {account.get(f'{key}_parameters', '?')}" for role, key in _ROLES)
        + " parameters",
        "tuned": f"{account['tuned_units']} of {account['units']} layers",
    }
    stored_as: dict[str, set[str]] = {}
    for key, encoding in description.get("encodings", {}).items():
        stored_as.setdefault(key.removeprefix("delta/").rpartition("/")[0], set()).add(str(encoding))
    rows = []
    for unit in description["units"]:
        score = f"{unit['score']:.4f}" if isinstance(unit.get("score"), (int, float)) else "–"
        tuned = ", ".join(["yes", *sorted(stored_as.get(unit["name"], ()))]) if is_tuned(unit) else ""
        rows.append((unit["name"], unit["kind"], f"{unit['parameters']:,}", score, tuned))
    heads = ("layer", "kind", "parameters", "score", "tuned")
    return f"{plain_table((), about.items(), 'll')}\n\n{plain_table(heads, rows, 'llrrl')}"


def compare_table(library: Library) -> str:
    """Return a table with one row per pair of tasks: layers that both and either tune, and whether they share a base.

    Raises:
        UserError: for fewer than two tasks, or tasks of different networks.
    """
    tasks = library.descriptions
    if len(tasks) < 2:
        raise UserError(f"comparing takes two tasks; there {'is one' if tasks else 'is none'}")
    first = next(iter(tasks.values()))
    names = [unit["name"] for unit in first["units"]]
    for name, description in tasks.items():
        if [unit["name"] for unit in description["units"]] != names:
            same = description["base"]["name"] == first["base"]["name"]
            what = "have gates on different layers" if same else "are for different networks"
            raise UserError(
                f"tasks {first['task']} ({first['base']['name']}) and {name} ({description['base']['name']}) {what}, which "
                "cannot be compared"
            )
    tuned = {name: {u["name"] for u in description["units"] if is_tuned(u)} for name, description in tasks.items()}
    rows = []
    for a, b in combinations(tuned, 2):
        both, either = len(tuned[a] & tuned[b]), len(tuned[a] | tuned[b])
        same = tasks[a]["base"]["fingerprint"] == tasks[b]["base"]["fingerprint"]
        rows.append((a, b, both, either, f"{100 * both / either:.0f}" if either else "–", "yes" if same else "no"))
    return plain_table(("tasks", "", "both tune", "either", "overlap %", "same base"), rows, "llrrrl")


def plain_table(heads: Sequence[str], rows, align: str) -> str:
    """Format rows as plain columns; ``align`` has an ``l`` or an ``r`` per column. Cells are printed as they are."""
    columns = [{"l": "left", "r": "right"}[letter] for letter in align]
    text = tabulate(rows, heads, "plain", disable_numparse=True, colalign=columns)
    return "\n".join(map(str.rstrip, text.splitlines()))
