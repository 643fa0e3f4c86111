"""``taps serve``: answer requests over HTTP."""

from __future__ import annotations

from collections.abc import Sequence

from taps.cli.options import parse_serve
from taps.runs import cluster


def main(arguments: Sequence[str]) -> None:
    settings = parse_serve(arguments)
    cluster.set_environment(settings.address)
    from taps.serving.server import serve  # imports torch, so only after the options are checked

    serve(settings, lambda line: print(line, flush=True))
