"""A task's norms, gates and head as its file holds them.

Norms and gates are stored in columns: for each name (``weight``, ``score``, …) one tensor with the values of all norms or gates, in
network order. In a compact file batch norms have the base's running statistics, their own being folded into weight and bias,
which gives the same outputs in evaluation mode; norms and head are float16 or, for a budget, encoded:

- weights and biases of norms as multiples of a step, their differences to the base's in units of the channel's weight;
- the head's matrices in multiples of one step, as deltas are.

A model remembers the encodings of a task's norms and head (``model.encoded``), so that what a file holds is stored again as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from taps.core.delta import Encoded
from taps.core.network import Network
from taps.core.norm import TaskNorm, norm_tensors
from taps.core.unit import GatedUnit
from taps.errors import UserError
from taps.storage.encoding import EncodedDelta, code_steps, encode_as
from taps.storage.range_code import LARGEST

#: the encoded columns of norms
_COLUMNS = ("weight", "bias")
#: median of weights below which a norm is taken for one that starts at zero, as the last of a residual block may
_SMALL = 1e-3
#: relative error of an encoded head for each unit of the norms' step, up to an error from which the loss rises; beyond it, where
#: bytes are too few for more, for each unit of the step
_HEAD_ERROR, _LARGEST_UNNOTICED, _COARSE_HEAD_ERROR = 24.0, 0.3, 6.0


def small_tensors(
    model: Network, task: str, norms: Sequence[TaskNorm], compact: bool, units: Sequence[GatedUnit] | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the contents of a task's file besides deltas, its gates, its copies of these norms and its head, and the names of
    their encodings."""
    tensors = _columns("gate", [unit.gates[task].state_dict() for unit in (model.units if units is None else units)])
    small, encodings = _norms_and_head(model, task, norms, compact), {}
    for key, tensor in small.items():
        known = model.encoded.get(task, {}).get(key) if compact else None
        if known is not None and _holds(norms, task, key, known, tensor):
            tensors[key], encodings[key] = known.data, known.name
        else:
            tensors[key] = tensor.half() if compact and tensor.is_floating_point() else tensor
    return tensors, encodings


def _norms_and_head(model: Network, task: str, norms: Sequence[TaskNorm], compact: bool) -> dict[str, Tensor]:
    states = [
        compact_norm(norm.norms[task], norm.base) if compact else norm_tensors(norm.norms[task]) for norm in norms
    ]
    small = _columns("norm", states)
    small.update((f"head/{name}", tensor) for name, tensor in model.heads[task].state_dict().items())
    return {key: tensor.detach() for key, tensor in small.items()}


def _holds(norms: Sequence[TaskNorm], task: str, key: str, encoded: Encoded, tensor: Tensor) -> bool:
    try:
        return torch.equal(decoded(norms, task, key, encoded, tensor.shape).to(tensor.dtype), tensor.cpu())
    except (ValueError, RuntimeError):  # of a norm or a head that has been replaced
        return False


def encoded_small(
    model: Network, task: str, norms: Sequence[TaskNorm], step: float, with_head: bool = True
) -> dict[str, Encoded]:
    """Return encodings of a task's norms and head, by key of its file; ``step``: of a norm, in parts of a channel's weight."""
    found: dict[str, Encoded] = {}
    for key, tensor in _norms_and_head(model, task, norms, True).items():
        value = tensor.cpu().float()
        kind, _, name = key.partition("/")
        if kind == "norm" and name in _COLUMNS:
            base, scale = _base_column(norms, task, name)
            difference = (value - base) / scale
            # Channels without variance, whose folded weights are large, need longer steps.
            own = max(step, float(difference.abs().max()) / LARGEST) if len(difference) else step
            found[key] = EncodedDelta("range_coded", code_steps((difference / own).round_(), own))
        elif kind == "head" and with_head and tensor.is_floating_point() and value.dim() > 1:
            error = max(min(_HEAD_ERROR * step, _LARGEST_UNNOTICED), min(_COARSE_HEAD_ERROR * step, 0.9))
            found[key] = encode_as("range_coded", value, error)
    return found


def decoded(
    norms: Sequence[TaskNorm], task: str, key: str, encoded: Encoded, shape: torch.Size | None = None
) -> Tensor:
    """Return the values of an encoded tensor of norms or head, float32 on the CPU.

    Raises:
        ValueError, RuntimeError: if the bytes do not encode a tensor of this shape; columns of norms need none.
    """
    kind, _, name = key.partition("/")
    if kind == "head":
        return encoded.decode(torch.Size() if shape is None else shape, torch.float32)
    if name not in _COLUMNS:
        raise ValueError(f"no such tensor is encoded: {key}")
    base, scale = _base_column(norms, task, name)
    return base + encoded.decode(base.shape, torch.float32) * scale


