"""What TAPS costs beside the plain network: ratios of medians, measured alternately in one process.

    python benchmarks/cost.py                      # ResNet-34, batch 32, 128 px, CPU
    python benchmarks/cost.py --model vit_small_patch16_224 --pixels 224 --batch 8

Peak memory is measured in a process of its own for each variant, as the growth over what the imports take.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

import taps


def plain_network(options) -> nn.Module:
    torch.manual_seed(0)
    net = taps.create_backbone(options.model, pretrained=False)
    return nn.Sequential(net, nn.Linear(net.num_features, options.classes))


def task_model(options, closed: float = 0.0, method: str = "taps", norm: str = "task") -> taps.TaskModel:
    torch.manual_seed(0)
    model = taps.adapt(taps.create_backbone(options.model, pretrained=False), method, norm=norm)
    model.add_task("task", num_classes=options.classes)
    for unit in model.units[: round(closed * len(model.units))] if method == "taps" else ():
        unit.gates["task"].set(False)
    return model


def training_step(
    network: nn.Module, options, forward: Callable, penalty: Callable | None = None
) -> Callable[[], None]:
    network.train()
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1e-4, momentum=0.9)
    x = torch.randn(options.batch, 3, options.pixels, options.pixels)
    y = torch.arange(options.batch) % options.classes

    def step() -> None:
        loss = nn.functional.cross_entropy(forward(x), y)
        if penalty is not None:
            loss = loss + penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def task_step(model: taps.TaskModel, options) -> Callable[[], None]:
    return training_step(model, options, lambda x: model(x, task="task"), lambda: model.penalty("task"))


def evaluation(network: nn.Module, options, forward: Callable) -> Callable[[], None]:
    network.eval()
    x = torch.randn(options.batch, 3, options.pixels, options.pixels)

    def run() -> None:
        with torch.no_grad():
            forward(x)

    return run


def alternately(variants: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median seconds of each variant; one call of each in turn, after one round to warm up."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for index in range(rounds + 1):
        for name, run in variants.items():
            start = time.perf_counter()
            run()
            if index:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def resident(field: str) -> int:
    """Bytes of ``VmRSS`` (now) or ``VmHWM`` (peak) of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise ValueError(f"this system does not report {field}")


def peak_memory(variant: str, options, queue) -> None:
    torch.set_num_threads(options.threads)
    before = resident("VmRSS")
    if variant == "fine-tuning":
        net = plain_network(options)
        step = training_step(net, options, net)
    else:
        step = task_step(task_model(options), options)
    for _ in range(4):
        step()
    queue.put(resident("VmHWM") - before)


def measure_memory(variant: str, options) -> int:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=peak_memory, args=(variant, options, queue))
    process.start()
    value = queue.get()
    process.join()
    return value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet34")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--pixels", type=int, default=128)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(
        f"{options.model}, batch {options.batch}, {options.pixels} px, {options.threads} CPU threads, {options.rounds} rounds"
    )

    weights = sum(parameter.numel() * 4 for parameter in plain_network(options).parameters())
    fine, ours = (measure_memory(variant, options) for variant in ("fine-tuning", "taps"))
    allowed = 1.1 * fine + weights
    print(f"peak memory of training, MiB: fine-tuning {fine >> 20}, TAPS {ours >> 20}, weights {weights >> 20}")
    print(f"  TAPS / (fine-tuning + one copy of the weights + 10 %) = {ours / allowed:.3f}")

    net = plain_network(options)
    steps = {
        "plain fine-tuning": training_step(net, options, net),
        "taps, all open": task_step(task_model(options), options),
        "taps, half closed": task_step(task_model(options, closed=0.5), options),
    }
    report("training step", alternately(steps, options.rounds))
    del steps

    net = plain_network(options)
    models = {name: task_model(options, closed) for name, closed in (("open", 0.0), ("closed", 1.0))}
    merged = models["open"].merge("task")
    runs = {
        "plain network": evaluation(net, options, net),
        "taps, all closed": evaluation(models["closed"], options, lambda x: models["closed"](x, task="task")),
        "taps, all open": evaluation(models["open"], options, lambda x: models["open"](x, task="task")),
        "taps, merged": evaluation(merged, options, merged),
    }
    report("evaluation", alternately(runs, options.rounds))

    with tempfile.TemporaryDirectory() as folder:
        for name, model in (*models.items(), ("half closed", task_model(options, closed=0.5))):
            path = model.save_task("task", folder) / "task.safetensors"
            content = sum(tensor.numel() * tensor.element_size() for tensor in load_file(path).values())
            print(
                f"task file, {name}: {path.stat().st_size:,} bytes = {path.stat().st_size / content:.4f} × its content"
            )


def report(title: str, seconds: dict[str, float]) -> None:
    first = next(iter(seconds.values()))
    print(f"{title}, × plain ({1000 * first:.0f} ms):")
    for name, value in seconds.items():
        print(f"  {name:20} {value / first:.3f}")


if __name__ == "__main__":
    main()
