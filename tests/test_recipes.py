"""Recipes that people expect: augmentation, smoothing, warm-up, layer decay, clipping, early stopping, class weights, trackers."""

import copy
import json
import random

import numpy as np
import pytest
import timm
import timm.optim
import torch
from conftest import SMALL
from PIL import Image
from test_front_door import fit, fresh, network, samples
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import taps
from taps.data.classification.images import read_image
from taps.metrics.losses import CrossEntropy, balanced_weights
from taps.networks.preprocessing import AutoAugment, Preprocessing
from taps.training.recipe import Recipe, make_optimizer

POLICIES = ["rand-m9-mstd0.5-inc1", "augmix-m3-w3", "original", "3a"]


@pytest.mark.parametrize("policy", POLICIES)
def test_augmentation_follows_torchs_generator_alone(policy):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8))
    change = AutoAugment(policy, Preprocessing(32, 37))
    random.seed(1)
    np.random.seed(1)
    outside = random.getstate(), np.random.get_state()[1].tolist()

    def drawn(seed: int) -> list[bytes]:
        torch.manual_seed(seed)
        return [change(image).tobytes() for _ in range(8)]

    assert drawn(0) == drawn(0) != drawn(1)
    assert len(set(drawn(0))) > 1
    assert (random.getstate(), np.random.get_state()[1].tolist()) == outside


def test_erasing_blanks_a_part_of_training_images():
    image = Image.new("RGB", (40, 40), (255, 0, 0))
    transform = Preprocessing(32, 37).transform(True, erasing=1.0)
    x = transform(image)
    assert x.shape == (3, 32, 32)
    assert x.flatten(1).unique(dim=1).shape[1] == 2  # the colour, and what is blank
    assert Preprocessing(32, 37).transform(False, erasing=1.0)(image).flatten(1).unique(dim=1).shape[1] == 1


def test_learning_rates_rise_and_fall():
    recipe = Recipe(epochs=10, lr_warmup_epochs=3)
    rates = [recipe.learning_rate(epoch) for epoch in range(10)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    expected = [0.5 * (1 + np.cos(np.pi * step / 7)) for step in range(7)]
    assert rates[3:] == pytest.approx(expected)


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_layer_decay_is_that_of_timm(name):
    torch.manual_seed(0)
    plain = timm.create_model(name, num_classes=3)
    groups = timm.optim.param_groups_layer_decay(plain, layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    expected = {key: scale[id(parameter)] for key, parameter in plain.named_parameters()}
    net = copy.deepcopy(plain)
    net.reset_classifier(0)
    model = taps.adapt(net, "finetune", train_base=True)
    model.add_task("a", 3)
    optimizer = make_optimizer(model, ["a"], Recipe(lr=0.1, base_lr=0.1, norm_lr=0.1, layer_decay=0.5))
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for unit in model.units:
        for key in unit.parameter_names:
            wanted = pytest.approx(0.1 * expected[f"{unit.name}.{key}" if unit.name else key])
            assert rates[id(unit.deltas["a"][key])] == wanted, (unit.name, key)
            assert rates[id(unit.base.get_parameter(key))] == wanted
    for norm in model.task_norms:
        for key, parameter in norm.norms["a"].named_parameters():
            assert rates[id(parameter)] == pytest.approx(0.1 * expected[f"{norm.name}.{key}"]), norm.name
    assert rates[id(model.heads["a"].weight)] == 0.1
    assert len(rates) == sum(len(parameters) for parameters in model.roles("a").values())


def test_layer_decay_counts_layers_where_blocks_are_not_known():
    model = taps.adapt(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)))
    model.add_task("a", 3)
    optimizer = make_optimizer(model, ["a"], Recipe(lr=0.1, layer_decay=0.5))
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for index, unit in enumerate(model.units):
        for parameter in unit.deltas["a"].parameters():
            assert rates[id(parameter)] == pytest.approx(0.1 * 0.5 ** (2 - index))


def test_gradients_are_clipped_to_their_norm():
    steps = {}
    for limit in (None, 1e-3):
        model = fresh()
        before = torch.cat([p.detach().flatten() for p in model.heads["a"].parameters()])
        taps.fit(
            model, "a", [samples()[:16]], epochs=1, lr=0.1, momentum=0.0, lam=0.0, clip_grad=limit, channels_last=False
        )  # fmt: skip
        steps[limit] = (torch.cat([p.detach().flatten() for p in model.heads["a"].parameters()]) - before).norm()
    assert steps[1e-3] <= 0.1 * 1e-3 * 1.001 < steps[None]


