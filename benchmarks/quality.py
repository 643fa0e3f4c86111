"""Accuracy against bytes per task, compared with alternatives: same images, seeds, epochs and base weights for all.

    python benchmarks/quality.py                        # the demo's six tasks, three seeds, two processes: under forty minutes
    python benchmarks/quality.py --quick                # two tasks, one seed, half the epochs: a few minutes
    python benchmarks/quality.py --dataset A B --model_type resnet34 --input_size 224 --epochs 30 --images 0
    python benchmarks/quality.py --model_type resnet18 --model_path resnet18.safetensors   # weights made by benchmarks/distil.py
    python benchmarks/quality.py --tune                 # choose each row's settings on validation images

Rows: ``finetune``, ``linear_probe``, ``norm_only``, ``taps`` (published gates and λ), ``taps_budget`` at several budgets (with
``--controls`` also with layers in random order, from the first or from the last instead of chosen ones); LoRA by ``peft`` (Hu
et al., 2022) on every convolution and linear layer that is not grouped; a mask of the base's weights (Piggyback, Mallya et al.,
2018); the weights of each output with the largest gradients (GPS, Zhang et al., 2024); full fine-tuning whose weights are coded
afterwards (``coded`` by this library, ``bitdelta``, ``compeft``); ``qat``, deltas of all layers rounded alike (straight-through)
while Adam trains; LoRA whose factors are coded afterwards, or have one bit per weight while they are trained, with full deltas of
depthwise layers (``coded_lora``, ``one_bit_lora``). Each task has its own head, and its own norms except in the linear probe and
where a row says otherwise: ``frozen norms`` uses the base's norms; ``as documented`` is one base with one adapter per task, whose
batch norms keep updating their statistics with every task's images. The bytes of ``taps_budget``, ``coded`` and ``qat`` are the
length of the file, and the last two rivals use the same codes. The bytes of the others are counted as float16 with batch norms
folded (like ``save_task``'s compact files), positions at their entropy and masks at one bit per weight.

All rows train on the training images and are tested once, after the last epoch; a row and seed that ``--output`` holds already is
refused. ``--tune`` never reads the test images: it uses a copy of the demo that is made from what the demo trains on, other digits
and other strips of the photographs for validation, or a quarter of the training images of other data sets. It tries nine
combinations per row. Settings of ``qat`` and ``coded_lora`` were chosen in this way at 1 %, on three tasks, the latter's also with
rates up to 0.1. For ``one_bit_lora``, seven combinations of scale and rate were tried on three tasks of that copy; for the other
rivals, settings were chosen on a quarter of the training images of three tasks; how budgets are trained was chosen as
``docs/budget.md`` says.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import multiprocessing
import random
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from scipy.stats import t as student

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import taps  # noqa: E402
from taps.core.accounting import accounting  # noqa: E402
from taps.core.method import SETTLED, Phase  # noqa: E402
from taps.core.modules import evaluating  # noqa: E402
from taps.data.classification.folders import find_tasks  # noqa: E402
from taps.data.classification.images import TaskData, make_loader, split_validation  # noqa: E402
from taps.data.generated.demo import make_demo, read_demo  # noqa: E402
from taps.data.opening import needs_image_size  # noqa: E402
from taps.errors import UserError  # noqa: E402
from taps.memory import keep_freed_memory  # noqa: E402
from taps.methods import taps_budget  # noqa: E402
from taps.methods.taps_budget import parse_budget  # noqa: E402
from taps.metrics.accuracy import accuracy_by_class  # noqa: E402
from taps.networks.preprocessing import Preprocessing, of_network  # noqa: E402
from taps.storage import files  # noqa: E402
from taps.storage.task_file import contents, packed_size  # noqa: E402
from taps.training.loop import run_phases  # noqa: E402
from taps.training.recipe import Recipe  # noqa: E402

from rivals import (  # noqa: E402  isort: skip
    AFTERWARDS, FACTORED, TASK, Row, add_factors, code_afterwards, code_factors, rival, use_adapter,
)  # fmt: skip

ROWS = (
    Row("finetune", lr=3e-3, optimizer="adam"),
    Row("linear_probe"),
    Row("norm_only", lr=1e-2, optimizer="adam"),
    Row("taps", "λ 0.5", lr=3e-3, optimizer="adam"),
    Row("lora", "rank 1", lr=1e-2, optimizer="adam"),
    Row("lora", "rank 8", lr=1e-2, optimizer="adam"),
    Row("lora", "rank 32", lr=3e-3, optimizer="adam"),
    Row("lora", "rank 8", lr=1e-2, optimizer="adam", norms="shared"),
    Row("mask", "1 bit", lr=3e-3, optimizer="adam"),
    Row("mask", "1 bit", lr=3e-3, optimizer="adam", norms="base"),
    Row("gradients", "1 %", lr=1e-2, optimizer="adam"),
    Row("coded", "0.3%", lr=3e-3, optimizer="adam"),
    Row("coded", "1%", lr=3e-3, optimizer="adam"),
    Row("coded", "3%", lr=3e-3, optimizer="adam"),
    Row("bitdelta", lr=3e-3, optimizer="adam"),
    Row("compeft", "5 %", lr=3e-3, optimizer="adam", scale=4.0),
    Row("compeft", "20 %", lr=3e-3, optimizer="adam", scale=2.0),
    Row("qat", "0.3%", lr=0.005, optimizer="split"),
    Row("qat", "1%", lr=0.005, optimizer="split"),
    Row("qat", "3%", lr=0.005, optimizer="split"),
    Row("coded_lora", "0.3%", lr=1e-2, optimizer="adam"),
    Row("coded_lora", "1%", lr=1e-2, optimizer="adam"),
    Row("coded_lora", "3%", lr=1e-2, optimizer="adam"),
    Row("one_bit_lora", "0.3%", lr=1e-2, optimizer="adam"),
    Row("one_bit_lora", "1%", lr=1e-2, optimizer="adam"),
    Row("taps_budget", "0.1%", lr=0.01, optimizer="split"),
    Row("taps_budget", "0.3%", lr=0.01, optimizer="split"),
    Row("taps_budget", "1%", lr=0.01, optimizer="split"),
    Row("taps_budget", "3%", lr=0.01, optimizer="split"),
    Row("taps_budget", "10%", lr=0.01, optimizer="split"),
    Row("taps_budget", "35%", lr=0.01, optimizer="split"),
    Row("taps_budget", "50%", lr=0.01, optimizer="split"),
)
CONTROLS = tuple(
    Row("taps_budget", "3%", lr=0.01, optimizer="split", layers=layers) for layers in ("random", "first", "last")
)
TUNED = {"sgd": (0.01, 0.02, 0.05), "split": (0.005, 0.01, 0.02), "adam": (1e-3, 3e-3, 1e-2)}
SCALED = {
    "lora": (1.0, 4.0, 16.0), "gradients": (1.0, 3.0, 10.0), "compeft": (1.0, 2.0, 4.0), "one_bit_lora": (1.0, 4.0, 16.0),
}  # fmt: skip
RANKS = {"coded_lora": (4, 8, 16)}


@contextmanager
def controlled(row: Row, seed: int) -> Iterator[None]:
    """Assign a budget's bytes, inside the ``with`` block, to layers in the row's order, at about one bit per weight, until they are
    spent, or to all layers alike (``qat``); all deltas are rounded when coarse ones are."""
    chosen, error, order, layers = taps_budget.allocate, 0.55, {}, row.layers

    def alike(model: taps.TaskModel, task: str, size: int, fine: float = 0.0, kept=None) -> dict[str, float | None]:
        step = taps_budget._step(model, task, size)
        left = taps_budget._left(model, task, size, step)
        units = [unit for unit in model.units if task in unit.deltas and unit.gates[task].decide().uses_delta]
        fixed = sum(taps_budget._fixed_bytes(model, unit, task, step) for unit in units)
        for level in (0.02 * 1.12**power for power in range(60)):
            taken = fixed
            for unit in units:
                way = [taps_budget._Choice(0, 0.0, level)]
                taps_budget._measure(unit, task, way, 0, 0, set())
                taken += way[0].size
                if taken > left:
                    break
            else:
                return {unit.name: level for unit in units}
        raise UserError("too few bytes for all layers")

    def allocate(model: taps.TaskModel, task: str, size: int, fine: float = 0.0, kept=None) -> dict[str, float | None]:
        if not order:
            names = [unit.name for unit in model.units]
            if layers == "random":
                random.Random(seed).shuffle(names)
            order.update((name, place) for place, name in enumerate(reversed(names) if layers == "last" else names))
        step = taps_budget._step(model, task, size)
        left, levels = taps_budget._left(model, task, size, step), dict.fromkeys(order)
        units = [unit for unit in model.units if task in unit.deltas and unit.gates[task].decide().uses_delta]
        for unit in sorted(units, key=lambda unit: order[unit.name]):
            way = [taps_budget._Choice(0, 0.0, error)]
            taps_budget._measure(unit, task, way, 0, taps_budget._fixed_bytes(model, unit, task, step), set())
            if way[0].size <= left:
                levels[unit.name] = error
                left -= way[0].size
        return levels

    taps_budget.allocate = alike if row.method == "qat" else allocate if layers else chosen
    try:
        yield
    finally:
        taps_budget.allocate = chosen


def bytes_of(row: Row, model: taps.TaskModel, task: str, of_deltas: int = 0) -> int:
    """Return the bytes of a task of this library's methods: its file with a budget, else float16 and folded norms.

    ``of_deltas``: bytes of the deltas if they were coded in another way.
    """
    if model.method.budget is not None:
        with tempfile.TemporaryDirectory() as folder:
            return (model.save_task(task, folder, compact=True) / "task.safetensors").stat().st_size
    account = accounting(model, task)
    norms = account["norm_parameters"] // 2  # weight and bias, with statistics folded in
    deltas = of_deltas or 2 * account["delta_parameters"]
    return deltas + 2 * (norms + account["head_parameters"])


def run(row: Row, seed: int, given: argparse.Namespace) -> dict:
    """Run all tasks of one row and seed; returns accuracies, bytes, seconds and drift."""
    torch.set_num_threads(given.threads)
    keep_freed_memory()
    accelerator = Accelerator(cpu=given.device == "cpu", rng_types=[])
    of_size = {"img_size": given.input_size} if needs_image_size(given.model_type, given.input_size) else {}
    base = taps.create_backbone(given.model_type, path=given.model_path, **of_size)
    prepare = Preprocessing(given.input_size, round(given.input_size * 8 / 7), **of_network(base))
    with_budget = dict.fromkeys(("coded", "qat", *FACTORED), "taps_budget")
    method = {**with_budget, **dict.fromkeys(AFTERWARDS[1:], "finetune")}.get(row.method, row.method)
    own = taps.adapt(copy.deepcopy(base), method) if method in taps.METHODS else None
    blank = taps.adapt(copy.deepcopy(base), "norm_only" if row.norms == "own" else "linear_probe")
    shared = None
    result = {
        "row": row.name,
        "seed": seed,
        "optimizer": row.optimizer,
        "lr": row.lr,
        "scale": row.scale,
        "rank": row.rank,
        "version": taps.__version__,
        "base_bytes": 4 * blank.base_parameters,
        "tasks": {},
    }
    probe, answers = torch.randn(4, 3, given.input_size, given.input_size, generator=torch.manual_seed(0)), {}
    probe = probe.to(accelerator.device)
    tasks = [task for task in tasks_of(given, seed) if given.only in (None, task.name)]
    for task in tasks:
        tested = task.val if given.tune and given.dataset else task.test
        quiet = {"workers": 0, "seed": seed}
        loader, sampler = make_loader(
            task.train, prepare.transform(True, task.stretch, task.flip), 16, train=True, **quiet
        )
        tests, _ = make_loader(tested, prepare.transform(False, task.stretch), 64, train=False)
        torch.manual_seed(seed)
        model, name, extra = own, task.name, 0
        if own is None:
            plain, _ = make_loader(task.train, prepare.transform(False, task.stretch), 64, train=False)
            if row.norms == "shared":
                names = [other.name for other in tasks]
                model, extra = shared = shared or rival(row, copy.deepcopy(base), names, task, plain, seed)
                use_adapter(model, name)
            else:
                name = TASK
                model, extra = rival(row, copy.deepcopy(base), [TASK], task, plain, seed)
            torch.manual_seed(seed)
        model.add_task(name, num_classes=len(task.classes))
        size = parse_budget(row.setting, model) if method == "taps_budget" else None
        if row.method in FACTORED:
            add_factors(row, model, name, size)
        is_plain = row.method == "coded" or row.method in FACTORED
        whole = (Phase("open", given.epochs, penalty=0.0, trains=SETTLED),)
        lam = row.number if row.method == "taps" else 0.0
        recipe = Recipe(
            epochs=given.epochs, warmup_epochs=given.epochs / 12, settle_epochs=given.epochs * 0.75, lam=lam,
            budget=size, lr=row.lr, base_lr=row.lr, optimizer=row.optimizer, seed=seed,
            plan=whole if is_plain else None, decay="cosine" if is_plain else None,
        )  # fmt: skip
        if row.method == "qat":  # trained at the rate that was chosen for it, whatever a budget's is multiplied by
            lr = row.lr / model.method.defaults(model, recipe).rate
            recipe = replace(recipe, lr=lr, base_lr=lr)
        started = time.perf_counter()
        with controlled(row, seed):
            run_phases(model, name, loader, sampler, recipe, accelerator)
        if row.method in (*AFTERWARDS, *FACTORED):
            plain, _ = make_loader(task.train, prepare.transform(False, task.stretch), 64, train=False)
            if row.method in FACTORED:
                taken = code_factors(model, name, plain, size)
            else:
                extra = code_afterwards(row, model, name, plain, size)
        trained = time.perf_counter()
        with evaluating(model):
            found = accuracy_by_class(model, name, accelerator.prepare(tests), accelerator, len(task.classes))
            score = found.accuracy
            evaluated = time.perf_counter()
            answers[task.name] = (model, name, model(probe, name), tests, len(task.classes))
        if row.method in FACTORED:
            size = taken
        elif own is None:
            blank.add_task(TASK, num_classes=len(task.classes))
            size = packed_size(contents(blank, TASK, compact=True)[0]) + extra
            blank.remove_task(TASK)
        else:
            size = bytes_of(row, model, name, extra)
        result["tasks"][task.name] = {
            "accuracy": score, "bytes": size, "train_seconds": trained - started, "test_seconds": evaluated - trained,
        }  # fmt: skip
    result["drift"] = 0.0
    with torch.no_grad():
        for task, (model, name, before, tests, classes) in answers.items():
            use_adapter(model, name)
            with evaluating(model):
                moved = float((model(probe, name) - before).abs().max())
                if moved:  # report the accuracy after all tasks are trained
                    of = result["tasks"][task]
                    of["when_trained"] = of["accuracy"]
                    again = accuracy_by_class(model, name, accelerator.prepare(tests), accelerator, classes)
                    of["accuracy"] = again.accuracy
            result["drift"] = max(result["drift"], moved)
    return result


def tasks_of(given: argparse.Namespace, seed: int) -> list[TaskData]:
    """Return the tasks with the requested number of training images; ``--tune`` holds back validation images of data sets, while
    the demo has a copy for it."""
    tasks = find_tasks(given.dataset) if given.dataset else read_demo(given.demo)
    if given.tune and given.dataset:
        tasks = [split_validation(replace(task, val=None), 0.25, seed) for task in tasks]
    if given.images:
        kept = {}
        for task in tasks:
            order = torch.randperm(len(task.train), generator=torch.Generator().manual_seed(seed)).tolist()
            kept[task.name] = tuple(task.train[index] for index in order[: given.images])
        tasks = [replace(task, train=kept[task.name]) for task in tasks]
    return tasks[:: max(len(tasks) // given.tasks, 1)][: given.tasks] if given.tasks else tasks


def summarise(results: list[dict]) -> list[dict]:
    """Return one line per row: means over tasks, then mean and spread over seeds; times relative to full fine-tuning."""

    def mean(result: dict, key: str) -> float:
        return statistics.mean(task[key] for task in result["tasks"].values())

    def middle(own: list[dict], key: str) -> float:
        return statistics.median(task[key] for result in own for task in result["tasks"].values())

    by_row: dict[str, list[dict]] = {}
    for result in results:
        by_row.setdefault(result["row"], []).append(result)
    reference = by_row.get("finetune")
    lines = []
    for name, own in by_row.items():
        scores = [mean(result, "accuracy") for result in own]
        size = statistics.mean(mean(result, "bytes") for result in own)
        line = {
            "row": name, **{key: own[0][key] for key in ("optimizer", "lr", "scale")},
            "accuracy": statistics.mean(scores), "seeds": len(scores),
            "spread": statistics.stdev(scores) if len(scores) > 1 else None, "bytes": round(size),
            "percent_of_base": 100 * size / own[0]["base_bytes"], "drift": max(result["drift"] for result in own),
            "tasks": {task: statistics.mean(r["tasks"][task]["accuracy"] for r in own) for task in own[0]["tasks"]},
        }  # fmt: skip
        for key in ("train_seconds", "test_seconds"):
            ratio = middle(own, key) / middle(reference, key) if reference else None
            line[key.replace("seconds", "time_x_finetune")] = ratio
        lines.append(line)
    return lines


def table(lines: list[dict]) -> str:
    """Return the lines as a Markdown table."""
    head = "| method | bytes a task | % of the base | accuracy % | ± over seeds | training time | evaluation time | drift |"
    rows = [head, "|---|---|---|---|---|---|---|---|"]
    for line in lines:
        times = [
            "–" if line[f"{k}_time_x_finetune"] is None else f"{line[f'{k}_time_x_finetune']:.2f} ×"
            for k in ("train", "test")
        ]
        spread = "–" if line["spread"] is None else f"{line['spread']:.1f}"
        rows.append(
            f"| {line['row']} | {line['bytes']:,} | {line['percent_of_base']:.2f} | {line['accuracy']:.1f} | {spread} "
            f"| {times[0]} | {times[1]} | {line['drift']:g} |"
        )
    return "\n".join(rows)


def comparison(results: list[dict], lines: list[dict]) -> str:
    """Return a Markdown table that compares every other method with the budget that has at most its bytes, on the seeds of both."""
    ours = sorted((line for line in lines if re.fullmatch(r"taps_budget [\d.]+%", line["row"])), key=_size)
    scores: dict[str, dict[int, float]] = {}
    for result in results:
        found = statistics.mean(task["accuracy"] for task in result["tasks"].values())
        scores.setdefault(result["row"], {})[result["seed"]] = found
    rows = ["| method | budget | its accuracy minus the method's | 95 % confidence | seeds |", "|---|---|---|---|---|"]
    for line in lines:
        smaller = [own for own in ours if _size(own) <= 1.02 * _size(line)]
        if line in ours or not smaller:
            continue
        own, other = scores[smaller[-1]["row"]], scores[line["row"]]
        gains = [own[seed] - other[seed] for seed in sorted(own.keys() & other.keys())]
        if len(gains) > 1:
            reach = student.ppf(0.975, len(gains) - 1) * statistics.stdev(gains) / len(gains) ** 0.5
            bounds = f"{statistics.mean(gains) - reach:+.1f} to {statistics.mean(gains) + reach:+.1f}"
            budget = smaller[-1]["row"].removeprefix("taps_budget ")
            rows.append(f"| {line['row']} | {budget} | {statistics.mean(gains):+.1f} | {bounds} | {len(gains)} |")
    return "\n".join(rows)


def _size(line: dict) -> float:
    return line["percent_of_base"]


def picture(lines: list[dict], path: Path) -> None:
    """Plot accuracy against bytes on a logarithmic axis; methods with several settings are lines, one per kind of norms. The legend
    has the setting of methods with one."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    families: dict[str, list[dict]] = {}
    for line in lines:
        setting, _, norms = line["row"].partition(",")
        families.setdefault(setting.split()[0] + (f",{norms}" if norms else ""), []).append(line)
    for index, (family, own) in enumerate(families.items()):
        own = sorted(own, key=lambda line: line["percent_of_base"])
        ours, control = family == "taps_budget", family.startswith("taps_budget,")
        label = family if len(own) > 1 or control else own[0]["row"]
        for line in own if len(own) > 1 and not ours else ():  # the axis has the size of ours
            setting, percent = line["row"].partition(",")[0].partition(" ")[2], line["percent_of_base"]
            if any(percent < other["percent_of_base"] < 1.8 * percent for other in own):
                continue  # the next one's label would be written across it
            place = (percent, line["accuracy"])
            axes.annotate(setting, place, xytext=(5, -11), textcoords="offset points", fontsize=8, color="dimgray")
        axes.errorbar(
            [line["percent_of_base"] for line in own], [line["accuracy"] for line in own],
            [line["spread"] or 0 for line in own], marker="o" if ours else "sDv<>P*Xhp"[index % 10], capsize=3,
            linewidth=2.5 if ours else 1, color="black" if ours or control else f"C{index}", label=label,
            markerfacecolor="white" if control else None, zorder=3 if ours else 2,
        )  # fmt: skip
    axes.set_xscale("log")
    ticks = [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50]
    axes.set_xticks(ticks, [f"{tick:g} %" for tick in ticks])
    axes.minorticks_off()
    axes.set(xlabel="bytes per task, % of the base's", ylabel="mean test accuracy, %")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper")
    figure.savefig(path, dpi=120)


