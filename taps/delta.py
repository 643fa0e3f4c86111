"""The arithmetic of deltas: W + specific ⊙ δ, its gradients, and the tensors themselves. The one place that combines weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from timm.layers import Conv2dSame
from torch import Tensor, nn

from taps.encoding import decode, kept

#: layers whose output is linear in their parameters; not their subclasses, which may standardise weights first
_LINEAR_IN_PARAMETERS = frozenset(
    {nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear, Conv2dSame}
)


def is_linear_in_parameters(module: nn.Module) -> bool:
    """Whether f(x; W + s·δ) = f(x; W) + s·f(x; δ)."""
    return (
        type(module) in _LINEAR_IN_PARAMETERS and not module._forward_pre_hooks
    )  # weight normalisation is such a hook


class _AddDelta(torch.autograd.Function):
    """w = W + specific·δ as one pass over memory that keeps only δ and the gate for the backward pass.

    Gradients: dW = g, dδ = delta_gradient·g, dspecific = Σ g·δ over the broadcast dimensions.
    """

    @staticmethod
    def forward(ctx, base: Tensor, delta: Tensor, specific: Tensor, delta_gradient: Tensor) -> Tensor:
        ctx.save_for_backward(delta, delta_gradient)
        ctx.specific_shape = specific.shape
        if _on_host(specific) == 0.0:
            return base.detach()
        return torch.addcmul(base, delta, specific.to(delta.dtype))

    @staticmethod
    def backward(ctx, gradient: Tensor):
        delta, factor = ctx.saved_tensors
        base_gradient = gradient if ctx.needs_input_grad[0] else None
        delta_gradient = specific_gradient = None
        if ctx.needs_input_grad[1]:
            known = _on_host(factor)
            if known == 1.0:
                delta_gradient = gradient
            elif known == 0.0:
                delta_gradient = torch.zeros_like(delta)
            else:
                delta_gradient = gradient * factor.to(gradient.dtype)
        if ctx.needs_input_grad[2]:
            if len(ctx.specific_shape) == 0 and _same_dense_order(gradient, delta):
                flat = (delta.numel(),), (1,)  # memory order: any order gives the same sum of products
                specific_gradient = torch.dot(gradient.as_strided(*flat), delta.as_strided(*flat))
            else:
                specific_gradient = (gradient * delta).sum_to_size(ctx.specific_shape)
        return base_gradient, delta_gradient, specific_gradient, None


def _on_host(factor: Tensor) -> float | None:
    """A scalar's value where reading it is free, so that whole passes over the weights can be left out."""
    if factor.numel() != 1 or factor.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    return factor.item()


def any_nonzero(tensor: Tensor) -> bool:
    """Whether anything is not zero; a trained tensor's first few elements tell without reading the others."""
    return bool(tensor[:1].any()) or bool(tensor.any())


def _same_dense_order(a: Tensor, b: Tensor) -> bool:
    dense = a.is_contiguous() or (a.dim() == 4 and a.is_contiguous(memory_format=torch.channels_last))
    return dense and a.stride() == b.stride() and a.dtype == b.dtype


class TeachGates(torch.autograd.Function):
    """The identity of y with the gradients of closed gates, and zeros for their deltas, which an optimiser's momentum
    goes on moving: see :meth:`taps.layer.GatedUnit.teach_gates`."""

    @staticmethod
    def forward(ctx, y: Tensor, x: Tensor, slope: Callable, rows: list[slice], each: int, *own: Tensor) -> Tensor:
        ctx.save_for_backward(x, *own[len(rows) :])
        ctx.slope, ctx.rows, ctx.each = slope, rows, each
        return y.detach()

    @staticmethod
    def backward(ctx, gradient: Tensor):
        x, *deltas = ctx.saved_tensors
        along = []
        for index, place in enumerate(ctx.rows):
            slope = ctx.slope(x[place], deltas[index * ctx.each : (index + 1) * ctx.each])
            zero = gradient.new_zeros((), dtype=deltas[0].dtype)
            along.append(zero if slope is None else torch.sum(gradient[place] * slope).to(zero.dtype))
        wanted = ctx.needs_input_grad[5 + len(ctx.rows) :]
        still = [torch.zeros_like(delta) if needs else None for delta, needs in zip(deltas, wanted, strict=True)]
        return gradient, None, None, None, None, *along, *still


def add_delta(
    base: Tensor, delta: Tensor, specific: float | Tensor, delta_gradient: float | Tensor | None = None
) -> Tensor:
    """The effective parameter W + specific ⊙ δ, with the gradient convention of the decision."""
    if isinstance(specific, Tensor):
        factor = specific.detach() if delta_gradient is None else torch.as_tensor(delta_gradient, device=delta.device)
        return _AddDelta.apply(base, delta, specific, factor)
    if specific == 0.0:
        return base
    return base + delta if specific == 1.0 else base + specific * delta


class Deltas(nn.Module):
    """One task's deltas of one unit, each named ``<parameter>.delta``: given values, or zeros like the unit's parameters.

    A delta may be held in an encoding (:mod:`taps.encoding`): its values are then the decoded ones, and files store the
    encoding's bytes for as long as they are.
    """

    def __init__(self, parameters: Mapping[str, Tensor], values: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        self.encodings: dict[str, str] = {}
        self._held: dict[str, tuple[str, int]] = {}
        for name, parameter in parameters.items():
            holder: nn.Module = self
            for part in name.split("."):
                holder = holder._modules.setdefault(part, nn.Module())
            value = (
                values[name].to(parameter.device, parameter.dtype)
                if values is not None and name in values
                else torch.zeros_like(parameter)
            )
            holder.delta = nn.Parameter(value)

    def __getitem__(self, name: str) -> nn.Parameter:
        return self.get_submodule(name).delta

    def count(self) -> int:
        """Number of weights; of a delta that is held as positions and values, that of these."""
        total = 0
        for name, parameter in self.named_parameters():
            name = name.removesuffix(".delta")
            known = self._held.get(name)
            if known is not None and known[0].startswith("sparse"):
                moved = known[1] != parameter._version
                total += int(parameter.count_nonzero()) if moved else kept(self.get_submodule(name).stored)
            else:
                total += parameter.numel()
        return total

    @torch.no_grad()
    def hold(self, name: str, encoding: str, stored: Tensor) -> None:
        """Give a delta the values that the bytes ``stored`` decode to.

        Raises:
            ValueError, RuntimeError: if they are not the bytes of such a delta.
        """
        delta = self[name]
        delta.copy_(decode(encoding, stored, delta.shape, delta.dtype))
        self.get_submodule(name).register_buffer("stored", stored.to(delta.device))
        self.encodings[name] = encoding
        self._held[name] = (encoding, delta._version)

    def let_go(self) -> None:
        """Hold nothing any more; values stay."""
        for name in self.encodings:
            del self.get_submodule(name).stored
        self.encodings, self._held = {}, {}

    def stored(self, name: str) -> tuple[str, Tensor] | None:
        """The encoding of a delta and its bytes; ``None`` where none is held or the delta has moved since."""
        if name not in self.encodings:
            return None
        encoding, stored, delta = self.encodings[name], self.get_submodule(name).stored, self[name].detach()
        same = torch.equal(decode(encoding, stored, delta.shape, delta.dtype), delta.cpu())
        return (encoding, stored) if same else None

    def held(self) -> list[nn.Parameter]:
        """The deltas that are held in an encoding and have not moved since."""
        return [self[name] for name in self.encodings if self.stored(name) is not None]
