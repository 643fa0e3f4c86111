"""``taps mtl``: train and test on multi-task benchmarks."""

from __future__ import annotations

from collections.abc import Sequence

from taps.cli.options import parse_mtl
from taps.cli.program import choose_gpus, launch_on_every_gpu


def main(arguments: Sequence[str]) -> None:
    settings = parse_mtl(arguments)
    if choose_gpus(settings.gpus) or settings.multi_gpu:
        launch_on_every_gpu("mtl", arguments)
    from taps.runs.programs import train_multi_task  # imports torch, so only after the options are checked

    train_multi_task(settings)
