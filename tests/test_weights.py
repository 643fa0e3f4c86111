"""Weights as training programs write them: wrappers, prefixes, other libraries' names, other image sizes, addresses."""

import argparse
import functools
import http.server
import json
import threading
import warnings
from pathlib import Path

import hub as stand_in
import pytest
import timm
import torch
import torchvision
from cases import origin_of
from hypothesis import given, settings
from hypothesis import strategies as some
from safetensors.torch import save, save_file

import taps
from taps.networks.classifier import drop_last_layer
from taps.networks.origin import rebuild
from taps.networks.weights import load_weights
from taps.storage.state_dict import read_state_dict

SMALL = "test_resnet"


def small(classes: int = 0):
    torch.manual_seed(0)
    net = timm.create_model(SMALL, num_classes=classes).eval()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    return net


def load(net, path, name=SMALL, **options):
    """A backbone with a file's weights, and what was said."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        loaded = taps.create_backbone(name, path=path, **options).eval()
    return loaded, " ".join(str(warning.message) for warning in said)


def same(one, other, shape=(2, 3, 64, 64), tolerance=0.0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        a, b = one(x), other(x)
    return float((a - b).abs().max()) <= tolerance * float(b.abs().max())


WRAPPERS = {
    "flat": lambda state: state,
    "timm": lambda state: {"epoch": 3, "arch": SMALL, "state_dict": state, "args": argparse.Namespace(lr=0.1, names=["a"])},
    "timm with an average": lambda state: {"state_dict": garbled(state), "state_dict_ema": state, "optimizer": {"state": {}}},
    "deit": lambda state: {"model": garbled(state), "model_ema": state, "args": argparse.Namespace(batch=3)},
    "mae": lambda state: {"model": state, "scaler": {"scale": 65536.0}},
    "lightning": lambda state: {"state_dict": state, "pytorch-lightning_version": "2.4", "callbacks": {}},
    "tutorial": lambda state: {"epoch": 1, "model_state_dict": state, "loss": torch.tensor(0.3)},
    "cifar": lambda state: {"net": state, "acc": 93.2},
    "nested": lambda state: {"checkpoint": {"model": state}},
}  # fmt: skip
PREFIXES = (
    "", "module.", "model.", "model.module.", "module.model.", "_orig_mod.", "backbone.", "encoder.", "module.encoder_q.",
    "student.backbone.", "net.features.x.",
)  # fmt: skip


def garbled(state):
    return {name: torch.zeros_like(tensor) for name, tensor in state.items()}


@functools.cache
def given_state(classes):
    return small(classes).state_dict()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    some.sampled_from(sorted(WRAPPERS)),
    some.sampled_from(PREFIXES),
    some.sampled_from((0, 7, 1000)),
    some.sampled_from((torch.float32, torch.float64, torch.float16, torch.bfloat16)),
    some.booleans(),
)
def test_whatever_is_wrapped_around_a_state_dict(tmp_path_factory, wrapper, prefix, classes, dtype, beside):
    state = {name: t.to(dtype) if t.is_floating_point() else t for name, t in given_state(classes).items()}
    stored = {prefix + name: tensor for name, tensor in state.items()}
    if beside and prefix:
        stored["criterion.weight"] = torch.ones(3)
    path = tmp_path_factory.getbasetemp() / "wrapped.pth"
    torch.save(WRAPPERS[wrapper](stored), path)
    net, said = load(SMALL, path)
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, state[name].to(tensor.dtype)), name
    assert ("classifier" in said) == (classes > 0)
    assert classes == 0 or f"({classes} classes) is left out" in said


def test_the_query_encoder_of_two_is_meant_and_unknown_pairs_are_refused(tmp_path):
    state = small().state_dict()
    other = garbled(state)
    for one, two in (("module.encoder_q.", "module.encoder_k."), ("teacher.", "student.")):
        torch.save(
            {**{two + n: t for n, t in other.items()}, **{one + n: t for n, t in state.items()}}, tmp_path / "w.pth"
        )
        assert same(load(SMALL, tmp_path / "w.pth")[0], small())
    torch.save(
        {**{f"a.{n}": t for n, t in other.items()}, **{f"b.{n}": t for n, t in state.items()}}, tmp_path / "w.pth"
    )
    with pytest.raises(ValueError, match=r"w.pth holds several networks \(a., b.\); save the one that is meant alone"):
        load(SMALL, tmp_path / "w.pth")


FAMILIES = {
    "resnet18": "resnet18",
    "densenet121": "densenet121",
    "vgg11": "vgg11",
    "inception_v3": "inception_v3",
    "mobilenetv2_100": "mobilenet_v2",
    "mobilenetv3_small_100": "mobilenet_v3_small",
    "mnasnet_050": "mnasnet0_5",
    "efficientnet_b0": "efficientnet_b0",
    "efficientnetv2_s": "efficientnet_v2_s",
    "regnety_004": "regnet_y_400mf",
    "regnetx_004_tv": "regnet_x_400mf",
    "convnext_tiny": "convnext_tiny",
    "swin_tiny_patch4_window7_224": "swin_t",
    "swinv2_tiny_window8_256": "swin_v2_t",
    "vit_base_patch32_224": "vit_b_32",
}


def of_torchvision(name, size=32):
    """A network of torchvision's with random weights, and statistics that let a signal through."""
    torch.manual_seed(0)
    options = {"init_weights": False} if name == "inception_v3" else {}
    net = torchvision.models.get_model(name, weights=None, **options)
    norms = [module for module in net.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    if norms:
        with torch.no_grad():
            net.train()(torch.randn(2, 3, size, size))
    return net.eval()


@pytest.mark.slow
@pytest.mark.parametrize("ours", FAMILIES)
def test_torchvision_weights_give_torchvision_features(tmp_path, ours):
    size = timm.get_pretrained_cfg(ours).input_size
    source = of_torchvision(FAMILIES[ours], size[-1])
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    net, said = load(ours, tmp_path / "weights.pth", ours)
    assert "classifier" in said
    assert "names" not in said
    drop_last_layer(source)
    assert same(net, source, (1, *size), 1e-5)


@pytest.mark.parametrize(("ours", "theirs"), [("mobilenetv3_small_100", "mobilenet_v3_small")])
def test_converted_weights_fit_timm_s_network_as_it_is(tmp_path, ours, theirs):
    """The other epsilon of torchvision's norms is in the running variances, not in the network."""
    source = of_torchvision(theirs, 224)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    net, _ = load(ours, tmp_path / "w.pth", ours)
    model = taps.adapt(net).eval()
    model.add_task("a", num_classes=4)
    plain = timm.create_model(ours, num_classes=4).eval()
    plain.load_state_dict(model.merge("a").state_dict())
    assert same(plain, model.merge("a"), (1, 3, 224, 224))
    drop_last_layer(source)
    plain.reset_classifier(0)
    assert same(plain, source, (1, 3, 224, 224), 1e-5)


def test_what_a_checkpoint_says_it_holds_is_compared(tmp_path):
    state = timm.create_model("tf_efficientnet_b0", num_classes=0).state_dict()
    torch.save({"arch": "efficientnet_b0", "state_dict": state}, tmp_path / "w.pth")
    with pytest.raises(
        ValueError, match=r"w.pth says it holds efficientnet_b0, which pads its images otherwise than tf_effi"
    ):
        load("tf_efficientnet_b0", tmp_path / "w.pth", "tf_efficientnet_b0")
    torch.save(state, tmp_path / "w.pth")
    said = load("tf_efficientnet_b0", tmp_path / "w.pth", "tf_efficientnet_b0")[1]
    assert (
        "tf_efficientnet_b0 and efficientnet_b0 have the same tensors but pad images otherwise, and it does not say"
        in said
    )
    torch.save({"arch": "tf_efficientnet_b0", "state_dict": state}, tmp_path / "w.pth")
    assert not load("tf_efficientnet_b0", tmp_path / "w.pth", "tf_efficientnet_b0")[1]
    torch.save({"arch": "resnet50", "state_dict": small().state_dict()}, tmp_path / "w.pth")
    assert "it says it holds resnet50, and is taken for test_resnet" in load(SMALL, tmp_path / "w.pth")[1]
    torch.save({"model_ema": small().state_dict(), "model": garbled(small().state_dict())}, tmp_path / "w.pth")
    assert "w.pth: of model_ema, model, model_ema is taken" in load(SMALL, tmp_path / "w.pth")[1]
    broken = small().state_dict()
    broken["conv1.0.weight"][0, 0, 0, 0] = torch.nan
    torch.save(broken, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"holds values that are not finite in 1 tensors, e.g. conv1.0.weight"):
        load(SMALL, tmp_path / "w.pth")


@pytest.mark.parametrize(
    ("ours", "theirs", "message"),
    [
        (
            "tf_efficientnet_b0",
            "efficientnet_b0",
            r"computes something else: its outputs differ by .*; use efficientnet_b0$",
        ),
        ("tf_mobilenetv3_small_100", "mobilenet_v3_small", "use mobilenetv3_small_100$"),
        ("regnetx_004", "regnet_x_400mf", "not built like regnetx_004; use regnetx_004_tv$"),
        ("resnet34", "resnet18", r"w.pth does not fit resnet34: 80 missing \(layer1.2.conv1.weight"),
        ("efficientnet_b1", "efficientnet_b0", "w.pth does not fit efficientnet_b1: "),
    ],
)
def test_weights_that_fit_networks_that_compute_something_else_are_refused(tmp_path, ours, theirs, message):
    torch.save(of_torchvision(theirs).state_dict(), tmp_path / "w.pth")
    with pytest.raises(ValueError, match=message) as caught:
        load(ours, tmp_path / "w.pth", ours)
    assert len(str(caught.value)) <= 300


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224", {"img_size": 96}),
        ("vit_tiny_patch16_224", {"img_size": 64, "patch_size": 8}),
        ("swin_tiny_patch4_window7_224", {"img_size": 96}),
        ("swin_tiny_patch4_window7_224", {"img_size": 128, "window_size": 4}),
    ],
)
def test_another_image_size_is_resampled_as_timm_does(tmp_path, name, options):
    torch.manual_seed(0)
    source = timm.create_model(name)
    save_file({n: t.contiguous() for n, t in source.state_dict().items()}, tmp_path / "w.safetensors")
    net, _ = load(name, tmp_path / "w.safetensors", name, **options)
    warnings.simplefilter("ignore")
    theirs = timm.create_model(  # timm's own way for downloaded weights
        name, pretrained=True, pretrained_cfg_overlay={"file": str(tmp_path / "w.safetensors"), "num_classes": 1000},
        num_classes=0, **options,
    )  # fmt: skip
    for key, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, net.state_dict()[key]), key


