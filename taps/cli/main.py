"""The command ``taps``, with one subcommand per program."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

from taps.cli import options, program
from taps.runs import cluster
from taps.settings.adaptation import EvaluateSettings, JointSettings, SequentialSettings
from taps.settings.data import (
    BrainsSettings,
    CheckSettings,
    NormalizerSettings,
    ScenesSettings,
    StaysSettings,
    SubjectsSettings,
)
from taps.settings.declare import Settings
from taps.settings.importing import ImportSettings
from taps.settings.multi_task import MultiTaskSettings
from taps.settings.prediction import PredictSettings
from taps.settings.serving import ServeSettings
from taps.settings.task_files import TasksSettings


class Command(NamedTuple):
    """A subcommand.

    Attributes:
        text: one line of help.
        settings: the class of its settings.
        run: ``module:function``, which is imported once the settings have been checked.
        parse: returns the settings that arguments stand for, without importing torch; ``None``: those of the class alone.
        outputs: what the function is given besides the settings: where lines go.
        uses_gpus: whether it runs as one process per GPU if there are several.
    """

    text: str
    settings: type[Settings]
    run: str
    parse: Callable[[Sequence[str]], Any] | None = None
    outputs: tuple[Callable[[str], None], ...] = ()
    uses_gpus: bool = False


def _complain(line: str) -> None:
    print(line, file=sys.stderr)


COMMANDS = {
    "train": Command(
        "adapt one network to one task after another",
        SequentialSettings,
        "taps.runs.programs:train_sequential",
        options.parse_sequential,
        uses_gpus=True,
    ),
    "joint": Command(
        "train one network for many tasks together",
        JointSettings,
        "taps.runs.programs:train_joint",
        options.parse_joint,
        uses_gpus=True,
    ),
    "mtl": Command(
        "dense and other multi-task benchmarks",
        MultiTaskSettings,
        "taps.runs.programs:train_multi_task",
        options.parse_mtl,
        uses_gpus=True,
    ),
    "evaluate": Command(
        "test, verify and export a results folder",
        EvaluateSettings,
        "taps.runs.evaluation:evaluate",
        options.parse_evaluate,
        (print,),
    ),
    "predict": Command(
        "classify your own images with stored tasks",
        PredictSettings,
        "taps.runs.prediction:predict",
        options.parse_predict,
        (print, _complain),
    ),
    "serve": Command(
        "answer requests for predictions over HTTP", ServeSettings, "taps.cli.serve:serve", options.parse_serve
    ),
    "import": Command(
        "turn other programs' checkpoints into tasks",
        ImportSettings,
        "taps.runs.importing:import_files",
        options.parse_import,
        (print,),
    ),
    "tasks list": Command(
        "one row per task: accuracy, tuned layers, size, base", TasksSettings, "taps.cli.tasks:show_list"
    ),
    "tasks show": Command(
        "every layer of each task, its score and whether it is tuned", TasksSettings, "taps.cli.tasks:show_layers"
    ),
    "tasks compare": Command(
        "how many layers each pair of tasks tunes in common", TasksSettings, "taps.cli.tasks:show_comparison"
    ),
    "data check": Command(CheckSettings.description, CheckSettings, "taps.cli.data:check"),
    "data scenes": Command(ScenesSettings.description, ScenesSettings, "taps.cli.data:scenes"),
    "data stays": Command(StaysSettings.description, StaysSettings, "taps.cli.data:stays"),
    "data brains": Command(BrainsSettings.description, BrainsSettings, "taps.cli.data:brains"),
    "data subjects": Command(SubjectsSettings.description, SubjectsSettings, "taps.cli.data:subjects"),
    "data normalizer": Command(NormalizerSettings.description, NormalizerSettings, "taps.cli.data:normalizer"),
}
#: commands that consist of several
GROUPS = {"tasks": "list, show and compare task files", "data": "check, divide and generate data"}


def execute(name: str, arguments: Sequence[str]) -> None:
    """Run a command with these arguments."""
    command = COMMANDS[name]
    settings = command.parse(arguments) if command.parse else options.parse(command.settings, arguments)
    if command.uses_gpus:
        # With these, Ray starts one process per task.
        by_ray = getattr(settings, "parallel", None) or getattr(settings, "address", None)
        if (program.choose_gpus(settings.gpus) and not by_ray) or settings.multi_gpu:
            program.launch_on_every_gpu(name, arguments)
    module, function = command.run.split(":")
    is_parallel = getattr(settings, "parallel", None) and settings.address is None
    with cluster.started_during_import(module, settings.parallel) if is_parallel else nullcontext():
        getattr(import_module(module), function)(settings, *command.outputs)


def run(name: str) -> None:
    """Run a command with the arguments of this process, which ends with its exit status."""
    program.run(partial(execute, name))


def main() -> None:
    """Run the subcommand that the command line names."""
    words = sys.argv[1:]
    if words[:1] == ["--version"]:
        from taps.version import VERSION

        print(VERSION)
        sys.exit(0)
    name = _choose(
        words, "taps", {name: command.text for name, command in COMMANDS.items() if " " not in name} | GROUPS
    )
    if name in GROUPS:
        own = {whole.split()[1]: command.text for whole, command in COMMANDS.items() if whole.split()[0] == name}
        name += " " + _choose(words[1:], f"taps {name}", own)
    sys.argv = [f"taps {name}", *words[len(name.split()) :]]
    run(name)


def _choose(words: Sequence[str], name: str, texts: Mapping[str, str]) -> str:
    """Return the command that the first word names; ends with the help, or with status 2 for an unknown one."""
    if words[:1] in (["-h"], ["--help"]) or (not words and name == "taps"):
        lines = [f"  {own:{max(map(len, texts)) + 1}} {text}" for own, text in texts.items()]
        print(f"usage: {name} COMMAND …\n\n" + "\n".join(lines) + f"\n\n{name} COMMAND --help lists its options.")
        sys.exit(0)
    if not words or words[0] not in texts:
        near = difflib.get_close_matches(words[0], texts, n=1) if words else []
        hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(texts)}"
        what = f"unknown command {words[0]}" if words else f"{name} takes a command"
        print(f"error: {what}; {hint}", file=sys.stderr)
        sys.exit(2)
    return words[0]
