"""What a learned policy of AutoMTL costs to run, by norm policy: multiplications and time beside one network a task.

python train_mtl.py --method automtl
python benchmarks/choices.py results/scenes_automtl

The network is materialised (``TaskModel.predictor``), as it is and as a program of ``torch.export``; one network a task is timed
in the same way, in turn with it. Heads are left out of multiplications and are part of both times.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from options import parse_mtl
from taps import cost, results
from taps.arguments import Parser
from taps.backbones import attach_head
from taps.benchmarks import open_benchmark
from taps.commands import run
from taps.mtl import MultiTask
from taps.policy import read_policy
from taps.signals import StopSignals


def seconds(function: Callable) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def ratio(ours: Callable, theirs: list[Callable], x: torch.Tensor, rounds: int) -> float:
    """The median of times measured in turn: one call for all tasks beside one for each."""

    def apart() -> None:
        for net in theirs:
            net(x)

    ours(x), apart()
    return statistics.median(seconds(lambda: ours(x)) / seconds(apart) for _ in range(rounds))


@torch.no_grad()
def measure(work: MultiTask, stage: Path, rounds: int, batch: int) -> list[tuple[str, float, float, float]]:
    """For each norm policy: its name, MACs, time, and time of exported programs, each × one network a task."""
    policy, tasks = read_policy(stage / "policy.json"), work.benchmark.tasks
    x = work.benchmark.example(count=batch)
    rows = []
    for norm in ("follow", "frozen", "task"):
        work.options.norm = norm
        model = work.model(tasks, policy=policy).eval()
        for own in {id(own): own for one in model.task_norms for own in one.norms._modules.values()}.values():
            torch.nn.init.normal_(own.bias)  # as training leaves them: no two alike
        together = model.predictor()
        alone = [attach_head(work.benchmark.backbone(), model.heads[task]).eval() for task in tasks]
        exported = torch.export.export(together, (x,)).module()
        programs = [torch.export.export(net, (x,)).module() for net in alone]
        count = model.predict_cost(x)
        full = sum(cost.macs(net, x) for net in alone) - count["macs_heads"]
        times = ratio(together, alone, x, rounds), ratio(exported, programs, x, rounds)
        rows.append((norm, count["macs"] / full, *times))
    return rows


def main(arguments: list[str]) -> None:
    """The command."""
    parser = Parser(prog="python benchmarks/choices.py", description=__doc__.splitlines()[0])
    parser.add_argument(
        "folder", metavar="RUN", type=Path, nargs="+", help="of a finished run of train_mtl.py --method automtl"
    )
    parser.add_argument("--rounds", type=int, default=15, metavar="N", help="measurements (default: 15)")
    parser.add_argument("--batch", type=int, default=16, metavar="N", help="images (default: 16)")
    given = parser.parse_args(arguments)
    print(f"{torch.get_num_threads()} threads, {given.batch} images, × one network a task")
    for folder in given.folder:
        options = parse_mtl(["--config", str(folder / "settings.json")])
        work = MultiTask(
            options, open_benchmark(options, Accelerator(cpu=True)), Accelerator(cpu=True), results.RunFolder(folder),
            StopSignals(),
        )  # fmt: skip
        for stage in sorted(folder.glob("retrain_*")):
            for norm, macs, eager, exported in measure(work, stage, given.rounds, given.batch):
                print(
                    f"{folder.name} {stage.name} norm={norm:6}  MACs {macs:.3f}  time {eager:.3f} ({eager / macs:.2f} × MACs)  "
                    f"exported {exported:.3f} ({exported / macs:.2f} × MACs)"
                )


if __name__ == "__main__":
    run(main)
