"""The laws on a CUDA device; reported as skipped where there is none."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from accelerate import Accelerator
from conftest import ROOT, SMALL
from torch import nn
from torch.utils.data import BatchSampler, DataLoader

import taps
from taps.data.classification.images import EpochSampler
from taps.storage.task_file import read_stored
from taps.training.loop import run_phases
from taps.training.recipe import Recipe

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]


def network(norm: str = "task") -> taps.TaskModel:
    torch.manual_seed(0)
    model = taps.adapt(taps.create_backbone("test_resnet", pretrained=False), norm=norm)
    for name in ("a", "b"):
        model.add_task(name, num_classes=4)
        for parameter in model.roles(name)["delta"].values():
            parameter.data.normal_(std=0.05)
    for unit in model.units[:3]:
        unit.gates["b"].set(False)
    return model.cuda().eval()


@pytest.mark.parametrize("norm", ["task", "follow", "frozen"])
def test_merged_mixed_and_shared_answers_agree(norm):
    model = network(norm)
    x = torch.randn(4, 3, 32, 32, device="cuda")
    with torch.no_grad():
        alone = {name: model(x, task=name) for name in ("a", "b")}
        for name, expected in alone.items():
            assert torch.allclose(model.merge(name)(x), expected, atol=1e-4)
            assert torch.allclose(model.predict(x)[name], expected, atol=1e-4)
        mixed = model(x, task=["a", "b", "a", "b"])
        assert torch.allclose(mixed[1], alone["b"][1], atol=1e-4)


@pytest.mark.parametrize("ste", ["code", "paper"])
def test_gradients_are_those_of_a_cpu(ste):
    """Deltas are added in another way there."""
    torch.manual_seed(0)
    model = taps.adapt(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten()), ste=ste)
    model.add_task("a", head=nn.Linear(512, 4))
    for unit in model.units:
        for parameter in unit.deltas["a"].parameters():
            parameter.data.normal_(std=0.05)
    x, found = torch.randn(4, 3, 12, 12), []
    for device in ("cpu", "cuda"):
        own = copy.deepcopy(model).to(device).train()
        own(x.to(device), task="a").square().sum().backward()
        found.append(
            {name: parameter.grad.cpu() for name, parameter in own.named_parameters() if parameter.requires_grad}
        )
    for name, gradient in found[0].items():
        assert torch.allclose(found[1][name], gradient, rtol=1e-2, atol=1e-3), name


class Images(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, key):
        generator = torch.Generator().manual_seed(key[0])
        return torch.randn(3, 32, 32, generator=generator), key[0] % 4


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("norm", ["task", "follow"])
def test_no_step_waits_for_the_device(norm, monkeypatch):
    """Training raises at the first synchronisation inside a step; with norm="follow" decisions are read once per step."""
    model = network(norm).train()
    sampler = EpochSampler(64, seed=0, shuffle=True)
    loader = DataLoader(Images(), batch_sampler=BatchSampler(sampler, 8, False), pin_memory=True)
    from taps.training import loop

    step = loop._Run._step

    def watched(self, window, phase):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return step(self, window, phase)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(loop._Run, "_step", watched)
    run_phases(model, "a", loader, sampler, Recipe(epochs=2, warmup_epochs=1), Accelerator(rng_types=[]))


@pytest.mark.parametrize("more", [(), ("--amp", "bf16"), ("--amp", "fp16"), ("--norm", "follow")])
def test_a_stopped_run_goes_on(tree, here, tmp_path, stop_at, more):
    line = ["train_sequential.py", "--dataset", tree / "paint", *SMALL, "--device", "cuda", "--epochs", 2, *more]
    with stop_at(3):
        here(*line, "--experiment_name", "run", check=143)
    here(*line, "--experiment_name", "run", "--resume")
    tensors = read_stored(tmp_path / "results/run/paint")[1]
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one CUDA device")
def test_two_ranks(tree, tmp_path):
    line = [sys.executable, str(ROOT / "train_sequential.py"), "--dataset", str(tree / "paint"), *SMALL, "--multi_gpu"]
    line += ["--device", "cuda", "--epochs", "1", "--experiment_name", "run"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=300, env={**os.environ})
    assert done.returncode == 0, done.stderr
    assert "2 × cuda" in done.stdout


def test_a_task_trained_on_a_gpu_is_used_on_a_cpu(tmp_path):
    model = network()
    model.save_task("a", tmp_path / "a")
    other = taps.adapt(taps.create_backbone("test_resnet", pretrained=False))
    other.load_base(model.base_state())
    other.load_task(tmp_path / "a")
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(other.eval()(x, task="a"), model(x.cuda(), task="a").cpu(), atol=1e-3)
    assert isinstance(other.heads["a"], nn.Linear)
