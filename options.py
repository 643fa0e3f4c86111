"""Every command-line option of the programs, grouped, once."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from taps.adashare import SAMPLINGS as GATE_SAMPLINGS
from taps.adashare import VARIANTS
from taps.arguments import Parser, number
from taps.automtl import COSTS
from taps.benchmarks import BENCHMARKS
from taps.data.formatted import ALIASES
from taps.data.mimic3 import ALIASES as STAY_ALIASES
from taps.data.tasks import SAMPLINGS
from taps.dynashare import TARGET_LOSSES
from taps.errors import UserError, unknown
from taps.methods import METHODS
from taps.mtl import PHASES
from taps.plan import LAST_TEMPERATURE
from taps.presets import preset
from taps.recipe import DECAYS, OPTIMIZERS
from taps.skips import SKIPS
from taps.sparse import STRUCTURES

#: defaults of the published program, and those of the demo where they differ
PUBLISHED = {
    "model_type": "resnet34", "epochs": 30, "batch_size": 32, "lr": 0.01, "warmup_epochs": 2.0, "settle_epochs": 0.0,
    "lam": 1.0, "score_lr": None, "input_size": 224, "workers": min(8, os.cpu_count() or 1), "val_fraction": 0.1,
}  # fmt: skip
JOINT = {**PUBLISHED, "batch_size": 12, "epochs": 60}
MULTI_TASK_METHODS = ("adashare", "dynashare", "automtl", "sparse_delta", "taps", "hard_sharing", "single_task")
DEMO = {
    "model_type": "tf_efficientnet_lite0", "epochs": 6, "batch_size": 16, "lr": 0.03, "lam": 0.5, "warmup_epochs": 0.5,
    "settle_epochs": 4.5, "input_size": 64, "workers": 0, "experiment_name": "demo",
}  # fmt: skip
#: the demo's learning rate with a budget, where all layers learn at first
DEMO_BUDGET_LR = 0.02


def steps(low: int) -> Callable[[str], int | str]:
    """A parser of numbers of steps from ``low`` on, or with an ``e`` behind of passes over the training samples."""

    def parse(text: str) -> int | str:
        if not text.endswith("e"):
            return number(int, low)(text)
        number(float, 0, 1e6, above=True)(text[:-1])
        return text

    return parse


def share(text: str) -> float:
    """A share such as ``2%`` or ``0.02``, above 0 and at most all."""
    try:
        value = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share above 0 and up to 100%, such as 2%")
    return value


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
        choices=METHODS,
        metavar="NAME",
        help="; ".join(f"{name}: {row.summary}" for name, row in METHODS.items())
        + " (default: taps, with --budget taps_budget)",
    )
    method.add_argument(
        "--norm",
        choices=("task", "follow", "frozen"),
        help="norm layers: each task's own everywhere (task), only behind tuned layers (follow), or the base's (frozen) (default: task, of taps_budget follow)",
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
        nargs="+",
        metavar="SIZE",
        help="instead of --lam, --warmup_epochs and --settle_epochs: a size of the task file (5%% of the base, 600KB, 2MB). All layers learn for a third of the epochs; then its bytes go to the layers and bits a weight that keep most of what was learned, and the other layers back to the base. Several sizes are a run each that begin with one open phase (default: none; of taps_budget 10%%)",
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
        help=f"learning rate of the first epoch; falls with a cosine {default('lr')[:-1]}, with --budget {DEMO_BUDGET_LR})",
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

    add_machine(parser)
    add_output(parser.add_argument_group("output"), "(default: data, model and method; demo: demo)")
    return parser


def add_machine(parser: Parser) -> None:
    """Devices and precision."""
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


def add_output(output, name: str) -> None:
    """Where results go."""
    output.add_argument(
        "--result_path",
        default="results",
        metavar="DIR",
        help="where experiment folders go; with several machines a folder they share (default: results)",
    )
    output.add_argument(
        "--experiment_name",
        metavar="NAME",
        help=f"the experiment's folder {name}",
    )
    output.add_argument(
        "--resume",
        action="store_true",
        help="continue the experiment exactly where it stopped; start it if there is none",
    )
    output.add_argument("--overwrite", action="store_true", help="delete an earlier experiment of this name")


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
    options = _with_method(parser, parser.parse_args(arguments))
    if options.method == "hard_sharing":
        parser.error("method hard_sharing trains all tasks together: use train_joint.py")
    _refuse_policies(parser, options)
    return _complete(parser, options, PUBLISHED, DEMO)


def parse_joint(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse and fill in the defaults, which for the demo are the demo's."""
    parser = joint_parser()
    options = _with_method(parser, parser.parse_args(arguments))
    if options.method == "hard_sharing" and options.variant == "lite":
        parser.error("--variant lite shares first and adapts then: choose another --method, or --variant joint")
    if isinstance(options.budget, list) and options.variant == "lite":
        parser.error("--variant lite takes one --budget")
    _refuse_policies(parser, options)
    demo = {**DEMO, "experiment_name": f"demo_{options.variant}"}
    options = _complete(parser, options, JOINT, demo, f"_{options.variant}")
    if options.shared_epochs is None:
        options.shared_epochs = options.epochs
    return options


