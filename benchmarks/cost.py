"""Cost of TAPS relative to the plain network: ratios of medians, measured alternately in one process.

    python benchmarks/cost.py                      # ResNet-34, batch 32, 128 px, CPU
    python benchmarks/cost.py --model vit_small_patch16_224 --pixels 224 --batch 8
    python benchmarks/cost.py --only many          # only the cost of many tasks on one base

Peak memory is measured in a separate process per variant, as the growth over the memory of the imports.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy
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
    """Return the median seconds of each variant, called in turn after one warm-up round."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for index in range(rounds + 1):
        for name, run in variants.items():
            start = time.perf_counter()
            run()
            if index:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def resident(field: str) -> int:
    """Return the bytes of ``VmRSS`` (now) or ``VmHWM`` (peak) of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise ValueError(f"this system does not report {field}")


def peak_memory(variant: str, options) -> int:
    torch.set_num_threads(options.threads)
    before = resident("VmRSS")
    if variant == "fine-tuning":
        net = plain_network(options)
        step = training_step(net, options, net)
    else:
        step = task_step(task_model(options), options)
    for _ in range(4):
        step()
    return resident("VmHWM") - before


def measure(function: Callable[..., int], arguments: tuple) -> int:
    """Return the result of ``function`` in a new process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet34")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--pixels", type=int, default=128)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--only",
        choices=("one", "settled", "loaded", "many"),
        help="only one task, one task with fixed gates, loaded tasks at batch size 1, or many tasks",
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(
        f"{options.model}, batch {options.batch}, {options.pixels} px, {options.threads} CPU threads, {options.rounds} rounds"
    )

    if options.only in (None, "one"):
        one_task(options)
    if options.only in (None, "settled"):
        for name, pixels, batch in (("resnet34", 128, 32), ("vit_small_patch16_224", 224, 8)):
            settled(name, pixels, batch, options.rounds)
    if options.only in (None, "loaded"):
        loaded_tasks(options)
    if options.only in (None, "many"):
        many_tasks(options)


def one_task(options) -> None:
    """Compare training, evaluation, memory and files of one task with the plain network."""
    weights = sum(parameter.numel() * 4 for parameter in plain_network(options).parameters())
    fine, ours = (measure(peak_memory, (variant, options)) for variant in ("fine-tuning", "taps"))
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


def settled(name: str, pixels: int, batch: int, rounds: int) -> None:
    """Compare training with fixed gates, a third of the layers open and norm="follow" with full fine-tuning."""
    options = argparse.Namespace(model=name, pixels=pixels, batch=batch, classes=100)
    net = plain_network(options)
    steps = {"fine-tuning": training_step(net, options, net)}
    weights = sum(parameter.numel() for parameter in net.parameters())
    layouts: dict[str, Callable[[int, int, str], bool]] = {
        "last third": lambda index, count, unit: index >= count - count // 3,
        "every third": lambda index, count, unit: index % 3 == 2,
    }
    if name.startswith("resnet"):
        layouts["third stage"] = lambda index, count, unit: "layer3" in unit
    facts = {}
    for layout, is_open in layouts.items():
        model = task_model(options, norm="follow")
        for index, unit in enumerate(model.units):
            unit.gates["task"].set(is_open(index, len(model.units), unit.name))
            unit.gates["task"].requires_grad_(False)
            if not unit.gates["task"].decide().uses_delta:  # as training does in settle
                del unit.deltas["task"]
        opened = sum("task" in unit.deltas for unit in model.units)
        own = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        facts[layout] = f"{opened} of {len(model.units)} layers, optimiser's memory {own / weights:.3f} ×"
        steps[layout] = training_step(model, options, lambda x, model=model: model(x, task="task"))
    times = alternately(steps, rounds)
    for layout, text in facts.items():
        ratio = times[layout] / times["fine-tuning"]
        print(f"settled, {name} {pixels} px, {layout} open ({text}): {ratio:.3f} of fine-tuning's time")


TASKS = ("a", "b", "c", "d", "e", "f")


def six_tasks(name: str, is_open: Callable[[float], bool], norm: str = "follow") -> taps.TaskModel:
    """Return a network with six tasks that tune the layers whose relative depth 0..1 ``is_open`` accepts."""
    torch.manual_seed(0)
    model = taps.adapt(taps.create_backbone(name, pretrained=False), norm=norm)
    for task in TASKS:
        model.add_task(task, num_classes=10)
        for index, unit in enumerate(model.units):
            for parameter in unit.deltas[task].parameters():
                parameter.data.normal_(std=1e-3)
            unit.gates[task].set(is_open(index / len(model.units)))
    return model


