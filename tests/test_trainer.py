"""The four calls of the trainer: construct, pre-train, learn the policy and train under it, and the resulting network."""

import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import taps


class Stripes(Dataset):
    """Noise with stripes; the tasks are to predict their direction and their colour."""

    def __init__(self, size: int) -> None:
        generator = torch.Generator().manual_seed(size)
        self.way = torch.randint(0, 2, (size,), generator=generator)
        self.colour = torch.randint(0, 3, (size,), generator=generator)
        images = 0.3 * torch.randn(size, 3, 16, 16, generator=generator)
        wave = torch.sin(torch.arange(16) * 1.5)
        for image, way, colour in zip(images, self.way.tolist(), self.colour.tolist(), strict=True):
            image[colour] += wave[:, None] if way else wave[None]
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int):
        return self.images[index], {"way": self.way[index], "colour": self.colour[index]}


def backbone() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 12, 3, padding=1), nn.BatchNorm2d(12),
        nn.ReLU(), nn.Conv2d(12, 24, 3, stride=2, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip


def accuracy(output: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    return 100 * (output.argmax(1) == label).float().mean()


def story(**options) -> taps.PolicyTrainer:
    torch.manual_seed(0)
    loaders = {"train": DataLoader(Stripes(128), batch_size=16), "val": DataLoader(Stripes(40), batch_size=20)}
    given = {
        "heads": {"way": nn.Linear(24, 2), "colour": nn.Linear(24, 3)},
        "loaders": loaders,
        "losses": dict.fromkeys(("way", "colour"), nn.functional.cross_entropy),
        "metrics": dict.fromkeys(("way", "colour"), accuracy),
        "eval_iterations": 20, "weight_iterations": 6, "policy_iterations": 3,
        **options,
    }  # fmt: skip
    return taps.PolicyTrainer(backbone(), **given)


@pytest.fixture(scope="module")
def learned():
    trainer = story()
    before = {name: tensor.clone() for name, tensor in trainer.model.base_state().items()}
    trainer.pre_train(iterations=40)
    policy = trainer.learn_policy(iterations=90)
    return trainer, policy, before


def test_four_calls_learn_the_tasks(learned):
    trainer, policy, before = learned
    network = trainer.post_train(policy, iterations=40)
    found = trainer.evaluate(network)
    assert found["way"]["metric"] > 90
    assert found["colour"]["metric"] > 90
    assert next(row["stage"] for row in trainer.history) == "pre-train"
    assert {row["stage"] for row in trainer.history} == {"pre-train", "policy", "post-train"}
    gone = network.predictor()
    x = next(iter(trainer.val))[0]
    with torch.no_grad():
        for task, output in gone(x).items():
            torch.testing.assert_close(output, network(x, task))
    assert not any(
        torch.equal(tensor, before[name]) for name, tensor in trainer.model.base_state().items() if "weight" in name
    )


def test_policies_depend_on_the_seed_alone(learned):
    again = story()
    again.pre_train(iterations=40)
    assert again.learn_policy(iterations=90).probability == learned[1].probability


def test_training_again_from_scratch_forgets_and_leaves_the_model(learned):
    trainer, policy, before = learned
    state = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    fresh = trainer.post_train(policy.top(2)[1], iterations=1, start="scratch")
    assert all(torch.equal(tensor, state[name]) for name, tensor in trainer.model.state_dict().items())
    moved = max(
        float((tensor - before[name]).abs().max()) for name, tensor in fresh.base_state().items() if "weight" in name
    )
    assert moved < 0.02


def test_an_unlearned_policy_is_doubted():
    trainer = story()
    with pytest.warns(UserWarning, match="nearly uniform"):
        trainer.learn_policy(iterations=9)


def test_other_methods_and_samples_of_their_own():
    layers = taps.create_backbone("resnet10t", pretrained=False, channels=(8, 8, 8, 8))
    loaders = {
        "train": DataLoader(Stripes(32), batch_size=8), "policy": DataLoader(Stripes(16), batch_size=8),
        "val": DataLoader(Stripes(8), batch_size=8),
    }  # fmt: skip
    trainer = taps.PolicyTrainer(
        layers, {"way": nn.Linear(8, 2)}, loaders, {"way": nn.functional.cross_entropy}, method="adashare",
        weight_iterations=1, policy_iterations=1,
    )  # fmt: skip
    assert len(trainer.parts["weights"][""]) == 32
    trainer.pre_train(iterations=2)
    with pytest.warns(UserWarning, match="nearly uniform"):
        policy = trainer.learn_policy(iterations=8)
    assert policy.own == {}
    assert trainer.post_train(policy, iterations=2).predict(torch.randn(2, 3, 32, 32))["way"].shape == (2, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "automtll"}, "did you mean 'automtl'"),
        ({"learning_rate": 1.0}, "unknown option 'learning_rate'"),
        ({"losses": {"way": nn.functional.cross_entropy}}, "losses are given for way; heads are given for way, colour"),
        ({"loaders": {"train": None}}, "loaders lack 'val'"),
        ({"task_weights": {"wy": 2.0}}, "unknown task in task_weights 'wy'; did you mean 'way'"),
        ({"task_weights": {"way": -2.0}}, "task_weights: -2.0 is not a number of at least 0"),
        ({"lr": 0.0}, "lr: 0.0 is not a number above 0"),
        ({"policy_lr": -0.1}, "policy_lr: -0.1 is not a number above 0"),
        ({"batch_size": 0}, "batch_size: 0 is not a whole number of at least 1"),
        ({"temperature_decay": 1.5}, "temperature_decay: 1.5 is not a number above 0 and at most 1"),
        ({"eval_iterations": "1e"}, "eval_iterations: '1e' are passes; give a number of steps"),
        ({"policy_wd": math.inf}, "policy_wd: inf is not a number of at least 0"),
        ({"policy_fraction": 0.0}, "policy_fraction: 0.0 is not a number above 0 and at most 0.9"),
        (
            {"loaders": {name: DataLoader(list(range(4))) for name in ("train", "val")}},
            r"loaders have to give \(inputs, \{task: labels\}\)",
        ),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        story(**options)


def test_steps_are_checked(learned):
    trainer, policy, _ = learned
    for work in (trainer.pre_train, lambda n: trainer.post_train(policy, n)):
        with pytest.raises(ValueError, match="iterations have to be 1 or more, not 0"):
            work(0)
    with pytest.raises(ValueError, match="takes a cycle of 9 steps at least, not 5"):
        trainer.learn_policy(5)


def test_a_policy_for_another_network_is_refused(learned):
    trainer, policy, _ = learned
    other = taps.Policy("x", ("a",), {"way": (1.0,)}, {"way": (1.0,)})
    with pytest.raises(ValueError, match="policy given is for x with 1 units"):
        trainer.post_train(other, iterations=1)
    with pytest.raises(ValueError, match="unknown start 'scrach'"):
        trainer.post_train(policy, iterations=1, start="scrach")


class OneTask(Dataset):
    """Samples of one task as AutoMTL's data sets give them."""

    def __init__(self, size: int, task: str, masked: bool) -> None:
        self.samples, self.task, self.masked = Stripes(size), task, masked

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict:
        image, labels = self.samples[index]
        sample = {"input": image, "label": labels[self.task]}
        return {**sample, "mask": torch.tensor(index % 3 > 0)} if self.masked else sample


class Criterion:
    def __call__(self, prediction, label, mask=None):
        loss = nn.functional.cross_entropy(prediction, label, reduction="none")
        return loss.mean() if mask is None else (loss * mask).sum() / mask.sum().clamp(min=1)


class Metric:
    """Accumulates over batches until its numbers are asked for."""

    def __init__(self) -> None:
        self.right, self.count = 0, 0

    def __call__(self, prediction, label, mask=None):
        known = torch.ones_like(label, dtype=torch.bool) if mask is None else mask
        self.right += int((prediction.argmax(1) == label)[known].sum())
        self.count += int(known.sum())

    def val_metrics(self) -> dict[str, float]:
        found = {"accuracy": 100 * self.right / self.count}
        self.right, self.count = 0, 0
        return found


NAMES = {"segment_semantic": ("colour", 3), "depth_zbuffer": ("way", 2)}


def by_task(size: int, batch_size: int, lists: bool = False) -> dict:
    found = {}
    for name, (task, _) in NAMES.items():
        own = [
            DataLoader(OneTask(n, task, name == "depth_zbuffer"), batch_size=batch_size)
            for n in (size, size, size // 4)
        ]
        found[name] = own if lists else own[0]
    return found


@pytest.mark.parametrize("lists", [False, True])
def test_loaders_of_their_own_with_masks_and_accumulating_metrics(lists):
    """Dictionaries by task of loaders, criteria and metrics, under the published names of tasks."""
    torch.manual_seed(0)
    trainer = taps.PolicyTrainer(
        backbone(),
        nn.ModuleDict({name: nn.Linear(24, classes) for name, (_, classes) in NAMES.items()}),
        {"train": by_task(128, 16, lists), "val": by_task(40, 20)},
        {name: Criterion() for name in NAMES},
        {name: Metric() for name in NAMES},
        step_per_task=True, eval_iterations=20, weight_iterations=6, policy_iterations=3,
    )  # fmt: skip
    assert len(trainer.parts["policy"]["segment_semantic"]) == (
        32 if lists else round(128 * trainer.options.policy_fraction)
    )
    trainer.pre_train(iterations=40)
    policy = trainer.learn_policy(iterations=90)
    network = trainer.post_train(policy, iterations=40)
    found = trainer.evaluate(network)
    assert all(row["accuracy"] > 90 for row in found.values())
    x = torch.stack([OneTask(40, "way", True)[index]["input"] for index in range(40)])
    samples = [OneTask(40, "way", True)[index] for index in range(40)]
    known = torch.stack([sample["mask"] for sample in samples])
    labels = torch.stack([sample["label"] for sample in samples])
    with torch.no_grad():
        right = (network(x, task="depth_zbuffer").argmax(1) == labels)[known].float().mean()
    assert found["depth_zbuffer"]["accuracy"] == pytest.approx(100 * float(right))
    assert set(trainer.validate()) == set(NAMES)


def test_validation_with_mixtures_or_decisions():
    trainer = story()
    modes = [module.training for module in trainer.model.modules()]
    decided = trainer.validate(hard=True)
    assert trainer.validate() == decided
    torch.manual_seed(0)
    mixed = [trainer.validate(hard=False) for _ in range(2)]
    assert decided != mixed[0] != mixed[1], "drawn anew"
    assert [module.training for module in trainer.model.modules()] == modes
    for gate in (gate for task in trainer.tasks for gate in trainer.model.gates(task)):
        gate.logits.data = torch.tensor([80.0, -80.0, -80.0])[: len(gate.logits)]
    sure = trainer.validate(hard=False)
    assert all(sure[task]["loss"] == pytest.approx(own["loss"], rel=1e-5) for task, own in trainer.validate().items())


def test_loaders_by_task_are_checked():
    heads = {name: nn.Linear(24, classes) for name, (_, classes) in NAMES.items()}
    losses = dict.fromkeys(NAMES, Criterion())
    good = {"train": by_task(32, 8), "val": by_task(16, 8)}
    wrong = [DataLoader([torch.zeros(3)] * 32, batch_size=8)] * 2
    for loaders, message in (
        (
            {**good, "val": {"depth_zbuffer": good["val"]["depth_zbuffer"]}},
            r"loaders\['val'\] lacks a loader for each of segment",
        ),
        (
            {**good, "train": dict(zip(NAMES, wrong, strict=True))},
            "the loader of 'segment_semantic' gives a Tensor; it has to",
        ),
        (
            {**good, "train": {**good["train"], "depth_zbuffer": [good["train"]["depth_zbuffer"]] * 3}},
            "'segment_semantic' has one training loader, others have three",
        ),
        (
            {**good, "train": {**good["train"], "depth_zbuffer": by_task(32, 4)["depth_zbuffer"]}},
            "training loaders have batch sizes 4, 8; give one size",
        ),
        (
            {**good, "train": {name: [one] * 2 for name, one in good["train"].items()}},
            "are 2; give one, or for train all",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            taps.PolicyTrainer(backbone(), heads, loaders, losses)
