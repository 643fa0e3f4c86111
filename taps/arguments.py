"""Command-line parsers whose errors are one line."""

from __future__ import annotations

import argparse
import difflib
import re


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, with the nearest option offered."""

    def error(self, message: str) -> None:
        match = re.search(r"unrecognized arguments: (-\S+)", message)
        if match:
            given = match.group(1).split("=")[0]
            near = difflib.get_close_matches(given, self._option_string_actions, n=1)
            message = f"unknown option {given}" + (f"; did you mean {near[0]}?" if near else "; see --help")
        self.exit(2, f"error: {message}\n")
