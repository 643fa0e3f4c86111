"""Published configurations of the multi-task benchmarks, by benchmark and number of tasks, and that of the offline default.

Where a number of tasks was not published, the nearest published one is taken. NYUv2, CityScapes and Taskonomy: AdaShare's and
DynaShare's settings files; DomainNet: AdaShare's branch of that name; MIMIC-III: DynaShare's program for it, with the loss
weights as it applies them (twice); volumes: the fork of AdaShare for the ABCD study, whose 30 epochs over 30 % of the training
subjects are 9 passes over all of them, and whose 60 pairs of epochs over two disjoint parts are 60 cycles of two halves.
PASCAL-Context and NYUDv2 have no published configuration of a policy method: losses' weights and steps are those of ATRC and
InvPT, the rest is chosen here.
"""

from __future__ import annotations

#: what all of the published configurations have in common
_COMMON = {
    "pretrained": False, "output_stride": 8, "channels": None, "crop": None, "head_width": 1024, "head_rates": (6, 12, 18, 24),
    "head_dropout": 0.5, "patch_size": None, "loss_at": "output", "norm": "follow", "batch_size": 16, "optimizer": "adam",
    "betas": (0.5, 0.999), "wd": 1e-4, "decay": "step", "decay_iterations": 4000, "decay_rate": 0.5,
    "weights_optimizer": "sgd", "weights_lr": None,
    "policy_lr": 0.01, "policy_wd": 5e-4, "iterations": 20000, "warmup_iterations": 4000, "retrain_iterations": 20000,
    "weight_iterations": None, "policy_iterations": None, "eval_iterations": 400, "init_temperature": 5.0,
    "temperature_decay": 0.965, "curriculum_speed": 3, "retrain_from": "scratch", "settle_iterations": 0,
    "exp_ids": tuple(range(8)), "target_weight": 25.0,
    "sample": True, "policy_fraction": 0.2, "val_fraction": 0.1, "input_size": 224, "task_weights": {}, "lam": 1.0, "num_class": 19,
    "single_task": None, "hours": 170, "causal": True, "positive_weights": {},
}  # fmt: skip

#: of PASCAL-Context and NYUDv2: the losses' weights and 40000 steps of ATRC and InvPT, AdaShare's gates as for NYUv2
_PROTOCOL = {
    "model_type": "resnet50", "pretrained": True, "batch_size": 8, "lr": 1e-3, "base_lr": 1e-4, "betas": (0.9, 0.999),
    "head_width": 256, "loss_at": "label", "decay": "cosine", "sparsity_weight": 0.001, "sharing_weight": 0.05,
    "iterations": 40_000, "warmup_iterations": 8000, "retrain_iterations": 40_000, "eval_iterations": 2000, "exp_ids": (0,),
}  # fmt: skip

