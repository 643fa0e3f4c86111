"""Published configurations of the multi-task benchmarks and the configuration of the demo, read from ``published/*.yaml``.

The values of a benchmark come from ``common.yaml``, then from its own file for the number of tasks, for generated data and for
the method; later values take precedence. If a number of tasks was not published, the nearest published one is used.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

_FOLDER = Path(__file__).parent / "published"


@cache
def _read(name: str) -> dict[str, Any]:
    import yaml

    return yaml.safe_load((_FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))


def published(benchmark: str, tasks: int | None, method: str, generated: bool = False) -> dict[str, Any]:
    """Return the published settings of a benchmark.

    Args:
        benchmark: name of the benchmark.
        tasks: number of tasks; ``None``: that of the published configuration.
        method: name of the method.
        generated: whether the data is generated because none is named.
    """
    common, own = _read("common"), _read(benchmark)
    by_count = own["tasks"]
    count = min(by_count, key=lambda known: abs(known - tasks)) if tasks else list(by_count)[-1]
    values = {**common["settings"], **by_count[count]}
    if generated:
        values.update(own.get("generated", {}).get("settings", {}))
    values.update(common["methods"].get(method, {}))
    of_generated = own.get("generated", {}).get("methods", {}) if generated else {}
    values.update(of_generated.get(method, own.get("methods", {}).get(method, {})))
    return values


def as_published(benchmark: str, method: str) -> dict[str, Any]:
    """Return what ``--published`` changes in :func:`published` settings, whose defaults are better in these points."""
    own = _read("common")["as_published"]
    return {**own["settings"], **own["benchmarks"].get(benchmark, {}), **own["methods"].get(method, {})}


def published_taps(joint: bool) -> dict[str, Any]:
    """Return the settings in which the published program of TAPS differs from the defaults."""
    values = _read("taps")
    return {**values["settings"], **(values["joint"] if joint else {})}


def demo(budget: bool = False) -> dict[str, Any]:
    """Return the settings of the demo, with a budget or without."""
    values = _read("demo")
    return {**values["settings"], **(values["budget"] if budget else {})}
