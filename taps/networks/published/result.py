"""What a published checkpoint holds, and what its readers have in common."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from taps.errors import UserError
from taps.networks.heads import ASPP
from taps.storage.state_dict import does_not_fit, listed, without_counters

State = dict[str, Tensor]
#: mean of the pixels 0..255 in RGB that the programs subtract; they do not divide by a standard deviation
CAFFE = {"mean": tuple(value / 255 for value in (122.67891434, 116.66876762, 104.00698793)), "std": (1 / 255,) * 3}
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
_RATES = (6, 12, 18, 24)


@dataclass
class PublishedTask:
    """What one task adds to a published network.

    Attributes:
        head: the head with its weights.
        deltas: W' − W by the parameter's name.
        norms: tensors of the task's own norms by name.
        policy: (run, specific) of each unit; ``None`` for methods without policies.
        gates: tensors of the gates that choose for each image, by unit and name.
    """

    head: nn.Module
    deltas: State = field(default_factory=dict)
    norms: State = field(default_factory=dict)
    policy: list[tuple[float, float]] | None = None
    gates: dict[str, State] = field(default_factory=dict)


@dataclass
class Published:
    """A published network in this library's terms.

    Attributes:
        net: the base with its weights.
        method, norm, options: arguments of :func:`taps.adapt`.
        tasks: the tasks by name.
        pixels: ``mean`` and ``std`` of RGB in 0..1 with which images are normalised.
    """

    net: nn.Module
    method: str
    norm: str
    tasks: dict[str, PublishedTask]
    options: dict[str, object] = field(default_factory=dict)
    pixels: Mapping[str, tuple[float, ...]] = field(default_factory=lambda: CAFFE)


def check_known(names: Iterable[str], pattern: str, path: Path) -> None:
    """Raise a ``UserError`` if tensors have other names than ``pattern`` allows."""
    unknown = [name for name in names if not re.match(pattern, name)]
    if unknown:
        raise UserError(f"{path}: {len(unknown)} tensors are unknown ({listed(unknown)})")


def load(net: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Load a network's tensors, all of which have to be there, and no others.

    Raises:
        UserError: in one line, with a file that lists all names.
    """
    wanted = net.state_dict()
    lacking = [key for key in without_counters(wanted) if key not in tensors]
    wrong = [key for key, value in tensors.items() if key not in wanted or wanted[key].shape != value.shape]
    if lacking or wrong:
        raise does_not_fit(path, type(net).__name__, {"missing": lacking, "unexpected or of another shape": wrong})
    net.load_state_dict(tensors, strict=False)


def aspp(state: State, branches: Mapping[str, str], path: Path) -> ASPP:
    """Return the head whose branches have these prefixes."""
    own = {}
    for theirs, ours in branches.items():
        for layer, place in (("conv1", 0), ("conv2", 3), ("conv3", 6)):
            for kind in ("weight", "bias"):
                own[f"{ours}{place}.{kind}"] = needed(state, f"{theirs}{layer}.{kind}", path)
    first, last = own["branches.0.0.weight"], own["branches.0.6.weight"]
    head = ASPP(first.shape[1], len(last), len(first), _RATES)
    try:
        head.load_state_dict(own)
    except RuntimeError as error:
        raise UserError(
            f"{path}: a head has tensors of other shapes ({str(error).splitlines()[-1].strip()[:120]})"
        ) from None
    return head


def part(state: Mapping[str, Tensor], prefix: str, ours: str) -> State:
    """Return the tensors below a prefix, below another one."""
    return {ours + key[len(prefix) :]: tensor for key, tensor in state.items() if key.startswith(prefix)}


def needed(state: Mapping[str, Tensor], key: str, path: Path) -> Tensor:
    """Return a tensor that has to be there."""
    if key not in state:
        raise UserError(f"{path}: {key} is missing")
    return state[key]
