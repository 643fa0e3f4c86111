"""Delta arithmetic: W + specific ⊙ δ, its gradients and the stored tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from timm.layers import Conv2dSame
from torch import Tensor, nn

from taps.core.modules import unseen

#: layers whose output is linear in their parameters; subclasses are excluded, as they may standardise weights first, unless they
#: have an attribute ``is_linear_in_parameters``
_LINEAR_IN_PARAMETERS = frozenset(
    {nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear, Conv2dSame}
)


def is_linear_in_parameters(module: nn.Module) -> bool:
    """Return whether f(x; W + s·δ) = f(x; W) + s·f(x; δ)."""
    module = unseen(module)
    known = type(module) in _LINEAR_IN_PARAMETERS or "is_linear_in_parameters" in type(module).__dict__
    return known and not module._forward_pre_hooks  # weight normalisation uses such a hook


class _AddDelta(torch.autograd.Function):
    """w = W + specific·δ in a single pass over memory that saves only δ and the gate for the backward pass.

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
    """Return a scalar's value if reading it is free, else ``None``; a known 0 or 1 saves a pass over the weights."""
    if factor.numel() != 1 or factor.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    return factor.item()


def _same_dense_order(a: Tensor, b: Tensor) -> bool:
    dense = a.is_contiguous() or (a.dim() == 4 and a.is_contiguous(memory_format=torch.channels_last))
    return dense and a.stride() == b.stride() and a.dtype == b.dtype


def add_delta(
    base: Tensor, delta: Tensor, specific: float | Tensor, delta_gradient: float | Tensor | None = None
) -> Tensor:
    """Return the effective parameter W + specific ⊙ δ; δ's gradient has the factor ``delta_gradient`` (``None``: ``specific``)."""
    if isinstance(specific, Tensor):
        if delta_gradient is None and specific.numel() == 1 and delta.device.type != "cpu":
            # There the time of a Python function per layer counts, and on a CPU that of another pass over the weights.
            return torch.addcmul(base, delta, specific.to(delta.dtype))
        factor = specific.detach() if delta_gradient is None else torch.as_tensor(delta_gradient, device=delta.device)
        return _AddDelta.apply(base, delta, specific, factor)
    if specific == 0.0:
        return base
    return base + delta if specific == 1.0 else base + specific * delta


def whole_steps(weights: Tensor, step: Any, dead: Any) -> Tensor:
    """Return weights as integer multiples of ``step``, with a dead zone: the first step starts ½ + ``dead`` steps from zero. Both
    are floats or scalars on the weights' device."""
    steps = weights / step
    return steps.sub_(steps.clamp(-dead, dead)).round_()  # nothing here waits for a device


class _Rounded(torch.autograd.Function):
    """Whole steps of δ times a scale, with the gradient of δ (straight-through; Bengio et al., 2013)."""

    @staticmethod
    def forward(ctx, delta: Tensor, rounding: Tensor) -> Tensor:
        step, scale, dead = rounding.to(delta.dtype)
        return whole_steps(delta, step, dead).mul_(scale)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient, None


def _digest(tensor: Tensor) -> tuple[torch.dtype, bytes]:
    """Return type and hash of a tensor's values, by which a change is found in a fraction of the time that decoding takes."""
    values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return tensor.dtype, hashlib.blake2b(values.numpy().data, digest_size=16).digest()


