"""Every command-line option of the programs, grouped, once."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from taps.arguments import Parser
from taps.data.tasks import SAMPLINGS
from taps.methods import METHODS
from taps.recipe import OPTIMIZERS

#: defaults of the published program, and those of the demo where they differ
PUBLISHED = {
    "model_type": "resnet34", "epochs": 30, "batch_size": 32, "lr": 0.01, "warmup_epochs": 2.0, "settle_epochs": 0.0,
    "lam": 1.0, "score_lr": None, "input_size": 224, "workers": min(8, os.cpu_count() or 1), "val_fraction": 0.1,
}  # fmt: skip
JOINT = {**PUBLISHED, "batch_size": 12, "epochs": 60}
DEMO = {
    "model_type": "tf_efficientnet_lite0", "epochs": 6, "batch_size": 16, "lr": 0.03, "lam": 0.5, "warmup_epochs": 0.5,
    "settle_epochs": 4.5, "input_size": 64, "workers": 0, "experiment_name": "demo",
}  # fmt: skip


def number(kind: type, low: float, high: float = math.inf, above: bool = False) -> Callable[[str], float]:
    """A parser of numbers in [low, high], or (low, high] if ``above``."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (value > low if above else value >= low) or value > high:
            wanted = "a whole number" if kind is int else "a number"
            limit = f"above {low}" if above else f"of at least {low}"
            upper = f" and at most {high}" if high < math.inf else ""
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted} {limit}{upper}")
        return value

    return parse


def boolean(group, name: str, text: str) -> None:
    group.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, default=True, help=text)


