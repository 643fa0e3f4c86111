"""Numbers of the published programs on weights and inputs made by formula, and their choices."""

import importlib.util
import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator
from torch import nn
from torch.nn.functional import cross_entropy

import taps
from taps.cli.options import parse_mtl, parse_sequential
from taps.core.gate import ConstantGate
from taps.data.multi_label import Task
from taps.metrics.dense import make_metric
from taps.networks.dense_backbones import create_dense_backbone
from taps.networks.heads import ASPP, ConvNeXtHead
from taps.settings.declare import as_dict
from taps.settings.presets import published
from taps.settings.task_names import file_names
from taps.training.loop import run_phases
from taps.training.recipe import Recipe
from taps.training.schedules import policy_plan, weights_plan

FOLDER = Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "published"
needs_numbers = pytest.mark.skipif(not FOLDER.is_dir(), reason="the numbers of the published programs are not here")


def formula():
    spec = importlib.util.spec_from_file_location("formula", FOLDER / "formula.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@needs_numbers
@pytest.mark.parametrize("name", ["resnet18", "resnet34"])
@pytest.mark.parametrize("size", [(64, 96), (56, 56)])
@pytest.mark.parametrize("kind", ["all", "policy", "soft"])
def test_features_of_the_deeplab_resnet(name, size, kind):
    made = formula()
    expected = json.loads((FOLDER / "ada.json").read_text())[f"{name} {size[0]}x{size[1]} {kind}"]
    net = create_dense_backbone(name, output_stride=8).double()
    made.fill_all(net)
    model = taps.adapt(net, "adashare").double().eval()
    model.add_task("a", head=nn.Identity())
    for unit, run in zip(model.units, expected.get("policy", [1.0] * len(model.units)), strict=True):
        unit.change_gate("a", ConstantGate(run=run))
    with torch.no_grad():
        found = made.digest(model(made.noise((1, 3, *size), 7), task="a"))
    assert made.distance(found, expected) < 1e-10


@needs_numbers
def test_the_head_of_the_deeplab_resnet():
    made = formula()
    expected = json.loads((FOLDER / "ada.json").read_text())["aspp"]
    head = ASPP(512, expected["shape"][1]).double().eval()
    made.fill_all(head)
    with torch.no_grad():
        found = made.digest(head(made.noise((1, 512, 9, 11), 17)))
    assert made.distance(found, expected) < 1e-10


def test_features_are_as_large_as_published():
    net = create_dense_backbone("resnet18", output_stride=8).eval()
    for size, features in (((224, 224), (29, 29)), ((321, 321), (41, 41)), ((256, 512), (33, 65))):
        assert net(torch.zeros(1, 3, *size)).shape[-2:] == features
    assert (
        create_dense_backbone("resnet18", output_stride=8, deeplab=False).eval()(torch.zeros(1, 3, 224, 224)).shape[-1]
        == 28
    )


def test_random_weights_start_as_published():
    torch.manual_seed(0)
    net = create_dense_backbone("resnet34", output_stride=8)
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 10_000:
            assert abs(float(module.weight.detach().std()) - 0.01) < 3e-4, name
        elif isinstance(module, nn.BatchNorm2d):
            assert bool((module.weight == 1).all()), name


def test_depth_errors_of_uneven_batches_are_weighted_by_images():
    """Batches of 4, 4 and 2 images: means of the batches' means over valid pixels, weighted by 4, 4 and 2."""
    generator = torch.Generator().manual_seed(0)
    task = Task("depth", "depth", 1)
    metric, images, absolute, relative = make_metric(task, published=True), [], [], []
    for count in (4, 4, 2):
        target = 1 + torch.rand(count, 1, 5, 5, generator=generator).double()
        target[torch.rand(target.shape, generator=generator) < 0.3] = torch.nan
        prediction = target.nan_to_num(1.0) + torch.randn(target.shape, generator=generator).double()
        metric.update(prediction, target)
        known = target.isfinite()
        error = (prediction - target)[known].abs()
        images.append(count)
        absolute.append(float(error.mean()) * count)
        relative.append(float((error / target[known]).mean()) * count)
    found = metric.compute()
    assert found["abs_error"] == pytest.approx(sum(absolute) / sum(images), rel=1e-9)
    assert found["rel_error"] == pytest.approx(sum(relative) / sum(images), rel=1e-9)


def settings(*arguments: str):
    return parse_mtl(list(arguments))


def test_policies_are_learned_with_adam_s_default_betas():
    for method in ("adashare", "dynashare", "automtl"):
        options = settings("--benchmark", "nyuv2", "--dataset", ".", "--method", method)
        plan = policy_plan(options, {"weights": 640, "policy": 160}, 8)
        assert plan.recipe.betas == plan.recipe.others["weights"].betas == (0.5, 0.999)
        assert plan.recipe.others["policy"].betas == (0.9, 0.999)


def test_automtl_s_rates_and_steps():
    options = settings("--benchmark", "nyuv2", "--dataset", ".", "--method", "automtl")
    plan = policy_plan(options, {"weights": 640, "policy": 160}, 33)
    assert plan.recipe.step_per_task
    assert {plan.recipe.learning_rate(epoch) for epoch in range(25)} == {1.0}  # 10,000 steps of pre-training
    policy = plan.recipe.others["policy"]
    cycles = 20_000 // 500
    rates = [policy.lr * policy.learning_rate(cycle) for cycle in range(cycles)]
    assert rates == pytest.approx([0.01] * 20 + [0.001] * 20)
    longer = [policy.lr * policy.learning_rate(cycle) for cycle in range(60)]
    assert longer[20:] == pytest.approx([0.001] * 40), "it falls once"
    retrain = weights_plan(replace(options, method="automtl"), {"train": 800}, 0).recipe
    assert retrain.step_per_task
    assert [retrain.learning_rate(epoch) for epoch in (0, 9, 10, 20)] == [1.0, 1.0, 0.5, 0.25]  # of 400 steps each


def test_a_step_for_each_task_in_turn():
    """Against a loop by hand: the second task's gradient is taken after the first task's step."""
    torch.manual_seed(0)
    x, labels = torch.randn(8, 3), {"a": torch.randint(2, (8,)), "b": torch.randint(2, (8,))}
    model, by_hand = (taps.adapt(base(), "hard_sharing") for _ in range(2))
    for own in (model, by_hand):
        for task in labels:
            torch.manual_seed(1)
            own.add_task(task, num_classes=2)
    recipe = Recipe(epochs=1, lr=0.1, base_lr=0.1, decay="constant", step_per_task=True, task_weights={"b": 3.0})
    run_phases(model, ["a", "b"], [(x, labels)], Sampler(), recipe, Accelerator(cpu=True))
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.1, momentum=0.9)
    for task, weight in (("a", 1.0), ("b", 3.0)):
        (weight * cross_entropy(by_hand(x, task=task), labels[task])).backward()
        optimizer.step()
        optimizer.zero_grad()
    for (name, one), two in zip(model.state_dict().items(), by_hand.state_dict().values(), strict=True):
        torch.testing.assert_close(one, two, msg=name)


