"""``taps import``: turn other programs' checkpoints into tasks."""

from __future__ import annotations

from collections.abc import Sequence

from taps.cli.options import parse_import


def main(arguments: Sequence[str]) -> None:
    settings = parse_import(arguments)
    from taps.runs.importing import import_files  # imports torch, so only after the options are checked

    import_files(settings, print)