def _with_method(parser: Parser, options: argparse.Namespace) -> argparse.Namespace:
    """Fill in the method and its size; several sizes stay a list."""
    if options.budget is not None and len(options.budget) == 1:
        options.budget = options.budget[0]
    if options.method is None:
        options.method = "taps" if options.budget is None else "taps_budget"
    row = METHODS[options.method]
    options.norm = row.norms[0] if options.norm is None else options.norm
    if options.budget is None:
        options.budget = row.budget
    elif "threshold" not in row.options:
        parser.error(f"--budget chooses among layers, which method {options.method} does not")
    for name in ("lam", "warmup_epochs", "settle_epochs", "score_lr"):
        if options.budget is not None and getattr(options, name) is not None:
            parser.error(f"--{name} is not used with a budget, which takes its place: leave one of them out")
    return options


def _refuse_policies(parser: Parser, options: argparse.Namespace) -> None:
    if METHODS[options.method].fixed is not None:
        parser.error(f"method {options.method} learns a policy and trains again under it: use train_mtl.py")


def _complete(
    parser: Parser, options: argparse.Namespace, published: dict, demo: dict, suffix: str = ""
) -> argparse.Namespace:
    """Fill in defaults and refuse what contradicts itself."""
    defaults = dict(published) if options.dataset else {**published, **demo}
    if not options.dataset and options.budget is not None:
        defaults["lr"] = DEMO_BUDGET_LR
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
    return options