def together(results: Iterator[dict | str]) -> Iterator[dict | str]:
    """Join the results of a row's and seed's tasks that were run one by one."""
    for _, own in itertools.groupby(
        results, lambda one: one if isinstance(one, str) else (one["row"], one["seed"], one["lr"])
    ):
        first, *more = own
        for other in more:
            if isinstance(first, dict):
                first["tasks"].update(other["tasks"])
        yield first


def trials(row: Row) -> list[Row]:
    """Return the nine combinations of settings of which validation images choose a row's."""
    more = [replace(row, scale=scale) for scale in SCALED.get(row.method, ())]
    more += [replace(row, rank=rank) for rank in RANKS.get(row.method, ())]
    if more:
        return [replace(own, lr=lr) for own in more for lr in TUNED[row.optimizer]]
    return [replace(row, optimizer=optimizer, lr=lr) for optimizer, rates in TUNED.items() for lr in rates]


def check_unread(before: dict, how: dict, asked: list[tuple[str, int]], folder: Path) -> None:
    """Raise a ``UserError`` if results are of another comparison, or test images would be read again for a row and seed."""
    differing = next((name for name in how if before["how"].get(name) != how[name]), None)
    if differing is not None:
        was = before["how"].get(differing)
        raise UserError(f"{folder} compares with {differing} {was}, not {how[differing]}; choose another --output")
    earlier = before["how"].get("version", "?")  # of all its runs, before 0.19
    done = {(result["row"], result["seed"]): result.setdefault("version", earlier) for result in before["runs"]}
    for row, seed in asked:
        if (row, seed) in done:
            raise UserError(
                f"{folder} has {row}, seed {seed}, tested with version {done[row, seed]}; test images are read once: "
                "choose other --rows or --seeds, or another --output for another version"
            )


