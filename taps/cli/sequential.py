"""``taps train``: train one task after another."""

from __future__ import annotations

from collections.abc import Sequence

from taps.cli.options import parse_sequential
from taps.cli.program import choose_gpus, launch_on_every_gpu


def main(arguments: Sequence[str]) -> None:
    settings = parse_sequential(arguments)
    is_parallel = settings.parallel or settings.address  # one process per task, which Ray starts
    if (choose_gpus(settings.gpus) and not is_parallel) or settings.multi_gpu:
        launch_on_every_gpu("train", arguments)
    from taps.runs.programs import train_sequential  # imports torch, so only after the options are checked

    train_sequential(settings)