def training_parser(prog: str, description: str, published: dict) -> Parser:
    """The options that all training programs have; ``published`` holds the defaults where data is given."""

    def default(name: str) -> str:
        demo = f"; demo: {DEMO[name]}" if name in DEMO and DEMO[name] != published.get(name) else ""
        return f"(default: {'that of --lr' if published[name] is None else published[name]}{demo})"

    parser = Parser(
        prog=prog,
        description=description,
        epilog="Exit status: 0 done; 2 a mistake in the options or the data; 130 and 143 stopped, continue with --resume.",
        allow_abbrev=False,
    )
    data = parser.add_argument_group("data")
    data.add_argument(
        "--dataset",
        nargs="+",
        metavar="PATH",
        help="folders with train/ and test/ (optionally val/), a root with several, a DomainNet root with the official lists, or one domain of it (default: the demo)",
    )
    data.add_argument(
        "--cropped",
        action="store_true",
        help="scale images to the input size without regard to their proportions; always so for folders named *cropped*",
    )
    data.add_argument(
        "--input_size",
        type=number(int, 1),
        metavar="PIXELS",
        help=f"side of the network's input {default('input_size')}",
    )
    data.add_argument(
        "--resize",
        type=number(int, 1),
        metavar="PIXELS",
        help="shorter side before the centre is cut out for evaluation (default: 8/7 of the input size, 256 for 224)",
    )
    data.add_argument("--no_flip", action="store_true", help="do not mirror training images")
    data.add_argument(
        "--val_fraction",
        type=number(float, 0, 0.9),
        metavar="F",
        help=f"part of train that selects the best epoch where there is no val/ folder; 0 selects on the test split, as published {default('val_fraction')}",
    )
    data.add_argument(
        "--skip_bad_images",
        action="store_true",
        help="check every image first, leave out the unreadable ones and say how many",
    )
    data.add_argument(
        "--workers",
        type=number(int, 0),
        metavar="N",
        help=f"processes that load images; the result does not depend on it {default('workers')}",
    )

    network = parser.add_argument_group("network")
    network.add_argument("--model_type", metavar="NAME", help=f"any timm model {default('model_type')}")
    network.add_argument(
        "--model_path",
        metavar="FILE",
        help="start from these weights: .safetensors or .pth, of timm's or torchvision's naming",
    )
    boolean(network, "pretrained", "start from timm's ImageNet weights (default) or from random ones")

    method = parser.add_argument_group("method")
    method.add_argument(
        "--method",
        default="taps",
        choices=METHODS,
        metavar="NAME",
        help="; ".join(f"{name}: {row.summary}" for name, row in METHODS.items()) + " (default: taps)",
    )
    method.add_argument(
        "--norm",
        default="task",
        choices=("task", "follow", "frozen"),
        help="norm layers: each task's own everywhere (task), only behind tuned layers (follow), or the base's (frozen) (default: task)",
    )
    method.add_argument(
        "--lam",
        type=number(float, 0),
        metavar="λ",
        help=f"weight of the sparsity penalty: the larger, the fewer layers are tuned {default('lam')}",
    )
    method.add_argument(
        "--warmup_epochs",
        type=number(float, 0),
        metavar="N",
        help=f"epochs without the penalty, counted exactly {default('warmup_epochs')}",
    )
    method.add_argument(
        "--settle_epochs",
        type=number(float, 0),
        metavar="N",
        help=f"last epochs, in which gates stand still and nothing is penalised, so that what is tuned can adjust {default('settle_epochs')}",
    )
    method.add_argument(
        "--budget",
        metavar="SIZE",
        help="instead of --lam: no penalty, and after the warm-up epochs the layers that moved most are kept within this size of the task file (5%% of the base, 600KB, 2MB); the others go back to the base",
    )
    method.add_argument(
        "--layers", metavar="REGEX", help="only layers whose name matches can be tuned, e.g. 'layer[34]'"
    )

    training = parser.add_argument_group("training")
    training.add_argument(
        "--epochs", type=number(int, 1), metavar="N", help=f"passes over the training images {default('epochs')}"
    )
    training.add_argument(
        "--batch_size",
        type=number(int, 1),
        metavar="N",
        help=f"images a batch on each process; in joint training images of each task {default('batch_size')}",
    )
    training.add_argument(
        "--accumulate",
        type=number(int, 1),
        default=1,
        metavar="N",
        help="batches whose gradients are averaged for a step (default: 1)",
    )
    training.add_argument(
        "--optimizer", default="sgd", choices=OPTIMIZERS, help="nag is sgd with Nesterov momentum (default: sgd)"
    )
    training.add_argument(
        "--lr",
        "--learning_rate",
        type=number(float, 0, above=True),
        metavar="X",
        help=f"learning rate of the first epoch; falls with a cosine {default('lr')}",
    )
    training.add_argument(
        "--score_lr",
        type=number(float, 0, above=True),
        metavar="X",
        help=f"that of the gate scores {default('score_lr')}",
    )
    training.add_argument(
        "--momentum", type=number(float, 0, 1), default=0.9, metavar="X", help="of sgd and nag (default: 0.9)"
    )
    training.add_argument(
        "--wd",
        type=number(float, 0),
        default=0.0,
        metavar="X",
        help="weight decay on deltas, heads and a base that learns; never on scores and norms (default: 0)",
    )
    training.add_argument(
        "--eval_epochs",
        type=number(int, 1),
        default=1,
        metavar="N",
        help="validate every N epochs and after the last (default: 1)",
    )
    training.add_argument(
        "--limit_batches",
        type=number(int, 1),
        metavar="N",
        help="use only N batches an epoch and N to evaluate, to try things out",
    )
    training.add_argument(
        "--seed", type=number(int, 0), default=0, metavar="N", help="of everything random (default: 0)"
    )

    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="(default: auto)")
    machine.add_argument(
        "--multi_gpu",
        action="store_true",
        help="one process on every visible GPU (DistributedDataParallel); accelerate launch and torchrun work too",
    )
    machine.add_argument(
        "--amp", default="none", choices=("none", "bf16", "fp16"), help="mixed precision (default: none)"
    )
    output = parser.add_argument_group("output")
    output.add_argument(
        "--result_path",
        default="results",
        metavar="DIR",
        help="where experiment folders go; with several machines a folder they share (default: results)",
    )
    output.add_argument(
        "--experiment_name",
        metavar="NAME",
        help="the experiment's folder (default: data, model and method; demo: demo)",
    )
    output.add_argument(
        "--resume",
        action="store_true",
        help="continue the experiment exactly where it stopped; start it if there is none",
    )
    output.add_argument("--overwrite", action="store_true", help="delete an earlier experiment of this name")
    return parser


def sequential_parser() -> Parser:
    """Options of ``train_sequential.py``."""
    parser = training_parser(
        "train_sequential.py",
        "Adapt one pretrained network to one task after another. Without --dataset it runs the demo.",
        PUBLISHED,
    )
    parser.add_argument_group("sequential").add_argument(
        "--compile",
        action="store_true",
        help="compile the training step with torch.compile (takes minutes, for long runs)",
    )
    return parser


def joint_parser() -> Parser:
    """Options of ``train_joint.py``."""
    parser = training_parser(
        "train_joint.py",
        "Train one network for many tasks together. Without --dataset it runs the demo.",
        JOINT,
    )
    joint = parser.add_argument_group("joint")
    joint.add_argument(
        "--variant",
        default="joint",
        choices=("joint", "lite"),
        help="joint: the base and all tasks' deltas at once, whose memory grows with the number of tasks; "
        "lite: one network shared by all first, then one task after another on it, in the memory of one task (default: joint)",
    )
    joint.add_argument(
        "--sampling",
        default="equal",
        choices=SAMPLINGS,
        help="whose images a batch holds: equally many of each task, in proportion to the tasks' sizes, or to their "
        "1/T-th power; an epoch always has as many images as all tasks together (default: equal)",
    )
    joint.add_argument(
        "--sampling_temperature",
        type=number(float, 0, above=True),
        default=2.0,
        metavar="T",
        help="of --sampling temperature: 1 is proportional, large values are equal (default: 2)",
    )
    joint.add_argument(
        "--base_lr",
        type=number(float, 0, above=True),
        metavar="X",
        help="learning rate of the shared base (default: that of --lr divided by the square root of the number of tasks)",
    )
    joint.add_argument(
        "--shared_epochs",
        type=number(int, 1),
        metavar="N",
        help="epochs of the shared network in the lite variant (default: as --epochs)",
    )
    return parser


