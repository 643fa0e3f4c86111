"""The pages: every Python block runs, options are those that exist, and the site is built without a broken link."""

import importlib.util
import os
import re
import runpy
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from PIL import Image
from test_front_door import network
from test_trainer import Stripes, accuracy, backbone
from torch.utils.data import DataLoader

import taps
from taps.methods import registry

PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))]
WITH_CODE = [page for page in PAGES if "```python" in (ROOT / page).read_text()]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with what the pages use: photographs of fruit, and two tasks in ``results/demo``."""
    folder = tmp_path_factory.mktemp("pages")
    for number, name in enumerate(("apple", "lime", "plum")):
        (folder / "fruit" / name).mkdir(parents=True)
        for index in range(6):
            pixels = torch.randint(0, 120, (40, 50, 3), dtype=torch.uint8)
            pixels[..., number] += 100
            Image.fromarray(pixels.numpy()).save(folder / "fruit" / name / f"{index}.jpg")
    Image.new("RGB", (90, 70), (200, 40, 40)).save(folder / "photo.jpg")
    model = taps.adapt("tf_efficientnet_lite0", norm="follow")
    for task, classes in (("digits", list("0123456789")), ("photo_filter", ["sharp", "blurred"])):
        model.add_task(task, num_classes=len(classes))
        prepare = model.default_preprocessing(64).describe()
        model.describe_task(task, classes=classes, preprocessing=prepare)
        model.save_task(task, folder / "results/demo" / task)
    return folder


def context(page: str) -> dict:
    """Return what a page's blocks take for granted."""
    if page != "docs/multi_task.md":
        return {}
    names = ("way", "colour")
    losses = dict.fromkeys(names, torch.nn.functional.cross_entropy)
    model = taps.adapt(network(), "sparse_delta")
    for task in ("semseg", "depth"):
        model.add_task(task, num_classes=2)
    model.follow({"semseg": [1.0] * len(model.units)})  # the base task has no weights of its own
    for norm in model.task_norms:
        norm.remove_task("semseg")
    images = torch.rand(2, 3, 32, 32)
    return {
        "taps": taps,
        "backbone": backbone(),
        "heads": {"way": torch.nn.Linear(24, 2), "colour": torch.nn.Linear(24, 3)},
        "loaders": {split: DataLoader(Stripes(size), 8) for split, size in (("train", 32), ("val", 16))},
        "losses": losses,
        "metrics": dict.fromkeys(names, accuracy),
        "model": model.eval(),
        "images": images,
        "x": images,
        "frame": images,
    }


@pytest.mark.parametrize("page", WITH_CODE)
@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers", "ignore:.*LeafSpec")
@pytest.mark.filterwarnings("ignore:the policy is nearly uniform")
def test_every_block_runs(page, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    methods = dict(registry.METHODS)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.S)
    namespace = {"__name__": page, **context(page)}
    try:
        for block in blocks:
            block = re.sub(r"iterations=\d+", "iterations=20", block)
            exec(compile(block, page, "exec"), namespace)
    finally:
        for name in registry.METHODS.keys() - methods:
            del registry.METHODS[name]


def site():
    spec = importlib.util.spec_from_file_location("site_pages", ROOT / "docs/site.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.stem)
def test_a_benchmark_finds_what_it_imports(path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    assert callable(runpy.run_path(str(path), run_name="imported").get("main", print))


def test_a_rival_in_the_comparison_learns_masks_norms_and_heads_alone(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from rivals import Row, rival

    net = taps.create_backbone("test_resnet", pretrained=False)
    layers = sum(module.weight.numel() for module in net.modules() if isinstance(module, torch.nn.Conv2d))
    model, size = rival(Row("mask", "1 bit"), net, ["task"], None, None, 0)
    assert size == layers // 8
    model.add_task("task", num_classes=3)
    model(torch.randn(2, 3, 32, 32), "task").sum().backward()
    learned = [own for own in model.backbone.parameters() if own.requires_grad]
    assert all(own.grad is not None for own in learned)
    assert sum(own.numel() for own in learned if own.dim() > 1) == layers


def test_the_page_of_options_is_made_from_their_declarations():
    page = (ROOT / "docs/options.md").read_text()
    assert page == site().options_page(), "run python docs/site.py"


def test_the_site_is_built_without_a_broken_link(tmp_path):
    pytest.importorskip("mkdocs")
    line = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(tmp_path / "site")]
    done = subprocess.run(
        line, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    )
    assert done.returncode == 0, done.stderr
    reference = (tmp_path / "site/api.html").read_text()
    for name in taps._HOMES:
        assert f"<code>taps.{name}</code></h2>" in reference or f"<code>taps.{name}</code>" in reference, name
    assert "Train one task of a model on batches" in reference