def _base_column(norms: Sequence[TaskNorm], task: str, name: str) -> tuple[Tensor, Tensor]:
    """Return the column of the base's norms and the scale of its differences: the channel's weight, at least a quarter of the
    norm's median."""
    bases, scales = [], []
    for norm in norms:
        if name in norm_tensors(norm.norms[task]):
            own = getattr(norm.base, name).detach().cpu().float().flatten()
            weight = getattr(norm.base, "weight", None)
            size = torch.ones_like(own) if weight is None else weight.detach().cpu().float().flatten().abs()
            bases.append(own)
            middle = float(size.median()) if len(size) else 0.0
            scales.append(size.clamp(min=0.25 * middle if middle >= _SMALL else 50 * _SMALL))
    return torch.cat(bases or [torch.empty(0)]), torch.cat(scales or [torch.empty(0)])


@torch.no_grad()
def set_small(
    model: Network, task: str, norms: Sequence[TaskNorm], encoded: Mapping[str, Encoded]
) -> Callable[[], None]:
    """Give a task's norms and head the values that these encodings hold; return a function that gives back their own."""
    modules = [norm.norms[task] for norm in norms] + [model.heads[task]]
    before = [(tensor, tensor.detach().clone()) for module in modules for tensor in module.state_dict().values()]
    values = {
        key: tensor.half() if tensor.is_floating_point() else tensor.clone()
        for key, tensor in _norms_and_head(model, task, norms, True).items()
    }
    for key, one in encoded.items():
        values[key] = decoded(norms, task, key, one, values[key].shape)
    fill_columns("norm", values, [stored_norm(norm, task, True) for norm in norms], Path())
    for name, tensor in model.heads[task].state_dict().items():
        tensor.copy_(values[f"head/{name}"])
    model.encoded[task] = dict(encoded)

    @torch.no_grad()
    def undo() -> None:
        for tensor, value in before:
            tensor.copy_(value)
        model.encoded.pop(task, None)

    return undo


def compact_norm(norm: nn.Module, base: nn.Module) -> dict[str, Tensor]:
    """Return a norm's tensors; for a batch norm, the weight and bias that with ``base``'s statistics are equivalent to its own,
    y = w·√((v₀ + ε)/(v + ε))·(x − m₀)/√(v₀ + ε) + b + w·(m₀ − m)/√(v + ε)."""
    tensors = norm_tensors(norm)
    if not _is_foldable(norm, base):
        return tensors
    spread, before = (norm.running_var + norm.eps).sqrt(), (base.running_var + base.eps).sqrt()
    return {
        "weight": norm.weight * (before / spread),
        "bias": norm.bias + norm.weight * (base.running_mean - norm.running_mean) / spread,
    }


def _is_foldable(norm: nn.Module, base: nn.Module) -> bool:
    """Return whether a norm is an affine batch norm with running statistics."""
    batch = isinstance(norm, nn.modules.batchnorm._BatchNorm)
    return batch and norm.affine and norm.running_mean is not None and base.running_mean is not None


def stored_norm(norm: TaskNorm, task: str, compact: bool) -> dict[str, Tensor]:
    """Return the tensors of a task's norm that files hold; a compact file's are those beside the base's statistics."""
    copy = norm.norms[task]
    if compact and _is_foldable(copy, norm.base):
        copy.running_mean.copy_(norm.base.running_mean)
        copy.running_var.copy_(norm.base.running_var)
        return {"weight": copy.weight, "bias": copy.bias}
    return norm_tensors(copy)


def _columns(prefix: str, states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    columns: dict[str, list[Tensor]] = {}
    for state in states:
        for name, tensor in state.items():
            columns.setdefault(f"{prefix}/{name}", []).append(tensor.flatten())
    return {name: torch.cat(parts) for name, parts in columns.items()}


def fill_columns(prefix: str, tensors: dict[str, Tensor], states: list[dict[str, Tensor]], path: Path) -> None:
    """Fill the tensors of ``states`` from their columns, which are removed from ``tensors``."""
    columns: dict[str, list[Tensor]] = {}
    for state in states:
        for name, tensor in state.items():
            columns.setdefault(f"{prefix}/{name}", []).append(tensor)
    for name, parts in columns.items():
        packed = tensors.pop(name, None)
        size = sum(part.numel() for part in parts)
        if packed is None or packed.numel() != size:
            raise UserError(
                f"{path}: {name} should hold {size} values, it holds {0 if packed is None else packed.numel()}"
            )
        for part, values in zip(parts, packed.split([part.numel() for part in parts]), strict=True):
            part.copy_(values.view_as(part))
