"""Speed and memory on a CUDA device: TAPS, full fine-tuning, LoRA of PEFT and the plain network, training and inference.

    make bench-gpu                                          # or: python benchmarks/gpu.py; under eight minutes, writes docs/gpu.md
    python benchmarks/gpu.py --device cpu --models resnet18 --sizes 1 4 --seconds 0.3 --page page.md

Every row is measured in turn with the others in one process, in the precision and memory order in which a training step of the
plain network was fastest at that batch size. Training rows are steps of SGD with momentum; ``taps`` trains with learning gates
and ``taps, settled`` with half of the layers closed. Inference compares one task with its merged network, and ten tasks on the
same images with ten.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import timm  # noqa: E402

import taps  # noqa: E402

LAYERS = {"resnet": r"conv\d|downsample\.0", "vit": "qkv|proj|fc1|fc2"}


def plain(name: str, trains: bool) -> nn.Module:
    net = timm.create_model(name, num_classes=100)
    return net.requires_grad_(trains)


def adapted(name: str, tasks: int = 1, settled: bool = False, norm: str = "task") -> taps.TaskModel:
    """Return a model whose tasks have closed the first half of the layers if ``settled``."""
    model = taps.adapt(taps.create_backbone(name, pretrained=False), norm=norm)
    for number in range(tasks):
        task = f"task{number}"
        model.add_task(task, num_classes=100)
        for index, unit in enumerate(model.units):
            unit.gates[task].set(not settled or index >= len(model.units) // 2)
            unit.gates[task].requires_grad_(not settled)
    model.set_task("task0")
    return model


def loaded(model: taps.TaskModel) -> taps.TaskModel:
    """Return the tasks as they are after saving and loading, ready for inference."""
    with tempfile.TemporaryDirectory() as folder:
        for task in model.tasks:
            model.save_task(task, Path(folder) / task)
        for task in model.tasks:
            model.remove_task(task)
            model.load_task(Path(folder) / task)
    return model.eval()


def lora(name: str) -> nn.Module:
    import peft

    layers = next(pattern for kind, pattern in LAYERS.items() if kind in name)
    net = timm.create_model(name, num_classes=100)
    head = "fc" if "resnet" in name else "head"
    config = peft.LoraConfig(r=8, target_modules=rf"(.*\.)?({layers})$", exclude_modules=[head], modules_to_save=[head])
    return peft.get_peft_model(net, config)


class Clock:
    """Times functions in turn on a device."""

    def __init__(self, device: torch.device, seconds: float) -> None:
        self.device, self.seconds = device, seconds

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def once(self, function: Callable[[], object]) -> float:
        self.wait()
        start = time.perf_counter()
        function()
        self.wait()
        return time.perf_counter() - start

    def all(self, functions: dict[str, Callable[[], object]]) -> dict[str, float]:
        """Return the median time of each function."""
        taken: dict[str, list[float]] = {}
        for name, function in functions.items():
            for _ in range(2):
                function()
            taken[name] = []
        ended = time.perf_counter() + self.seconds
        while time.perf_counter() < ended or len(next(iter(taken.values()))) < 3:
            for name, function in functions.items():
                taken[name].append(self.once(function))
        return {name: statistics.median(own) for name, own in taken.items()}

    def memory(self, function: Callable[[], object]) -> float | None:
        """Return the peak of memory in MB while a function runs, beyond what was held before."""
        if self.device.type != "cuda":
            return None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        self.wait()
        return (torch.cuda.max_memory_allocated() - before) / 1e6


def training_step(net: nn.Module, x: torch.Tensor, context: Callable, compiles: bool = False) -> Callable[[], None]:
    parameters = [parameter for parameter in net.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1e-3, momentum=0.9)
    labels = torch.zeros(len(x), dtype=torch.long, device=x.device)
    if compiles and isinstance(net, taps.TaskModel):  # as the training loop prepares a model
        net.hold_buffers()
        for gate in net.gates("task0"):
            gate.decide()
    called = torch.compile(net) if compiles else net

    def step() -> None:
        with context():
            loss = nn.functional.cross_entropy(called(x), labels)
            if isinstance(net, taps.TaskModel):
                loss = loss + net.penalty("task0")
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def forward(net: nn.Module, x: torch.Tensor, context: Callable, **how) -> Callable[[], None]:
    @torch.no_grad()
    def run() -> None:
        with context():
            net(x, **how)

    return run


def in_turn(steps: list[Callable[[], None]]) -> Callable[[], None]:
    def run() -> None:
        for step in steps:
            step()

    return run


def choose(name: str, size: int, clock: Clock) -> tuple[torch.dtype | None, torch.memory_format]:
    """Return precision and memory format in which the plain network trains fastest with batches of a size."""
    kinds = {}
    for dtype in (None, torch.bfloat16) if clock.device.type == "cuda" else (None,):
        for form in (torch.contiguous_format, torch.channels_last):
            net = plain(name, True).to(clock.device, memory_format=form)
            x = torch.randn(size, 3, 224, 224, device=clock.device).to(memory_format=form)
            kinds[dtype, form] = clock.all({"": training_step(net, x, precision(clock.device, dtype))})[""]
    return min(kinds, key=lambda own: kinds[own])


def precision(device: torch.device, dtype: torch.dtype | None) -> Callable:
    return nullcontext if dtype is None else lambda: torch.autocast(device.type, dtype)


def measure(name: str, sizes: list[int], clock: Clock, with_lora: bool, compiled_sizes: list[int]) -> list[tuple]:
    """Return rows: step, batch size, precision and memory order; network; time relative to the first row; images per second; MB."""
    device, rows = clock.device, []
    for size in sizes:
        dtype, form = choose(name, size, clock)
        context, ready = precision(device, dtype), partial(nn.Module.to, device=device, memory_format=form)
        how = ", ".join(str(own).removeprefix("torch.") for own in (dtype or torch.float32, form))
        print(f"{name}, batches of {size}: {how}", flush=True)
        x = torch.randn(size, 3, 224, 224, device=device).to(memory_format=form)
        nets = {
            "full fine-tuning": plain(name, True),
            "taps": adapted(name),
            "taps, settled": adapted(name, settled=True),
            **({"LoRA, rank 8": lora(name)} if with_lora else {}),
        }
        steps = {what: training_step(ready(net).train(), x, context) for what, net in nets.items()}
        rows += _rows(f"training, {size}, {how}", "full fine-tuning", steps, size, clock)
        if size in compiled_sizes:
            own = {what: net for what, net in nets.items() if "LoRA" not in what}
            steps = {f"{what}, compiled": training_step(net, x, context, compiles=True) for what, net in own.items()}
            rows += _rows(f"training, {size}, {how}", "full fine-tuning, compiled", steps, size, clock)
        del nets, steps
        with torch.no_grad():
            several = ready(loaded(adapted(name, 10, settled=True, norm="follow")))
            merged = [ready(several.merge(task)) for task in several.tasks]
            steps = {
                "one merged network": forward(merged[0], x, context),
                "one task of ten": forward(several, x, context, task="task0"),
                "ten merged networks": in_turn([forward(net, x, context) for net in merged]),
                "predict, ten tasks": forward(several.predictor(), x, context),
            }
        rows += _rows(f"inference, {size}, {how}", "one merged network", steps, size, clock)
        del several, merged, steps
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return rows


def _rows(kind: str, reference: str, steps: dict[str, Callable[[], object]], size: int, clock: Clock) -> list[tuple]:
    seconds = clock.all(steps)
    rows = []
    for what, own in seconds.items():
        memory = clock.memory(steps[what])
        shown = "–" if memory is None else f"{memory:,.0f}"
        rows.append((kind, what, f"{own / seconds[reference]:.2f}", f"{size / own:,.1f}", shown))
        print("  ", *rows[-1], sep="  ", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--models", nargs="+", default=["resnet50", "vit_base_patch16_224"])
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--compile", type=int, nargs="*", default=[], metavar="SIZE", help="batch sizes at which to time compiled "
                        "training steps too; compiling takes minutes")  # fmt: skip
    parser.add_argument("--seconds", type=float, default=4.0, help="for each group of rows")
    parser.add_argument("--page", type=Path, default=ROOT / "docs/gpu.md")
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --device cpu tries the program out")
    try:
        import peft  # noqa: F401

        with_lora = True
    except ImportError:
        with_lora = False
        print("peft is not installed: without LoRA", file=sys.stderr)
    device = torch.device(given.device)
    clock = Clock(device, given.seconds)
    title = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    lines = [
        f"# Speed and memory on one {title}",
        "",
        f"`make bench-gpu` with version {taps.__version__} and torch {torch.__version__}.",
        "Times are relative to the first row of each group, medians of steps measured in turn, in the precision and memory order",
        "in which the plain network trains fastest.",
        "",
        "Small batches are bound by the launching of operations, and gates that learn add some; large batches are bound by",
        "arithmetic. In `taps, settled` the first half of the layers is closed, and the ten tasks share that half.",
    ]
    heads = ["step, batch size, precision and memory order", "network", "time", "images per second", "memory, MB"]
    for name in given.models:
        lines += ["", f"## {name}", "", f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
        lines += ["| " + " | ".join(row) + " |" for row in measure(name, given.sizes, clock, with_lora, given.compile)]
    given.page.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"page: {given.page}")


if __name__ == "__main__":
    main()
