"""Settings files of the published programs (AdaShare, DynaShare and the fork of AdaShare for ABCD) as settings of this one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from taps.errors import UserError, unknown
from taps.settings.task_names import DENSE, STAYS

#: entries that are a setting here, under another name
_RENAMED = {
    "exp_name": "experiment_name", "curriculum_speed": "curriculum_speed", "target_rates": "target_rates",
    "dataload.img_dataroot": "images", "dataload.label_dataroot": "labels", "dataload.crop_h": "crop",
    "train.batch_size": "batch_size", "train.total_iters": "iterations", "train.warm_up_iters": "warmup_iterations",
    "train.retrain_total_iters": "retrain_iterations", "train.lr": "lr", "train.backbone_lr": "base_lr",
    "train.policy_lr": "policy_lr", "train.weight_decay": "wd", "train.reg_w": "sparsity_weight",
    "train.reg_w_hamming": "sharing_weight", "train.targetrate_w": "target_weight", "train.val_freq": "eval_iterations",
    "train.decay_lr_freq": "decay_iterations", "train.decay_lr_rate": "decay_rate", "train.init_temp": "init_temperature",
    "train.decay_temp": "temperature_decay", "train.weight_iter_alternate": "weight_iterations",
    "train.alpha_iter_alternate": "policy_iterations", "train.seqlen": "hours",
    "train.fc_lr": "lr", "train.decay_fc_lr_freq": "decay_iterations", "train.decay_fc_lr_rate": "decay_rate",
    "train.imagenet_pretrain": "pretrained", "task.cat_target": "cat_target", "task.num_target": "num_target",
}  # fmt: skip
#: entries that choose something here
_CHOOSING = {
    "backbone", "tasks", "lambdas", "tasks_num_class", "policy_model", "dataload.dataset", "dataload.dataroot", "is_curriculum",
    "is_sparse", "is_sharing", "retrain_from_pl", "task_bn", "train.hard_sampling", "train.cw_pheno", "train.cw_decomp", "train.cw_ihm",
}  # fmt: skip
#: entries without a use here: places and names of files, what the published programs do not read, and what the data says itself
_UNUSED = {
    "seed", "root_dir", "exp_subname", "paths.log_dir", "paths.result_dir", "paths.checkpoint_dir", "dataload.crop_w", "dataload.small_res",
    "policy", "init_neg_logits", "skip_layer", "fix_BN", "diff_sparsity_weights", "alpha", "task_balance_method", "coef",
    "train.print_freq", "train.decay_temp_freq", "train.resume", "train.retrain_resume", "train.policy_iter", "train.which_iter",
    "train.init_method", "train.cw_los", "train.prop", "train.policy_learning_checking", "test.which_iter", "task.targets",
    "task.tasks_num_class", "data_split.warmup_size", "data_split.train_batch_size", "data_split.val_batch_size",
    "data_augmentation.resize", "is_deterministic", "dataload.domains", "test.which_epoch", "test.batch_size", "test.n_epochs",
    "test.hard_sampling",
}  # fmt: skip
_DATA = {
    "NYU_v2": "nyuv2", "CityScapes": "cityscapes", "Taskonomy": "taskonomy", "DomainNet": "domainnet", "mimic": "mimic3",
    "ABCD": "volumes",
}  # fmt: skip
_METHODS = {"task-specific": "adashare", "blockwise": "adashare", "Dynamic": "adashare", "AIG": "dynashare"}
#: kernels of the dynamic convolutions of ``policy_model: Dynamic``
_DYNAMIC_KERNELS = 4


def is_published(values: Mapping[str, Any]) -> bool:
    """Return whether the contents of a YAML file are those of a published settings file."""
    return isinstance(values.get("dataload"), Mapping) and isinstance(values.get("train"), Mapping)


def places_of_subjects(values: Mapping[str, Any], path: Path, ignore_unknown: bool) -> dict[str, Any] | None:
    """Return what a settings file of the fork for ABCD, whose program divides subjects, says of images and labels.

    Like :func:`translate` it returns ``None`` for other files.
    """
    if not is_published(values):
        return None
    found = {"images": values["dataload"].get("img_dataroot"), "labels": values["dataload"].get("label_dataroot")}
    return {name: value for name, value in found.items() if value is not None}


def translate(values: Mapping[str, Any], path: Path, ignore_unknown: bool) -> dict[str, Any] | None:
    """Return the settings of ``train_mtl.py`` that a published settings file stands for, ``None`` for a file of this program.

    The weight of NYUv2's normals is divided by 4, since the loss here is 4 times as large, and MIMIC-III's loss weights are squared,
    since the program applies them twice. Lengths of the fork for ABCD, which are epochs of parts of the data, stay the preset's, as do
    its learning rates and weight decay, for which that program takes the defaults of its command line.

    Args:
        values: the file's contents.
        path: the file, for messages.
        ignore_unknown: leave out unknown entries instead of refusing them.

    Raises:
        UserError: for an unknown entry, data set, backbone or policy.
    """
    if not is_published(values):
        return None
    flat: dict[str, Any] = {}
    for key, value in values.items():
        inner = value if isinstance(value, Mapping) else None
        flat.update({f"{key}.{name}": own for name, own in inner.items()} if inner is not None else {key: value})
    flat = {key: value for key, value in flat.items() if value is not None}
    known = (*_RENAMED, *_CHOOSING, *_UNUSED)
    for key in flat if not ignore_unknown else ():
        if key not in known:
            raise unknown(f"entry of {path}", key, known, "or go on with --ignore_unknown")
    chosen = {_RENAMED[key]: value for key, value in flat.items() if key in _RENAMED}
    benchmark = _one_of(flat.get("dataload.dataset"), _DATA, "data set", path)
    chosen["benchmark"] = benchmark
    chosen["method"] = _one_of(flat.get("policy_model", "task-specific"), _METHODS, "policy_model", path)
    if flat.get("policy_model") == "Dynamic":
        if benchmark != "mimic3":
            raise UserError(f"policy_model Dynamic in {path} is for hospital stays, as in DynaShare's program")
        chosen["dynamic_kernels"] = _DYNAMIC_KERNELS
    if "target_rates" in flat:
        chosen["method"] = "dynashare"
    if "iterations" in chosen:
        chosen.setdefault("retrain_iterations", chosen["iterations"])  # one entry for both programs
    if "backbone" in flat:
        chosen["model_type"] = str(flat["backbone"]).lower()
    if "dataload.dataroot" in flat:
        chosen["dataset"] = [str(flat["dataload.dataroot"])]
    if not flat.get("is_curriculum", True):
        chosen["curriculum_speed"] = 0
    for key, name in (("is_sparse", "sparsity_weight"), ("is_sharing", "sharing_weight")):
        if not flat.get(key, True):
            chosen[name] = 0.0
    chosen["retrain_from"] = "policy" if flat.get("retrain_from_pl") else "scratch"
    if benchmark == "domainnet" and "crop" in chosen:
        chosen["input_size"] = chosen.pop("crop")
    if flat.get("task_bn"):
        chosen["norm"] = "task"
    if flat.get("train.hard_sampling"):
        chosen["sampling"] = "hard"
    positive = {name: flat[f"train.cw_{name}"] for name in ("ihm", "decomp", "pheno") if f"train.cw_{name}" in flat}
    if positive:
        chosen["positive_weights"] = positive
    tasks, weights = flat.get("tasks"), flat.get("lambdas")
    if tasks and benchmark != "volumes":
        names = [{**DENSE, **STAYS}.get(name, name) for name in tasks]
        chosen["tasks"] = names
        if weights:
            by_task = dict(zip(names, map(float, weights), strict=False))
            if benchmark == "nyuv2" and "normals" in by_task:
                by_task["normals"] /= 4
            chosen["task_weights"] = {k: w * w if benchmark == "mimic3" else w for k, w in by_task.items()}
        classes = dict(zip(names, flat.get("tasks_num_class") or (), strict=False))
        if benchmark == "cityscapes" and "semseg" in classes:
            chosen["num_class"] = classes["semseg"]
    if benchmark == "volumes":
        chosen.pop("retrain_iterations", None)
        for name in (
            "iterations",
            "warmup_iterations",
            "eval_iterations",
            "decay_iterations",
            "decay_rate",
            "lr",
            "base_lr",
            "wd",
            "policy_lr",
        ):
            chosen.pop(name, None)
    return chosen


def _one_of(value: object, known: Mapping[str, str], what: str, path: Path) -> str:
    if value not in known:
        raise unknown(f"{what} in {path}", value, known)
    return known[str(value)]