def mtl_parser() -> Parser:
    """Options of ``train_mtl.py``. Those without a default take the benchmark's published value (``taps/presets.py``)."""
    parser = Parser(
        prog="train_mtl.py",
        description="Learn which blocks of one network each of several tasks runs, train again under sampled policies, and "
        "test. Without options: AdaShare on Scenes, a generated benchmark.",
        epilog="What has no default here has that of the benchmark, the number of tasks and the method, the published one where "
        "there is one (taps/presets.py). "
        "Exit status: 0 done; 2 a mistake in the options or the data; 130 and 143 stopped, continue with --resume.",
        allow_abbrev=False,
    )
    data = parser.add_argument_group("data")
    data.add_argument(
        "--benchmark",
        default="scenes",
        choices=BENCHMARKS,
        help="(default: scenes, generated where it is missing; mimic3 and volumes are generated unless data is named)",
    )
    data.add_argument(
        "--dataset",
        nargs="+",
        metavar="PATH",
        help="the benchmark's folder (default: datasets/<name>, for mimic3 generated stays); for domainnet its root, or any folders with train/ and test/",
    )
    data.add_argument(
        "--tasks", nargs="+", metavar="TASK", help="which of the benchmark's tasks, e.g. semseg normals depth"
    )
    data.add_argument(
        "--images", metavar="DIR", help="volumes: folder of one .npy or .nii.gz file a subject, and of the three lists"
    )
    data.add_argument("--labels", metavar="CSV", help="volumes: table with one row a subject")
    data.add_argument("--cat_target", nargs="+", metavar="COLUMN", help="volumes: columns that are categories")
    data.add_argument("--num_target", nargs="+", metavar="COLUMN", help="volumes: columns that are numbers")
    data.add_argument(
        "--subject_column",
        default="subjectkey",
        metavar="COLUMN",
        help="volumes: of the subjects (default: subjectkey)",
    )
    data.add_argument(
        "--group",
        nargs="+",
        metavar="COLUMN",
        help="volumes: subjects alike in one of these stay together when train is divided, e.g. families",
    )
    data.add_argument("--mixed_shapes", action="store_true", help="volumes: of different shapes are brought to one too")
    data.add_argument("--hours", type=number(int, 8), metavar="N", help="mimic3: hours that are kept of each stay")
    data.add_argument(
        "--normalizer",
        metavar="FILE",
        help="mimic3: means and stds as .json or .npz (default: normalizer.json in the root)",
    )
    data.add_argument("--num_class", type=int, metavar="N", help="classes of cityscapes: 2, 7 or 19")
    data.add_argument(
        "--crop", type=number(int, 8), metavar="PIXELS", help="side of the training crops of a dense benchmark"
    )
    data.add_argument(
        "--input_size",
        type=number(int, 1),
        metavar="N",
        help="side in pixels of the images of domainnet, in voxels of the cube that volumes are brought to",
    )
    data.add_argument(
        "--cropped", action="store_true", help="domainnet: scale images without regard to their proportions"
    )
    data.add_argument(
        "--val_fraction",
        type=number(float, 0, 0.9),
        metavar="F",
        help="part of train that choices are made on, where the data has none; 0 chooses on the test split, as published",
    )
    data.add_argument(
        "--policy_fraction",
        type=number(float, 0, 0.9, above=True),
        metavar="F",
        help="part of train that learns policies, where the data does not say",
    )
    data.add_argument(
        "--workers", type=number(int, 0), default=0, metavar="N", help="processes that load data (default: 0)"
    )

    network = parser.add_argument_group("network")
    network.add_argument(
        "--model_type",
        metavar="NAME",
        help="any timm model with residual blocks; mimic3: resnet10 to resnet152 or tcn; volumes: resnet10 to resnet152",
    )
    network.add_argument(
        "--causal",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="mimic3: no block looks at hours after the one that is asked about; --no-causal does, as published. Gates of dynashare see the whole series either way",
    )
    network.add_argument("--model_path", metavar="FILE", help="start from these weights")
    network.add_argument(
        "--pretrained",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="start from timm's ImageNet weights, or from random ones",
    )
    network.add_argument("--output_stride", type=int, choices=(8, 16, 32), help="of the features of a dense benchmark")
    network.add_argument(
        "--channels", nargs=4, type=number(int, 1), metavar="N", help="of a ResNet's four stages, for small networks"
    )
    network.add_argument(
        "--patch_size", type=number(int, 1), metavar="PIXELS", help="of a vision transformer of a dense benchmark"
    )
    network.add_argument("--head_width", type=number(int, 1), metavar="N", help="channels inside a dense head")
    network.add_argument(
        "--head_rates", nargs="+", type=number(int, 1), metavar="N", help="dilations of a dense head's branches"
    )
    network.add_argument("--head_dropout", type=number(float, 0, 1), metavar="P", help="in dense heads")

    method = parser.add_argument_group("method")
    method.add_argument(
        "--method",
        default="adashare",
        choices=MULTI_TASK_METHODS,
        metavar="NAME",
        help="; ".join(f"{name}: {METHODS[name].summary}" for name in MULTI_TASK_METHODS if name in METHODS)
        + "; single_task: one network a task (default: adashare)",
    )
    method.add_argument(
        "--norm",
        choices=("task", "follow", "frozen"),
        help="norm layers: each task's own; its own only from where it first differs from other tasks; or shared",
    )
    method.add_argument(
        "--lam", type=number(float, 0), metavar="λ", help="taps and sparse_delta: weight of the sparsity penalty"
    )
    method.add_argument(
        "--base_task",
        metavar="TASK",
        help="sparse_delta: the task whose network the others change (default: the first)",
    )
    method.add_argument(
        "--density",
        type=share,
        metavar="SHARE",
        help="sparse_delta: weights that a sub-task may have of its own, e.g. 2%%, norms included; 100%%: as many as their gates leave open",
    )
    method.add_argument(
        "--where",
        metavar="REGEX",
        help="sparse_delta: change only layers whose name matches, e.g. 'blocks\\.(9|10|11)\\.'; what comes before them is computed once",
    )
    method.add_argument(
        "--structure",
        choices=STRUCTURES,
        default="weight",
        help="sparse_delta: a gate for each weight, or for each row of a matrix, which matrix products can leave out (default: weight)",
    )
    method.add_argument(
        "--pull",
        type=number(float, 0),
        metavar="μ",
        help="sparse_delta: weight of the distance between a sub-task's activations and the base's",
    )
    method.add_argument(
        "--sparsity_weight", type=number(float, 0), metavar="X", help="weight of the loss that skips blocks"
    )
    method.add_argument(
        "--sharing_weight", type=number(float, 0), metavar="X", help="weight of the loss that makes policies alike"
    )
    method.add_argument(
        "--sparsity_loss",
        choices=VARIANTS,
        default="code",
        help="of the published program or of the paper (default: code)",
    )
    method.add_argument(
        "--sharing_loss",
        choices=VARIANTS,
        default="code",
        help="of the published program or of the paper (default: code)",
    )
    method.add_argument(
        "--sampling",
        choices=GATE_SAMPLINGS,
        default="soft",
        help="gates mix while they learn, or are 0 or 1 (default: soft)",
    )
    method.add_argument(
        "--init_temperature",
        type=number(float, 0, above=True),
        metavar="τ",
        help="of the Gumbel-softmax in the first cycle",
    )
    method.add_argument(
        "--temperature_decay",
        type=number(float, 0, 1, above=True),
        metavar="X",
        help=f"factor on the temperature after each cycle; where no published value is known, one that reaches {LAST_TEMPERATURE:g} in the last cycle",
    )
    method.add_argument(
        "--curriculum_speed",
        type=number(float, 0),
        metavar="N",
        help="cycles until one more block, from the last, is opened (0.2: five a cycle); 0: all are open from the start, and warm-up mixes all choices in equal parts",
    )
    method.add_argument(
        "--preference_weight",
        type=number(float, 0),
        metavar="X",
        help="automtl: weight of the published loss that prefers shared layers, more so in shallow ones",
    )
    method.add_argument(
        "--policy_scale",
        type=number(float, 0),
        metavar="C",
        help="automtl: factor inside that loss: 1 in the paper, 6 in the published program",
    )
    method.add_argument(
        "--cost_weight", type=number(float, 0), metavar="X", help="automtl: weight of the loss that keeps the cost"
    )
    method.add_argument(
        "--cost", choices=COSTS, default="parameters", help="automtl: the cost that is kept (default: parameters)"
    )
    method.add_argument(
        "--cost_target",
        type=number(float, 0, above=True),
        metavar="X",
        help="automtl: what it is kept to, × one network a task",
    )
    method.add_argument(
        "--skip",
        choices=SKIPS,
        help="automtl: what a task may leave out: single layers, where something cheaper can stand in (published), or whole residual blocks; auto: blocks where the network has any",
    )
    method.add_argument(
        "--target_rates",
        nargs="+",
        type=number(float, 0, 1),
        metavar="T",
        help="dynashare: share of samples that run each block; one value is that of the second half",
    )
    method.add_argument(
        "--target_weight",
        type=number(float, 0),
        metavar="X",
        help="dynashare: weight of the target-rate loss",
    )
    method.add_argument(
        "--target_loss",
        choices=TARGET_LOSSES,
        default="gated",
        help="dynashare: mean over gated blocks, or as in the published program over all (default: gated)",
    )

    phases = parser.add_argument_group("phases")
    phases.add_argument(
        "--phases",
        nargs="+",
        choices=PHASES,
        default=list(PHASES),
        help="which to run: policy learns, retrain trains under policies, test measures (default: all)",
    )
    phases.add_argument(
        "--exp_ids",
        nargs="+",
        type=number(int, 0),
        metavar="N",
        help="which policies to train under: seeds of their draws",
    )
    phases.add_argument(
        "--sample",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="draw policies from the learned probabilities; --no-sample: take the most probable one, with --exp_ids N the N-th after it",
    )
    phases.add_argument("--policy", metavar="FILE", help="train under this policy.json instead of the run's own")
    phases.add_argument(
        "--retrain_from",
        choices=("scratch", "policy"),
        help="start retraining from the network's first weights or from those of policy learning",
    )
    phases.add_argument(
        "--iterations",
        type=steps(1),
        metavar="N",
        help="steps of warm-up and policy learning together; 20e are as many as 20 passes over train take",
    )
    phases.add_argument("--warmup_iterations", type=steps(0), metavar="N", help="steps before policies are learned")
    phases.add_argument(
        "--retrain_iterations",
        type=steps(1),
        metavar="N",
        help="steps of training under a policy, and of methods without one",
    )
    phases.add_argument(
        "--weight_iterations", type=number(int, 1), metavar="N", help="weight steps of a cycle (default: one pass)"
    )
    phases.add_argument(
        "--policy_iterations", type=number(int, 1), metavar="N", help="policy steps of a cycle (default: one pass)"
    )
    phases.add_argument(
        "--settle_iterations",
        type=number(int, 0),
        metavar="N",
        help="dynashare: last steps of retraining, in which gates stand still and decide as in evaluation",
    )
    phases.add_argument(
        "--pull_iterations",
        type=steps(0),
        metavar="N",
        help="sparse_delta: steps with --pull, after those of gates (--iterations) and of the weights they leave (--retrain_iterations); each is rounded up to whole --eval_iterations",
    )
    phases.add_argument("--eval_iterations", type=steps(1), metavar="N", help="steps between validations, about")

    training = parser.add_argument_group("training")
    training.add_argument(
        "--batch_size",
        type=number(int, 1),
        metavar="N",
        help="samples a step on each process; of domainnet images of each task",
    )
    training.add_argument(
        "--task_weights", nargs="+", type=task_weight, metavar="TASK=X", help="factors of the tasks' losses"
    )
    training.add_argument(
        "--positive_weights",
        nargs="+",
        type=task_weight,
        metavar="TASK=X",
        help="mimic3: factors of the loss where the answer is yes",
    )
    training.add_argument(
        "--loss_at",
        choices=("output", "label"),
        help="compare maps at the network's output size, as published, or at the labels'",
    )
    training.add_argument("--optimizer", choices=OPTIMIZERS, help="of warm-up and retraining")
    training.add_argument(
        "--lr", "--learning_rate", type=number(float, 0, above=True), metavar="X", help="learning rate of the heads"
    )
    training.add_argument(
        "--base_lr", "--backbone_lr", type=number(float, 0, above=True), metavar="X", help="that of the shared network"
    )
    training.add_argument(
        "--score_lr",
        type=number(float, 0, above=True),
        metavar="X",
        help="that of gates which learn with the weights (default: that of --lr)",
    )
    training.add_argument(
        "--delta_lr",
        type=number(float, 0, above=True),
        metavar="X",
        help="sparse_delta: that of the few weights that are left once gates have decided (default: that of --lr)",
    )
    training.add_argument("--decay", choices=DECAYS, help="how they fall")
    training.add_argument(
        "--decay_iterations", type=steps(1), metavar="N", help="steps between two falls of --decay step"
    )
    training.add_argument("--decay_rate", type=number(float, 0, 1, above=True), metavar="X", help="factor of each fall")
    training.add_argument("--betas", nargs=2, type=number(float, 0, 0.999999), metavar="X", help="of adam and adamw")
    training.add_argument(
        "--momentum", type=number(float, 0, 1), default=0.9, metavar="X", help="of sgd and nag (default: 0.9)"
    )
    training.add_argument("--wd", type=number(float, 0), metavar="X", help="weight decay")
    training.add_argument("--weights_optimizer", choices=OPTIMIZERS, help="of the weight steps of policy learning")
    training.add_argument(
        "--weights_lr",
        type=number(float, 0, above=True),
        metavar="X",
        help="its learning rate (default: --lr and --base_lr)",
    )
    training.add_argument(
        "--policy_lr", type=number(float, 0, above=True), metavar="X", help="learning rate of the policy steps (adam)"
    )
    training.add_argument("--policy_wd", type=number(float, 0), metavar="X", help="weight decay of the policy steps")
    training.add_argument(
        "--limit_batches",
        type=number(int, 1),
        metavar="N",
        help="use only N batches an epoch of the loop and N to evaluate, to try things out",
    )
    training.add_argument(
        "--seed", type=number(int, 0), default=0, metavar="N", help="of everything random (default: 0)"
    )

    report = parser.add_argument_group("report")
    report.add_argument(
        "--metrics",
        choices=("exact", "published"),
        default="exact",
        help="repeat the arithmetic of the published programs, to compare with their tables (default: exact)",
    )
    report.add_argument(
        "--single_task",
        metavar="PATH",
        help="what Δ_T compares with: the folder or summary.json of a single-task run, 'measure' to train one network a task first, or 'none'",
    )
    add_machine(parser)
    output = parser.add_argument_group("output")
    output.add_argument(
        "--config",
        metavar="FILE",
        help="a YAML or JSON file of options, such as settings.json of an earlier run; the command line overrides it",
    )
    add_output(output, "(default: benchmark and method)")
    for action in parser._actions:
        value = preset("scenes", None, "adashare").get(action.dest)
        if value not in (None, {}):
            pairs = [f"{name}={number:g}" for name, number in value.items()] if isinstance(value, dict) else value
            shown = " ".join(map(str, pairs)) if isinstance(pairs, (list, tuple)) else value
            action.help = f"{action.help} (Scenes: {shown})"
    return parser