def loaded_tasks(options) -> None:
    """Measure ten loaded tasks that tune the last quarter of the layers, on one image of 224 px at a time."""
    for name in ("resnet34", "tf_efficientnet_lite0", "vit_small_patch16_224"):
        loaded(name, options.rounds)


@torch.no_grad()
def loaded(name: str, rounds: int, count: int = 10) -> None:
    trained = six_tasks(name, lambda depth: depth >= 0.75)
    model = taps.adapt(taps.create_backbone(name, pretrained=False), norm="follow")
    model.load_base(trained.base_state())
    with tempfile.TemporaryDirectory() as folder:
        for index in range(count):
            saved = trained.save_task(TASKS[index % len(TASKS)], Path(folder) / str(index))
            model.load_task(saved, name=f"task{index}")
    model.eval()
    x = torch.randn(1, 3, 224, 224)
    cost = model.predict_cost(x)
    needed = cost["macs"] / cost["macs_separate"]
    merged = {task: model.merge(task) for task in model.tasks}
    times = alternately(
        {
            "one merged": lambda: merged["task0"](x),
            "one loaded": lambda: model(x, "task0"),
            "all merged": lambda: [network(x) for network in merged.values()],
            "predict": lambda: model.predict(x),
        },
        rounds,
    )
    one, every = times["one loaded"] / times["one merged"], times["predict"] / times["all merged"]
    print(
        f"batch 1, {name} 224 px: one of {count} loaded tasks {one:.3f} × its merged network; predict for all {every:.3f} × "
        f"{count} merged networks at {needed:.3f} of their MACs ({every / needed:.2f} ×)"
    )


def many_tasks(options) -> None:
    for name, pixels in (("resnet34", 128), ("vit_small_patch16_224", 224)):
        for depth in (0.25, 0.5, 0.75):
            predicting(name, pixels, depth, options.rounds)
    for pixels in (64, 128):
        for layout, is_open in (
            ("every second layer closed", lambda depth: round(depth * 36) % 2 == 1),
            ("first half closed", lambda depth: depth >= 0.5),
        ):
            mixed_step(pixels, layout, is_open, options.rounds)
    loading(options.rounds)


