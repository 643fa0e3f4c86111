"""Parsing of numbers within limits on a command line."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable


def number(kind: type, low: float, high: float = math.inf, above: bool = False) -> Callable[[str], float]:
    """Return a parser of numbers in [low, high], or in (low, high] if ``above``."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (value > low if above else value >= low) or value > high:
            wanted = "a whole number" if kind is int else "a number"
            limit = f"above {low}" if above else f"of at least {low}"
            upper = f" and at most {high}" if high < math.inf else ""
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted} {limit}{upper}")
        return value

    return parse