def base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4))


class Sampler:
    epoch = 0


#: values of the published configurations, where a mistake was once made or the default differs
VALUES = [
    ("nyuv2", 2, "adashare", {"curriculum_speed": 3, "policy_wd": 5e-4, "sparsity_weight": 0.05, "iterations": 20000}),
    ("nyuv2", 3, "adashare", {"sparsity_weight": 0.001, "sharing_weight": 0.05, "crop": 321, "decay_rate": 0.5}),
    ("nyuv2", 2, "dynashare", {"retrain_iterations": 50000, "decay_iterations": 10000, "target_loss": "code"}),
    ("cityscapes", 2, "adashare", {"lr": 1e-4, "base_lr": 1e-3, "sparsity_weight": 0.01, "sharing_weight": 0.1}),
    ("cityscapes", 2, "dynashare", {"target_weight": 25.0, "target_loss": "code", "decay_iterations": 4000}),
    ("taskonomy", 5, "adashare", {"decay_iterations": 12000, "decay_rate": 0.3, "retrain_iterations": 30000}),
    (
        "volumes",
        2,
        "adashare",
        {"curriculum_speed": 3, "policy_wd": 5e-3, "policy_lr": 1e-4, "base_lr": 1e-6, "wd": 1e-3},
    ),
    ("mimic3", 4, "dynashare", {"decay_iterations": 250, "retrain_from": "scratch", "target_loss": "code"}),
    ("nyuv2", 3, "automtl", {"preference_weight": 0.001, "step_per_task": True, "warmup_decay": "constant"}),
    ("taskonomy", 5, "automtl", {"warmup_iterations": 20000, "iterations": 50000, "retrain_iterations": 50000}),
]


