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
from typing import TYPE_CHECKING

from taps.version import VERSION

if TYPE_CHECKING:  # what a type checker and an editor see; at run time a name is imported when it is first used
    from taps.core.execution import State
    from taps.core.gate import ConstantGate, Decision, Gate
    from taps.core.method import Method, Phase
    from taps.errors import UserError
    from taps.methods.policy import Policy
    from taps.methods.registry import METHODS
    from taps.methods.sparse_delta import fix_support
    from taps.methods.taps import ThresholdGate
    from taps.networks.backbones import create_backbone
    from taps.reuse.from_base import Reuse
    from taps.reuse.video import VideoReuse
    from taps.task_model import TaskModel, adapt, load
    from taps.training.fitting import Record, fit
    from taps.training.policy_trainer import PolicyTrainer

_HOMES = {
    "METHODS": "methods.registry",
    "ConstantGate": "core.gate",
    "Decision": "core.gate",
    "Gate": "core.gate",
    "Method": "core.method",
    "Phase": "core.method",
    "Policy": "methods.policy",
    "PolicyTrainer": "training.policy_trainer",
    "Record": "training.fitting",
    "Reuse": "reuse.from_base",
    "State": "core.execution",
    "TaskModel": "task_model",
    "ThresholdGate": "methods.taps",
    "UserError": "errors",
    "VideoReuse": "reuse.video",
    "adapt": "task_model",
    "create_backbone": "networks.backbones",
    "fit": "training.fitting",
    "fix_support": "methods.sparse_delta",
    "load": "task_model",
}


__version__ = VERSION


def __getattr__(name: str):
    if name in _HOMES:
        value = globals()[name] = getattr(import_module(f"taps.{_HOMES[name]}"), name)
        return value
    raise AttributeError(f"module 'taps' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})


__all__ = [
    "METHODS",
    "ConstantGate",
    "Decision",
    "Gate",
    "Method",
    "Phase",
    "Policy",
    "PolicyTrainer",
    "Record",
    "Reuse",
    "State",
    "TaskModel",
    "ThresholdGate",
    "UserError",
    "VideoReuse",
    "__version__",
    "adapt",
    "create_backbone",
    "fit",
    "fix_support",
    "load",
]
