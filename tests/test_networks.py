"""Networks as people bring them: pruned, normalised by hooks, parametrised, of mixed types, in every precision."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import taps

X = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))


class To(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x):
        return x.to(self.dtype)


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 8),
    )  # fmt: skip


def with_layer(change) -> nn.Sequential:
    net = plain()
    net[3] = change(net[3]) or net[3]
    return net


def pruned(layer):
    prune.l1_unstructured(layer, "weight", 0.5)


def mixed() -> nn.Sequential:
    net = plain()
    return nn.Sequential(*net[:3], To(torch.bfloat16), net[3].bfloat16(), To(torch.float32), *net[4:7], To(torch.float64),
                         net[7].double(), To(torch.float32))  # fmt: skip


NETWORKS = {
    "plain": plain,
    "pruned": lambda: with_layer(pruned),
    "old weight norm": lambda: with_layer(nn.utils.weight_norm),
    "old spectral norm": lambda: with_layer(nn.utils.spectral_norm),
    "weight norm": lambda: with_layer(parametrizations.weight_norm),
    "spectral norm": lambda: with_layer(parametrizations.spectral_norm),
    "orthogonal": lambda: with_layer(lambda layer: parametrizations.orthogonal(layer)),
    "mixed types": mixed,
}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize("method", ["taps", "finetune"])
@pytest.mark.parametrize("kind", NETWORKS)
def test_every_step_works_at_any_moment(kind, method, tmp_path):
    net = NETWORKS[kind]()
    with torch.no_grad():
        net.train()(X)  # hooks and statistics have run
        before = net.eval()(X)
        fresh = copy.deepcopy(net)
    model = taps.adapt(net, method).eval()
    model.add_task("sketch", num_classes=np.int64(3))
    assert torch.equal(model.features(X, "sketch"), before)
    optimizer = torch.optim.SGD(model.parameters_of("sketch"), lr=0.1)
    for _ in range(3):
        model.train()
        loss = model(X, task="sketch").square().mean() + model.penalty("sketch")
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        now = model.merge("sketch")  # right after a step
        torch.testing.assert_close(now(X), model.eval()(X, task="sketch"), atol=1e-6, rtol=1e-5)
    assert torch.equal(model.features(X), before)
    outputs = model(X, task="sketch")
    torch.testing.assert_close(model.predictor()(X)["sketch"], outputs, atol=1e-6, rtol=1e-5)
    model.save_task("sketch", tmp_path / "t")
    other = taps.adapt(fresh, method).eval()
    other.load_task(tmp_path / "t")
    assert torch.equal(other(X, task="sketch"), outputs)
    if kind == "pruned":
        assert (now[0][3].weight == 0).sum() == 288


@pytest.mark.parametrize("last", [torch.float64, torch.bfloat16])
def test_heads_have_the_type_of_the_features_of_a_mixed_network(last, tmp_path):
    net = plain()
    net = nn.Sequential(*net[:7], To(last), net[7].to(last))
    model = taps.adapt(net).eval()
    model.add_task("sketch", num_classes=3)
    model.add_task("own", head=nn.Linear(8, 2).to(last))
    assert model(X, task="sketch").dtype == model(X, task="own").dtype == last
    model.save_task("sketch", tmp_path / "t")
    expected = model(X, task="sketch")
    model.remove_task("sketch")
    model.load_task(tmp_path / "t")
    assert torch.equal(model(X, task="sketch"), expected)


def test_a_base_that_was_converted_before_says_how_to_convert_it(tmp_path):
    model = taps.adapt(plain())
    model.add_task("sketch", num_classes=3)
    model.save_task("sketch", tmp_path / "t")
    with pytest.raises(ValueError, match=r"another base.*a base in bfloat16 is known if it is converted after adapt$"):
        taps.adapt(plain().bfloat16()).load_task(tmp_path / "t")


def test_lazy_networks_are_refused_until_they_have_shapes():
    net = nn.Sequential(nn.Flatten(), nn.LazyLinear(4))
    with pytest.raises(
        ValueError, match=r"^'1.weight' has no shape yet, since its module is lazy: run one batch through"
    ):
        taps.adapt(net)
    net(X)
    assert taps.adapt(net).num_features == 4


@pytest.mark.parametrize("number", [3, np.int64(3), np.uint8(3), torch.tensor(3)])
def test_any_whole_number_of_classes(number, tmp_path):
    model = taps.adapt(plain())
    model.add_task("sketch", num_classes=number)
    model.save_task("sketch", tmp_path / "t")
    assert model(X, task="sketch").shape == (4, 3)
    for wrong in (3.0, np.float64(3), "3", True, 0, np.int64(-1)):
        with pytest.raises(ValueError, match="num_classes must be a whole number above 0"):
            model.add_task("other", num_classes=wrong)


def test_names_of_classes_are_any_text_and_names_of_tasks_as_long_as_a_file_may_be(tmp_path):
    classes = ["", "a/b", 'quote"', "$x^", "日本", "e\u0301", "line\nbreak", "\udce9"]
    with pytest.raises(ValueError, match="task name of 256 characters is not allowed: use at most 255 letters"):
        taps.adapt(plain()).add_task("t" * 256, num_classes=2)
    task = "t" * 255
    model = taps.adapt(plain()).eval()
    model.add_task(task, num_classes=len(classes))
    model.save_task(task, tmp_path / task, {"classes": classes})
    other = taps.adapt(plain()).eval()
    assert other.load_task(tmp_path / task) == task
    assert other.classes(task) == classes
    assert torch.equal(other(X, task=task), model(X, task=task))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("method", ["taps", "finetune"])
def test_precision_before_or_after_loading(dtype, method, tmp_path):
    model = taps.adapt(plain(), method).eval()
    model.add_task("sketch", num_classes=3)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters_of("sketch"):
            parameter += 0.02 * torch.randn(parameter.shape)
    model.save_task("sketch", tmp_path / "t")
    expected = model(X, task="sketch")
    outputs = []
    for first in (True, False):
        other = taps.adapt(plain(), method).eval()
        if first:
            other.to(dtype)
        other.load_task(tmp_path / "t")
        other.to(dtype)
        outputs.append(other(X.to(dtype), task="sketch"))
        assert outputs[-1].dtype == dtype
        torch.testing.assert_close(other.merge("sketch")(X.to(dtype)), outputs[-1], atol=2e-2, rtol=2e-2)
    library = taps.adapt(plain(), method).eval().to(dtype)
    library.load_library(tmp_path)
    outputs.append(library(X.to(dtype), task="sketch"))
    assert torch.equal(outputs[0], outputs[2])
    for output in outputs:
        torch.testing.assert_close(output.float(), expected, atol=2e-2, rtol=2e-2)
    model.to(dtype).save_task("sketch", tmp_path / "rounded")  # a task of that precision, on its own base
    again = taps.adapt(plain(), method).eval().to(dtype)
    again.load_task(tmp_path / "rounded")
    assert torch.equal(again(X.to(dtype), task="sketch"), model(X.to(dtype), task="sketch"))


def test_autocast_gives_low_precision_outputs_and_gradients_for_everything():
    model = taps.adapt(plain()).train()
    model.add_task("sketch", num_classes=3)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(X, task="sketch")
    assert outputs.dtype == torch.bfloat16
    outputs.float().square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters_of("sketch"))


def test_an_optimiser_of_one_task_leaves_the_others():
    model = taps.adapt(plain(), norm="task").train()
    for task in ("sketch", "paint"):
        model.add_task(task, num_classes=3)
    before = {name: tensor.clone() for name, tensor in model.task_state("paint").items()}
    optimizer = torch.optim.SGD(model.parameters_of("sketch"), lr=0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(2):
        model(X, task="sketch").square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.task_state("paint").items())