def _job(job: tuple[Row, int, argparse.Namespace]) -> dict | str:
    try:
        return run(*job)
    except UserError as error:
        return f"{job[0].name}: {error}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--dataset", nargs="+", help="folders of images, as for train_sequential.py (default: the demo)"
    )
    parser.add_argument("--model_type", default="tf_efficientnet_lite0")
    parser.add_argument("--model_path", help="weights of the base (default: pretrained)")
    parser.add_argument("--input_size", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--images", type=int, default=240, help="training images per task; 0: all (default: 240)")
    parser.add_argument("--tasks", type=int, default=0, help="number of tasks (default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", nargs="+", help="only rows with these name prefixes; other results are kept")
    parser.add_argument("--finetune_lr", type=float, help="learning rate of full fine-tuning (default: 0.003, chosen for "
                        "EfficientNet-Lite0)")  # fmt: skip
    parser.add_argument("--controls", action="store_true", help="also run budgets whose layers are not chosen")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: 2)")
    parser.add_argument("--threads", type=int, default=1, help="threads per process (default: 1)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="of all processes (default: cpu)")
    parser.add_argument(
        "--by_task",
        action="store_true",
        help="one job per task, where tasks have nothing in common; does not measure the drift",
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "quality")
    given = parser.parse_args()
    given.demo = ROOT / "datasets" / ("demo_development" if given.tune else "demo")
    if given.quick:
        given.tasks, given.seeds, given.epochs = given.tasks or 2, [0], 3
    if not given.dataset:
        make_demo(given.demo, development=given.tune)
    rows = (*ROWS, *CONTROLS) if given.controls else ROWS
    if given.finetune_lr and given.tune:
        parser.error("--finetune_lr: --tune tries rates of its own")
    if given.finetune_lr:
        rows = [replace(row, lr=given.finetune_lr) if row.method == "finetune" else row for row in rows]
    for own in given.rows or ():
        if not any(row.name.startswith(own) for row in rows):
            parser.error(f"--rows {own!r} matches none of {', '.join(row.name for row in rows)}")
    rows = [row for row in rows if not given.rows or any(row.name.startswith(own) for own in given.rows)]
    if given.tune:
        given.seeds = [100]  # that no reported run uses
        rows = [own for row in rows for own in trials(row)]
    path = given.output / "quality.json"
    names = ("dataset", "model_type", "model_path", "input_size", "epochs", "images", "tasks", "finetune_lr")
    how = {name: getattr(given, name) for name in names}
    before = files.read_json(path) if path.is_file() and not given.tune else {"how": how, "runs": []}
    try:
        check_unread(before, how, [(row.name, seed) for row in rows for seed in given.seeds], given.output)
    except UserError as error:
        parser.error(str(error))
    results, missing = [], []
    started = time.perf_counter()
    given.only, jobs = None, []
    for seed, row in itertools.product(given.seeds, rows):
        apart = given.by_task and row.norms != "shared"
        names = [task.name for task in tasks_of(given, seed)] if apart else [None]
        jobs += [(row, seed, argparse.Namespace(**{**vars(given), "only": name})) for name in names]
    with multiprocessing.get_context("spawn").Pool(given.jobs) as pool:
        for result in together(pool.imap(_job, jobs)):
            if isinstance(result, str):
                missing.append(result)
                continue
            if given.tune:
                result["row"] += " ({optimizer}, lr {lr:g}, scale {scale:g}, rank {rank})".format_map(result)
            results.append(result)
            if not given.tune:  # what has been tested is known, even if the comparison is interrupted
                given.output.mkdir(parents=True, exist_ok=True)
                files.write_json(path, {"how": how, "runs": [*before["runs"], *results]})
            score = statistics.mean(task["accuracy"] for task in result["tasks"].values())
            text = f"{result['row']}, seed {result['seed']}: {score:.2f} %"
            if result["drift"]:
                trained = statistics.mean(
                    task.get("when_trained", task["accuracy"]) for task in result["tasks"].values()
                )
                text += f" after all tasks, {trained:.2f} % each when it had been trained"
            print(text, flush=True)
        pool.close()
        pool.join()
    for line in sorted(set(missing)):
        print(f"left out: {line}")
    if not results:
        print(f"error: no row could be measured: {missing[0]}", file=sys.stderr)
        raise SystemExit(2)
    if given.tune:
        print(table(summarise(results)))
        return
    results += before["runs"]
    order = {row.name: index for index, row in enumerate((*ROWS, *CONTROLS))}
    results.sort(key=lambda result: (order.get(result["row"], len(order)), result["seed"]))
    lines = summarise(results)
    print(table(lines), comparison(results, lines), sep="\n\n")
    files.write_json(path, {"how": how, "lines": lines, "runs": results})
    picture(lines, given.output / "quality.png")
    minutes = (time.perf_counter() - started) / 60
    base = given.model_type if given.model_path is None else f"{given.model_type} with {given.model_path}"
    files.write_text(
        given.output / "README.md",
        f"# Accuracy against bytes a task\n\n{base}, {given.input_size} px, {len(results[0]['tasks'])} tasks, "
        f"{given.images or 'all'} training images each, {given.epochs} epochs, seeds "
        f"{', '.join(map(str, sorted({result['seed'] for result in results})))}, version "
        f"{', '.join(sorted({result['version'] for result in results}))}.\n\n"
        f"{table(lines)}\n\n{comparison(results, lines)}\n\n"
        "![Accuracy against bytes](quality.png)\n\nMade by `benchmarks/quality.py`, which says what each row is and how bytes are "
        "counted. `quality.json` has every run. Times are ratios of medians to full fine-tuning's; drift is the largest change of "
        "any task's output after the other tasks were trained, where they are trained on one model.\n",
    )
    print(f"{minutes:.1f} minutes; {given.output}/README.md, quality.png, quality.json")


if __name__ == "__main__":
    main()
