"""Savings from skipped blocks: time with half of the blocks or half of the samples left out, and memory of a policy step.

    python benchmarks/skipping.py

Times are medians of ratios of passes run in turn in this process. Memory is the growth of the process's peak due to a training
step, with each kind of step in a separate process.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import taps  # noqa: E402
from taps.core.gate import Decision  # noqa: E402
from taps.core.modules import evaluating  # noqa: E402
from taps.data.multi_label import Task  # noqa: E402
from taps.methods.dynashare import InstanceGate  # noqa: E402
from taps.metrics.losses import make_loss  # noqa: E402
from taps.multitask import macs  # noqa: E402
from taps.networks.dense_backbones import create_dense_backbone  # noqa: E402
from taps.networks.heads import ASPP  # noqa: E402

TASKS = {"semseg": Task("semseg", "classes", 40), "normals": Task("normals", "normals", 3)}


def half_by_macs(model: taps.TaskModel, x: torch.Tensor) -> list[float]:
    """Return a policy that runs every second block, adjusted until half of the blocks' MACs are left."""
    count = len(model.units)
    everything = [1.0] * count

    def macs(policy: list[float]) -> int:
        model.follow({"a": policy})
        with evaluating(model), torch.no_grad(), model.state.running("a"):
            return macs.macs(model.backbone, x)

    full, none = macs(everything), macs([0.0] * count)
    each = [full - macs([float(other != index) for other in range(count)]) for index in range(count)]
    policy, left = everything, full - none
    for index in [*range(1, count, 2), *range(0, count, 2)]:
        if left - each[index] >= 0.49 * (full - none):
            policy = [0.0 if other == index else run for other, run in enumerate(policy)]
            left -= each[index]
    return policy


def ratio(first, second, rounds: int) -> float:
    """Return the median of time(first) ÷ time(second), run in turn."""
    ratios = []
    for _ in range(rounds + 1):
        seconds = []
        for function in (first, second):
            started = time.perf_counter()
            function()
            seconds.append(time.perf_counter() - started)
        ratios.append(seconds[0] / seconds[1])
    return statistics.median(ratios[1:])


@torch.no_grad()
def skipping(name: str, given: argparse.Namespace, dense: bool) -> None:
    """Measure half of the blocks, and half of the samples of every block."""

    def network() -> torch.nn.Module:
        return create_dense_backbone(name) if dense else taps.create_backbone(name, pretrained=False)

    x = torch.randn(given.batch, 3, given.pixels, given.pixels)
    model = taps.adapt(network(), "adashare").eval()
    model.add_task("a", head=torch.nn.Identity())
    policy = half_by_macs(model, x)
    model.follow({"a": policy})
    kept = ratio(lambda: model.features(x, "a"), lambda: model.features(x, None), given.rounds)
    with model.state.running("a"):
        share = macs.macs(model.backbone, x)
    with model.state.running(None):
        share /= macs.macs(model.backbone, x)
    where = f"{name}, {'output stride 8, ' if dense else ''}{given.pixels} px, batch {given.batch}"
    print(
        f"{where}: {sum(policy):.0f} of {len(policy)} blocks, {share:.2f} of the MACs: {kept:.2f} × the time of all blocks"
    )

    model = taps.adapt(network(), "dynashare", target_rates=[0.5] * len(policy)).eval()
    model.add_task("a", head=torch.nn.Identity())
    model.follow({"a": [1.0] * len(policy)})
    for index, unit in enumerate(model.units):
        gate = unit.gates["a"]
        rows = (torch.arange(given.batch) + index) % 2

        def decide(x, gate: InstanceGate = gate, rows=rows) -> Decision:
            gate.logits(x)  # included for the cost of choosing
            return Decision(run=rows.to(x.dtype))

        gate.decide = decide
    kept = ratio(lambda: model.features(x, "a"), lambda: model.features(x, None), given.rounds)
    print(f"{where}: every block for half of the samples: {kept:.2f} × the time of all samples")


def step(kind: str, given: argparse.Namespace) -> None:
    """Run training steps in this process and print how far they raised its peak memory."""
    from taps.core.method import SETTLED

    model = taps.adapt(
        create_dense_backbone("resnet34"), "hard_sharing" if kind == "plain" else "adashare", train_base=True
    )
    for name, task in TASKS.items():
        model.add_task(name, head=ASPP(model.num_features, task.channels))
    size = given.pixels
    x = torch.randn(given.batch, 3, size, size)
    targets = {
        "semseg": torch.randint(0, 40, (given.batch, size, size)),
        "normals": torch.randn(given.batch, 3, size, size),
    }
    losses = {name: make_loss(task, at_output=True) for name, task in TASKS.items()}
    trains = {"plain": SETTLED, "weights": SETTLED, "policy": ("gate",)}[kind]
    for role, parameters in model.roles(*TASKS).items():
        for parameter in parameters.values():
            parameter.requires_grad_(role in trains)
            if role in trains:
                parameter.grad = torch.zeros_like(parameter)
    model.train()
    for norm in model.task_norms:
        norm.hold(kind == "policy", tasks=False)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(2):
        if kind == "plain":
            outputs = model(x, tasks=list(TASKS))
            sum(losses[name](outputs[name], targets[name]) for name in TASKS).backward()
        else:
            for name in TASKS:
                (losses[name](model(x, name), targets[name]) + model.penalty(name)).backward()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def memory(given: argparse.Namespace) -> None:
    """Compare the peak memory of a weight step and of a policy step with that of a plain multi-task step."""
    peaks: dict[str, list[int]] = {}
    for _ in range(3):
        for kind in ("plain", "weights", "policy"):
            line = [
                sys.executable,
                __file__,
                "--step",
                kind,
                "--pixels",
                str(given.pixels),
                "--batch",
                str(given.batch),
            ]
            done = subprocess.run(line, capture_output=True, text=True, check=True)
            peaks.setdefault(kind, []).append(int(done.stdout))
    plain = statistics.median(peaks["plain"])
    for kind in ("weights", "policy"):
        value = statistics.median(peaks[kind])
        print(
            f"memory of a {kind} step: {value / plain:.2f} × that of a plain step of two tasks ({value / 1024:.0f} MiB)"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet34")
    parser.add_argument("--pixels", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--step", choices=("plain", "weights", "policy"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.step:
        step(given.step, given)
        return
    print(f"{torch.get_num_threads()} threads")
    for dense in (False, True):
        skipping(given.model, given, dense)
    memory(given)


if __name__ == "__main__":
    main()
