"""The command ``taps``, with one subcommand per program."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

from taps.cli import options, program


class Command(NamedTuple):
    """A subcommand.

    Attributes:
        text: one line of help.
        parse: returns the settings that its arguments stand for, without importing torch.
        run: ``module:function``, which is imported once the settings have been checked.
        outputs: what the function is given besides the settings: where lines go.
        uses_gpus: whether it runs as one process per GPU if there are several.
    """

    text: str
    parse: Callable[[Sequence[str]], Any]
    run: str
    outputs: tuple[Callable[[str], None], ...] = ()
    uses_gpus: bool = False


def _complain(line: str) -> None:
    print(line, file=sys.stderr)


COMMANDS = {
    "train": Command(
        "adapt one network to one task after another",
        options.parse_sequential,
        "taps.runs.programs:train_sequential",
        uses_gpus=True,
    ),
    "joint": Command(
        "train one network for many tasks together",
        options.parse_joint,
        "taps.runs.programs:train_joint",
        uses_gpus=True,
    ),
    "mtl": Command(
        "dense and other multi-task benchmarks",
        options.parse_mtl,
        "taps.runs.programs:train_multi_task",
        uses_gpus=True,
    ),
    "evaluate": Command(
        "test, verify and export a results folder",
        options.parse_evaluate,
        "taps.runs.evaluation:evaluate",
        (print,),
    ),
    "predict": Command(
        "classify your own images with stored tasks",
        options.parse_predict,
        "taps.runs.prediction:predict",
        (print, _complain),
    ),
    "serve": Command("answer requests for predictions over HTTP", options.parse_serve, "taps.cli.serve:serve"),
    "import": Command(
        "turn other programs' checkpoints into tasks",
        options.parse_import,
        "taps.runs.importing:import_files",
        (print,),
    ),
    "tasks": Command("list, show and compare task files", list, "taps.cli.tasks:main"),
    "data": Command("check, divide and generate data", list, "taps.cli.data:main"),
}


def execute(name: str, arguments: Sequence[str]) -> None:
    """Run a command with these arguments."""
    command = COMMANDS[name]
    settings = command.parse(arguments)
    if command.uses_gpus:
        # With these, Ray starts one process per task.
        by_ray = getattr(settings, "parallel", None) or getattr(settings, "address", None)
        if (program.choose_gpus(settings.gpus) and not by_ray) or settings.multi_gpu:
            program.launch_on_every_gpu(name, arguments)
    module, function = command.run.split(":")
    getattr(import_module(module), function)(settings, *command.outputs)


def run(name: str) -> None:
    """Run a command with the arguments of this process, which ends with its exit status."""
    program.run(partial(execute, name))


def main() -> None:
    """Run the subcommand that the command line names."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        lines = [f"  {name:9} {command.text}" for name, command in COMMANDS.items()]
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
    sys.argv = [f"taps {name}", *arguments[1:]]
    run(name)