def test_training_stops_without_progress_and_continues_to_the_same_end(tmp_path):
    class Never:
        """Labels that cannot be learned, so that validation soon stops improving."""

        def __len__(self):
            return 1

        def __iter__(self):
            x, y = samples().tensors
            yield x[:30], (y[:30] + 1) % 3

    model = fresh()
    record = taps.fit(
        model, "a", DataLoader(samples(), 16, shuffle=True), Never(), epochs=30, lr=0.05, patience=2, folder=tmp_path / "a"
    )  # fmt: skip
    errors = record.curve("val_error")
    counted = errors[12:]  # once gates are fixed: after two epochs without and ten with a penalty
    risen = 12 + counted.index(min(counted)) + 1  # equal results are no progress
    assert len(record.rows) == risen + 2 < 30
    assert errors[record.best_epoch - 1] == min(counted)
    again = taps.fit(
        fresh(), "a", DataLoader(samples(), 16, shuffle=True), Never(), epochs=30, lr=0.05, patience=2,
        folder=tmp_path / "a", resume=True,
    )  # fmt: skip
    assert (again.rows, again.best_epoch) == (record.rows, record.best_epoch)


@pytest.mark.parametrize("options", [{"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.4, "cutmix": 1.0}])
def test_blended_images_are_learned_from(options):
    record = fit(fresh(), epochs=8, **options)
    assert record.rows[record.best_epoch - 1]["val_error"] < 20
    assert all(0 <= row["train_error"] <= 100 for row in record.rows)


def test_blending_is_for_tasks_that_classify():
    model = taps.adapt(network())
    model.add_task("a", head=torch.nn.Sequential(torch.nn.Linear(96, 3)))
    with pytest.raises(taps.UserError, match="mixup and CutMix are for tasks that classify"):
        taps.fit(model, "a", [samples()[:16]], epochs=1, mixup=1.0)


@pytest.mark.parametrize("options", [{"mixup": 0.4}, {"cutmix": 1.0}])
def test_images_of_several_tasks_are_blended_within_each(options):
    """In a batch of two tasks each task's images stay its own, and its labels are shares of its own classes."""
    from accelerate import Accelerator

    from taps.training.loop import _by_task, _Run
    from taps.training.recipe import Recipe

    model = taps.adapt(network())
    for name, classes in (("a", 3), ("b", 5)):
        model.add_task(name, num_classes=classes)
    data = DataLoader([(torch.zeros(3, 16, 16), 0, 0)] * 4, 2)
    recipe, loss = Recipe(epochs=1, **options), torch.nn.functional.cross_entropy
    run = _Run(
        model, ("a", "b"), data, type("Order", (), {"epoch": 0})(), recipe, Accelerator(), loss, None, None, None
    )
    names = ["a", "b", "b", "a", "b"]
    x = torch.stack([torch.full((3, 16, 16), float(10 * (name == "b") + row)) for row, name in enumerate(names)])
    labels = torch.tensor([2, 4, 3, 0, 1])
    mixed, call, shares = run._mixed((x, {"task": names}, labels))
    assert not torch.equal(mixed, x)
    for row, name in enumerate(names):
        assert bool((mixed[row] >= 10).all()) == (name == "b")
    for (task, _, targets), classes in zip(_by_task(torch.zeros(5, 5), call, shares), (3, 5), strict=True):
        assert torch.allclose(targets.sum(1), torch.ones(len(targets)))
        assert not targets[:, classes:].any(), task


@pytest.mark.slow
def test_joint_training_blends(tree, here, tmp_path):
    line = ("train_joint.py", "--dataset", tree, *SMALL, "--epochs", 1, "--mixup", 0.4, "--cutmix", 1)
    here(*line, "--experiment_name", "joint")
    here(*line, "--variant", "lite", "--experiment_name", "lite")
    assert json.loads((tmp_path / "results/joint/summary.json").read_text())["tasks"].keys() == {"paint", "ink-2"}


def test_smoothing_and_class_weights_are_those_of_the_definition():
    torch.manual_seed(0)
    output, labels = torch.randn(9, 4, dtype=torch.float64), torch.tensor([0, 0, 0, 0, 0, 1, 1, 2, 2])
    weights = balanced_weights(labels.tolist(), 4)
    assert weights == pytest.approx([3 / 5, 3 / 2, 3 / 2, 1.0])
    logs = output.log_softmax(1)
    target = torch.nn.functional.one_hot(labels, 4) * 0.9 + 0.1 / 4
    assert CrossEntropy(0.1)(output, labels) == pytest.approx(float(-(target * logs).sum(1).mean()))
    own = torch.tensor(weights, dtype=torch.float64)[labels]
    expected = -(own * logs[torch.arange(9), labels]).sum() / own.sum()
    assert CrossEntropy(0.0, weights)(output, labels) == pytest.approx(float(expected))
    assert CrossEntropy()(output, labels) == cross_entropy(output, labels)


def test_a_criterion_of_ones_own_is_not_smoothed():
    with pytest.raises(taps.UserError, match="label_smoothing= applies only to the default criterion"):
        taps.fit(fresh(), "a", [samples()[:16]], epochs=1, label_smoothing=0.1, criterion=torch.nn.functional.mse_loss)


def test_the_commands_take_all_of_them_and_test_every_class(tree, here, tmp_path):
    options = (
        "--aa", "rand-m9-mstd0.5-inc1", "--reprob", 0.2, "--mixup", 0.2, "--cutmix", 1, "--smoothing", 0.1,
        "--lr_warmup_epochs", 1, "--layer_decay", 0.9, "--clip_grad", 1, "--patience", 2, "--class_weights", "balanced",
        "--track", "tensorboard", "--warmup_epochs", 1,
    )  # fmt: skip
    line = ("--dataset", tree / "paint", *SMALL, "--epochs", 2, *options, "--experiment_name", "run")
    here("train_sequential.py", *line, draws=True)
    run = tmp_path / "results/run"
    assert len(list(run.rglob("events.out.tfevents*"))) >= 2  # the published tags, and the tracker's
    tested = json.loads((run / "paint/test.json").read_text())
    counts = np.array(tested["confusion"])
    assert counts.shape == (3, 3)
    assert counts.sum(1).tolist() == [5, 5, 5]
    assert tested["accuracy"] == pytest.approx(100 * counts.trace() / 15)
    shares = (100 * counts.diagonal() / counts.sum(1)).tolist()
    assert tested["per_class"] == pytest.approx({f"class{label}": share for label, share in enumerate(shares)})
    model = taps.load(run)
    assert model.about("paint")["accuracy"] == tested["accuracy"]
    for picture in ("curves.png", "paint/confusion.png"):
        assert read_image(str(run / picture)).width > 300
    assert not (run / "checkpoint").exists()


@pytest.mark.parametrize(
    ("program", "options", "message"),
    [
        ("train_sequential.py", ("--aa", "rnd"), "--auto_augment 'rnd' is not a policy of timm"),
        ("train_sequential.py", ("--track", "wndb"), "unknown tracker 'wndb'; did you mean 'wandb'"),
        ("train_sequential.py", ("--experiment_name", "../x"), "--experiment_name ../x is not a folder inside results"),
        ("train_sequential.py", ("--experiment_name", "/elsewhere"), "is not a folder inside results"),
        ("train_sequential.py", ("--budget", "10%", "--patience", "2"), "--patience is not used with a budget"),
        ("train_sequential.py", ("--lr_warmup_epochs", "1"), "--lr_warmup_epochs 1 leaves none of 1 epochs"),
        ("train_sequential.py", ("--budget", "10"), "write 10% for that part of the base, or 10B"),
        ("train_sequential.py", ("--layer_decay", "0"), "is not a number above 0 and at most 1"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(program, options, message, tree, here, tmp_path):
    done = here(program, "--dataset", tree, *SMALL, "--epochs", 1, *options, check=2)
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "results").exists()


def test_a_published_experiment_name_stays_in_the_results_folder(tree, here, tmp_path):
    here(
        "train_sequential.py", "--dataset", tree / "paint", *SMALL, "--epochs", 1, "--limit_batches", 1,
        "--experiment_name", "./results/own",
    )  # fmt: skip
    assert (tmp_path / "results/own/summary.json").is_file()


def test_patience_waits_for_a_validation():
    from taps.training.loop import Progress, _Run

    run = object.__new__(_Run)
    run.recipe, run.progress = Recipe(epochs=20, patience=3, eval_epochs=5), Progress()
    run.progress.risen = 5
    stalled = []
    for epoch in range(5, 11):
        run.progress.epoch = epoch
        stalled.append(run.is_out_of_patience())
    assert stalled == [False] * 5 + [True]


@pytest.mark.parametrize("budget", [0.03, True])
def test_a_budget_that_is_no_size_is_refused(budget):
    with pytest.raises(taps.UserError, match="is not a number of bytes or a size"):
        Recipe(budget=budget)


def test_numbers_of_some_epochs_alone_are_a_curve():
    record = fit(fresh(), epochs=3, eval_epochs=2)
    assert [value is None for value in record.curve("val_error")] == [True, False, False]