class Encoded(Protocol):
    """A compressed delta, as made by :mod:`taps.storage.encoding`.

    Attributes:
        name: name of the encoding.
        data: encoded bytes, uint8.
        count: number of stored values if the encoding is sparse, else ``None``.
    """

    name: str
    data: Tensor

    @property
    def count(self) -> int | None: ...

    def decode(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Return the decoded delta."""


class Deltas(nn.Module):
    """One task's deltas for one unit, named ``<parameter>.delta`` and initialised to the given values or to zeros.

    A delta can be set from an encoding: it then takes the decoded values, and files store the encoded bytes until these values
    change. A task that is no longer trained may hold W + δ instead of δ (:meth:`hold_sums`).
    """

    def __init__(self, parameters: Mapping[str, Tensor], values: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        self._encoded: dict[str, tuple[Encoded, int, tuple]] = {}
        self.holds_sums = False
        for name, parameter in parameters.items():
            holder: nn.Module = self
            for part in name.split("."):
                holder = holder._modules.setdefault(part, nn.Module())  # type: ignore[assignment]
            value = (
                values[name].to(parameter.device, parameter.dtype)
                if values is not None and name in values
                else torch.zeros_like(parameter)
            )
            holder.delta = nn.Parameter(value)

    def _holder(self, name: str) -> Any:
        """Return the module that holds a delta; most parameters belong to the unit's module itself, which is found fast."""
        return self._modules[name] if name in self._modules else self.get_submodule(name)

    def __getitem__(self, name: str) -> Tensor:
        holder = self._holder(name)
        if not self.holds_sums:
            return holder.delta
        held: Tensor = holder.sum
        if name in self._encoded:
            return self._encoded[name][0].decode(held.shape, held.dtype).to(held.device)
        return holder.source.to(held.device, held.dtype)

    def used(self, name: str) -> Tensor:
        """Return a delta as the unit uses it: rounded if :meth:`set_rounding` says so."""
        rounding = self._holder(name)._buffers.get("rounding")
        return self[name] if rounding is None else _Rounded.apply(self[name], rounding)

    def set_rounding(self, name: str, rounding: Tensor | None) -> None:
        """Use a delta rounded to steps from now on, with a straight-through gradient, until it is encoded.

        Args:
            name: of the parameter.
            rounding: step, scale (the value of a step) and dead zone in steps, shape (3,); ``None`` ends the rounding.
        """
        holder = self.get_submodule(name)
        if rounding is not None:
            holder.register_buffer("rounding", rounding.to(self[name].device, torch.float32))
        elif hasattr(holder, "rounding"):
            del holder.rounding

    def sums(self) -> dict[str, Tensor] | None:
        """Return W + δ by parameter if the sums are held, else ``None``."""
        if not self.holds_sums:
            return None
        return {name.removesuffix(".sum"): parameter.detach() for name, parameter in self.named_parameters()}

    @torch.no_grad()
    def hold_sums(self, base: Mapping[str, Tensor]) -> None:
        """Hold W + δ instead of δ, so that calls of the unit need no addition; ``base`` maps parameter names to W.

        The sums use the memory that the deltas used. The deltas remain available in their encodings or in the file that they were
        read from, whose tensors are memory-mapped, not copied.
        """
        for name, parameter in base.items():
            holder: Any = self.get_submodule(name)
            delta = self.used(name).detach()
            if not self.holds_sums:
                self.set_rounding(name, None)
                del holder.delta
                holder.source = None if name in self._encoded else delta
            holder.sum = nn.Parameter(parameter.detach() + delta, requires_grad=False)
        self.holds_sums = True

    def count(self) -> int:
        """Return the number of weights; for a sparsely encoded delta, the number of stored values."""
        total = 0
        for name, parameter in self.named_parameters():
            name = name.removesuffix(".delta").removesuffix(".sum")
            encoded, version, _ = self._encoded.get(name, (None, -1, ()))
            if encoded is None or encoded.count is None:
                total += parameter.numel()
            else:
                moved = not self.holds_sums and version != parameter._version
                total += int(parameter.count_nonzero()) if moved else encoded.count
        return total

    @torch.no_grad()
    def set_encoded(self, name: str, encoded: Encoded) -> None:
        """Set a delta to the decoded values of an encoding.

        Raises:
            ValueError, RuntimeError: if the encoding does not decode to a delta of this shape.
        """
        self.set_rounding(name, None)
        delta = self[name]
        delta.copy_(encoded.decode(delta.shape, delta.dtype))
        self.get_submodule(name).register_buffer("stored", encoded.data.to(delta.device))
        self._encoded[name] = (encoded, delta._version, _digest(delta))

    def drop_encodings(self) -> None:
        """Discard the encodings; the deltas keep their values."""
        for name in self._encoded:
            del self.get_submodule(name).stored
        self._encoded = {}

    @property
    def encodings(self) -> dict[str, str]:
        """Name of the encoding of each encoded parameter."""
        return {name: encoded.name for name, (encoded, _, _) in self._encoded.items()}

    def encoded(self, name: str) -> Encoded | None:
        """Return the encoding of a delta, or ``None`` if it has none or has changed since it was encoded."""
        if name not in self._encoded:
            return None
        encoded, _, digest = self._encoded[name]
        if self.holds_sums or _digest(self[name]) == digest:
            return encoded
        delta = self[name].detach()
        in_other_type = delta.dtype != digest[0] and torch.equal(encoded.decode(delta.shape, delta.dtype), delta.cpu())
        return encoded if in_other_type else None

    def unmoved(self) -> list[Tensor]:
        """Return the deltas that still equal their decoded encodings."""
        return [self[name] for name in self._encoded if self.encoded(name) is not None]
