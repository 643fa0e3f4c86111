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

from importlib import import_module

from taps.backbones import create_backbone
from taps.errors import UserError
from taps.gates import ConstantGate, Decision, Gate, State, ThresholdGate
from taps.methods import METHODS, Method, Phase
from taps.model import TaskModel, adapt

#: names whose modules need time to import, and are imported when they are first used
_LATER = {
    "Policy": "policy",
    "PolicyTrainer": "trainer",
    "Reuse": "reuse",
    "VideoReuse": "video",
    "fix_support": "support",
}


def __getattr__(name: str):
    if name in _LATER:
        return getattr(import_module(f"taps.{_LATER[name]}"), name)
    raise AttributeError(f"module 'taps' has no attribute {name!r}")


__version__ = "0.9.0"
__all__ = [
    "METHODS",
    "ConstantGate",
    "Decision",
    "Gate",
    "Method",
    "Phase",
    "Policy",
    "PolicyTrainer",
    "Reuse",
    "State",
    "TaskModel",
    "ThresholdGate",
    "UserError",
    "VideoReuse",
    "adapt",
    "create_backbone",
    "fix_support",
]
