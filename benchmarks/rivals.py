"""The rows of ``quality.py`` and its rivals: LoRA, masks, chosen weights, and weights that are coded afterwards."""

from __future__ import annotations

import copy
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from timm.layers import freeze_batch_norm_2d
from torch import Tensor, nn
from torch.nn.utils import parametrize

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import taps  # noqa: E402
from taps.core.find import find_layers, is_norm  # noqa: E402
from taps.data.classification.images import TaskData  # noqa: E402
from taps.errors import UserError  # noqa: E402
from taps.methods.taps_budget import keep_within, round_within, store  # noqa: E402
from taps.storage.encoding import encode_as  # noqa: E402
from taps.storage.norms_and_head import encoded_small, set_small, small_tensors  # noqa: E402
from taps.storage.task_file import active_norms, packed_size  # noqa: E402

#: rivals that are fine-tuned in full first
AFTERWARDS = ("coded", "bitdelta", "compeft")
#: rivals whose deltas are products of two thin matrices
FACTORED = ("coded_lora", "one_bit_lora")
#: errors with which factors, norms and head of a rival are coded, from fine to coarse
_ERRORS = tuple(0.02 * 2 ** (half / 2) for half in range(12))
TASK = "task"  # name of a rival's only task


_NORMS = {"own": "", "base": ", frozen norms", "shared": ", as documented"}


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        method: one of the library's methods, or a rival's name.
        setting: rank, share of the weights, λ or budget, as shown in the table.
        lr: learning rate; ``optimizer``: as in :class:`taps.training.recipe.Recipe`.
        scale: scale of a rival's weights: LoRA's α/rank, the factor on the differences of chosen weights, or ComPEFT's α.
        rank: of ``coded_lora``; that of ``one_bit_lora`` follows from its bytes.
        norms: norms of a rival: ``"own"``; ``"base"``, frozen; or ``"shared"``, the base's, including running statistics.
        layers: for a control, the order in which layers receive a budget's bytes: ``"random"``, ``"first"`` or ``"last"``.
    """

    method: str
    setting: str = ""
    lr: float = 0.02
    optimizer: str = "sgd"
    scale: float = 1.0
    rank: int = 8
    norms: str = "own"
    layers: str | None = None

    @property
    def name(self) -> str:
        control = f", {self.layers} layers" if self.layers else ""
        return f"{self.method} {self.setting}{_NORMS[self.norms]}{control}".strip()

    @property
    def number(self) -> float:
        """The rank, share or λ in the setting."""
        return float(re.search(r"[\d.]+", self.setting)[0])


def entropy(count: int, kept: int) -> float:
    """Return the bits that identify ``kept`` of ``count`` weights: log₂ of the number of ways to choose them."""
    return (math.lgamma(count + 1) - math.lgamma(kept + 1) - math.lgamma(count - kept + 1)) / math.log(2)


class _Kept(torch.autograd.Function):
    """1[m ≥ τ] with a straight-through gradient."""

    @staticmethod
    def forward(ctx, scores: Tensor) -> Tensor:
        return (scores >= 0.05).to(scores.dtype)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient


class Mask(nn.Module):
    """W ⊙ 1[m ≥ τ]: Piggyback's mask, with m₀ = 2τ as published."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.learned = nn.Parameter(torch.full_like(weight, 0.1))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * _Kept.apply(self.learned)