@pytest.mark.parametrize(("benchmark", "tasks", "method", "values"), VALUES)
def test_values_of_the_published_configurations(benchmark, tasks, method, values):
    found = published(benchmark, tasks, method)
    assert {name: found[name] for name in values} == values


def test_generated_benchmarks_average_target_rates_over_gated_blocks():
    for benchmark in ("scenes", "mimic3", "volumes"):
        found = published(benchmark, None, "dynashare", generated=True)
        assert (found["target_loss"], found["target_weight"]) == ("gated", 1.0)


def test_normals_weigh_as_much_as_published():
    """1 − cosine of encoded normals, which the published weight of 20 belongs to, is on average a quarter of that of normals."""
    generator = torch.Generator().manual_seed(0)
    ratios = []
    for degrees in (10, 15, 20, 30):
        normal = nn.functional.normalize(torch.randn(20000, 3, generator=generator).double(), dim=1)
        axis = nn.functional.normalize(
            torch.linalg.cross(normal, torch.randn(20000, 3, generator=generator).double()), dim=1
        )
        angle = torch.tensor(degrees, dtype=torch.float64).deg2rad()
        turned = normal * angle.cos() + torch.linalg.cross(axis, normal) * angle.sin()
        encoded = (nn.functional.normalize(own + 1, dim=1) for own in (normal, turned))
        ratios.append(float((1 - angle.cos()) / (1 - (next(encoded) * next(encoded)).sum(1)).mean()))
    assert all(3.9 < ratio < 4.1 for ratio in ratios)
    for tasks in (2, 3):
        assert published("nyuv2", tasks, "adashare")["task_weights"]["normals"] == 20 / 4


def nyu_file(**changes) -> dict:
    """The entries of AdaShare's settings file for two tasks of NYUv2."""
    train = {
        "batch_size": 16, "total_iters": 20000, "warm_up_iters": 4000, "lr": 0.001, "policy_lr": 0.01, "backbone_lr": 0.001,
        "reg_w": 0.05, "reg_w_hamming": 0.05, "print_freq": 100, "val_freq": 400, "decay_lr_freq": 4000, "decay_lr_rate": 0.5,
        "decay_temp_freq": 100, "init_temp": 5, "decay_temp": 0.965, "resume": False, "hard_sampling": False,
    }  # fmt: skip
    return {
        "exp_name": "nyu_v2_2task", "seed": [88, 45], "backbone": "ResNet18", "tasks": ["seg", "sn"], "lambdas": [1, 20],
        "tasks_num_class": [40, 3], "policy_model": "task-specific", "paths": {"log_dir": "../experiments/logs/"},
        "dataload": {"dataset": "NYU_v2", "dataroot": "/data/nyu_v2", "crop_h": 321, "crop_w": 321}, "policy": True,
        "init_neg_logits": None, "is_sparse": True, "is_sharing": True, "is_curriculum": True, "curriculum_speed": 3,
        "retrain_from_pl": False, "train": train, "test": {"which_iter": "best"}, **changes,
    }  # fmt: skip


def other_file(**changes) -> dict:
    """The entries of a file that differs from NYUv2's in ``changes``; those of ``train`` and ``dataload`` are merged."""
    values = nyu_file(**changes)
    for part in ("train", "dataload"):
        values[part] = {**nyu_file()[part], **changes.get(part, {})}
    return values


