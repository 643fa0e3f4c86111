"""Ray: processes on this machine, or a cluster that runs already."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import re
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from threading import Thread
from typing import Any

from taps.errors import UserError, first_line

#: threads in which Ray is ending
_ENDS: list[Thread] = []


def set_environment(address: str | None) -> None:
    """Set what Ray reads when it is imported: no reports of usage, and the token that ``ray start`` has stored."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address is not None and (Path.home() / ".ray" / "auth_token").is_file():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


@contextmanager
def started_during_import(module: str, processes: int) -> Iterator[None]:
    """Import a module, here and in processes of Ray, which starts meanwhile; :func:`connected` uses it inside the ``with`` block.

    Args:
        module: what is imported.
        processes: how many processes will run at a time, or fewer.

    Raises:
        UserError: as of :func:`connected`.
    """
    here = os.cpu_count() or 1
    # Ray's processes end with the thread that starts them, so it is the import that has a thread of its own.
    with ThreadPoolExecutor(1) as other:
        other.submit(import_module, module)
        ray, _ = _connect(None, max(processes * threads_each(processes), here), "--parallel")
        # Where there are GPUs, a process must not look for them before Ray gives it one.
        count = 0 if ray.cluster_resources().get("GPU") else min(processes, here)
        own = ray.remote(num_cpus=1)(_import)
        for _ in range(count):
            own.remote(module)
    try:
        yield
    finally:
        _end(ray)


def _import(module: str) -> None:
    import_module(module)


@contextmanager
def connected(address: str | None, processors: int, what: str) -> Iterator[None]:
    """Use Ray inside the ``with`` block; it ends with the block, or meanwhile if :func:`started_during_import` started it.

    Args:
        address: ``HOST:PORT`` of a cluster, or ``"auto"``; ``None`` starts one on this machine, unless
            :func:`started_during_import` has.
        processors: number of processors that a cluster on this machine has.
        what: what Ray is needed for, for messages.

    Raises:
        UserError: if Ray is not installed or does not start, or the cluster does not answer.
    """
    ray, is_new = _connect(address, processors, what)
    try:
        yield
    finally:
        if is_new:
            _end(ray)
        else:  # results are written while it ends, which takes more than a second
            _ENDS.append(Thread(target=ray.shutdown))
            _ENDS[-1].start()


def _end(ray) -> None:
    with undisturbed():
        while _ENDS:
            _ENDS.pop().join()
        ray.shutdown()


def _connect(address: str | None, processors: int, what: str) -> tuple[Any, bool]:
    """Connect this process to Ray; return its module and whether it was not connected before."""
    set_environment(address)
    try:
        import ray
    except ImportError:
        raise UserError(f"{what} needs Ray: pip install 'taps-vision[serve]'") from None
    if address is None and ray.is_initialized():
        return ray, False
    for name in ("ray", "ray.serve"):
        logging.getLogger(name).setLevel(logging.ERROR)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    more: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    try:
        if address is None:
            # Its processes inherit this. A clone need not be installed; Ray's own way of telling them takes a second.
            package = str(Path(__file__).resolve().parents[2])
            os.environ["PYTHONPATH"] = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
            here = {"address": "local", "num_cpus": processors, "include_dashboard": False}
            ray.init(**here, _node_ip_address="127.0.0.1", **more)
        else:
            _check(address)
            ray.init(address=address, **more)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        if isinstance(error, UserError):
            raise
        where = f"the Ray cluster at {address} does not answer" if address else "Ray does not start"
        hint = "; does it want another token than that in ~/.ray/auth_token?" if address else ""
        raise UserError(f"{where}: {first_line(error)}{hint}") from None
    finally:
        for number, handler in handlers.items():  # Ray has put its own in their place, with another exit status
            signal.signal(number, handler)
    return ray, True


def threads_each(processes: int) -> int:
    """Return how many processor threads each of several processes on this machine gets: as OMP_NUM_THREADS says, else its share."""
    asked = re.match(r"\s*(\d+)", os.environ.get("OMP_NUM_THREADS", ""))  # or a list, one number per level of nesting
    return (int(asked.group(1)) if asked else 0) or max((os.cpu_count() or 1) // processes, 1)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Inside the ``with`` block signals are ignored, for the end is coming, and Ray's complaints that what it ends has ended."""
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _check(address: str) -> None:
    """Refuse an address at which nobody listens, for which Ray would wait for a minute."""
    if address == "auto":
        return
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not host or not port.isdecimal():
        raise UserError(f"--address {address} is not HOST:PORT or auto")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, OverflowError) as error:
        raise UserError(f"the Ray cluster at {address} does not answer: {error}") from None


def share(gpus: int, processes: int) -> float:
    """Return the part of a GPU that each process gets, so that all find room; Ray puts each on a single GPU."""
    return 1.0 if processes <= gpus else int(1e4 / math.ceil(processes / gpus)) / 1e4
