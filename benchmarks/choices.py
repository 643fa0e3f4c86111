"""Cost of running a learned AutoMTL policy, by norm policy: multiplications and time relative to one network per task.

python train_mtl.py --method automtl
python benchmarks/choices.py results/scenes_automtl

The network is materialised (``TaskModel.predictor``) and run both directly and as a ``torch.export`` program; one network per
task is timed in the same way, in turn with it. Multiplications exclude heads, both times include them.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from options import parse_mtl
from taps.benchmarks.opening import open_benchmark
from taps.cli.program import run
from taps.methods.policy import read_policy
from taps.multitask import macs
from taps.networks.classifier import attach_head
from taps.runs.multi_task import MultiTask
from taps.settings.declare import Parser
from taps.stop_signals import StopSignals
from taps.storage import run_folder


def seconds(function: Callable) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def ratio(ours: Callable, theirs: list[Callable], x: torch.Tensor, rounds: int) -> float:
    """Return the median ratio of times measured in turn: one call for all tasks ÷ one call per task."""

    def apart() -> None:
        for net in theirs:
            net(x)

    ours(x), apart()
    return statistics.median(seconds(lambda: ours(x)) / seconds(apart) for _ in range(rounds))


@torch.no_grad()
def measure(work: MultiTask, stage: Path, rounds: int, batch: int) -> list[tuple[str, float, float, float]]:
    """Return for each norm policy: name, MACs, time and time of exported programs, each × one network per task."""
    policy, tasks = read_policy(stage / "policy.json"), work.benchmark.tasks
    x = work.benchmark.example(count=batch)
    rows = []
    for norm in ("follow", "frozen", "task"):
        work.options = replace(work.options, norm=norm)
        model = work.model(tasks, policy=policy).eval()
        for own in {id(own): own for one in model.task_norms for own in one.norms._modules.values()}.values():
            torch.nn.init.normal_(own.bias)  # all different, as after training
        together = model.predictor()
        alone = [attach_head(work.benchmark.backbone(), model.heads[task]).eval() for task in tasks]
        exported = torch.export.export(together, (x,)).module()
        programs = [torch.export.export(net, (x,)).module() for net in alone]
        count = model.predict_cost(x)
        full = sum(macs.macs(net, x) for net in alone) - count["macs_heads"]
        times = ratio(together, alone, x, rounds), ratio(exported, programs, x, rounds)
        rows.append((norm, count["macs"] / full, *times))
    return rows


def main(arguments: list[str]) -> None:
    """Run the command."""
    parser = Parser(prog="python benchmarks/choices.py", description=__doc__.splitlines()[0])
    parser.add_argument(
        "folder", metavar="RUN", type=Path, nargs="+", help="finished run of train_mtl.py --method automtl"
    )
    parser.add_argument("--rounds", type=int, default=15, metavar="N", help="number of measurements (default: 15)")
    parser.add_argument("--batch", type=int, default=16, metavar="N", help="images per batch (default: 16)")
    given = parser.parse_args(arguments)
    print(f"{torch.get_num_threads()} threads, {given.batch} images, × one network a task")
    for folder in given.folder:
        options = parse_mtl(["--config", str(folder / "settings.json")])
        work = MultiTask(
            options, open_benchmark(options, Accelerator(cpu=True)), Accelerator(cpu=True), run_folder.RunFolder(folder),
            StopSignals(),
        )  # fmt: skip
        for stage in sorted(folder.glob("retrain_*")):
            for norm, share, eager, exported in measure(work, stage, given.rounds, given.batch):
                print(
                    f"{folder.name} {stage.name} norm={norm:6}  MACs {share:.3f}  time {eager:.3f} ({eager / share:.2f} × MACs)  "
                    f"exported {exported:.3f} ({exported / share:.2f} × MACs)"
                )


if __name__ == "__main__":
    run(main)
