"""``taps tasks list|show|compare FOLDER…``: inspect stored tasks."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from taps.settings.declare import Parser
from taps.storage.library import Library
from taps.storage.task_tables import compare_table, list_table, show_table


def main(arguments: Sequence[str]) -> None:
    parser = Parser(
        prog="taps tasks",
        description="Inspect stored tasks. FOLDER is a task's folder or one that holds several, e.g. results/demo.",
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, text in (
        ("list", "one row per task: accuracy, tuned layers, size, base"),
        ("show", "every layer of each task, its score and whether it is tuned"),
        ("compare", "how many layers each pair of tasks tunes in common"),
    ):
        action = actions.add_parser(name, help=text, description=text, allow_abbrev=False)
        action.add_argument("folders", nargs="+", metavar="FOLDER")
        action.accept_config()
    given = parser.parse_args(arguments)
    library = Library(given.folders, by_run=True)
    if library.folders:
        if given.action == "show":
            print("\n\n".join(map(show_table, library.descriptions.values())))
        else:
            print(list_table(library) if given.action == "list" else compare_table(library))
    sys.stdout.flush()
    library.check()
