"""``taps serve``: answer requests over HTTP."""

from __future__ import annotations

from taps.runs import cluster
from taps.settings.serving import ServeSettings


def serve(settings: ServeSettings) -> None:
    """Serve the tasks of a folder, with what Ray reads from the environment set before it is imported."""
    cluster.set_environment(settings.address)
    from taps.serving import server

    server.serve(settings, lambda line: print(line, flush=True))
