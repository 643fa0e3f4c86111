"""Numbers of the published programs on weights and inputs made by formula, and their choices."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.functional import cross_entropy

import taps
from taps.cli.options import parse_mtl
from taps.core.gate import ConstantGate
from taps.data.multi_label import Task
from taps.metrics.dense import make_metric
from taps.networks.dense_backbones import create_dense_backbone
from taps.networks.heads import ASPP
from taps.settings.presets import published
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
