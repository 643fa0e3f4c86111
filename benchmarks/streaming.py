"""Streaming of 100,000 hospital stays: peak memory, and the time to read a batch ÷ that of a training step of the 1-D ResNet-18.

    python benchmarks/streaming.py                  # about five minutes on two cores

The stays are generated: 100,000 names link to 400 different time series. Every stay is read once; then the published network
is trained for some steps on batches read in turn, without the cache.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from torch.utils.data import default_collate  # noqa: E402
from tqdm import tqdm  # noqa: E402

import taps  # noqa: E402
from taps.data.generated.hospital_stays import StayRecipe, make_stays  # noqa: E402
from taps.data.multi_label import Cache  # noqa: E402
from taps.data.records.mimic3 import open_mimic3  # noqa: E402
from taps.metrics.losses import make_loss  # noqa: E402
from taps.networks.heads import HourHead  # noqa: E402
from taps.networks.series import create_series_backbone  # noqa: E402

DIFFERENT = 400


def spread(root: Path, rows: int) -> None:
    """Extend the training list to ``rows`` stays with links to existing ones, each belonging to a different patient."""
    path = root / "train_listfile.csv"
    header, *lines = path.read_text().splitlines()
    with open(path, "w") as file:
        file.write(header + "\n")
        for number in range(rows):
            name, rest = lines[number % len(lines)].split(",", 1)
            other = f"{200000 + number}_episode1_timeseries.csv"
            os.link(root / "train" / name, root / "train" / other)
            file.write(f"{other},{rest}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--batch_size", type=int, default=256)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "stays"
        make_stays(root, StayRecipe(train=DIFFERENT, val=50, test=50))
        spread(root, given.rows)
        started = time.perf_counter()
        data = open_mimic3(root)
        print(
            f"{len(data.splits['train'])} stays opened in {time.perf_counter() - started:.1f} s, {memory():.0f} MiB at most"
        )
        samples = data.samples("train", True)
        for index in tqdm(range(len(samples)), desc="reading all", disable=None, leave=False):
            samples[index]
        print(f"all of them read once: {memory():.0f} MiB at most")

        model = taps.adapt(create_series_backbone("resnet18", 76), "adashare")
        for name, task in data.tasks.items():
            model.add_task(name, head=HourHead(512, task.channels, 170, 8, True, causal=True))
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        losses = {name: make_loss(task) for name, task in data.tasks.items()}
        fresh = replace(data, cache=Cache(0)).samples("train", True)
        ratios = []
        for step in range(4):
            started = time.perf_counter()
            x, labels = default_collate([fresh[step * given.batch_size + i] for i in range(given.batch_size)])
            read = time.perf_counter() - started
            started = time.perf_counter()
            outputs = model(x, tasks=list(data.tasks))
            sum(losses[name](outputs[name], labels[name]) for name in outputs).backward()
            optimizer.step()
            optimizer.zero_grad()
            trained = time.perf_counter() - started
            ratios.append(read / trained)
        print(
            f"reading a batch of {given.batch_size} ÷ a training step, {torch.get_num_threads()} threads: "
            f"{statistics.median(ratios):.3f}; with the training {memory():.0f} MiB at most"
        )


def memory() -> float:
    """Return the peak resident memory of this process in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