CITYSCAPES = other_file(
    exp_name="cityscapes_2task", backbone="ResNet34", tasks=["seg", "depth"], tasks_num_class=[19, 1],
    dataload={"dataset": "CityScapes", "dataroot": "/data/cityscapes", "small_res": False, "crop_h": 224, "crop_w": 224},
    train={"lr": 0.0001, "reg_w": 0.01, "reg_w_hamming": 0.1},
)  # fmt: skip
TASKONOMY = other_file(
    exp_name="taskonomy_5task", backbone="ResNet34", tasks=["seg", "sn", "depth", "keypoint", "edge"], lambdas=[1, 3, 2, 7, 7],
    tasks_num_class=[17, 3, 1, 1, 1], curriculum_speed=1,
    dataload={"dataset": "Taskonomy", "dataroot": "/data/taskonomy", "crop_h": 224, "crop_w": 224},
    train={
        "total_iters": 100000, "warm_up_iters": 20000, "retrain_total_iters": 30000, "lr": 0.0001, "backbone_lr": 0.0001,
        "reg_w": 0.001, "reg_w_hamming": 0.005, "val_freq": 1000, "decay_lr_freq": 12000, "decay_lr_rate": 0.3,
        "weight_iter_alternate": 400, "alpha_iter_alternate": 100,
    },
)  # fmt: skip
NYU_AIG = other_file(
    exp_subname="a", coef=1, target_rates=[1, 1, 1, 1, 0.55, 0.55, 0.55, 0.55], retrain_from_pl=True,
    train={
        "total_iters": 50000, "warm_up_iters": 10000, "targetrate_w": 25, "decay_lr_freq": 10000, "init_temp": 1, "decay_temp": 1,
    },
)  # fmt: skip
_MIMIC = {
    "batch_size": 256, "prop": 1.0, "seqlen": 170, "reg_w": 0.001, "val_freq": 10, "cw_pheno": 5.0, "cw_ihm": 5.0,
}  # fmt: skip
MIMIC = {
    "backbone": "ResNet18", "tasks": ["pheno", "los", "decomp", "ihm"], "tasks_num_class": [25, 10, 1, 1],
    "dataload": {"dataset": "mimic", "dataroot": "/data/mimic"}, "alpha": 1e-5, "task_balance_method": "None",
}  # fmt: skip
MIMIC_AIG = nyu_file(
    **MIMIC, lambdas=[1, 2, 2, 1], target_rates=[1, 1, 1, 1, 1, 1, 0.9, 1], policy_model="AIG",
    train={
        **nyu_file()["train"], **_MIMIC, "total_iters": 1000, "warm_up_iters": 500, "targetrate_w": 25, "decay_lr_freq": 250,
        "cw_decomp": 500.0, "cw_los": [2.0] * 10,
    },
)  # fmt: skip
MIMIC_DYNAMIC = nyu_file(
    **MIMIC, lambdas=[1, 1, 1, 1], policy_model="Dynamic",
    train={**nyu_file()["train"], **_MIMIC, "total_iters": 150, "warm_up_iters": 50, "decay_lr_freq": 50, "cw_decomp": 25.0},
)  # fmt: skip


def abcd_file() -> dict:
    return {
        "exp_name": "ABCD", "backbone": "ResNet50", "lambdas": [1, 20], "policy_model": "task-specific", "curriculum_speed": 3,
        "dataload": {"dataset": "ABCD", "img_dataroot": "/data/abcd", "label_dataroot": "/data/abcd.csv"},
        "task": {"cat_target": None}, "train": {"total_iters": 150, "warm_up_iters": 50, "lr": 0.001, "backbone_lr": 0.001},
    }  # fmt: skip


