"""Task files and results folders of version 0.9.0 load and give the same outputs, up to the rounding of the processor."""

import json
import re
import shutil

import pytest
import torch
from conftest import ROOT
from torch import nn

import taps

OLD = ROOT / "tests" / "files" / "0.9.0"
ANSWERS = json.loads((OLD / "answers.json").read_text())


class BasicBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = None

    def forward(self, x):
        y = self.bn1(self.conv1(x)).relu()
        return (self.bn2(self.conv2(y)) + x).relu()


def network() -> nn.Module:
    """Return the network of the files, with weights from a seed."""
    layers = [nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6), nn.ReLU(), BasicBlock(6), BasicBlock(6)]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 8))
    generator = torch.Generator().manual_seed(9)
    for name, tensor in net.state_dict().items():
        if tensor.is_floating_point():
            value = torch.rand(tensor.shape, generator=generator) - 0.5
            tensor.copy_(value + 1 if "var" in name else value)
    return net


@pytest.mark.parametrize("task", ANSWERS)
def test_tasks_of_every_method_answer_as_before(task):
    stored = ANSWERS[task]
    model = taps.adapt(network(), stored["method"], norm=stored["norm"], train_base=False).eval()
    assert model.load_task(OLD / "tasks" / task) == task
    x = (torch.arange(2 * 3 * 12 * 12, dtype=torch.float32).reshape(2, 3, 12, 12) * 0.37).sin()
    with torch.no_grad():
        output = torch.tensor([float.fromhex(value) for value in stored["output"]])
        torch.testing.assert_close(model(x, task).flatten(), output, rtol=1e-5, atol=1e-6)
        if stored["method"] != "dynashare":
            torch.testing.assert_close(model.merge(task)(x), model(x, task))
    assert sum(row["specific"] > 0 for row in model.report(task)) == stored["tuned"]


def test_a_results_folder_is_tested_and_verified(tree, here, tmp_path):
    shutil.copytree(OLD / "run", tmp_path / "run")
    verified = here("evaluate.py", tmp_path / "run", "--verify").stdout
    for task, line in zip(("ink-2", "paint"), verified.splitlines()[1:], strict=True):
        assert re.match(f"{task}: answers (bit for bit )?as after its training", line), line
    table = here("evaluate.py", tmp_path / "run", "--dataset", tree, "--device", "cpu").stdout
    assert ["mean", "100.00", "63.3"] in [line.split() for line in table.splitlines()]