class Chosen(nn.Module):
    """W + scale · δ at the weights in ``where``; a gradient step on δ counts scale² times."""

    def __init__(self, where: Tensor, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.register_buffer("where", where)
        self.learned = nn.Parameter(torch.zeros(where.shape))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.scale * self.learned * self.where


class _Sign(torch.autograd.Function):
    """sign(w) · mean |w| with a straight-through gradient."""

    @staticmethod
    def forward(ctx, weight: Tensor) -> Tensor:
        return weight.abs().mean() * weight.sign()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient


class Factors(nn.Module):
    """δ = scale · B·A, two thin matrices as in LoRA (Hu et al., 2022), or with one bit per weight (Bi-LoRA, Jie et al., 2023).

    The parametrized delta itself is zero and is not trained.
    """

    def __init__(self, delta: Tensor, rank: int, scale: float, one_bit: bool) -> None:
        super().__init__()
        rows, columns = len(delta), delta[0].numel()
        self.scale, self.one_bit = scale, one_bit
        self.up = nn.Parameter(torch.zeros(rows, rank))
        self.down = nn.Parameter(torch.empty(rank, columns).uniform_(-1, 1) / math.sqrt(columns))

    def forward(self, delta: Tensor) -> Tensor:
        up, down = (_Sign.apply(self.up), _Sign.apply(self.down)) if self.one_bit else (self.up, self.down)
        return delta + (self.scale * up @ down).view_as(delta)

    @torch.no_grad()
    def code(self, error: float) -> int:
        """Give the factors the values of their codes; return the bytes."""
        if self.one_bit:
            return sum(math.ceil(factor.numel() / 8) + 4 for factor in (self.up, self.down))
        return sum(_set_coded(factor, error) for factor in (self.up, self.down))


def _set_coded(values: Tensor, error: float) -> int:
    """Replace values by those of their range code with this relative error; return its bytes."""
    code = encode_as("range_coded", values.detach(), error)
    values.detach().copy_(code.decode(values.shape, values.dtype))
    return len(code.data)


def _thin_size(delta: Tensor) -> int:
    return len(delta) + delta[0].numel()


def add_factors(row: Row, model: taps.TaskModel, task: str, size: int) -> None:
    """Make deltas products of thin matrices where these have fewer numbers (not in depthwise layers).

    With one bit per weight, the rank is what four fifths of the bytes allow.
    """
    held = [(unit.deltas[task].get_submodule(name), name) for unit in model.units for name in unit.parameter_names]
    matrices = [holder for holder, _ in held if holder.delta.dim() > 1]
    rank = row.rank
    if row.method == "one_bit_lora":
        taken = lambda rank: sum(min(rank * _thin_size(own.delta), own.delta.numel()) for own in matrices)  # noqa: E731
        rank = max((rank for rank in range(1, 513) if taken(rank) / 8 <= 0.8 * size), default=1)
    for holder in matrices:
        if rank * _thin_size(holder.delta) < holder.delta.numel():
            factors = Factors(holder.delta, rank, row.scale, row.method == "one_bit_lora")
            parametrize.register_parametrization(holder, "delta", factors)
            holder.parametrizations.delta.original.requires_grad_(False)


def code_factors(model: taps.TaskModel, task: str, loader, size: int) -> int:
    """Code factors, the other deltas, norms and head as finely as ``size`` allows, and measure the norms' running statistics anew.

    Returns:
        The bytes of all.

    Raises:
        UserError: if they need more than ``size``.
    """
    deltas = [unit.deltas[task].get_submodule(name) for unit in model.units for name in unit.parameter_names]
    kept = [(own, own.detach().clone()) for own in model.parameters_of(task)]
    for error in _ERRORS:
        for own, value in kept:
            own.detach().copy_(value)
        taken = 0
        for holder in deltas:
            if parametrize.is_parametrized(holder):
                taken += holder.parametrizations.delta[0].code(error)
            else:
                taken += _set_coded(holder.delta, error)
        measure_statistics(model, task, loader)
        norms = active_norms(model, task)
        rest, _ = small_tensors(model, task, norms, compact=True)
        codes = encoded_small(model, task, norms, error / 8)
        taken += packed_size({**rest, **{key: code.data for key, code in codes.items()}})
        if taken <= size:
            set_small(model, task, norms, codes)
            return taken
    raise UserError(f"the coarsest code takes {taken:,} of {size:,} bytes")


def largest_gradients(net: nn.Module, task: TaskData, loader, share: float, seed: int) -> dict[str, Tensor]:
    """Return by layer the weights of each output whose gradients over all training images are the largest."""
    net = copy.deepcopy(net).requires_grad_(True).eval()
    torch.manual_seed(seed)
    head = nn.Linear(net.num_features, len(task.classes))
    for x, y in loader:
        nn.functional.cross_entropy(head(net(x)), y).backward()
    found = {}
    for layer in find_layers(net):
        size = layer.module.weight.grad.flatten(1).abs()
        kept = size.topk(max(round(share * size.shape[1]), 1), dim=1).indices
        found[layer.name] = torch.zeros_like(size).scatter_(1, kept, 1.0).view_as(layer.module.weight)
    return found


def inject_lora(row: Row, net: nn.Module, adapters: Sequence[str]) -> nn.Module:
    """Return the network with LoRA by peft on every layer that is not grouped, once per adapter.

    Raises:
        UserError: if peft is missing.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise UserError("rows of LoRA need peft: pip install peft") from None
    rank = int(row.number)
    names = [layer.name for layer in find_layers(net) if getattr(layer.module, "groups", 1) == 1]
    config = LoraConfig(r=rank, lora_alpha=int(rank * row.scale), target_modules=names)
    features = net.num_features
    for adapter in adapters:
        net = inject_adapter_in_model(config, net, adapter_name=adapter)
    net.num_features = features
    return net


def use_adapter(model: nn.Module, name: str) -> None:
    """Train and use only the adapter of this name; a network without adapters is left unchanged."""
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.set_adapter(name)


def rival(
    row: Row, net: nn.Module, adapters: Sequence[str], task: TaskData, loader, seed: int
) -> tuple[taps.TaskModel, int]:
    """Return a rival as a model without a task, and the bytes of a task's own weights besides norms and head.

    Raises:
        UserError: if a package is missing.
    """
    net.requires_grad_(False)
    layers, features = find_layers(net), net.num_features
    if row.norms == "base":
        net = freeze_batch_norm_2d(net)
    if row.method == "lora":
        net = inject_lora(row, net, adapters)
        size = sum(2 * own.numel() for name, own in net.named_parameters() if "lora_" in name) // len(adapters)
    elif row.method == "mask":
        for layer in layers:
            parametrize.register_parametrization(layer.module, "weight", Mask(layer.module.weight))
        size = sum(layer.module.weight.numel() for layer in layers) // 8
    else:
        chosen = largest_gradients(net, task, loader, row.number / 100, seed)
        size = 0
        for layer in layers:
            where = chosen[layer.name]
            parametrize.register_parametrization(layer.module, "weight", Chosen(where, row.scale))
            size += 2 * int(where.sum()) + math.ceil(entropy(where.numel(), int(where.sum())) / 8)
    learned = [own for name, own in net.named_parameters() if "lora_" in name or name.endswith("learned")]
    if row.norms == "own":
        learned += [own for module in net.modules() if is_norm(module) for own in module.parameters()]
    net.num_features = features  # peft's model does not declare it
    model = taps.adapt(net, "hard_sharing", train_base=True)
    model.backbone.requires_grad_(False)
    for parameter in learned:
        parameter.requires_grad_(True)
    return model, size


@torch.no_grad()
def code_afterwards(row: Row, model: taps.TaskModel, task: str, loader, size: int | None) -> int:
    """Store fully fine-tuned weights in fewer bytes, without training, and measure the norms' running statistics anew.

    ``coded``: this library's bits and range code within ``size``; ``bitdelta``: sign and one scale per layer (Liu et al., 2024,
    arXiv 2402.10193, without its distillation); ``compeft``: signs of the largest ``setting`` % of all weights, times ``scale``
    standard deviations (Yadav et al., 2023, arXiv 2311.13171).

    Args:
        row: the row.
        model: the model with the trained task.
        task: its name.
        loader: all training images without augmentation.
        size: for ``coded``, the bytes of the file.

    Returns:
        The bytes of deltas; 0 for ``coded``, whose file is measured.
    """
    if row.method == "coded":
        keep_within(model, task, size)
        for unit in model.units:
            if task in unit.deltas:
                for name in unit.parameter_names:
                    unit.deltas[task].set_rounding(name, None)
        round_within(model, task, size)
        measure_statistics(model, task, loader)
        store(model, task, size)
        return 0
    deltas = [unit.deltas[task][name] for unit in model.units for name in unit.parameter_names]
    if row.method == "bitdelta":
        for delta in deltas:
            delta.copy_(delta.abs().mean() * delta.sign())
        taken = sum(math.ceil(delta.numel() / 8) + 2 for delta in deltas)
    else:
        flat = torch.cat([delta.flatten() for delta in deltas])
        kept = round(row.number / 100 * len(flat))
        least, value = flat.abs().topk(kept).values[-1], row.scale * flat.std()
        for delta in deltas:
            delta.copy_(value * delta.sign() * (delta.abs() >= least))
        taken = math.ceil((entropy(len(flat), kept) + kept) / 8)
    measure_statistics(model, task, loader)
    return taken


@torch.no_grad()
def measure_statistics(model: taps.TaskModel, task: str, loader) -> None:
    """Replace the running statistics of a task's batch norms by those of its training images; the model ends in evaluation mode."""
    norms = [
        inner
        for norm in model.task_norms
        if (own := norm.active(task)) is not None
        for inner in own.modules()
        if isinstance(inner, nn.modules.batchnorm._BatchNorm)
    ]
    before = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean of all batches
        norm.train()
    device = next(model.parameters()).device
    for x, _ in loader:
        if len(x) > 1:
            model(x.to(device), task=task)
    for norm, momentum in zip(norms, before, strict=True):
        norm.momentum = momentum
    model.eval()
