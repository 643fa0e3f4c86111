"""Checkpoints of other programs as tasks: published TAPS, fully fine-tuned networks, LoRA adapters."""

import copy
import json

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

import taps

X = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))


class Gated(nn.Conv2d):
    """A convolution as in a checkpoint of the published program: frozen weight, residual and indicator."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__(
            layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, bias=False
        )
        self.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
        self.residual = nn.Parameter(torch.zeros_like(self.weight))
        self.indicator = nn.Parameter(torch.tensor([0.15]))

    def forward(self, x):
        is_open = (self.indicator >= 0.1).float()
        return F.conv2d(x, self.weight + is_open * self.residual, None, self.stride, self.padding)


def published_taps(seed: int, base: nn.Module, classes: int) -> nn.Module:
    net = copy.deepcopy(base)
    net.fc = nn.Linear(512, classes)
    torch.manual_seed(seed)
    for module in list(net.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Conv2d):
                gated = Gated(child)
                gated.residual.data.normal_(std=0.01)
                gated.indicator.data.fill_(float(torch.empty(()).uniform_(-0.1, 0.3)))
                setattr(module, name, gated)
            elif isinstance(child, nn.BatchNorm2d):
                child.running_mean.normal_(std=0.1)
                child.running_var.uniform_(0.5, 1.5)
                child.weight.data.uniform_(0.5, 1.5)
    return net.eval()


def test_checkpoints_of_the_published_taps_answer_the_same(here, tmp_path):
    from torchvision.models import resnet18

    torch.manual_seed(0)
    base = resnet18().eval()
    nets = {"birds": published_taps(1, base, 5), "cars": published_taps(2, base, 7)}
    for name, net in nets.items():
        state = {f"module.{key}": tensor for key, tensor in net.state_dict().items()}
        torch.save({"arch": "resnet50", "epoch": 30, "state_dict": state}, tmp_path / f"{name}.pth")
    (tmp_path / "birds.txt").write_text("\n".join(f"bird {index}" for index in range(5)))
    (tmp_path / "cars.txt").write_text("\n".join(f"car {index}" for index in range(7)))
    done = here("taps import", "birds.pth", "cars.pth", "--from", "taps", "--classes", "birds.txt", "cars.txt")
    assert "birds: 5 classes, " in done.stdout
    model = taps.load(tmp_path / "results/imported")
    assert model.classes("cars")[3] == "car 3"
    prepared = model.preprocessing_of("cars")  # as the published program tests
    assert (prepared["resize"], prepared["interpolation"], prepared["published"]) == (224, "bilinear", True)
    for name, net in nets.items():
        with torch.no_grad():
            assert torch.equal(model(X, task=name), net(X)), name
        gates = {unit.name: unit.gates[name] for unit in model.units}
        for layer, module in net.named_modules():
            if isinstance(module, Gated):
                assert torch.equal(gates[layer].score, module.indicator.detach()[0])
    both = model.predict(X)
    assert torch.allclose(both["birds"], nets["birds"](X).detach(), atol=1e-4)
    torch.save({"state_dict": published_taps(3, base, 2).state_dict()}, tmp_path / "later.pth")
    here("taps import", "later.pth", "--from", "taps")  # on the base that is there, whose norms are those of birds
    assert sorted(taps.load(tmp_path / "results/imported").tasks) == ["birds", "cars", "later"]
    again = here("taps import", "birds.pth", "--from", "taps", check=2)
    assert "results/imported/birds exists; replace it with --overwrite" in again.stderr
    other = published_taps(1, resnet18(), 5)
    torch.save({"state_dict": other.state_dict()}, tmp_path / "other.pth")
    done = here("taps import", "birds.pth", "other.pth", "--from", "taps", "--out", "x", check=2)
    assert "other.pth has another base: 20 of 20 frozen weights differ, e.g. " in done.stderr
    assert not (tmp_path / "x").exists()


@pytest.fixture
def small(tmp_path):
    """A small network with a classifier, whose weights without it lie in base.pth."""
    torch.manual_seed(0)
    net = timm.create_model("test_resnet", num_classes=0).eval()
    torch.save(net.state_dict(), tmp_path / "base.pth")
    net.reset_classifier(4)
    return net


ARGUMENTS = ("--model_type", "test_resnet", "--model_path", "base.pth", "--input_size", 64)


def tuned(net: nn.Module, only: str = "") -> nn.Module:
    net = copy.deepcopy(net)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if only in name:
                parameter += 0.05 * torch.randn(parameter.shape)
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(std=0.1)
    return net.eval()


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_fine_tuned_network_becomes_a_task(small, here, tmp_path, prefix):
    whole, part = tuned(small), tuned(small, "layer4")
    for name, net in (("whole", whole), ("part", part)):
        torch.save({"model": {prefix + key: t for key, t in net.state_dict().items()}}, tmp_path / f"{name}.pth")
    done = here("taps import", "whole.pth", "part.pth", "--from", "state_dict", *ARGUMENTS)
    model = taps.load(tmp_path / "results/imported")
    for name, net in (("whole", whole), ("part", part)):
        torch.testing.assert_close(model(X, task=name), net(X), atol=1e-5, rtol=1e-5)
    layers = sum(isinstance(module, nn.Conv2d) for module in small.modules())
    last = sum(isinstance(module, nn.Conv2d) for module in small.layer4.modules())
    assert f"whole: 4 classes, {layers} of {layers} layers tuned" in done.stdout
    assert f"part: 4 classes, {last} of {layers} layers tuned" in done.stdout
    here("taps import", "part.pth", "--from", "state_dict", *ARGUMENTS, "--max_error", 0.1, "--out", "small")
    exact, coded = (tmp_path / folder / "part/task.safetensors" for folder in ("results/imported", "small"))
    assert coded.stat().st_size < 0.4 * exact.stat().st_size
    rounded = taps.load(tmp_path / "small")(X, task="part")
    assert (rounded - part(X)).norm() < 0.2 * part(X).norm()


def test_the_same_network_of_several_is_meant_as_for_base_weights(small, here, tmp_path):
    whole = tuned(small)
    states = {"model.": small.state_dict(), "ema_model.module.": whole.state_dict()}
    torch.save(
        {"state_dict": {p + key: t for p, own in states.items() for key, t in own.items()}}, tmp_path / "ema.pth"
    )
    here("taps import", "ema.pth", "--from", "state_dict", *ARGUMENTS)
    torch.testing.assert_close(taps.load(tmp_path / "results/imported")(X, task="ema"), whole(X), atol=1e-5, rtol=1e-5)


def test_position_embeddings_and_tokens_may_have_moved(here, tmp_path):
    torch.manual_seed(0)
    net = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=3, depth=2).eval()
    name = "test_vit"
    net = timm.create_model(name, img_size=64, num_classes=3).eval()
    torch.save({key: t for key, t in net.state_dict().items() if not key.startswith("head")}, tmp_path / "base.pth")
    moved = tuned(net)
    torch.save(moved.state_dict(), tmp_path / "moved.pth")
    arguments = ("--model_type", name, "--model_path", "base.pth", "--input_size", 64)
    here("taps import", "moved.pth", "--from", "state_dict", *arguments)
    model = taps.load(tmp_path / "results/imported")
    torch.testing.assert_close(model(X, task="moved"), moved(X), atol=1e-5, rtol=1e-5)


def test_lora_adapters_become_tasks(small, here, tmp_path):
    """δ = α/r · B A for linear layers and convolutions, against a network with the factors merged by hand."""
    torch.manual_seed(2)
    merged, state = copy.deepcopy(small), {}
    targets = {"layer1.0.conv1": 4, "layer3.0.conv2": 4, "layer4.0.conv1": 2}
    for name, rank in targets.items():
        layer = merged.get_submodule(name)
        down, up = torch.randn(rank, *layer.weight.shape[1:]), torch.randn(layer.out_channels, rank, 1, 1)
        state[f"base_model.model.{name}.lora_A.weight"], state[f"base_model.model.{name}.lora_B.weight"] = down, up
        alpha = 3.0 if name == "layer4.0.conv1" else 8.0
        with torch.no_grad():  # a narrow convolution and a pointwise one after it
            layer.weight += alpha / rank * F.conv2d(down.transpose(0, 1), up).transpose(0, 1)
    torch.manual_seed(3)
    nn.init.normal_(merged.fc.weight)
    state["base_model.model.fc.weight"], state["base_model.model.fc.bias"] = merged.fc.weight.data, merged.fc.bias.data
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "rank_pattern": {"layer4.0.conv1": 2},
              "alpha_pattern": {"layer4.0.conv1": 3}, "bias": "none", "modules_to_save": ["fc"]}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    done = here("taps import", "adapter", "--from", "peft", *ARGUMENTS, "--tasks", "sketch")
    assert "sketch: 4 classes, 3 of " in done.stdout
    model = taps.load(tmp_path / "results/imported/sketch")
    torch.testing.assert_close(model(X, task="sketch"), merged.eval()(X), atol=1e-3, rtol=1e-4)
    for change, message in (
        ({"use_dora": True}, "use_dora makes the adapter more than a delta"),
        ({"bias": "all"}, "bias='all' is not stored with the factors"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' changes the base's weights too"),
        ({"peft_type": "IA3"}, "adapters of type IA3 are not changes of weights; only LORA is"),
    ):
        (folder / "adapter_config.json").write_text(json.dumps({**config, **change}))
        done = here("taps import", "adapter", "--from", "peft", *ARGUMENTS, "--out", "x", check=2)
        assert message in done.stderr
        assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("base.pth", "--from", "taps"), "is not a checkpoint of TAPS: it has 0 layers with an indicator"),
        (("base.pth", "--from", "state_dict", *ARGUMENTS), "base.pth has no classifier, which a task needs"),
        (
            ("short.pth", "--from", "state_dict", *ARGUMENTS),
            "1 tensors are missing or of another shape (conv1.0.weight)",
        ),
        (("base.pth", "--from", "state_dict"), "--from state_dict needs --model_type"),
        (
            ("base.pth", "--from", "peft", *ARGUMENTS),
            "is not the folder of a PEFT adapter: it has no adapter_config.json",
        ),
        (("evil.pth", "--from", "taps"), "nothing else is unpickled"),
        (("nothing.pth", "--from", "taps"), "does not exist"),
        (("base.pth", "--from", "tapes"), "'tapes' is not one of (did you mean taps?) taps, adashare, dynashare"),
        (("base.pth",), "name files and what they are"),
        (("a", "b", "--from", "taps", "--tasks", "x"), "--tasks gives 1 names for 2 files"),
    ],
)
def test_what_cannot_be_imported_is_one_line(small, here, tmp_path, arguments, message):
    state = small.state_dict()
    del state["conv1.0.weight"]
    torch.save(state, tmp_path / "short.pth")
    torch.save({"model": nn.Linear(1, 1)}, tmp_path / "evil.pth")
    done = here("taps import", *arguments, check=2)
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "results").exists()


def test_two_files_of_one_name_have_to_be_told_apart(small, here, tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        torch.save(tuned(small).state_dict(), tmp_path / folder / "model.pth")
    files = ("a/model.pth", "b/model.pth", "--from", "state_dict", *ARGUMENTS)
    assert (
        "two tasks would have the name 'model'; name them with --tasks" in here("taps import", *files, check=2).stderr
    )
    here("taps import", *files, "--tasks", "a", "b")
    assert taps.load(tmp_path / "results/imported").tasks == ["a", "b"]


def test_a_classifier_inside_a_head_is_found(here, tmp_path):
    base = timm.create_model("test_convnext", num_classes=7).eval()
    taps_base = {key: tensor for key, tensor in base.state_dict().items() if not key.startswith("head.fc")}
    save_file(taps_base, tmp_path / "base.safetensors")
    net = tuned(base)
    torch.save(net.state_dict(), tmp_path / "ft.pth")
    here(
        "taps import", "ft.pth", "--from", "state_dict", "--model_type", "test_convnext", "--model_path",
        "base.safetensors", "--cropped",
    )  # fmt: skip
    model = taps.load(tmp_path / "results/imported")
    assert model.preprocessing_of("ft")["crop"] == "stretch"
    with torch.no_grad():
        torch.testing.assert_close(model(X, task="ft"), net(X), atol=1e-5, rtol=1e-5)


def test_a_second_network_of_another_kind_is_one_line(here, tmp_path):
    from torchvision.models import resnet18

    torch.manual_seed(0)
    net = published_taps(1, resnet18().eval(), 5)
    state = net.state_dict()
    torch.save({"state_dict": state}, tmp_path / "birds.pth")
    torch.save(
        {"state_dict": {k: t for k, t in state.items() if not k.startswith("layer4.1.bn1")}}, tmp_path / "cars.pth"
    )
    done = here("taps import", "birds.pth", "cars.pth", "--from", "taps", check=2)
    assert "cars.pth is not of resnet18: 4 tensors are missing, new or of another shape" in done.stderr
    assert not (tmp_path / "results/imported").exists()