def test_names_that_nobody_knows_are_taken_in_order_and_that_is_said(tmp_path):
    state = {f"block{i}.{name.rsplit('.', 1)[-1]}": t for i, (name, t) in enumerate(small().state_dict().items())}
    torch.save(state, tmp_path / "w.pth")
    net, said = load(SMALL, tmp_path / "w.pth")
    assert same(net, small())
    assert said.startswith(
        "w.pth: its names (block0.weight, block1.weight, …) are unknown, so its tensors are taken in their order"
    )


def test_what_does_not_fit_is_said_in_one_line_with_a_file_of_all_names(tmp_path):
    state = timm.create_model("resnet18", num_classes=0).state_dict()
    del state["conv1.weight"], state["layer1.0.bn1.bias"]
    state["surprise.weight"] = torch.zeros(3)
    state["layer2.0.conv1.weight"] = torch.zeros(1, 2, 3, 3)
    torch.save(state, tmp_path / "w.pth")
    net = timm.create_model("resnet18", num_classes=0)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(ValueError, match=r"^w.pth does not fit resnet18: 2 missing") as caught:
        load_weights(net, tmp_path / "w.pth")
    message = str(caught.value)
    assert "2 missing (conv1.weight, layer1.0.bn1.bias)" in message
    assert "1 unexpected (surprise.weight)" in message
    assert "\n" not in message
    assert len(message) <= 300
    listed = Path(message.rsplit(" ", 1)[1]).read_text()
    assert "missing (2):\n  conv1.weight\n  layer1.0.bn1.bias\nunexpected (1):\n  surprise.weight\n" in listed
    assert "of another shape (1):\n  layer2.0.conv1.weight (1, 2, 3, 3) instead of (128, 64, 3, 3)" in listed
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_what_is_not_plain_tensors_is_not_unpickled(tmp_path):
    class Surprise:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"weight": Surprise()}, tmp_path / "evil.pth")
    torch.save(
        {"state_dict": {"weight": torch.ones(1)}, "args": argparse.Namespace(x=Surprise())}, tmp_path / "args.pth"
    )
    torch.save({"model": torch.nn.Linear(1, 1)}, tmp_path / "module.pth")
    torch.save({"epoch": 3, "optimizer": {"lr": 0.1}}, tmp_path / "empty.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "zero.pth").write_bytes(b"")
    (tmp_path / "text.safetensors").write_text("hello")
    for name, message in (
        ("evil.pth", "nothing else is unpickled"),
        ("args.pth", "nothing else is unpickled"),
        ("module.pth", "nothing else is unpickled"),
        ("empty.pth", r"does not hold a state dict \(names with tensors\), but the keys epoch, optimizer$"),
        ("list.pth", "but a list$"),
        ("text.pth", "not a file of plain tensors"),
        ("zero.pth", "not a file of plain tensors"),
        ("text.safetensors", "not a complete safetensors file"),
        ("nothing.pth", "does not exist"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            taps.create_backbone(SMALL, path=tmp_path / name)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


@settings(max_examples=1000, deadline=None, derandomize=True)
@given(some.data())
def test_a_damaged_file_of_weights_is_refused_or_reads_as_it_was_written(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp()
    suffix = data.draw(some.sampled_from((".pth", ".safetensors")))
    state = {"a.weight": torch.arange(12.0).reshape(3, 4), "a.bias": torch.ones(3), "n": torch.tensor(3)}
    path = folder / f"damaged{suffix}"
    if suffix == ".pth":
        torch.save({"state_dict": state, "args": argparse.Namespace(a=1)}, path)
    else:
        save_file(state, path)
    whole = path.read_bytes()
    if data.draw(some.booleans()):
        path.write_bytes(whole[: data.draw(some.integers(0, len(whole) - 1))])
    else:
        at = data.draw(some.integers(0, len(whole) - 1))
        path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << data.draw(some.integers(0, 7)))]) + whole[at + 1 :])
    try:
        read = read_state_dict(path)
    except taps.UserError as error:
        read = {}
        assert "\n" not in str(error)  # noqa: PT017 (some mutations are harmless)
    assert all(isinstance(tensor, torch.Tensor) for tensor in read.values())