def task_weight(text: str) -> tuple[str, float]:
    """``TASK=X``."""
    name, _, value = text.partition("=")
    try:
        weight = float(value)
    except ValueError:
        weight = -1.0
    if not name or not 0 <= weight < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not TASK=X with a number X of at least 0")
    return name, weight


#: entries of a run's settings that are no options, or none that another run should repeat
NOT_CONFIGURED = ("versions", "commit", "command", "config", "resume", "overwrite", "phases", "resize")


def config_arguments(parser: Parser, path: Path) -> list[str]:
    """A settings file as the arguments that say the same.

    Raises:
        UserError: if it cannot be read or names an unknown option.
    """
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--config {path} cannot be read: {str(error).splitlines()[0]}") from None
    if not isinstance(values, dict):
        raise UserError(f"--config {path} does not hold option: value lines")
    known = {action.dest: action for action in parser._actions}
    arguments: list[str] = []
    for name, value in values.items():
        if name in NOT_CONFIGURED or value is None:
            continue
        if name not in known:
            raise unknown(f"option in {path}", str(name), known)
        action = known[name]
        option = action.option_strings[0]
        if isinstance(action, argparse.BooleanOptionalAction):
            arguments.append(option if value else f"--no-{name}")
        elif action.nargs == 0:
            arguments.extend([option] if value else [])
        else:
            if isinstance(value, dict):
                value = [f"{key}={number}" for key, number in value.items()]
            values_given = value if isinstance(value, list) else [value]
            arguments.extend([option, *map(str, values_given)] if values_given else [])
    return arguments


