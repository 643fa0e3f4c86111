"""``taps evaluate``: test, verify and export a results folder."""

from __future__ import annotations

from collections.abc import Sequence

from taps.cli.options import parse_evaluate


def main(arguments: Sequence[str]) -> None:
    settings = parse_evaluate(arguments)
    from taps.runs.evaluation import evaluate  # imports torch, so only after the options are checked

    evaluate(settings, print)
