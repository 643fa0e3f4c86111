"""The command ``taps``, with one subcommand per program."""

from __future__ import annotations

import difflib
import sys
from importlib import import_module

#: subcommand -> its module in this folder and its description
COMMANDS = {
    "train": ("sequential", "adapt one network to one task after another"),
    "joint": ("joint", "train one network for many tasks together"),
    "mtl": ("multi_task", "dense and other multi-task benchmarks"),
    "evaluate": ("evaluate", "test, verify and export a results folder"),
    "predict": ("predict", "classify your own images with stored tasks"),
    "serve": ("serve", "answer requests for predictions over HTTP"),
    "import": ("import_tasks", "turn other programs' checkpoints into tasks"),
    "tasks": ("tasks", "list, show and compare task files"),
    "data": ("data", "check, divide and generate data"),
}


def main() -> None:
    """Run the subcommand that the command line names."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        lines = [f"  {name:9} {text}" for name, (_, text) in COMMANDS.items()]
        print("usage: taps COMMAND …\n\n" + "\n".join(lines) + "\n\ntaps COMMAND --help lists its options.")
        sys.exit(0)
    if arguments[0] == "--version":
        from taps.version import VERSION

        print(VERSION)
        sys.exit(0)
    name = arguments[0]
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}"
        print(f"error: unknown command {name}; {hint}", file=sys.stderr)
        sys.exit(2)
    from taps.cli.program import run

    module = import_module(f"taps.cli.{COMMANDS[name][0]}")
    sys.argv = [f"taps {name}", *arguments[1:]]
    run(module.main)