_OWN: dict[tuple[str, int], dict] = {
    ("nyuv2", 2): {
        "tasks": ("semseg", "normals"), "model_type": "resnet18", "crop": 321, "lr": 1e-3, "base_lr": 1e-3,
        "sparsity_weight": 0.05, "sharing_weight": 0.05, "task_weights": {"semseg": 1.0, "normals": 20.0},
    },
    ("nyuv2", 3): {
        "tasks": ("semseg", "normals", "depth"), "model_type": "resnet34", "crop": 321, "lr": 1e-3, "base_lr": 1e-3,
        "sparsity_weight": 0.001, "sharing_weight": 0.05, "task_weights": {"semseg": 1.0, "normals": 20.0, "depth": 3.0},
    },
    ("cityscapes", 2): {
        "tasks": ("semseg", "depth"), "model_type": "resnet34", "crop": 224, "lr": 1e-4, "base_lr": 1e-3,
        "sparsity_weight": 0.01, "sharing_weight": 0.1, "task_weights": {"semseg": 1.0, "depth": 20.0},
    },
    ("taskonomy", 5): {
        "tasks": ("semseg", "normals", "depth", "keypoints", "edges"), "model_type": "resnet34", "crop": 224, "lr": 1e-4,
        "base_lr": 1e-4, "sparsity_weight": 0.001, "sharing_weight": 0.005, "curriculum_speed": 1,
        "iterations": 100_000, "warmup_iterations": 20_000, "retrain_iterations": 30_000, "decay_iterations": 12_000,
        "decay_rate": 0.3, "eval_iterations": 1000, "weight_iterations": 400, "policy_iterations": 100,
        "task_weights": {"semseg": 1.0, "normals": 3.0, "depth": 2.0, "keypoints": 7.0, "edges": 7.0},
    },
    ("pascal_context", 5): {
        **_PROTOCOL, "tasks": ("semseg", "parts", "saliency", "normals", "edges"),
        "task_weights": {"semseg": 1.0, "parts": 2.0, "saliency": 5.0, "normals": 10.0, "edges": 50.0},
    },
    ("nyud", 4): {
        **_PROTOCOL, "tasks": ("semseg", "depth", "normals", "edges"),
        "task_weights": {"semseg": 1.0, "depth": 1.0, "normals": 10.0, "edges": 50.0},
    },
    ("domainnet", 6): {
        "model_type": "resnet34", "pretrained": True, "norm": "task", "batch_size": 32, "lr": 1e-3, "base_lr": 1e-5,
        "sparsity_weight": 0.01, "sharing_weight": 0.1, "curriculum_speed": 1, "weights_optimizer": "adam",
        "decay_iterations": 2000, "decay_rate": 0.3,
    },
    ("mimic3", 4): {
        "tasks": ("ihm", "decomp", "los", "pheno"), "model_type": "resnet18", "batch_size": 256, "lr": 1e-3, "base_lr": 1e-3,
        "sparsity_weight": 0.001, "sharing_weight": 0.05, "iterations": 1000, "warmup_iterations": 500,
        "weight_iterations": 10, "policy_iterations": 1, "eval_iterations": 50, "curriculum_speed": 3,
        "positive_weights": {"ihm": 5.0, "decomp": 500.0, "pheno": 5.0},
        "task_weights": {"ihm": 1.0, "decomp": 4.0, "los": 4.0, "pheno": 1.0}, "retrain_iterations": 1000,
        "decay_iterations": 4000,
    },
    ("volumes", 2): {
        "model_type": "resnet50", "input_size": 96, "lr": 1e-3, "base_lr": 1e-6, "wd": 1e-3, "policy_lr": 1e-4,
        "sparsity_weight": 0.05, "sharing_weight": 0.05, "policy_fraction": 0.5, "iterations": "69e",
        "warmup_iterations": "9e", "retrain_iterations": "69e", "eval_iterations": "1e", "decay": "constant",
        "curriculum_speed": 1, "exp_ids": (0,),
    },
    ("scenes", 3): {
        "tasks": ("semseg", "normals", "depth"), "model_type": "resnet18", "channels": (16, 32, 48, 64), "crop": 64,
        "head_width": 32, "head_rates": (1, 2, 3, 4), "head_dropout": 0.0, "loss_at": "label", "lr": 3e-3, "base_lr": 3e-3,
        "betas": (0.9, 0.999), "decay": "cosine", "weights_optimizer": "adam", "policy_lr": 0.05, "policy_wd": 0.0,
        "sparsity_weight": 0.007, "sharing_weight": 0.02, "task_weights": {"semseg": 1.0, "normals": 3.0, "depth": 1.0},
        "iterations": 262, "warmup_iterations": 100, "retrain_iterations": 180, "weight_iterations": 12,
        "policy_iterations": 6, "eval_iterations": 60, "curriculum_speed": 1, "temperature_decay": None,
        "retrain_from": "policy", "exp_ids": (0, 1), "single_task": "measure",
    },
}  # fmt: skip

#: DynaShare's own settings, on top of AdaShare's; instance gates are trained from the policy's weights
_DYNASHARE: dict[str | tuple[str, bool], dict] = {
    "nyuv2": {"retrain_iterations": 50_000, "decay_iterations": 10_000, "retrain_from": "policy", "target_rates": (0.55,)},
    "cityscapes": {"retrain_iterations": 50_000, "retrain_from": "policy", "target_rates": (1.0,) * 7 + (0.99,) * 9},
    "taskonomy": {"retrain_from": "policy", "target_rates": (0.55,)},
    "pascal_context": {"retrain_from": "policy", "target_rates": (0.55,)},
    "nyud": {"retrain_from": "policy", "target_rates": (0.55,)},
    "domainnet": {"retrain_from": "policy", "target_rates": (0.55,)},
    "mimic3": {"retrain_from": "policy", "target_rates": (1.0,) * 6 + (0.9, 1.0)},
    "volumes": {"retrain_from": "policy", "target_rates": (0.55,)},
    "scenes": {"target_rates": (0.75,), "target_weight": 1.0, "score_lr": 0.05, "settle_iterations": 60},
    ("mimic3", True): {"target_rates": (0.75,), "target_weight": 1.0, "score_lr": 0.05, "settle_iterations": 60},
    ("volumes", True): {"target_rates": (0.75,), "target_weight": 1.0, "score_lr": 0.05, "settle_iterations": 60},
}  # fmt: skip

