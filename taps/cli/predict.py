"""``taps predict``: classify images with stored tasks."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from taps.cli.options import parse_predict


def main(arguments: Sequence[str]) -> None:
    settings = parse_predict(arguments)
    from taps.runs.prediction import predict  # imports torch, so only after the options are checked

    predict(settings, print, lambda line: print(line, file=sys.stderr))
