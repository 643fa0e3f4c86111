"""Settings of ``train_mtl.py``; those without a default take the benchmark's published value (``published/``)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from taps.settings.adaptation import STATUS, Machine, Output
from taps.settings.choices import (
    BENCHMARKS,
    COSTS,
    DECAYS,
    GATE_SAMPLINGS,
    HEADS,
    LAST_TEMPERATURE,
    NORMS,
    OPTIMIZERS,
    SKIPS,
    STAGES,
    STRUCTURES,
    TARGET_LOSSES,
    VARIANTS,
)
from taps.settings.declare import Settings, setting


@dataclass(frozen=True)
class BenchmarkData(Settings):
    """The benchmark and its data."""

    title: ClassVar[str] = "data"
    benchmark: str = setting("scenes", "scenes is generated if it is missing; mimic3 and volumes are generated unless --dataset names data", choices=BENCHMARKS, metavar="NAME")
    dataset: list[str] | None = setting(None, "the benchmark's folder; for domainnet its root, or any folders with train/ and test/", nargs="+", metavar="PATH", shown="datasets/NAME, for mimic3 and volumes generated data")
    tasks: list[str] | None = setting(None, "which of the benchmark's tasks, e.g. semseg normals depth", nargs="+", metavar="TASK")
    images: str | None = setting(None, "volumes: folder with one .npy or .nii.gz file per subject, and the three lists", metavar="DIR")
    labels: str | None = setting(None, "volumes: table with one row per subject", metavar="CSV")
    cat_target: list[str] | None = setting(None, "volumes: columns that are categories", nargs="+", metavar="COLUMN")
    num_target: list[str] | None = setting(None, "volumes: columns that are numbers", nargs="+", metavar="COLUMN")
    subject_column: str = setting("subjectkey", "volumes: the column that names the subjects", metavar="COLUMN")
    group: list[str] | None = setting(None, "volumes: subjects with an equal value in one of these columns, e.g. families, stay together when train is divided", nargs="+", metavar="COLUMN")
    mixed_shapes: bool = setting(False, "volumes: allow different shapes and resize all volumes to one shape", bool)
    hours: int = setting(170, "mimic3: hours kept of each stay", int, low=8, metavar="N", shown="170; of generated stays 120")
    normalizer: str | None = setting(None, "mimic3: file of means and standard deviations, .json or .npz", metavar="FILE", shown="normalizer.json in the root")
    num_class: int = setting(19, "cityscapes: number of classes, 2, 7 or 19", int, metavar="N")
    crop: int | None = setting(None, "dense benchmarks: side length of training crops", int, low=8, metavar="PIXELS")
    input_size: int | None = setting(None, "side length of domainnet's images in pixels, or of the cube in voxels to which volumes are resized", int, low=1, metavar="N")
    cropped: bool = setting(False, "domainnet: scale images without keeping their aspect ratio", bool)
    val_fraction: float | None = setting(None, "fraction of train used for validation if the data has no validation split; 0 validates on the test split, as published", float, low=0, high=0.9, metavar="F")
    workers: int = setting(0, "data-loading processes", int, low=0, metavar="N")


@dataclass(frozen=True)
class BenchmarkNetwork(Settings):
    """The shared network and its heads."""

    title: ClassVar[str] = "network"
    model_type: str | None = setting(None, "any timm model with residual blocks; mimic3: resnet10 to resnet152 or tcn; volumes: resnet10 to resnet152", metavar="NAME")
    dynamic_kernels: int = setting(0, "mimic3, resnets: number of kernels per dynamic convolution (arXiv 1912.03458), used in the first layer and in the projections of shortcuts; DynaShare's program has 4", int, low=0, high=64, metavar="K", shown="none are dynamic")
    causal: bool = setting(True, "mimic3: no block sees hours after the one that is predicted; with --no-causal blocks see the whole series, as published. Gates of dynashare see the whole series either way", bool, negatable=True)
    model_path: str | None = setting(None, "initial weights", metavar="FILE")
    pretrained: bool | None = setting(None, "start from timm's ImageNet weights rather than random ones", bool, negatable=True)
    checkpoint_activations: bool = setting(False, "recompute activations in the backward pass instead of keeping them: less memory, more time", bool)
    output_stride: int | None = setting(None, "dense benchmarks: output stride of the features", int, choices=(8, 16, 32))
    deeplab: bool | None = setting(None, "dense benchmarks: a ResNet is dilated as in the published programs, whose stem rounds up and whose first dilated blocks are dilated throughout; --no-deeplab: as timm does it", bool, negatable=True)
    channels: list[int] | None = setting(None, "channels of a ResNet's four stages, for small networks", int, low=1, nargs=4, metavar="N")
    patch_size: int | None = setting(None, "dense benchmarks: patch size of a vision transformer", int, low=1, metavar="PIXELS")
    head: str | None = setting(None, "dense heads: aspp, dilated branches (AdaShare, AutoMTL), or convnext, tokens unfolded to 4 × 4 places each and two ConvNeXt blocks (efficient computation sharing)", choices=HEADS)
    head_width: int | None = setting(None, "channels inside a dense head; of convnext before tokens are unfolded, a multiple of 16", int, low=1, metavar="N")
    head_rates: list[int] | None = setting(None, "dilations of a dense head's branches", int, low=1, nargs="+", metavar="N")
    head_dropout: float | None = setting(None, "dropout in dense heads", float, low=0, high=1, metavar="P")


@dataclass(frozen=True)
class BenchmarkMethod(Settings):
    """The method and its own options."""

    title: ClassVar[str] = "method"
    method: str = setting("adashare", "", metavar="NAME")
    norm: str | None = setting(None, "norm layers: each task's own (task), its own only from the first layer in which it differs from other tasks (follow), or shared (frozen)", choices=NORMS)
    lam: float | None = setting(None, "taps and sparse_delta: weight of the sparsity penalty", float, low=0, metavar="λ")
    base_task: str | None = setting(None, "sparse_delta: the task whose network the others modify", metavar="TASK", shown="the first")
    density: float | None = setting(None, "sparse_delta: share of weights, norms included, that a sub-task may have of its own, e.g. 2%; 100%: as many as there are open gates", "share", metavar="SHARE")
    where: str | None = setting(None, r"sparse_delta: change only layers whose name matches, e.g. 'blocks\.(9|10|11)\.'; the layers before them are computed once", metavar="REGEX")
    structure: str = setting("weight", "sparse_delta: one gate per weight, or one per row of a matrix, so that matrix products can leave out rows", choices=STRUCTURES)
    pull: float | None = setting(None, "sparse_delta: weight of the distance between a sub-task's activations and the base's", float, low=0, metavar="μ")
    frame_pull: float = setting(0.0, "sparse_delta on nyud with the frames around each image: weight of the relative distance between activations of an image and of a frame beside it, while the base task is trained", float, low=0, metavar="X")
    sparsity_weight: float | None = setting(None, "weight of the loss that favours skipped blocks", float, low=0, metavar="X")
    sharing_weight: float | None = setting(None, "weight of the loss that makes tasks' policies similar", float, low=0, metavar="X")
    sparsity_loss: str = setting("code", "the loss of the published program (code) or of the paper", choices=VARIANTS)
    sharing_loss: str = setting("code", "the loss of the published program (code) or of the paper", choices=VARIANTS)
    sampling: str = setting("soft", "gates in training: mixtures (soft), or 0 or 1 (hard)", choices=GATE_SAMPLINGS)
    preference_weight: float | None = setting(None, "automtl: weight of the published loss that favours sharing, most strongly in shallow layers", float, low=0, metavar="X")
    policy_scale: float | None = setting(None, "automtl: factor inside the loss of --preference_weight: 1 in the paper, 6 in the published program", float, low=0, metavar="C")
    cost_weight: float | None = setting(None, "automtl: weight of the loss that limits the cost", float, low=0, metavar="X")
    cost: str = setting("parameters", "automtl: the cost that is limited", choices=COSTS)
    cost_target: float | None = setting(None, "automtl: limit on that cost, as a multiple of the cost of one network per task", float, low=0, above=True, metavar="X")
    skip: str | None = setting(None, "automtl: parts that a task may skip: single layers that something cheaper can replace (published), or whole residual blocks; auto: blocks if the network has any", choices=SKIPS)
    target_rates: list[float] | None = setting(None, "dynashare: target share of samples that run each block; a single value applies to the second half of the blocks, and the first half always runs", float, low=0, high=1, nargs="+", metavar="T")
    target_weight: float | None = setting(None, "dynashare: weight of the target-rate loss", float, low=0, metavar="X")
    target_loss: str | None = setting(None, "dynashare: mean over gated blocks, or over all blocks as in the published program (code)", choices=TARGET_LOSSES)


@dataclass(frozen=True)
class Stages(Settings):
    """The stages to run and their lengths."""

    title: ClassVar[str] = "stages"
    phases: list[str] = setting(list(STAGES), "stages to run: policy learns policies, retrain trains under them, test measures", choices=STAGES, nargs="+", repeats=False)
    exp_ids: list[int] | None = setting(None, "numbers of the policies to train under, or with --phases test to test: each is the seed of its draw or, with --no-sample, its rank", int, low=0, nargs="+", metavar="N")
    sample: bool | None = setting(None, "draw policies from the learned probabilities; --no-sample: use the most probable ones", bool, negatable=True)
    policy: list[str] | str | None = setting(None, "train under this policy.json instead of the run's own; with several there is one run for each", nargs="+", metavar="FILE")
    retrain_from: str | None = setting(None, "start retraining from the initial weights (scratch) or from those of policy learning (policy)", choices=("scratch", "policy"))
    iterations: int | str | None = setting(None, "steps of warm-up and policy learning together; 20e: as many steps as 20 passes over train", "steps", low=1, metavar="N")
    warmup_iterations: int | str | None = setting(None, "steps before policies are learned", "steps", low=0, metavar="N")
    retrain_iterations: int | str | None = setting(None, "steps of training under a policy, or of methods without policies", "steps", low=1, metavar="N")
    pull_iterations: int | str | None = setting(None, "sparse_delta: steps with --pull, after the steps of gates (--iterations) and of weights whose gates are open (--retrain_iterations); each number is rounded up to whole --eval_iterations", "steps", low=0, metavar="N")


@dataclass(frozen=True)
class PolicyTraining(Settings):
    """Training of weights and policies; also the options of :class:`taps.PolicyTrainer`."""

    title: ClassVar[str] = "training"
    step_per_task: bool | None = setting(None, "one optimiser step for each task in turn, instead of one for the sum of all losses", bool, negatable=True)
    batch_size: int | None = setting(None, "samples per step on each process; for domainnet, images of each task", int, low=1, metavar="N", aliases=("--train_batch_size",))
    weight_iterations: int | None = setting(None, "weight steps per cycle", int, low=1, metavar="N", shown="one pass")
    policy_iterations: int | None = setting(None, "policy steps per cycle", int, low=1, metavar="N", shown="one pass")
    eval_iterations: int | str | None = setting(None, "approximate steps between validations", "steps", low=1, metavar="N")
    settle_iterations: int | None = setting(None, "dynashare: steps at the end of retraining in which gates are fixed and decide as in evaluation", int, low=0, metavar="N")
    policy_fraction: float | None = setting(None, "fraction of train used to learn policies, unless the data defines it", float, low=0, high=0.9, above=True, metavar="F")
    init_temperature: float | None = setting(None, "temperature of the Gumbel-softmax in the first cycle", float, low=0, above=True, metavar="τ")
    temperature_decay: float | None = setting(None, "factor on the temperature after each cycle", float, low=0, high=1, above=True, metavar="X", shown=f"if none is published, one that reaches {LAST_TEMPERATURE:g} in the last cycle")
    curriculum_speed: float | None = setting(None, "cycles until one more block takes part, starting from the last (0.2: five per cycle); 0: all take part from the start, and warm-up mixes all choices in equal parts", float, low=0, metavar="N")
    task_weights: dict[str, float] | None = setting(None, "factors on the tasks' losses", "weights", nargs="+", metavar="TASK=X")
    optimizer: str | None = setting(None, "optimiser of warm-up and retraining", choices=OPTIMIZERS)
    lr: float | None = setting(None, "learning rate of the heads", float, low=0, above=True, metavar="X", aliases=("--learning_rate",))
    base_lr: float | None = setting(None, "learning rate of the shared network", float, low=0, above=True, metavar="X", aliases=("--backbone_lr",))
    score_lr: float | None = setting(None, "learning rate of gates that are trained with the weights", float, low=0, above=True, metavar="X", shown="as --lr")
    decay: str | None = setting(None, "how learning rates fall", choices=DECAYS)
    warmup_decay: str | None = setting(None, "how learning rates fall before policies are learned", choices=DECAYS, shown="as --decay")
    decay_iterations: int | str | None = setting(None, "steps between two reductions with --decay step", "steps", low=1, metavar="N")
    decay_rate: float | None = setting(None, "factor of each reduction", float, low=0, high=1, above=True, metavar="X")
    betas: list[float] | None = setting(None, "β₁ and β₂ of adam and adamw", float, low=0, high=0.999999, nargs=2, metavar="X")
    momentum: float = setting(0.9, "momentum for sgd and nag", float, low=0, high=1, metavar="X")
    wd: float | None = setting(None, "weight decay", float, low=0, metavar="X", aliases=("--weight_decay",))
    weights_optimizer: str | None = setting(None, "optimiser of the weight steps in policy learning", choices=OPTIMIZERS)
    weights_lr: float | None = setting(None, "learning rate of --weights_optimizer", float, low=0, above=True, metavar="X", shown="--lr and --base_lr")
    policy_lr: float | None = setting(None, "learning rate of the policy steps (adam)", float, low=0, above=True, metavar="X")
    policy_decay_iterations: int | None = setting(None, "steps of policy learning after which --policy_lr falls to a tenth", int, low=1, metavar="N", shown="never")
    policy_wd: float | None = setting(None, "weight decay of the policy steps", float, low=0, metavar="X")
    layer_decay: float = setting(1.0, "factor on the learning rates of the shared network per block of distance from the head, blocks as in timm", float, low=0, above=True, high=1, metavar="X")
    clip_grad: float | None = setting(None, "clip the gradients of a step to at most this norm", float, low=0, above=True, metavar="X", shown="no limit")
    limit_batches: int | None = setting(None, "use only N batches per epoch of the loop and N per evaluation, for trial runs", int, low=1, metavar="N")


@dataclass(frozen=True)
class BenchmarkTraining(PolicyTraining):
    """Training settings that only benchmarks have."""

    title: ClassVar[str] = "training"
    positive_weights: dict[str, float] | None = setting(None, "mimic3: factors on the loss of positive labels", "weights", nargs="+", metavar="TASK=X")
    loss_at: str | None = setting(None, "size at which maps are compared with labels: the network's output (published) or the label", choices=("output", "label"))
    delta_lr: float | None = setting(None, "sparse_delta: learning rate of the weights whose gates are open in the end", float, low=0, above=True, metavar="X", shown="as --lr")
    seed: int = setting(0, "random seed", int, low=0, high=2**32 - 1, metavar="N")
    seeds: list[int] | None = setting(None, "instead of --seed: one run for each seed, and their means and standard deviations at the end", int, low=0, high=2**32 - 1, nargs="+", metavar="N", shown="one run")


@dataclass(frozen=True)
class Report(Settings):
    """Metrics and the reference of Δ_T."""

    title: ClassVar[str] = "report"
    published: bool = setting(False, "follow the published programs wherever they differ, unless set here: their metrics, the best epoch chosen on test samples, norms that all tasks share (not with automtl, sparse_delta and taps, nor on domainnet), for mimic3 a network that sees later hours, for automtl a --policy_scale of 6, for sparse_delta --head convnext, --head_width 3072 and --decay poly", bool)
    metrics: str = setting("exact", "exact metrics, or the arithmetic of the published programs for comparison with their tables", choices=("exact", "published"))
    single_task: str | None = setting(None, "reference of Δ_T: the folder or summary.json of a single-task run, 'measure' to train one network per task first, or 'none'", metavar="PATH")


@dataclass(frozen=True)
class MultiTaskSettings(
    Output, Machine, Report, BenchmarkTraining, Stages, BenchmarkMethod, BenchmarkNetwork, BenchmarkData
):
    """Settings of ``train_mtl.py``."""

    description: ClassVar[str] = "Learn which blocks of one network each of several tasks runs, train again under sampled policies, and test. Without options, run AdaShare on Scenes, a generated benchmark."
    epilog: ClassVar[str] = f"Defaults that are not shown depend on the benchmark, the number of tasks and the method; they are the published values where there are any (taps/settings/published). {STATUS}"
    resize: int = 256

    def __post_init__(self) -> None:
        if isinstance(self.policy, list) and len(self.policy) == 1:
            object.__setattr__(self, "policy", self.policy[0])
