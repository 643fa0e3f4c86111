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
    assert len(trainer.parts["weights"]) == 32
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