@pytest.fixture
def hub(monkeypatch, tmp_path):
    from huggingface_hub import constants

    with stand_in.serving() as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        template = served.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield served


def test_networks_and_files_on_the_hub(hub, tmp_path):
    source = small(10)
    config = {
        "architecture": SMALL,
        "num_classes": 10,
        "pretrained_cfg": {"tag": "mine", "classifier": "fc", "first_conv": "conv1.0"},
    }
    weights = save({name: tensor.contiguous() for name, tensor in source.state_dict().items()})
    hub.files["me/net"] = {"config.json": json.dumps(config).encode(), "model.safetensors": weights}
    source.reset_classifier(0)
    net = taps.create_backbone("hf-hub:me/net").eval()
    assert same(net, source)
    assert origin_of(net)["model"] == "hf-hub:me/net"
    again = rebuild(origin_of(net)).eval()
    assert same(again, source)
    net, said = load(SMALL, "hf-hub:me/net/model.safetensors")
    assert same(net, source)
    assert "fc (10 classes) is left out" in said
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert same(rebuild(origin_of(net)).eval(), source)
    with pytest.raises(ValueError, match=r"hf-hub:me/net/nothing\.pth is neither cached nor can it be downloaded"):
        load(SMALL, "hf-hub:me/net/nothing.pth")
    with pytest.raises(ValueError, match="'hf-hub:me/net' is not hf-hub:user/repository/file"):
        load(SMALL, "hf-hub:me/net")
    with pytest.raises(ValueError, match="'hf-hub:me/other' are neither cached nor can they be downloaded"):
        taps.create_backbone("hf-hub:me/other")


