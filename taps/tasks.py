"""``python -m taps.tasks list|show|compare|remove FOLDER…``: look into task files and manage them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from taps.arguments import Parser
from taps.commands import run
from taps.library import Library, compare_table, list_table, remove, show_table


def main(arguments: Sequence[str]) -> None:
    parser = Parser(
        prog="python -m taps.tasks",
        description="Look into task files and manage them. FOLDER is a task's folder or one that holds several, e.g. results/demo.",
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, text in (
        ("list", "a line a task: accuracy, layers tuned, size, base"),
        ("show", "every layer of each task, its score and whether it is tuned"),
        ("compare", "how far each two tasks tune the same layers"),
        ("remove", "delete tasks; each FOLDER is one task's"),
    ):
        actions.add_parser(name, help=text, description=text).add_argument("folders", nargs="+", metavar="FOLDER")
    given = parser.parse_args(arguments)
    if given.action == "remove":
        remove([Path(folder) for folder in given.folders])
        print(f"removed {', '.join(given.folders)}")
        return
    library = Library(given.folders, by_run=True)
    if library.folders:
        if given.action == "show":
            print("\n\n".join(map(show_table, library.descriptions.values())))
        else:
            print(list_table(library) if given.action == "list" else compare_table(library))
    sys.stdout.flush()
    library.check()


if __name__ == "__main__":
    run(main)
