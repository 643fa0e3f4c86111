"""Execution of commands: exit statuses and processes."""

from __future__ import annotations

import atexit
import gc
import io
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from taps.errors import UserError, first_line
from taps.memory import keep_freed_memory
from taps.stop_signals import Interrupted

#: how long a launcher may take to end all processes after one has failed
_SECONDS_TO_BE_ENDED = 5


def run(main: Callable[[Sequence[str]], None]) -> None:
    """Run a command; a user error gives one line and status 2, Ctrl-C status 130, SIGTERM status 143."""
    warnings.formatwarning = lambda message, *where: f"warning: {message}\n"
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files need not be Unicode
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    # What imports make lives as long as the program. Looking for garbage among it takes seconds, at the end too.
    gc.set_threshold(50_000, 20, 20)
    keep_freed_memory()
    atexit.register(gc.freeze)
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
        status = 0
    except UserError as error:
        # An error in a data-loading process has the traceback as its message; only the last line is the error's own.
        line = str(error).strip().splitlines()[-1]
        for kind in (UserError, *UserError.__subclasses__()):
            line = line.removeprefix(f"{kind.__module__}.{kind.__qualname__}: ")
        if os.environ.get("RANK", "0") != "0":
            # A mistake of all processes is said by the first, after which the launcher ends this one.
            time.sleep(_SECONDS_TO_BE_ENDED)
        print(f"error: {line}", file=sys.stderr)
        status = 2
    except Interrupted as stopped:
        print(f"stopped by {stopped}; continue with --resume", file=sys.stderr)
        status = stopped.status
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        status = 130
    except MemoryError as error:
        print(f"error: out of memory{f': {error}' if str(error) else ''}; lower --batch_size", file=sys.stderr)
        status = 2
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # of torch, which need not have been imported
            raise
        print(f"error: {first_line(error)} Lower --batch_size, or give --checkpoint_activations", file=sys.stderr)
        status = 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except OSError as error:
        print(
            f"error: {error.strerror or error}: {error.filename}" if error.filename else f"error: {error}",
            file=sys.stderr,
        )
        status = 2
    sys.exit(status)


def choose_gpus(numbers: Sequence[int] | None) -> bool:
    """Let this process see only these GPUs, and return whether they are several. To be called before torch starts CUDA."""
    if numbers and "WORLD_SIZE" not in os.environ:  # else the process that started this one has chosen
        visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        if visible and max(numbers) >= len(visible):
            raise UserError(f"--gpus {max(numbers)} is not among the {len(visible)} GPUs of CUDA_VISIBLE_DEVICES")
        _check_gpus(numbers)
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(visible[n] if visible else str(n) for n in numbers)
    return numbers is not None and len(numbers) > 1


def _check_gpus(numbers: Sequence[int]) -> None:
    """Raise a ``UserError`` if this machine does not have all of these GPUs; CUDA leaves out those it does not find."""
    import torch

    found = torch.cuda.device_count()
    if found and max(numbers) >= found:
        raise UserError(f"--gpus {max(numbers)}: this machine has {found}, counted from 0")


def launch_on_every_gpu(command: str, arguments: Sequence[str]) -> None:
    """Start ``taps command`` again as one process per GPU, unless a launcher has done so or there is at most one."""
    import torch

    if "WORLD_SIZE" in os.environ or torch.cuda.device_count() < 2:
        return
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(torch.cuda.device_count())]
    root = str(Path(__file__).resolve().parents[2])  # a clone need not be installed
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    command_line = [sys.executable, *launcher, "-m", "taps", command, *arguments]
    os.execve(sys.executable, command_line, {**os.environ, "PYTHONPATH": path})
