"""Deltas in fewer bytes: the smallest encoding of each that keeps its error within a bound.

The error of an encoded delta is ‖δ̂ − δ‖ / ‖δ‖ (Frobenius norms), measured after decoding. Encodings:

===========  =============================================================  ==================================
``float16``  half-precision numbers                                         2 bytes a weight
``bfloat16`` the same with float32's range                                  2 bytes a weight
``int8``     whole numbers with a scale for each output                     1 byte a weight
``low_rank`` two thin float16 matrices, the truncated SVD of (outputs, …)   2 · rank · (rows + columns)
``sparse``   positions and float16 values of the largest weights            4 or 6 bytes a kept weight
===========  =============================================================  ==================================
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Parts = dict[str, Tensor]


def error_of(delta: Tensor, decoded: Tensor) -> float:
    """‖δ̂ − δ‖ / ‖δ‖; infinite if a decoded value is not finite."""
    size = float(delta.double().norm())
    difference = float((decoded.double() - delta.double()).norm())
    if not math.isfinite(difference):
        return math.inf
    return difference / size if size else (0.0 if difference == 0 else math.inf)


def _matrix(delta: Tensor) -> Tensor:
    return delta.reshape(len(delta), -1) if delta.dim() else delta.reshape(1, 1)


def _half(kind: torch.dtype) -> Callable[[Tensor, float], Parts]:
    def encode(delta: Tensor, max_error: float) -> Parts:
        return {"values": delta.to(kind)}

    return encode


def _int8(delta: Tensor, max_error: float) -> Parts:
    rows = _matrix(delta.float())
    scale = (rows.abs().amax(1) / 127.0).clamp(min=1e-30)
    return {"values": (rows / scale[:, None]).round().to(torch.int8), "scale": scale}


def _low_rank(delta: Tensor, max_error: float) -> Parts:
    rows = _matrix(delta.float())
    u, s, v = torch.linalg.svd(rows, full_matrices=False)
    left = (s.flip(0) ** 2).cumsum(0).flip(0)  # of the singular values from each on
    bound = (0.99 * max_error) ** 2 * float(left[0])  # the factors' own rounding needs some room
    rank = max(int((left > bound).sum()), 1)
    root = s[:rank].sqrt()
    return {"left": (u[:, :rank] * root).half(), "right": (v[:rank] * root[:, None]).half()}


def _sparse(delta: Tensor, max_error: float) -> Parts:
    flat = delta.float().flatten()
    order = flat.abs().argsort(descending=True, stable=True)
    left = (flat[order] ** 2).flip(0).cumsum(0).flip(0)
    kept = max(int((left > (0.99 * max_error) ** 2 * float(left[0])).sum()), 1)
    positions = order[:kept].sort().values
    narrow = torch.uint16 if len(flat) <= 1 << 16 else torch.int32
    return {"positions": positions.to(narrow), "values": flat[positions].half()}


def _decode_sparse(parts: Parts, shape: torch.Size) -> Tensor:
    flat = torch.zeros(math.prod(shape))
    flat[parts["positions"].long()] = parts["values"].float()
    return flat.view(shape)


#: name -> (to the parts that are stored, for a delta and an error; from the parts and the shape back to float32)
ENCODINGS: dict[str, tuple[Callable[[Tensor, float], Parts], Callable[[Parts, torch.Size], Tensor]]] = {
    "float16": (_half(torch.float16), lambda parts, shape: parts["values"].float().view(shape)),
    "bfloat16": (_half(torch.bfloat16), lambda parts, shape: parts["values"].float().view(shape)),
    "int8": (_int8, lambda parts, shape: (parts["values"].float() * parts["scale"][:, None]).view(shape)),
    "low_rank": (_low_rank, lambda parts, shape: (parts["left"].float() @ parts["right"].float()).view(shape)),
    "sparse": (_sparse, _decode_sparse),
}


def encode(delta: Tensor, max_error: float) -> tuple[str, Parts] | None:
    """The encoding of a delta that takes the fewest bytes.

    Args:
        delta: any floating-point tensor.
        max_error: bound on the measured error, >= 0.

    Returns:
        Its name and the tensors to store; ``None`` where none is within the bound and smaller than the delta itself.
    """
    best: tuple[str, Parts] | None = None
    smallest = delta.nbytes
    for name, (encoder, decoder) in ENCODINGS.items():
        parts = encoder(delta, max_error)
        size = sum(part.nbytes for part in parts.values())
        if size < smallest and error_of(delta, decoder(parts, delta.shape)) <= max_error:
            best, smallest = (name, parts), size
    return best


def decode(name: str, parts: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The delta that was stored as the encoding ``name``."""
    return ENCODINGS[name][1](dict(parts), shape).to(dtype)
