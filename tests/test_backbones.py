"""Backbones: names, embedded weights and preprocessing; other weights are in ``test_weights.py``."""

import subprocess
import sys

import pytest
import timm
import torch

import taps
from taps.networks.preprocessing import Preprocessing, of_network


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


def test_damaged_metadata_say_nothing_about_the_pixels(tmp_path):
    from PIL import Image

    from taps.networks.preprocessing import ToRGB

    Image.new("RGB", (4, 5), (9, 8, 7)).save(tmp_path / "bad.png", exif=b"Exif\0\0garbagegarbage")
    with Image.open(tmp_path / "bad.png") as image:
        assert ToRGB()(image).getpixel((0, 0)) == (9, 8, 7)