def test_a_tag_names_the_weights_of_a_published_comparison(hub):
    torch.manual_seed(1)
    source = timm.create_model("resnet34")
    hub.files["timm/resnet34.tv_in1k"] = {"model.safetensors": save(dict(source.state_dict()))}
    net = taps.create_backbone("resnet34.tv_in1k")
    source.reset_classifier(0)
    assert same(net.eval(), source.eval())
    assert origin_of(net)["model"] == "resnet34.tv_in1k"


def test_a_file_on_the_web(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "cache"))
    (tmp_path / "web" / "a").mkdir(parents=True)
    (tmp_path / "web" / "b").mkdir()
    torch.save(small().state_dict(), tmp_path / "web" / "a" / "w.pth")
    torch.save(garbled(small().state_dict()), tmp_path / "web" / "b" / "w.pth")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path / "web"))
    handler.log_message = lambda *args: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        at = f"http://127.0.0.1:{server.server_port}"
        assert same(load(SMALL, f"{at}/a/w.pth")[0], small())
        assert (
            not load(SMALL, f"{at}/b/w.pth")[0].state_dict()["conv1.0.weight"].any()
        )  # the same name elsewhere is another file
        with pytest.raises(ValueError, match=r"/c/w.pth cannot be downloaded: .*404"):
            load(SMALL, f"{at}/c/w.pth")
        server.shutdown()
    assert same(load(SMALL, f"{at}/a/w.pth")[0], small())  # from the cache
