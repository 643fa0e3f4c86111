"""Numbers and pictures of a run for TensorBoard and for accelerate's trackers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from accelerate import Accelerator

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch.utils.tensorboard import SummaryWriter


class Log:
    """TensorBoard's file and the trackers of a run, each of which may be absent."""

    def __init__(self, writer: SummaryWriter | None = None, tracking: Accelerator | None = None) -> None:
        self._writer, self._tracking, self._steps = writer, tracking, 0

    def scalars(self, values: Mapping[str, float], epoch: int) -> None:
        """Write an epoch's numbers for TensorBoard."""
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, epoch)
            self._writer.flush()

    def figure(self, name: str, figure: Figure) -> None:
        """Write a picture for TensorBoard."""
        if self._writer is not None:
            self._writer.add_figure(name, figure)

    def track(self, values: Mapping[str, object]) -> None:
        """Send numbers to the trackers."""
        if self._tracking is not None:
            self._steps += 1  # trackers want steps that only rise
            self._tracking.log(values, step=self._steps)


@contextmanager
def open_log(path: Path, accelerator: Accelerator, name: str | None, settings: Mapping[str, object]) -> Iterator[Log]:
    """Open TensorBoard's file, in the first process, and the trackers for the ``with`` block.

    Args:
        path: the results folder.
        accelerator: has the trackers.
        name: of the experiment, for the trackers; ``None``: they get nothing.
        settings: of the run; trackers get the simple ones.
    """
    with ExitStack() as stack:
        if name is not None:
            simple = {key: own for key, own in settings.items() if isinstance(own, (bool, int, float, str))}
            accelerator.init_trackers(name.replace("/", "-"), config=simple)
            stack.callback(_finish_trackers, accelerator)
        writer = None
        if accelerator.is_main_process:
            from torch.utils.tensorboard import SummaryWriter  # slow to import, and not needed to report a user error

            writer = stack.enter_context(SummaryWriter(path))
        yield Log(writer, None if name is None else accelerator)


def _finish_trackers(accelerator: Accelerator) -> None:
    for tracker in accelerator.trackers:
        tracker.finish()
    accelerator.trackers = []
