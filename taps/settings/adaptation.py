"""Settings of ``train_sequential.py``, ``train_joint.py`` and ``evaluate.py``."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import ClassVar

from taps.settings.choices import IMAGE_SAMPLINGS, NORMS, OPTIMIZERS
from taps.settings.declare import Settings, setting, several

#: what the help of a training program says of its exit status
STATUS = "Exit status: 0 done; 2 a mistake in the options or the data; 130 and 143 stopped, continue with --resume."


@dataclass(frozen=True)
class Data(Settings):
    """The image data."""

    title: ClassVar[str] = "data"
    dataset: list[str] | None = setting(None, "folders with train/ and test/ (optionally val/), folders of classes, CSV files with path,label or path,labels, a folder that holds several of the first, a DomainNet root with the official lists, or one domain of it", nargs="+", metavar="PATH", shown="the demo")
    cropped: bool = setting(False, "scale images to the input size without keeping their aspect ratio; always done for folders named *cropped* unless --no-cropped_names", bool)
    cropped_names: bool = setting(True, "apply --cropped to folders whose name contains 'cropped', such as those of ImageNet-to-Sketch", bool, negatable=True)
    interpolation: str | None = setting(None, "how images are resized", choices=("bilinear", "bicubic"), shown="as the base was trained")
    input_size: int = setting(224, "side length of the network's input", int, low=1, metavar="PIXELS")
    resize: int | None = setting(None, "shorter side of evaluation images before the centre crop", int, low=1, metavar="PIXELS", shown="8/7 of the input size, 256 for 224")
    background: str = setting("white", "colour under transparent pixels: a name or #rrggbb", metavar="COLOUR")
    no_flip: bool = setting(False, "do not mirror training images", bool)
    val_fraction: float = setting(0.1, "fraction of train used to select the best epoch if there is no val/ folder; 0 selects on the test split, as published", float, low=0, high=0.9, metavar="F")
    test_fraction: float = setting(0.2, "fraction of each class to test on if the data has no test images", float, low=0, above=True, high=0.9, metavar="F")
    skip_bad_images: bool = setting(False, "check every image first, leave out unreadable ones and report their number", bool)
    workers: int = setting(min(8, os.cpu_count() or 1), "data-loading processes; results do not depend on their number", int, low=0, metavar="N", shown="the number of processors, at most 8")


@dataclass(frozen=True)
class Network(Settings):
    """The shared network."""

    title: ClassVar[str] = "network"
    model_type: str = setting("resnet34", "any timm model", metavar="NAME")
    model_path: str | None = setting(None, "initial weights: .safetensors or .pth with timm's or torchvision's names, on disk, at https://… or at hf-hub:user/repository/file", metavar="FILE")
    pretrained: bool = setting(True, "start from timm's ImageNet weights rather than random ones", bool, negatable=True)
    checkpoint_activations: bool = setting(False, "recompute activations in the backward pass instead of keeping them: less memory, more time; for networks that support timm's set_grad_checkpointing", bool)


@dataclass(frozen=True)
class MethodChoice(Settings):
    """The method, which decides what tasks share."""

    title: ClassVar[str] = "method"
    method: str | None = setting(None, "", metavar="NAME", shown="taps, with --budget taps_budget")
    norm: str | None = setting(None, "norm layers: each task's own everywhere (task), its own only after tuned layers (follow), or the base's (frozen)", choices=NORMS, shown="task, with --budget follow")
    penalty: str = setting("layers", "what --lam weighs: the mean of the scores |s| over layers, as published, or over weights, which closes large layers first", choices=("layers", "weights"))
    published: bool = setting(False, "follow the published program of TAPS wherever it differs, unless set here: torchvision's first ImageNet weights for ResNets, bilinear resizing, no margin around the test crop, --no-cropped_names, gradients summed over eight batches, three epochs without λ, gates that learn to the end, a penalty divided by 52, Nesterov momentum for the shared network of joint training, the best epoch chosen on test images, and pictures read without EXIF orientation, 16-bit scaling or a background under transparent pixels", bool)
    layers: str | None = setting(None, "only layers whose name matches can be tuned, e.g. 'layer[34]'", metavar="REGEX")


@dataclass(frozen=True)
class Schedule(Settings):
    """The phases of training, and the penalty or budget that keeps tasks small."""

    title: ClassVar[str] = "method"
    lam: float = setting(1.0, "weight of the sparsity penalty, a mean over layers; with larger values fewer layers are tuned. The published program divides by 52 instead of the number of layers L, so that its λ is 52/L times as large: 1.44 for ResNet-34, 0.98 for ResNet-50", float, low=0, metavar="λ")
    warmup_epochs: float = setting(2.0, "initial epochs without the penalty; may be fractional", float, low=0, metavar="N")
    settle_epochs: float | None = setting(None, "epochs at the end in which gates are fixed and nothing is penalised, so that tuned layers can adjust; with --published 0", float, low=0, metavar="N", shown="two thirds of those after the warm-up, rounded down")
    budget: list[str] | str | None = setting(None, "instead of --lam, --warmup_epochs and --settle_epochs: the size of a task file (5% of the base, 600KB, 2MB). All layers are trained for a third of the epochs; then layers and bits per weight are chosen to keep as much as possible of what was learned, and the other layers return to the base. With several sizes there is one run per size; those that train alike (below 0.6 %, up to 2 %, up to 6 %, above) start from one open phase", nargs="+", metavar="SIZE", shown="none; taps_budget: 10%")


@dataclass(frozen=True)
class Optimization(Settings):
    """Optimiser, steps and learning rates."""

    title: ClassVar[str] = "training"
    epochs: int = setting(30, "passes over the training images", int, low=1, metavar="N")
    accumulate: int = setting(1, "batches per optimiser step", int, low=1, metavar="N")
    gradients: str = setting("mean", "how the gradients of the batches of a step are combined: by their mean or their sum", choices=("mean", "sum"))
    optimizer: str | None = setting(None, "nag is sgd with Nesterov momentum; split is momentum normalised by layer for deltas (from a --budget of 2 bits per weight on, adam) and adam for norms and heads, at 0.3 times the learning rate, and for deltas less if the base's weights are small", choices=OPTIMIZERS, shown="sgd; with --budget split")
    lr: float = setting(0.01, "initial learning rate, which falls along a cosine; with --budget below 2 bits per weight it is multiplied by 0.7 from 0.2 bits and by 0.5 from 0.6 bits on, and falls almost linearly in fewer than 12 epochs", float, low=0, above=True, metavar="X", aliases=("--learning_rate",))
    score_lr: float | None = setting(None, "learning rate of the gate scores", float, low=0, above=True, metavar="X", shown="as --lr")
    momentum: float = setting(0.9, "momentum for sgd and nag", float, low=0, high=1, metavar="X")
    wd: float = setting(0.0, "weight decay on deltas, heads and the matrices of a base that is trained; never on scores and norms", float, low=0, metavar="X")
    lr_warmup_epochs: int = setting(0, "epochs at the start in which learning rates rise linearly (--warmup_epochs delays the penalty instead)", int, low=0, metavar="N")
    layer_decay: float = setting(1.0, "factor on the learning rates of deltas and norms per block of distance from the head, blocks as in timm", float, low=0, above=True, high=1, metavar="X")
    clip_grad: float | None = setting(None, "clip the gradients of a step to at most this norm", float, low=0, above=True, metavar="X", shown="no limit")
    label_smoothing: float = setting(0.0, "share of the target that is spread over all classes", float, low=0, high=0.99, metavar="X", aliases=("--smoothing",))
    mixup: float = setting(0.0, "α of mixup, which blends pairs of training images; 0 turns it off", float, low=0, metavar="α")
    cutmix: float = setting(0.0, "α of CutMix, which pastes a part of one training image into another; 0 turns it off", float, low=0, metavar="α")
    ema_decay: float | None = setting(None, "validate and keep an exponential moving average of the weights with this decay per step, e.g. 0.99; gates are not averaged", float, low=0, above=True, high=0.999999, metavar="X", aliases=("--model_ema_decay",), shown="no average")
    patience: int | None = setting(None, "stop a task after N epochs without a better validation result", int, low=1, metavar="N", shown="never")
    eval_epochs: int = setting(1, "validate every N epochs and after the last", int, low=1, metavar="N")
    limit_batches: int | None = setting(None, "use only N batches per epoch and N per evaluation, for trial runs", int, low=1, metavar="N")
    seed: int = setting(0, "random seed", int, low=0, high=2**32 - 1, metavar="N")


@dataclass(frozen=True)
class Augmentation(Settings):
    """Random changes of training images beyond crop and flip, and weights of classes."""

    title: ClassVar[str] = "training"
    auto_augment: str | None = setting(None, "policy of timm: rand-m9-mstd0.5-inc1 (RandAugment), augmix-m3-w3 (AugMix), original or 3a (AutoAugment)", metavar="POLICY", aliases=("--aa",), shown="none")
    random_erasing: float = setting(0.0, "probability of erasing a part of a training image", float, low=0, high=1, metavar="P", aliases=("--reprob",))
    class_weights: str = setting("none", "balanced: weigh each class in the loss by the inverse of its number of images; with several labels per image, weigh each label by the ratio of images without it to images with it", choices=("none", "balanced"))


@dataclass(frozen=True)
class Batches(Settings):
    """The batch size."""

    title: ClassVar[str] = "training"
    batch_size: int = setting(32, "images per batch on each process; in joint training, images of each task", int, low=1, metavar="N")


@dataclass(frozen=True)
class Machine(Settings):
    """Devices and precision."""

    title: ClassVar[str] = "machine"
    device: str = setting("auto", "device to run on", choices=("auto", "cpu", "cuda", "mps"))
    gpus: list[int] | None = setting(None, "indices of the GPUs to use; with several, one process runs on each", int, low=0, nargs="+", metavar="N", aliases=("--gpu",), shown="the first visible one; with --multi_gpu all visible ones")
    multi_gpu: bool = setting(False, "run one process on every visible GPU (DistributedDataParallel); accelerate launch and torchrun work too", bool)
    amp: str = setting("none", "mixed precision", choices=("none", "bf16", "fp16"))


@dataclass(frozen=True)
class Output(Settings):
    """The results folder."""

    title: ClassVar[str] = "output"
    config: str | None = setting(None, "a YAML file of settings, such as settings.yaml of an earlier run; the command line takes precedence", metavar="FILE", repeats=False)
    ignore_unknown: bool = setting(False, "continue if the --config file has unknown entries", bool, repeats=False)
    result_path: str = setting("results", "folder of the experiment folders; with several machines, a folder that all of them share", metavar="DIR")
    experiment_name: str | None = setting(None, "name of the experiment's folder", metavar="NAME", aliases=("--exp_name",), shown="named after the data, model and method")
    resume: bool = setting(False, "continue the experiment exactly where it stopped, or start it if there is none", bool, repeats=False)
    overwrite: bool = setting(False, "delete an earlier experiment of this name", bool, repeats=False)
    track: list[str] | None = setting(None, "also log to these trackers, e.g. wandb or mlflow", nargs="+", metavar="NAME", shown="TensorBoard's files only")
    keep_checkpoint: bool = setting(False, "keep the checkpoint of a finished run (weights and optimiser state)", bool)


@dataclass(frozen=True)
class Sweep(Settings):
    """Several runs from one command."""

    title: ClassVar[str] = "training"
    seeds: list[int] | None = setting(None, "instead of --seed: one run for each seed, and their means and standard deviations at the end", int, low=0, high=2**32 - 1, nargs="+", metavar="N", shown="one run")


@dataclass(frozen=True)
class AdaptationSettings(Output, Machine, Sweep, Batches, Augmentation, Optimization, Schedule, MethodChoice, Network, Data):
    """Settings that sequential and joint training share."""

    epilog: ClassVar[str] = STATUS
    method: list[str] | str | None = several(MethodChoice, "method", "with several methods, as with several values of --lam, there is one run for each combination")  # type: ignore[assignment]
    lam: list[float] | float = several(Schedule, "lam", "with several values there is one run for each, from one warm-up")  # type: ignore[assignment]

    def __post_init__(self) -> None:
        for name in ("method", "lam", "budget"):
            value = getattr(self, name)
            if isinstance(value, list) and len(value) == 1:
                object.__setattr__(self, name, value[0])


@dataclass(frozen=True)
class SequentialSettings(AdaptationSettings):
    """Settings of ``train_sequential.py``."""

    title: ClassVar[str] = "sequential"
    description: ClassVar[str] = "Adapt one pretrained network to one task after another. Without --dataset, run the demo."
    compile: bool = setting(False, "compile the training step with torch.compile; takes minutes, so it pays off only in long runs", bool)
    parallel: int | None = setting(None, "train up to N tasks side by side, each in a process of its own with its share of the processors or GPUs (OMP_NUM_THREADS sets the threads of each); needs Ray: taps-vision[serve]. The files are byte for byte those of training one task after another with as many threads", int, low=1, metavar="N", shown="one after another", repeats=False)
    address: str | None = setting(None, "HOST:PORT of a Ray cluster on which tasks are trained side by side, or auto; its machines share the data and --result_path", metavar="ADDRESS", shown="this machine", repeats=False)


@dataclass(frozen=True)
class JointSettings(AdaptationSettings):
    """Settings of ``train_joint.py``."""

    title: ClassVar[str] = "joint"
    description: ClassVar[str] = "Train one network for many tasks together. Without --dataset, run the demo."
    epochs: int = setting(60, "passes over the training images", int, low=1, metavar="N")
    batch_size: int = setting(12, "images of each task per batch on each process", int, low=1, metavar="N")
    variant: str = setting("joint", "joint: train the base and all tasks' deltas at once, with memory that grows with the number of tasks; lite: train one network that all tasks share, then one task after another on it, with the memory of one task", choices=("joint", "lite"))
    sampling: str = setting("equal", "images per task in a batch: equal numbers, in proportion to the tasks' sizes, or to their 1/T-th power (temperature); an epoch always has as many images as all tasks together", choices=IMAGE_SAMPLINGS)
    sampling_temperature: float = setting(2.0, "T for --sampling temperature: 1 is proportional, large values approach equal", float, low=0, above=True, metavar="T")
    base_lr: float | None = setting(None, "learning rate of the shared base", float, low=0, above=True, metavar="X", shown="that of --lr divided by the square root of the number of tasks")
    shared_optimizer: str | None = setting(None, "optimiser of the shared network in the lite variant", choices=OPTIMIZERS, shown="as --optimizer")
    shared_epochs: int | None = setting(None, "epochs for the shared network in the lite variant", int, low=1, metavar="N", shown="as --epochs")


@dataclass(frozen=True)
class EvaluateSettings(Settings):
    """Settings of ``evaluate.py``."""

    title: ClassVar[str] = "evaluate"
    description: ClassVar[str] = "Test a results folder on its test splits and print its table."
    positional: ClassVar[tuple[str, ...]] = ("folder",)
    required: ClassVar[tuple[str, ...]] = ("folder",)
    missing: ClassVar[str] = "name the results folder to evaluate, e.g. results/demo"
    folder: str = setting("", "a results folder, e.g. results/demo")
    config: str | None = setting(None, "a YAML file of these settings, or settings.yaml of the run to evaluate; the command line takes precedence", metavar="FILE", repeats=False)
    tasks: list[str] | None = setting(None, "tasks to evaluate", nargs="+", metavar="NAME", shown="all")
    dataset: list[str] | None = setting(None, "test on these folders or tables instead of those used in training: on their test images or, where they are not divided, on all", nargs="+", metavar="PATH")
    export: str | None = setting(None, "also write each task as a separate network: DIR/<task>.safetensors, a state dict for timm, and DIR/<task>.pt2, a torch.export program; and DIR/together.pt2, one program for all tasks that computes shared work once", metavar="DIR")
    onnx: bool = setting(False, "with --export: also write every program as .onnx", bool)
    no_test: bool = setting(False, "do not test, only print the stored table or export", bool)
    verify: bool = setting(False, "instead of testing, verify that every tensor of the base is bit for bit what it was after training, and every task's output on a known input up to rounding; exit status 1 if not", bool)
    batch_size: int | None = setting(None, "images per batch", int, low=1, metavar="N", shown="as in the run")
    workers: int | None = setting(None, "data-loading processes", int, low=0, metavar="N", shown="as in the run")
    device: str = setting("auto", "device to run on", choices=("auto", "cpu", "cuda", "mps"))
    limit_batches: int | None = setting(None, "test on N batches only", int, low=1, metavar="N")
    skip_bad_images: bool = setting(False, "leave out images that cannot be read", bool)