DOMAINNET = {
    "exp_name": "domainnet_adashare_taskbn", "seed": [88, 45], "backbone": "ResNet34", "tasks_num_class": [345] * 6,
    "tasks": ["real", "painting", "quickdraw", "clipart", "infograph", "sketch"], "lambdas": [1] * 6,
    "policy_model": "blockwise", "task_bn": True, "retrain_from_pl": False, "policy": True, "is_sparse": True, "is_sharing": True,
    "is_curriculum": True, "is_deterministic": False, "curriculum_speed": 1,
    "dataload": {"dataset": "DomainNet", "dataroot": "/data/DomainNet", "domains": ["real"], "crop_h": 224, "crop_w": 224},
    "train": {
        "batch_size": 32, "total_iters": 20000, "warm_up_iters": 4000, "fc_lr": 0.001, "backbone_lr": 0.00001, "policy_lr": 0.01,
        "val_freq": 400, "imagenet_pretrain": True, "weight_iter_alternate": 400, "alpha_iter_alternate": 100, "reg_w": 0.01,
        "reg_w_hamming": 0.1, "decay_fc_lr_freq": 2000, "decay_fc_lr_rate": 0.3, "init_temp": 5, "decay_temp": 0.965,
    },
    "test": {"which_epoch": 19, "batch_size": 128, "n_epochs": 20, "hard_sampling": False},
}  # fmt: skip
NYU_TEST = {
    **{key: value for key, value in NYU_AIG.items() if key != "train"},
    "retrain_from_pl": False,
    "train": {"init_temp": 1},
}
FILES = {
    "cityscapes_2task_test": {
        **CITYSCAPES, "exp_name": "cityscapes_2task_pretrain", "lambdas": [1, 20], "train": {"policy_iter": "latest"},
    },
    "nyu_v2_3task_test": {
        **nyu_file(), "exp_name": "NYU_v2_3Task_pretrain", "backbone": "ResNet34", "tasks": ["seg", "sn", "depth"],
        "tasks_num_class": [40, 3, 1], "lambdas": [1, 20, 3], "train": {"policy_iter": "best"},
    },
    "domainnet": DOMAINNET,
    "nyu_v2_2task_test": NYU_TEST,
    "nyu_v2_2task": nyu_file(),
    "nyu_v2_2task_aig": NYU_AIG,
    "cityscapes_2task": CITYSCAPES,
    "taskonomy_5task": TASKONOMY,
    "mimic_iii_4tasks": MIMIC_DYNAMIC,
    "mimic_iii_4tasks_aig": MIMIC_AIG,
    "ABCD": abcd_file(),
}  # fmt: skip


@pytest.fixture
def in_their_place(tmp_path, monkeypatch):
    """Published settings files where the published commands expect them."""
    monkeypatch.chdir(tmp_path)
    for name, values in FILES.items():
        path = tmp_path / f"yamls/adashare/{name}.yml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(values))
    return tmp_path


def commands() -> list[tuple[str, str]]:
    page = (Path(__file__).resolve().parent.parent / "docs/published.md").read_text()
    return re.findall(r"^\| `(python3? [^`]+)` \| `(python [^`]+)` \|$", page, re.MULTILINE)


@pytest.mark.filterwarnings("ignore:the command line wins over")
@pytest.mark.parametrize(("theirs", "ours"), commands())
def test_every_published_command_runs_as_typed(in_their_place, theirs, ours):
    program, *arguments = shlex.split(ours)[1:]
    read = {"train_sequential.py": parse_sequential, "train_mtl.py": parse_mtl}[program](arguments)
    typed = shlex.split(theirs)[2:]
    as_typed = (parse_sequential if program == "train_sequential.py" else parse_mtl)(typed)
    assert replace(as_typed, **({"phases": read.phases} if program == "train_mtl.py" else {})) == read
    if program == "train_sequential.py":
        assert read.experiment_name == typed[typed.index("--experiment_name") + 1].removeprefix("./results/")
    if "--exp_name" in typed:
        assert read.experiment_name == "test"
    if "--exp_ids" in typed:
        assert read.exp_ids == [int(typed[typed.index("--exp_ids") + 1])]
    if "--gpus" in typed:
        assert len(read.gpus) == len(re.search(r"--gpus((?: \d)+)", theirs)[1].split())