def parse_sequential(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse and fill in the defaults, which for the demo are the demo's."""
    parser = sequential_parser()
    options = parser.parse_args(arguments)
    if options.method == "hard_sharing":
        parser.error("method hard_sharing trains all tasks together: use train_joint.py")
    return _complete(parser, options, PUBLISHED, DEMO)


def parse_joint(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse and fill in the defaults, which for the demo are the demo's."""
    parser = joint_parser()
    options = parser.parse_args(arguments)
    if options.method == "hard_sharing" and options.variant == "lite":
        parser.error("--variant lite shares first and adapts then: choose another --method, or --variant joint")
    demo = {**DEMO, "experiment_name": f"demo_{options.variant}"}
    options = _complete(parser, options, JOINT, demo, f"_{options.variant}")
    if options.shared_epochs is None:
        options.shared_epochs = options.epochs
    return options


def _complete(
    parser: Parser, options: argparse.Namespace, published: dict, demo: dict, suffix: str = ""
) -> argparse.Namespace:
    """Fill in defaults and refuse what contradicts itself."""
    defaults = dict(published) if options.dataset else {**published, **demo}
    if not options.dataset and options.epochs is not None:  # the phases keep their shares of the demo
        for name in ("warmup_epochs", "settle_epochs"):
            defaults[name] = demo[name] * options.epochs / demo["epochs"]
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.resize is None:
        options.resize = round(options.input_size * 8 / 7)
    if options.experiment_name is None:
        data = "_".join(Path(path).name or Path(path).resolve().name for path in options.dataset)
        options.experiment_name = f"{data}_{options.model_type}_{options.method}{suffix}"
    options.dataset = [os.path.abspath(path) for path in options.dataset] if options.dataset else None
    options.model_path = os.path.abspath(options.model_path) if options.model_path else None
    penalised = options.method == "taps" and options.lam > 0 and options.budget is None
    if penalised and options.settle_epochs > 0 and options.warmup_epochs + options.settle_epochs >= options.epochs:
        parser.error(
            f"--warmup_epochs {options.warmup_epochs:g} and --settle_epochs {options.settle_epochs:g} leave none of "
            f"{options.epochs} epochs for --lam"
        )
    if options.resume and options.overwrite:
        parser.error("--resume and --overwrite exclude each other")
    if options.budget is not None and options.method != "taps":
        parser.error(f"--budget chooses among layers, which method {options.method} does not")
    if options.budget is not None and not 0 < options.warmup_epochs < options.epochs:
        parser.error("--budget compares layers after the warm-up: --warmup_epochs must be above 0 and below --epochs")
    return options


def evaluate_parser() -> Parser:
    """Options of ``evaluate.py``."""
    parser = Parser(
        prog="evaluate.py",
        description="Test a results folder on its test splits and print its table.",
        allow_abbrev=False,
    )
    parser.add_argument("folder", help="a results folder, e.g. results/demo")
    parser.add_argument("--tasks", nargs="+", metavar="NAME", help="only these tasks (default: all)")
    parser.add_argument(
        "--dataset", nargs="+", metavar="PATH", help="test on these folders instead of those trained on"
    )
    parser.add_argument(
        "--export",
        metavar="DIR",
        help="also write each task as a network of its own: DIR/<task>.safetensors, a state dict for timm, and DIR/<task>.pt2, a torch.export program; and DIR/together.pt2, one program for all tasks that computes once what they share",
    )
    parser.add_argument("--onnx", action="store_true", help="with --export: write every program as .onnx too")
    parser.add_argument("--no_test", action="store_true", help="do not test; print the stored table or export only")
    parser.add_argument("--batch_size", type=number(int, 1), metavar="N", help="(default: that of the run)")
    parser.add_argument("--workers", type=number(int, 0), metavar="N", help="(default: that of the run)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="(default: auto)")
    parser.add_argument("--limit_batches", type=number(int, 1), metavar="N", help="test on N batches only")
    parser.add_argument("--skip_bad_images", action="store_true", help="leave out images that cannot be read")
    return parser


def parse_evaluate(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse and refuse what contradicts itself."""
    parser = evaluate_parser()
    given = parser.parse_args(arguments)
    if given.onnx and not given.export:
        parser.error("--onnx says how to export: give --export DIR too")
    return given
