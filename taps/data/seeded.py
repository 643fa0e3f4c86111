"""Data loaders whose batches depend on the seed and the epoch alone."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, Dataset


def mix_seed(*numbers: int) -> int:
    """Combine several numbers into one seed."""
    value = 0
    for number in numbers:
        value = (value * 6364136223846793005 + number + 1442695040888963407) % 2**63
    return value


def endless(size: int, start: int, *seed: int) -> Iterator[tuple[int, int]]:
    """(index, pass) from position ``start`` on; each pass goes over all indices in a new random order."""
    number, skip = divmod(start, size)
    while True:
        generator = torch.Generator().manual_seed(mix_seed(*seed, number))
        for index in torch.randperm(size, generator=generator).tolist()[skip:]:
            yield index, number
        number, skip = number + 1, 0


def planned_loader(samples: Dataset, batches, workers: int, seed: int, keep_workers: bool = True) -> DataLoader:
    """A loader over the batches of a batch sampler; its output does not depend on the number of workers."""
    return DataLoader(
        samples,
        batch_sampler=batches,
        num_workers=workers,
        persistent_workers=keep_workers and workers > 0,
        pin_memory=torch.cuda.is_available(),  # so that copies to the GPU need not be waited for
        worker_init_fn=leave_signals_to_the_main_process,
        generator=torch.Generator().manual_seed(seed),  # by default every epoch draws from the global generator
    )


def leave_signals_to_the_main_process(worker: int) -> None:
    """Keep out signals that are sent to all processes of a group, by Ctrl-C or ``timeout``: the main process finishes its step and
    ends the workers."""
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