def parse_mtl(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse; values come from the command line, then from ``--config``, then from the benchmark's preset."""
    parser = mtl_parser()
    options = parser.parse_args(arguments)
    for method in MULTI_TASK_METHODS:
        for name in METHODS[method].select_options if method in METHODS else ():
            if getattr(options, name) is not None and options.method != method:
                parser.error(f"--{name} is for --method {method}, not {options.method}")
    if options.config:
        options = parser.parse_args([*config_arguments(parser, Path(options.config)), *arguments])
    aliases = {"mimic3": STAY_ALIASES, "volumes": {}, "domainnet": {}}.get(options.benchmark, ALIASES)
    for name in ("task_weights", "positive_weights"):
        given = getattr(options, name)
        setattr(options, name, given and [(aliases.get(task, task), weight) for task, weight in given])
    options.tasks = options.tasks and [aliases.get(name, name) for name in options.tasks]
    of_volumes = [name for name in ("images", "labels", "cat_target", "num_target") if getattr(options, name)]
    if options.benchmark != "volumes" and of_volumes:
        parser.error(f"--{of_volumes[0]} is for --benchmark volumes")
    chosen = options.tasks or [*(options.cat_target or ()), *(options.num_target or ())]
    generated = not options.dataset and not options.images and not options.labels
    published = preset(options.benchmark, len(chosen) or None, options.method, generated)
    given_channels = options.channels is not None
    for name in ("task_weights", "positive_weights"):
        if getattr(options, name) is not None:
            setattr(options, name, {**published[name], **dict(getattr(options, name))})
    for name, value in published.items():
        if getattr(options, name, None) is None:
            setattr(options, name, list(value) if isinstance(value, tuple) else value)
    if chosen:
        others = published["task_weights"].keys() - set(chosen)
        options.task_weights = {name: value for name, value in options.task_weights.items() if name not in others}
    if options.experiment_name is None:
        options.experiment_name = f"{options.benchmark}_{options.method}"
    if (
        options.model_type != published["model_type"]
        and not given_channels
        and not options.model_type.startswith("resnet")
    ):
        options.channels = None
    for name in ("model_path", "policy", "images", "labels", "normalizer"):
        setattr(options, name, os.path.abspath(getattr(options, name)) if getattr(options, name) else None)
    options.dataset = [os.path.abspath(path) for path in options.dataset] if options.dataset else None
    if options.single_task not in (None, "measure", "none"):
        options.single_task = os.path.abspath(options.single_task)
    options.resize = round((options.input_size or 224) * 8 / 7)
    if options.resume and options.overwrite:
        parser.error("--resume and --overwrite exclude each other")
    if options.benchmark == "domainnet" and not options.dataset:
        parser.error("--benchmark domainnet needs --dataset: its root, or folders with train/ and test/")
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
    parser.add_argument(
        "--verify",
        action="store_true",
        help="instead of testing: is every tensor of the base, and every task's answer to a known input, what it was when the task had been trained, bit for bit? Ends with status 1 if not",
    )
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
    if given.verify and (given.export or given.dataset):
        parser.error("--verify looks at the stored files alone: leave out --export and --dataset")
    return given