def test_there_are_commands_of_every_program():
    assert len(commands()) == 20
    assert {shlex.split(theirs)[1] for theirs, _ in commands()} == {
        "train_sequential.py", "train.py", "re-train.py", "test.py", "train_policy_learning.py",
    }  # fmt: skip


@pytest.mark.parametrize("command", ["train.py --gpus 0", "test.py --gpus 0 --exp_ids 2"])
def test_commands_for_dynamic_convolutions(in_their_place, command):
    read = parse_mtl(["--config", "yamls/adashare/mimic_iii_4tasks.yml", *command.split()[1:]])
    assert (read.benchmark, read.method, read.dynamic_kernels, read.iterations) == ("mimic3", "adashare", 4, 150)
    path = in_their_place / "own.yml"
    path.write_text(yaml.safe_dump(nyu_file(policy_model="Dynamic")))
    with pytest.raises(taps.UserError, match=r"policy_model Dynamic in own.yml is for hospital stays"):
        parse_mtl(["--config", "own.yml"])


def same_settings(one, other, but: tuple[str, ...]) -> dict:
    left, right = ({k: v for k, v in as_dict(own).items() if k not in but} for own in (one, other))
    return {name: (left[name], right[name]) for name in left if left[name] != right[name]}


@pytest.mark.parametrize(
    ("name", "arguments", "differences"),
    [
        ("nyu_v2_2task", "--benchmark nyuv2 --tasks seg sn --dataset /data/nyu_v2", {}),
        ("cityscapes_2task", "--benchmark cityscapes --tasks seg depth --dataset /data/cityscapes", {}),
        ("taskonomy_5task", "--benchmark taskonomy --tasks seg sn depth keypoint edge --dataset /data/taskonomy", {}),
        (
            "nyu_v2_2task_aig",  # the file of retraining, beside which the preset has that of policy learning
            "--benchmark nyuv2 --tasks seg sn --dataset /data/nyu_v2 --method dynashare",
            {
                "iterations": (50000, 20000), "warmup_iterations": (10000, 4000), "init_temperature": (1.0, 5.0),
                "temperature_decay": (1.0, 0.965), "target_rates": ([1.0] * 4 + [0.55] * 4, [0.55]),
            },
        ),
        (
            "domainnet",
            "--benchmark domainnet --tasks real painting quickdraw clipart infograph sketch --dataset /data/DomainNet",
            {"task_weights": (dict.fromkeys(DOMAINNET["tasks"], 1.0), {})},
        ),
        (
            "mimic_iii_4tasks_aig",
            "--benchmark mimic3 --tasks pheno los decomp ihm --dataset /data/mimic --method dynashare",
            {"eval_iterations": (10, 50)},
        ),
    ],
)  # fmt: skip
def test_published_files_are_the_presets(in_their_place, name, arguments, differences):
    """What AdaShare's and DynaShare's files say is what the presets say."""
    read = parse_mtl(["--config", f"yamls/adashare/{name}.yml"])
    assert same_settings(read, parse_mtl(arguments.split()), ("config", "experiment_name")) == differences


def test_lengths_of_the_fork_for_abcd_stay_the_presets(in_their_place):
    read = parse_mtl(["--config", "yamls/adashare/ABCD.yml", "--cat_target", "race.ethnicity", "--num_target", "age"])
    assert (read.benchmark, read.images, read.labels) == ("volumes", "/data/abcd", "/data/abcd.csv")
    assert (read.iterations, read.curriculum_speed, read.model_type) == ("69e", 3, "resnet50")
    assert (read.lr, read.base_lr, read.wd) == (1e-3, 1e-6, 1e-3)


def test_the_published_file_divides_the_subjects(in_their_place, here):
    made = in_their_place / "abcd"
    (made / "images").mkdir(parents=True)
    rows = [f"s{index},{index % 2}" for index in range(50)]
    (made / "labels.csv").write_text("\n".join(["subjectkey,sex", *rows]))
    for index in range(50):
        (made / f"images/s{index}.npy").write_bytes(b"")
    path = in_their_place / "yamls/adashare/ABCD.yml"
    data = {"dataset": "ABCD", "img_dataroot": str(made / "images"), "label_dataroot": str(made / "labels.csv")}
    path.write_text(yaml.safe_dump({**abcd_file(), "dataload": data}))
    done = here("taps data", "subjects", "--config", path, "--val_size", 0.2, "--test_size", 0.1)
    assert "35 train, 10 val, 5 test" in done.stdout


