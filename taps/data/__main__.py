"""``python -m taps.data FOLDER…``: check downloaded data against the published counts."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from taps.arguments import Parser
from taps.commands import run
from taps.data.known import check


def main(arguments: Sequence[str]) -> None:
    parser = Parser(
        prog="python -m taps.data",
        description="Check data folders against the published counts. Exit status 1: incomplete.",
    )
    parser.add_argument("folders", nargs="+", metavar="FOLDER")
    wrong = 0
    for folder in parser.parse_args(arguments).folders:
        lines, bad = check(Path(folder))
        print("\n".join(lines))
        wrong += bad
    print("complete" if wrong == 0 else f"{wrong} things are missing or different")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    run(main)
