"""What the command-line programs share: exit statuses, devices, and the step from options to a base network."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs

from taps.backbones import create_backbone, needs_image_size, preprocessing
from taps.data import Preprocessing, TaskData, find_tasks
from taps.data.demo import make_demo, read_demo
from taps.errors import UserError
from taps.files import read_json
from taps.model import TaskModel, adapt
from taps.results import RunFolder, read_tasks
from taps.signals import Interrupted

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


def run(main: Callable[[Sequence[str]], None]) -> None:
    """Run a command: a user's mistake is one line and status 2, Ctrl-C is 130, SIGTERM 143."""
    warnings.formatwarning = lambda message, *where: f"warning: {message}\n"
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
        status = 0
    except UserError as error:
        # A data-loading process passes its traceback on as the message; the last line of it is ours.
        line = str(error).strip().splitlines()[-1]
        for kind in (UserError, *UserError.__subclasses__()):
            line = line.removeprefix(f"{kind.__module__}.{kind.__qualname__}: ")
        if os.environ.get("RANK", "0") == "0":  # one line, not one a process
            print(f"error: {line}", file=sys.stderr)
        status = 2
    except Interrupted as stopped:
        print(f"stopped by {stopped}; continue with --resume", file=sys.stderr)
        status = stopped.status
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        status = 130
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


def launch_on_every_gpu(script: str, arguments: Sequence[str]) -> None:
    """Start the script again as one process a GPU, unless a launcher has done so or there is at most one."""
    if "WORLD_SIZE" in os.environ or torch.cuda.device_count() < 2:
        return
    count = str(torch.cuda.device_count())
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", count]
    os.execv(sys.executable, [sys.executable, *launcher, script, *arguments])


def make_accelerator(options: Namespace) -> Accelerator:
    """Devices, processes and precision.

    Raises:
        UserError: if the device asked for is not there.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True, "auto": True}
    if not available[options.device]:
        raise UserError(f"--device {options.device} is not available on this machine; use --device auto or cpu")
    cpu = options.device == "cpu" or not (available["cuda"] or available["mps"])
    precision = {"none": "no", "bf16": "bf16", "fp16": "fp16"}[options.amp]
    if precision == "fp16" and cpu:
        raise UserError("--amp fp16 needs a GPU; use --amp bf16 on the CPU")
    # Closed units under norm="follow" and gates that stand still have parameters without a gradient in some steps.
    given = vars(options)
    some_unused = given["norm"] == "follow" or given.get("budget") or given.get("settle_epochs", 0) > 0
    some_unused = bool(some_unused) or "variant" in given or "phases" in given
    unused = DistributedDataParallelKwargs(find_unused_parameters=some_unused)
    return Accelerator(cpu=cpu, mixed_precision=precision, kwargs_handlers=[unused], rng_types=[])


@contextmanager
def tensorboard(path: Path, wanted: bool) -> Iterator[SummaryWriter | None]:
    """TensorBoard's file in a results folder for the ``with`` block; ``None`` where it is not wanted."""
    writer = None
    if wanted:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and not needed to refuse a mistake

        writer = SummaryWriter(path)
    try:
        yield writer
    finally:
        if writer is not None:
            writer.close()


def read_data(paths: Sequence[str] | None, options: Namespace) -> list[TaskData]:
    """The tasks in ``paths``, or those of the demo, which is made where it is missing."""
    if paths:
        return find_tasks(paths, cropped=True if options.cropped else None)
    root = Path("datasets/demo")
    make_demo(root)
    return read_demo(root)


def make_base(options: Namespace, path: Path | None = None) -> torch.nn.Module:
    """The backbone that the options name, with its weights or those in ``path``; random ones follow from the seed."""
    torch.manual_seed(options.seed)
    size = {"img_size": options.input_size} if needs_image_size(options.model_type, options.input_size) else {}
    return create_backbone(
        options.model_type, pretrained=options.pretrained, path=path or options.model_path or None, **size
    )


def make_preprocessing(options: Namespace, net: torch.nn.Module) -> Preprocessing:
    """Input size from the options, colours from the backbone's training."""
    return Preprocessing(input_size=options.input_size, resize=options.resize, **preprocessing(net))


def load_base(folder: Path) -> tuple[torch.nn.Module, Namespace]:
    """The base of a run, not yet adapted, and the run's options.

    Raises:
        UserError: if the folder holds no run, or its base cannot be had.
    """
    options = Namespace(**read_json(folder / "settings.json"))
    base = RunFolder(folder).base_path
    return make_base(options, base if base.is_file() else None), options


def load_run(
    folder: Path, names: Sequence[str] | None = None, device: torch.device | str = "cpu"
) -> tuple[TaskModel, Preprocessing]:
    """The model of a finished run with its tasks, in evaluation mode, and how images are prepared for it.

    Args:
        folder: a results folder.
        names: the tasks to load; ``None`` for all.
        device: where to.

    Raises:
        UserError: if the folder holds no run, or its base cannot be had.
    """
    names = list(read_tasks(folder)) if names is None else names
    net, options = load_base(folder)
    prepare = make_preprocessing(options, net)
    model = adapt(net, options.method, norm=options.norm, layers=options.layers, train_base=False).to(device)
    for name in names:
        model.load_task(folder / name, name=name)
    return model.eval(), prepare
