"""TAPS: one pretrained network, many tasks, each with small deltas where learned gates say they are needed.

>>> import taps, torch
>>> net = taps.create_backbone("resnet18", pretrained=False)
>>> model = taps.adapt(net, method="taps")
>>> model.add_task("sketch", num_classes=345)
>>> model(torch.zeros(1, 3, 64, 64), task="sketch").shape
torch.Size([1, 345])
>>> len(model.report("sketch"))
20
"""

from taps.backbones import create_backbone
from taps.errors import UserError
from taps.gates import ConstantGate, Decision, Gate, State, ThresholdGate
from taps.methods import METHODS, Method, Phase
from taps.model import TaskModel, adapt

__version__ = "0.5.0"
__all__ = [
    "METHODS",
    "ConstantGate",
    "Decision",
    "Gate",
    "Method",
    "Phase",
    "State",
    "TaskModel",
    "ThresholdGate",
    "UserError",
    "adapt",
    "create_backbone",
]
