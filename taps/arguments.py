"""Command-line parsers whose errors are one line, and numbers within limits."""

from __future__ import annotations

import argparse
import difflib
import math
import re
from collections.abc import Callable


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, with the nearest option offered."""

    def error(self, message: str) -> None:
        match = re.search(r"unrecognized arguments: (-\S+)", message)
        if match:
            given = match.group(1).split("=")[0]
            near = difflib.get_close_matches(given, self._option_string_actions, n=1)
            message = f"unknown option {given}" + (f"; did you mean {near[0]}?" if near else "; see --help")
        self.exit(2, f"error: {message}\n")


def number(kind: type, low: float, high: float = math.inf, above: bool = False) -> Callable[[str], float]:
    """A parser of numbers in [low, high], or (low, high] if ``above``."""

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
