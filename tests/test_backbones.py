"""Backbones: names, local weights with timm's and torchvision's names, embedded weights and preprocessing."""

import subprocess
import sys

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file

import taps
from taps.networks.preprocessing import Preprocessing, of_network
from taps.networks.weights import load_weights


def test_embedded_network_sees_what_is_on_the_photographs():
    from PIL import Image
    from sklearn.datasets import load_sample_images

    net = taps.create_backbone("tf_efficientnet_lite0", pretrained=True)
    prepare = Preprocessing(224, 256, **of_network(net)).transform(train=False)
    file = taps.networks.backbones._embedded_weights()
    full = timm.create_model("tf_efficientnet_lite0").eval()
    full.load_state_dict(dict(zip(full.state_dict(), torch.load(file, weights_only=True).values(), strict=True)))
    images = torch.stack([prepare(Image.fromarray(photo)) for photo in load_sample_images().images])
    with torch.no_grad():
        features = net.eval()(images)
        best = full.classifier(features).argmax(1).tolist()
        assert torch.equal(full(images), full.classifier(features))
    labels = timm.data.ImageNetInfo()
    assert labels.index_to_description(best[0]).split(",")[0] in ("palace", "bell cote")
    assert labels.index_to_description(best[1]).split(",")[0] in ("daisy", "bee")


def test_unknown_backbone_offers_the_nearest_names():
    with pytest.raises(ValueError, match=r"unknown backbone 'resnet35'; did you mean .*'resnet34'"):
        taps.create_backbone("resnet35", pretrained=False)


def test_offline_error_names_the_ways_out(tmp_path):
    """Runs in a separate process, with an empty cache and an unreachable hub."""
    code = (
        "import taps\ntry: taps.create_backbone('resnet18', pretrained=True)\nexcept ValueError as error: print(error)"
    )
    environment = {
        "HF_HOME": str(tmp_path),
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "PATH": "",
        "TORCH_HOME": str(tmp_path),
    }
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=100)
    assert "'resnet18' are neither cached nor can they be downloaded" in done.stdout, done.stderr
    assert "--model_path" in done.stdout
    assert "--no-pretrained" in done.stdout
    assert "Retry" not in done.stderr


def write(path, state):
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    else:
        torch.save(state, path)
    return path


@pytest.mark.parametrize(
    ("ours", "theirs", "options", "size"),
    [
        ("resnet18", torchvision.models.resnet18, {}, 64),
        ("densenet121", torchvision.models.densenet121, {}, 64),
        ("vit_base_patch16_224", torchvision.models.vit_b_16, {}, 224),
        ("mobilenetv2_100", torchvision.models.mobilenet_v2, {}, 64),
    ],
)
def test_torchvision_weights_give_torchvision_features(tmp_path, ours, theirs, options, size):
    source = theirs().eval()
    for module in source.modules():  # default statistics would hide a mistake
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    path = write(tmp_path / "weights.pth", source.state_dict())
    net = taps.create_backbone(ours, path=path, **options).eval()
    for name in ("fc", "classifier", "heads"):
        if hasattr(source, name):
            setattr(source, name, torch.nn.Identity())
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        torch.testing.assert_close(net(x), source(x), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_timm_weights_with_and_without_classifier(tmp_path, suffix, wrapped):
    for classes in (0, 10):
        state = timm.create_model("resnet18", num_classes=classes).state_dict()
        if wrapped and suffix == ".pth":
            path = tmp_path / f"{classes}.pth"
            torch.save({"epoch": 3, "state_dict": {f"module.{name}": value for name, value in state.items()}}, path)
        else:
            path = write(tmp_path / f"{classes}{suffix}", state)
        net = taps.create_backbone("resnet18", path=path)
        assert torch.equal(net.layer4[1].conv2.weight, state["layer4.1.conv2.weight"])


def test_wrong_weights_are_refused_with_every_key(tmp_path):
    state = timm.create_model("resnet18", num_classes=0).state_dict()
    del state["conv1.weight"], state["layer1.0.bn1.bias"]
    state["surprise.weight"] = torch.zeros(3)
    state["layer2.0.conv1.weight"] = torch.zeros(1, 2, 3, 3)
    net = timm.create_model("resnet18", num_classes=0)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(ValueError) as caught:
        load_weights(net, write(tmp_path / "w.pth", state))
    message = str(caught.value)
    assert "missing (2): conv1.weight, layer1.0.bn1.bias" in message
    assert "unexpected (1): surprise.weight" in message
    assert "of another shape (1): layer2.0.conv1.weight (1, 2, 3, 3) instead of (128, 64, 3, 3)" in message
    assert "\n" not in message
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    with pytest.raises(ValueError, match=r"missing \(80\)"):
        load_weights(timm.create_model("resnet34", num_classes=0), write(tmp_path / "v.pth", before))


def test_what_is_not_plain_tensors_is_not_unpickled(tmp_path):
    class Surprise:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"weight": Surprise()}, tmp_path / "evil.pth")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "text.safetensors").write_text("hello")
    for name, message in (
        ("evil.pth", "nothing else is unpickled"),
        ("empty.pth", "does not hold a state dict"),
        ("text.pth", "not a file of plain tensors"),
        ("text.safetensors", "not a complete safetensors file"),
        ("nothing.pth", "does not exist"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            taps.create_backbone("resnet18", path=tmp_path / name)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()
