"""``taps joint``: train all tasks together."""

from __future__ import annotations

from collections.abc import Sequence

from taps.cli.options import parse_joint
from taps.cli.program import choose_gpus, launch_on_every_gpu


def main(arguments: Sequence[str]) -> None:
    settings = parse_joint(arguments)
    if choose_gpus(settings.gpus) or settings.multi_gpu:
        launch_on_every_gpu("joint", arguments)
    from taps.runs.programs import train_joint  # imports torch, so only after the options are checked

    train_joint(settings)