#: AutoMTL's own settings (§4.1 and the published program), on top of AdaShare's; iterations hold those of pre-training
_AUTOMTL: dict[str | tuple[str, bool], dict] = {
    "": {
        "norm": "task", "curriculum_speed": 0, "weight_iterations": 400, "policy_iterations": 100, "weights_lr": 1e-4,
        "iterations": 30_000, "warmup_iterations": 10_000, "retrain_iterations": 30_000, "preference_weight": 5e-4,
        "policy_scale": 1.0, "cost_weight": 0.0, "cost_target": 0.5, "skip": "layers",
    },
    "nyuv2": {
        "lr": 1e-3, "base_lr": 1e-3, "preference_weight": 1e-3, "task_weights": {"semseg": 5.0, "normals": 20.0, "depth": 5.0},
    },
    "cityscapes": {"lr": 1e-3, "base_lr": 1e-3, "task_weights": {"semseg": 1.0, "depth": 1.0}},
    "taskonomy": {
        "iterations": 50_000, "warmup_iterations": 20_000, "retrain_iterations": 50_000, "decay_iterations": 10_000,
    },
    "scenes": {
        "norm": "follow", "iterations": 262, "warmup_iterations": 100, "retrain_iterations": 180, "weight_iterations": 12,
        "policy_iterations": 6, "weights_lr": None, "preference_weight": 0.002, "sample": False, "skip": "auto",
    },
}  # fmt: skip

_VIT_B = {
    "model_type": "vit_base_patch16_224", "pretrained": True, "batch_size": 6, "lr": 2e-5, "base_lr": 2e-5, "wd": 1e-6,
}  # fmt: skip
#: efficient computation sharing (its program for PASCAL-Context); λ is its 5e-8 times the weights of a ViT-B, learning rates
#: and steps are those that suit a network of the benchmark's size
_SPARSE_DELTA: dict[str | tuple[str, bool], dict] = {
    "": {
        "norm": "task", "base_task": None, "density": 0.02, "lam": 4.3, "delta_lr": None, "score_lr": 0.1, "pull": 0.1,
        "optimizer": "adamw",
        "betas": (0.9, 0.999), "decay": "cosine", "iterations": 20_000, "retrain_iterations": 20_000, "pull_iterations": 5_000,
        "warmup_iterations": 0, "retrain_from": "policy", "exp_ids": (0,), "single_task": "measure",
    },
    "pascal_context": _VIT_B,
    "nyud": _VIT_B,
    "scenes": {
        "model_type": "vit_tiny_patch16_224", "channels": None, "lr": 1e-3, "base_lr": 1e-3, "delta_lr": 3e-3, "density": 0.05,
        "lam": 0.0, "iterations": 200, "retrain_iterations": 600, "pull_iterations": 100, "eval_iterations": 100, "batch_size": 16,
    },
}  # fmt: skip

#: settings of the generated data that is used where none is named, on top of those of the benchmark
_GENERATED: dict[str, dict] = {
    "mimic3": {
        "model_type": "tcn", "channels": (24, 24, 24, 24), "head_width": 16, "head_rates": (1, 2), "head_dropout": 0.1,
        "hours": 120, "batch_size": 32, "lr": 3e-3, "base_lr": 3e-3, "betas": (0.9, 0.999), "decay": "cosine",
        "weights_optimizer": "adam", "policy_lr": 0.05, "policy_wd": 0.0, "sparsity_weight": 0.002, "sharing_weight": 0.002,
        "policy_fraction": 0.3, "positive_weights": {}, "task_weights": {}, "iterations": 480,
        "warmup_iterations": 120,
        "retrain_iterations": 200, "weight_iterations": 12, "policy_iterations": 6, "eval_iterations": 80, "curriculum_speed": 1,
        "temperature_decay": 0.8, "retrain_from": "policy", "exp_ids": (0, 1), "single_task": "measure",
    },
    "volumes": {
        "model_type": "resnet18", "channels": (8, 12, 16, 24), "input_size": None,
        "task_weights": {"interview_age": 3.0, "picvocab": 3.0, "diagnosis": 2.0},
        "batch_size": 16, "lr": 3e-3, "base_lr": 3e-3, "betas": (0.9, 0.999), "wd": 1e-4, "decay": "cosine",
        "weights_optimizer": "adam", "policy_lr": 0.05, "policy_wd": 0.0, "sparsity_weight": 0.07, "sharing_weight": 0.003,
        "policy_fraction": 0.4, "iterations": 750, "warmup_iterations": 300, "retrain_iterations": 300, "weight_iterations": 8,
        "policy_iterations": 10, "eval_iterations": 80, "curriculum_speed": 0.5, "temperature_decay": None, "sample": False,
        "retrain_from": "policy", "exp_ids": (0, 1), "single_task": "measure",
    },
}  # fmt: skip


def preset(benchmark: str, tasks: int | None, method: str, generated: bool = False) -> dict:
    """The values of options for a benchmark, a number of tasks (``None``: the published ones), a method, and whether the
    data is what is generated where none is named."""
    known = [count for name, count in _OWN if name == benchmark]
    count = min(known, key=lambda own: abs(own - tasks)) if tasks else known[-1]
    values = {**_COMMON, **_OWN[benchmark, count], **(_GENERATED.get(benchmark, {}) if generated else {})}
    if method == "taps":
        values["norm"] = "task"
    own = {"dynashare": _DYNASHARE, "automtl": _AUTOMTL, "sparse_delta": _SPARSE_DELTA}.get(method, {})
    for key in ("", (benchmark, generated) if (benchmark, generated) in own else benchmark):
        values.update(own.get(key, {}))
    return values
