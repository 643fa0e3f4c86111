"""Formulas against short independent references in float64."""

import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import taps
from taps.core.execution import State
from taps.core.method import Phase
from taps.core.unit import add_delta
from taps.methods.registry import METHODS
from taps.training.recipe import Recipe, make_optimizer, phase_at


@pytest.mark.parametrize("score", [0.15, 0.1, 0.0999999, -0.3])
@pytest.mark.parametrize("ste", ["code", "paper"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_straight_through_gradients(score, ste, layout):
    """w = W + 1[s ≥ τ]δ; dL/ds = ⟨g, δ⟩; dL/dδ = 1[s ≥ τ]g (code) or s·g (paper); dL/dW = g."""
    gate = taps.ThresholdGate(threshold=0.1, score_init=score, ste=ste).double()
    base, delta, g = (torch.randn(5, 4, 3, 3, dtype=torch.float64).contiguous(memory_format=layout) for _ in range(3))
    base.requires_grad_()
    delta.requires_grad_()
    decision = gate(None, State())
    weight = add_delta(base, delta, decision.specific, decision.delta_gradient)
    weight.backward(g)
    is_open = float(gate.score.detach() >= 0.1)
    assert torch.equal(weight, base + is_open * delta)
    torch.testing.assert_close(gate.score.grad, (g * delta).sum().detach())
    factor = is_open if ste == "code" else float(gate.score.detach())
    torch.testing.assert_close(delta.grad, factor * g)
    torch.testing.assert_close(base.grad, g)


def test_elementwise_and_soft_factors():
    base, delta, z = (torch.randn(3, 2, dtype=torch.float64, requires_grad=True) for _ in range(3))
    assert torch.autograd.gradcheck(add_delta, (base, delta, z))
    scalar = torch.rand((), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(add_delta, (base, delta, scalar))
    assert torch.equal(add_delta(base, delta, 0.25), base + 0.25 * delta)


def test_penalty_is_the_mean_over_the_real_number_of_layers():
    model = taps.adapt(taps.create_backbone("resnet18", pretrained=False)).double()
    model.add_task("a", num_classes=2)
    scores = torch.randn(20, dtype=torch.float64)
    for unit, score in zip(model.units, scores, strict=True):
        unit.gates["a"].score.data.copy_(score)
    penalty = model.penalty("a")
    torch.testing.assert_close(penalty, scores.abs().sum() / 20, rtol=1e-6, atol=0)
    penalty.backward()
    for unit, score in zip(model.units, scores, strict=True):
        torch.testing.assert_close(float(unit.gates["a"].score.grad), float(score.sign()) / 20)


def test_the_penalty_of_weights_is_the_mean_score_of_a_weight():
    net = nn.Sequential(nn.Linear(3, 40), nn.Linear(40, 4))
    model = taps.adapt(net, penalty="weights")
    model.add_task("a", num_classes=2)
    scores = (-0.3, 0.2)
    for unit, score in zip(model.units, scores, strict=True):
        unit.gates["a"].score.data.fill_(score)
    sizes = [sum(p.numel() for p in unit.deltas["a"].parameters()) for unit in model.units]
    assert sizes == [160, 164]
    penalty = model.penalty("a")
    torch.testing.assert_close(float(penalty.detach()), (160 * 0.3 + 164 * 0.2) / 324)
    penalty.backward()
    torch.testing.assert_close(float(model.units[0].gates["a"].score.grad), -160 / 324)
    model.half()
    torch.testing.assert_close(float(model.penalty("a").detach()), (160 * 0.3 + 164 * 0.2) / 324, atol=1e-3, rtol=0)
    for options, reason in (
        ({"penalty": "bytes"}, "penalty has to be 'layers' or 'weights', not 'bytes'"),
        ({"penalty": "weights", "penalty_divisor": 52}, "penalty_divisor is a number of layers: leave it out"),
    ):
        with pytest.raises(ValueError, match=reason):
            taps.adapt(nn.Linear(3, 4), **options)


def test_the_published_penalty_has_52_layers_in_every_network():
    models = [taps.adapt(nn.Linear(3, 4), penalty_divisor=divisor) for divisor in (None, 52)]
    for model in models:
        model.add_task("a", num_classes=2)
    assert models[1].penalty("a") * 52 == models[0].penalty("a") == torch.tensor(0.15)
    with pytest.raises(ValueError, match="penalty_divisor has to be above 0, not 0"):
        taps.adapt(nn.Linear(3, 4), penalty_divisor=0)


class PlainResNet(nn.Module):
    """A short residual network, used by both the library and the reference."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.first = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.second = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(8)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        x = (x + self.norm2(self.second(self.first(x).relu()))).relu()
        return x.mean((2, 3))


def test_ten_steps_equal_the_published_arithmetic():
    """SGD with momentum, no decay; gates close during training. Losses, deltas and scores agree to 1e-9 in float64."""
    torch.manual_seed(0)
    lam, lr, momentum, tau, steps = 6.0, 0.05, 0.9, 0.1, 10
    x = torch.randn(steps, 6, 3, 9, 9, dtype=torch.float64)
    y = torch.randint(0, 4, (steps, 6))
    net = PlainResNet().double()
    base = {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}
    model = taps.adapt(net)
    model.add_task("t", num_classes=4)
    head = {name: tensor.detach().clone() for name, tensor in model.heads["t"].state_dict().items()}

    # the reference: explicit weights, explicit gradients of the gate, explicit momentum
    layers = ("stem", "first", "second")
    values = {f"d.{k}": torch.zeros_like(base[f"{k}.weight"]) for k in layers}
    values |= {f"s.{k}": torch.tensor(0.15, dtype=torch.float32).double() for k in layers}
    values |= {f"{k}.{p}": base[f"{k}.{p}"].clone() for k in ("norm", "norm2") for p in ("weight", "bias")}
    values |= {f"h.{k}": v.clone() for k, v in head.items()}
    velocity = {k: torch.zeros_like(v) for k, v in values.items()}
    reference_losses, closed = [], []
    for step in range(steps):
        opened = {k: float(values[f"s.{k}"] >= tau) for k in layers}
        closed.append(sum(value == 0 for value in opened.values()))
        w = {k: (base[f"{k}.weight"] + opened[k] * values[f"d.{k}"]).requires_grad_() for k in layers}
        p = {k: values[k].clone().requires_grad_() for k in values if k[0] in "nh"}
        h = F.conv2d(x[step], w["stem"])
        h = F.batch_norm(h, None, None, p["norm.weight"], p["norm.bias"], training=True).relu()
        r = F.conv2d(F.conv2d(h, w["first"], padding=1).relu(), w["second"], padding=1)
        h = (h + F.batch_norm(r, None, None, p["norm2.weight"], p["norm2.bias"], training=True)).relu()
        loss = F.cross_entropy(F.linear(h.mean((2, 3)), p["h.weight"], p["h.bias"]), y[step])
        loss.backward()
        gradient = {k: v.grad for k, v in p.items()}
        for k in layers:
            gradient[f"d.{k}"] = opened[k] * w[k].grad
            gradient[f"s.{k}"] = (w[k].grad * values[f"d.{k}"]).sum() + lam / len(layers) * values[f"s.{k}"].sign()
        reference_losses.append(float(loss.detach() + lam / len(layers) * sum(values[f"s.{k}"].abs() for k in layers)))
        for k in values:
            velocity[k] = gradient[k] if step == 0 else momentum * velocity[k] + gradient[k]
            values[k] = values[k] - lr * velocity[k]

    optimizer = make_optimizer(model, ["t"], Recipe(lr=lr, momentum=momentum))
    model.train()
    losses = []
    for step in range(steps):
        loss = F.cross_entropy(model(x[step], task="t"), y[step]) + lam * model.penalty("t")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert closed[0] == 0
    assert 0 < max(closed) <= 3, "gates close on the way"
    assert len(set(closed)) > 1
    assert losses == pytest.approx(reference_losses, abs=1e-9)
    for unit in model.units:
        assert float(unit.gates["t"].score.detach()) == pytest.approx(float(values[f"s.{unit.name}"]), abs=1e-9)
        torch.testing.assert_close(unit.deltas["t"]["weight"].detach(), values[f"d.{unit.name}"], atol=1e-9, rtol=0)
    torch.testing.assert_close(model.heads["t"].weight.detach(), values["h.weight"], atol=1e-9, rtol=0)


def test_learning_rate_is_a_cosine_that_never_spends_an_epoch_at_zero():
    recipe = Recipe(epochs=30)
    rates = [recipe.learning_rate(epoch) for epoch in range(30)]
    assert rates[0] == 1
    assert all(a > b > 0 for a, b in pairwise(rates))
    assert rates[15] == pytest.approx(0.5)
    assert rates[29] == pytest.approx((1 + math.cos(math.pi * 29 / 30)) / 2)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 0),
        ("lr", 0.0),
        ("lr", math.nan),
        ("score_lr", -1.0),
        ("momentum", -0.1),
        ("budget", -1),
        ("lr", math.inf),
    ],
)
def test_a_recipe_refuses_numbers_outside_of_their_ranges(name, value):
    with pytest.raises(ValueError, match=f"{name}: .* is not a "):
        Recipe(**{name: value})


def test_phases_count_epochs_exactly():
    model = taps.adapt(nn.Sequential(nn.Linear(2, 2)))
    published = partial(Recipe, settle_epochs=0)
    phases = published(epochs=5, warmup_epochs=2).phases(model)
    assert [(phase.name, phase.epochs, phase.penalty) for phase in phases] == [("warm-up", 2, 0.0), ("train", 3, 1.0)]
    assert [phase_at(phases, e).penalty for e in (0, 1, 1.99, 2, 4.9, 7)] == [0, 0, 0, 1, 1, 1]
    assert [p.name for p in published(epochs=5, warmup_epochs=0).phases(model)] == ["train"]
    assert [p.name for p in Recipe(epochs=5, warmup_epochs=9).phases(model)] == ["warm-up"]
    for epochs, warmup, train, settle in ((30, 2, 10, 18), (12, 1, 4, 7), (3, 1.5, 0.5, 1), (2, 1, 1, 0)):
        lengths = [p.epochs for p in Recipe(epochs=epochs, warmup_epochs=warmup).phases(model)]
        assert lengths == [own for own in (warmup, train, settle) if own]
    settled = Recipe(epochs=5, warmup_epochs=1, settle_epochs=2.5).phases(model)
    assert [(p.name, p.epochs) for p in settled] == [("warm-up", 1), ("train", 1.5), ("settle", 2.5)]
    assert "gate" not in settled[-1].trains
    with pytest.raises(ValueError, match="method 'taps' does not support a size budget; use method 'taps_budget'"):
        Recipe(epochs=6, budget=10).phases(model)
    model = taps.adapt(nn.Sequential(nn.Linear(2, 2)), "taps_budget")
    within = Recipe(epochs=6, budget=10).phases(model)
    assert [(p.name, p.epochs) for p in within] == [
        ("open", 2), *[("settle", 1)] * 3, ("round", 0.5), ("round", 0.5), ("round", 0.0)
    ]  # fmt: skip
    assert all(p.begin is not None for p in within)
    assert [p.forks for p in within] == [False, True] + [False] * 5
    assert [within.index(phase_at(within, e)) for e in (1.9, 2.9, 4.9, 5, 5.4, 5.5, 5.99)] == [0, 1, 3, 4, 4, 5, 5]
    assert not any("gate" in p.trains or p.penalty for p in within)
    assert METHODS["finetune"].phases(model, Recipe(epochs=3)) == (Phase("train", 3),)


def test_gates_and_norms_do_not_decay_and_gates_have_their_own_rate():
    model = taps.adapt(taps.create_backbone("resnet18", pretrained=False))
    model.add_task("a", num_classes=2)
    optimizer = make_optimizer(model, ["a"], Recipe(lr=0.1, score_lr=0.7, wd=0.01))
    groups = {group["role"]: group for group in optimizer.param_groups}
    assert {role: group["weight_decay"] for role, group in groups.items()} == {
        "delta": 0.01, "head": 0.01, "gate": 0.0, "norm": 0.0
    }  # fmt: skip
    assert {role: group["lr"] for role, group in groups.items()} == {
        "delta": 0.1,
        "head": 0.1,
        "gate": 0.7,
        "norm": 0.1,
    }
    assert sum(len(group["params"]) for group in groups.values()) == sum(p.requires_grad for p in model.parameters())


def test_parameters_x_base():
    """1 + Σ (open units + norms' affine and statistics) / backbone, without heads."""
    from taps.core.accounting import accounting, parameters_x_base

    model = taps.adapt(taps.create_backbone("resnet34", pretrained=False))
    model.add_task("a", num_classes=10)
    account = accounting(model, "a")
    assert account["parameters"] == 21_267_648 + 2 * 17_024
    assert account["base_parameters"] == 21_284_672
    for unit in model.units:
        unit.gates["a"].set(unit.name == "conv1")
    account = accounting(model, "a")
    assert account["delta_parameters"] == 64 * 3 * 49
    assert account["tuned_layers"] == 1 / 36
    expected = 1 + 2 * (64 * 3 * 49 + 2 * 17_024) / 21_284_672
    assert parameters_x_base([account, account]) == pytest.approx(expected)
    assert parameters_x_base([account], heads=True) - parameters_x_base([account]) == pytest.approx(5130 / 21_284_672)