def test_unknown_entries_of_published_files_are_named(in_their_place):
    path = in_their_place / "own.yml"
    path.write_text(yaml.safe_dump(nyu_file(train={"regw": 0.5, "lr": 0.5})))
    with pytest.raises(
        taps.UserError, match=r"unknown entry of own.yml 'train.regw'; did you mean 'train.reg_w'.*--ignore_unknown"
    ):
        parse_mtl(["--config", "own.yml"])
    assert parse_mtl(["--config", "own.yml", "--ignore_unknown"]).lr == 0.5
    path.write_text(yaml.safe_dump(nyu_file(policy_model="AIGDynamic")))
    with pytest.raises(taps.UserError, match=r"unknown policy_model in own.yml 'AIGDynamic'.*AIG"):
        parse_mtl(["--config", "own.yml"])
    path.write_text("lr: 0.1\nsurprise: 3\n")
    with pytest.raises(taps.UserError, match=r"unknown setting in own.yml, line 2: 'surprise'"):
        parse_sequential(["--config", "own.yml"])
    assert parse_sequential(["--config", "own.yml", "--ignore_unknown"]).lr == 0.1


def test_the_published_benchmarks_are_one_switch():
    read = settings("--benchmark", "mimic3", "--dataset", ".", "--published", "--method", "dynashare")
    assert (read.metrics, read.val_fraction, read.norm, read.causal) == ("published", 0.0, "frozen", False)
    read = settings(
        "--benchmark", "nyuv2", "--dataset", ".", "--published", "--method", "automtl", "--val_fraction", "0.1"
    )
    assert (read.metrics, read.val_fraction, read.norm, read.policy_scale) == ("published", 0.1, "task", 6.0)


def test_names_of_columns_become_names_of_files():
    names = ["race.ethnicity", "race ethnicity", "BMI (kg/m²)", "age", "..."]
    assert list(file_names(names).values()) == ["race_ethnicity", "race_ethnicity_2", "BMI_kg_m", "age", "target"]


def test_the_head_of_efficient_computation_sharing():
    """The published head has 2.98 million parameters after ViT-B; its output has four times the features' resolution."""
    head = ConvNeXtHead(768, 21)
    assert sum(parameter.numel() for parameter in head.parameters()) == pytest.approx(2.98e6, rel=0.02)
    x = torch.randn(2, 768, 3, 5)
    assert head(x).shape == (2, 21, 12, 20)
    seen = head.unfold(head.project(x))  # each token's channels are 4 × 4 places of width/16 channels
    token = head.project(x)[0, :, 1, 2].reshape(192, 4, 4)
    assert torch.equal(seen[0, :, 4:8, 8:12], token)
    with pytest.raises(taps.UserError, match="--head_width 100 of a convnext head is not a multiple of 16"):
        ConvNeXtHead(8, 2, 100)
    read = settings("--benchmark", "pascal_context", "--dataset", ".", "--method", "sparse_delta", "--published")
    assert (read.head, read.head_width, read.decay) == ("convnext", 3072, "poly")


def test_polynomial_decay():
    recipe = Recipe(epochs=10, decay="poly")
    assert [recipe.learning_rate(epoch) for epoch in (0, 5, 9)] == pytest.approx([1.0, 0.5**0.9, 0.1**0.9])


def test_maps_of_a_transformer_keep_their_place_at_any_size():
    net = create_dense_backbone("test_vit", image_size=(32, 32), patch_size=16).eval()
    x = torch.randn(1, 3, 40, 56, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = net(x)
        torch.testing.assert_close(found, net(torch.nn.functional.interpolate(x, (48, 64), mode="bilinear")))
    assert found.shape[-2:] == (3, 4)