@torch.no_grad()
def predicting(name: str, pixels: int, depth: float, rounds: int) -> None:
    """Measure six tasks on 16 images in one pass, with everything up to some depth shared."""
    model = six_tasks(name, lambda unit: unit >= depth).eval()
    x = torch.randn(16, 3, pixels, pixels)
    outputs = model.predict(x)
    difference = max(float((model(x, task) - output).abs().max()) for task, output in outputs.items())
    cost = model.predict_cost(x)
    needed = cost["macs"] / cost["macs_separate"]
    merged = {task: model.merge(task) for task in TASKS}
    predictor = model.predictor()
    times = alternately(
        {
            "separate": lambda: [model(x, task) for task in TASKS],
            "predict": lambda: model.predict(x),
            "merged": lambda: [merged[task](x) for task in TASKS],
            "predictor": lambda: predictor(x),
        },
        max(rounds // 3, 3),
    )
    ratio = times["predict"] / times["separate"]
    exported = times["predictor"] / times["merged"]
    print(
        f"predict, {name} {pixels} px, tuned from {depth:.2f} of the depth: {needed:.3f} of the MACs of six passes, "
        f"{ratio:.3f} of their time ({ratio / needed:.2f} × the MACs), predictor {exported:.3f} of six merged networks' "
        f"({exported / needed:.2f} ×), largest difference {difference:.0e}"
    )


def mixed_step(pixels: int, layout: str, is_open: Callable[[float], bool], rounds: int) -> None:
    """Compare a step on 6 × 8 images of six tasks in one forward pass with six separate forward and backward passes."""
    model = six_tasks("resnet34", is_open, norm="task").train()
    x, y = torch.randn(48, 3, pixels, pixels), torch.arange(48) % 10
    names = [task for task in TASKS for _ in range(8)]
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-5)
    loss = nn.functional.cross_entropy

    def penalty() -> torch.Tensor:
        return sum(model.penalty(task) for task in TASKS)

    def mixed() -> None:
        (6 * loss(model(x, names), y) + penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()

    def separate() -> None:
        for index, task in enumerate(TASKS):
            rows = slice(8 * index, 8 * index + 8)
            (loss(model(x[rows], task), y[rows]) + model.penalty(task)).backward()
        optimizer.step()
        optimizer.zero_grad()

    plain = nn.Sequential(taps.create_backbone("resnet34", pretrained=False), nn.Linear(512, 10)).train()

    def one_batch() -> None:
        loss(plain(x), y).backward()

    def six_batches() -> None:
        for index in range(len(TASKS)):
            loss(plain(x[8 * index : 8 * index + 8]), y[8 * index : 8 * index + 8]).backward()

    times = alternately(
        {"separate": separate, "mixed": mixed, "six batches": six_batches, "one batch": one_batch}, rounds
    )
    memory = {name: measure(step_memory, (pixels, layout, name)) for name in ("mixed", "summed", "separate")}
    print(
        f"mixed step, resnet34 {pixels} px, {layout}: {times['mixed'] / times['separate']:.3f} of the time of six separate "
        f"ones (the plain network, one batch of 48: {times['one batch'] / times['six batches']:.3f} of six of 8); "
        f"memory {memory['mixed'] / memory['summed']:.2f} × that of six forwards and one backward, "
        f"{memory['mixed'] / memory['separate']:.2f} × that of six backwards one by one"
    )


def step_memory(pixels: int, layout: str, how: str) -> int:
    """Return the growth of this process's memory over three steps, in bytes."""
    opens = {"first half closed": lambda depth: depth >= 0.5}
    model = six_tasks("resnet34", opens.get(layout, lambda depth: round(depth * 36) % 2 == 1), norm="task").train()
    x, y = torch.randn(48, 3, pixels, pixels), torch.arange(48) % 10
    names = [task for task in TASKS for _ in range(8)]
    before = resident("VmRSS")
    for _ in range(3):
        if how == "mixed":
            nn.functional.cross_entropy(model(x, names), y).backward()
        else:
            losses = []
            for index, task in enumerate(TASKS):
                rows = slice(8 * index, 8 * index + 8)
                losses.append(nn.functional.cross_entropy(model(x[rows], task), y[rows]))
                if how == "separate":
                    losses.pop().backward()
            if losses:
                sum(losses).backward()
        for parameter in model.parameters():
            parameter.grad = None
    return resident("VmHWM") - before


def loading(rounds: int) -> None:
    """Compare loading a task with reading its bytes, and measure switching between loaded tasks."""
    for name in ("resnet34", "resnet50"):
        model = six_tasks(name, lambda depth: depth >= 0.25, norm="task").eval()
        with tempfile.TemporaryDirectory() as folder:
            path = model.save_task("a", folder) / "task.safetensors"

            def load(model: taps.TaskModel = model, folder: str = folder) -> None:
                model.load_task(folder, name="loaded")
                model.remove_task("loaded")

            def load_and_use(model: taps.TaskModel = model, folder: str = folder) -> None:
                model.load_task(folder, name="loaded")
                for tensor in model.task_state("loaded").values():
                    tensor.sum()
                model.remove_task("loaded")

            def read_and_use(path: Path = path) -> None:
                torch.from_numpy(numpy.fromfile(path, dtype=numpy.float32)).sum()

            reading = {
                "load": load,
                "read": path.read_bytes,
                "load and use": load_and_use,
                "read and use": read_and_use,
            }
            times = alternately(reading, max(rounds, 11))
            size = path.stat().st_size

        def switch(model: taps.TaskModel = model) -> None:
            for task in TASKS * 50:
                with model.using(task):
                    pass

        switching = alternately({"switch": switch}, rounds)["switch"] / 300
        print(
            f"loading a task, {name}: {size / 1e6:.1f} MB in {1000 * times['load']:.1f} ms, "
            f"{times['load'] / times['read']:.2f} × reading its bytes, "
            f"with a sum over every tensor {times['load and use'] / times['read and use']:.2f} × the same over the bytes; "
            f"switching {1e6 * switching:.1f} µs"
        )


def report(title: str, seconds: dict[str, float]) -> None:
    first = next(iter(seconds.values()))
    print(f"{title}, × plain ({1000 * first:.0f} ms):")
    for name, value in seconds.items():
        print(f"  {name:20} {value / first:.3f}")


if __name__ == "__main__":
    main()
