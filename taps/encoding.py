"""Deltas in fewer bytes.

The error of an encoded delta is ‖δ̂ − δ‖ / ‖δ‖ (Frobenius norms), measured after decoding. Encodings, each one string of bytes:

=====================  ======================================================  ======================================
``float16``            half-precision numbers                                  2 bytes a weight
``bfloat16``           the same with float32's range                           2 bytes a weight
``int1`` … ``int8``    so many bits a weight, one scale a group of 64 or more  ⅛ to 1 byte a weight, 2 bytes a group
``low_rank``           two thin float16 matrices, the truncated SVD            2 · rank · (rows + columns)
``sparse16``           float16 values of the largest weights, and the gaps     2 bytes a kept weight, and the bits that say
                       between them in a Rice code                             where: within 4 % of the least possible
``sparse32``           the same of all that are not 0, in float32: exact       4 bytes a kept weight, and those bits
=====================  ======================================================  ======================================
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

#: bits a weight of the encodings by whole numbers -> the best step for a normal distribution of spread 1 (Max, 1960)
BITS = {1: 1.596, 2: 0.996, 3: 0.586, 4: 0.335, 5: 0.188, 6: 0.104, 8: 0.0308}
_GROUP = 64  # weights that share a scale, at least: whole rows


def error_of(delta: Tensor, decoded: Tensor) -> float:
    """‖δ̂ − δ‖ / ‖δ‖; infinite if a decoded value is not finite."""
    size = float(delta.double().norm())
    difference = float((decoded.double() - delta.double()).norm())
    if not math.isfinite(difference):
        return math.inf
    return difference / size if size else (0.0 if difference == 0 else math.inf)


def _bytes(*parts: Tensor) -> Tensor:
    return torch.cat([part.contiguous().flatten().view(torch.uint8) for part in parts])


def _matrix(shape: torch.Size) -> tuple[int, int]:
    rows = shape[0] if shape else 1
    return rows, math.prod(shape) // rows if rows else 0


def _rows_a_group(shape: torch.Size) -> int:
    return max(math.ceil(_GROUP / max(_matrix(shape)[1], 1)), 1)


def _groups(delta: Tensor) -> Tensor:
    """The weights, a group a row; the last one is filled up with zeros."""
    rows, columns = _matrix(delta.shape)
    together = _rows_a_group(delta.shape)
    flat = delta.float().reshape(rows, columns)
    return torch.nn.functional.pad(flat, (0, 0, 0, -rows % together)).reshape(-1, together * columns)


def _fit(groups: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """bfloat16 scales of groups and codes k of ``bits`` bits for v = scale · (k − (2^bits − 1)/2), by least squares: from what
    suits a normal distribution, or with many bits from what clips nothing, scale and codes are found in turns."""
    middle = (2**bits - 1) / 2
    scale = groups.square().mean(1).sqrt() * BITS[bits] if bits < 5 else groups.abs().amax(1) / middle

    def codes() -> Tensor:
        return (groups / scale[:, None]).add_(middle).round_().clamp_(0, 2 * middle)

    for _ in range(3):
        scale = scale.clamp(min=1e-30)
        found = codes().sub_(middle)
        scale = (groups * found).sum(1) / found.square().sum(1).clamp(min=1e-30)
    half = scale.clamp(min=1e-30).bfloat16()
    scale = half.float()
    return half, codes()


def squared_error(name: str, delta: Tensor) -> float:
    """‖δ̂ − δ‖² of an encoding whose size does not depend on the error."""
    if not name.startswith("int"):
        return float((decode(name, encode_as(name, delta), delta.shape, delta.dtype) - delta).double().square().sum())
    groups, bits = _groups(delta), int(name[3:])
    scale, code = _fit(groups, bits)
    left = code.sub_((2**bits - 1) / 2).mul_(scale.float()[:, None]).sub_(groups).square_().flatten()
    return float(left[: delta.numel()].sum(dtype=torch.float64))


def size_of(name: str, shape: torch.Size) -> int:
    """Bytes of such an encoding."""
    if not name.startswith("int"):
        return 2 * math.prod(shape)
    return 2 * math.ceil(_matrix(shape)[0] / _rows_a_group(shape)) + math.ceil(math.prod(shape) * int(name[3:]) / 8)


def _integers(bits: int) -> Callable[[Tensor], Tensor]:
    def encode(delta: Tensor) -> Tensor:
        scale, code = _fit(_groups(delta), bits)
        flat = code.flatten()[: delta.numel()].to(torch.uint8).numpy()
        planes = np.unpackbits(flat[:, None], axis=1)[:, 8 - bits :]
        return _bytes(scale, torch.from_numpy(np.packbits(planes)))

    return encode


def _decode_integers(bits: int) -> Callable[[Tensor, torch.Size], Tensor]:
    middle = (2**bits - 1) / 2

    def decode(stored: Tensor, shape: torch.Size) -> Tensor:
        (rows, columns), count = _matrix(shape), math.prod(shape)
        together = _rows_a_group(shape)
        head = 2 * math.ceil(rows / together)
        if len(stored) != head + math.ceil(count * bits / 8):
            raise ValueError(f"{len(stored)} bytes are not {count} weights of {bits} bits")
        scale = stored[:head].view(torch.bfloat16).float()
        planes = np.unpackbits(stored[head:].numpy(), count=count * bits).reshape(count, bits)
        code = torch.from_numpy(np.packbits(planes, axis=1)[:, 0] >> (8 - bits)).float() - middle
        return (code.view(rows, columns) * scale.repeat_interleave(together)[:rows, None]).view(shape)

    return decode


def _half(kind: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda delta: _bytes(delta.to(kind))


def _low_rank(delta: Tensor, max_error: float) -> Tensor:
    rows = delta.float().reshape(_matrix(delta.shape))
    u, s, v = torch.linalg.svd(rows, full_matrices=False)
    left = (s.flip(0) ** 2).cumsum(0).flip(0)  # of the singular values from each on
    bound = (0.99 * max_error) ** 2 * float(left[0])  # the factors' own rounding needs some room
    rank = max(int((left > bound).sum()), 1)
    root = s[:rank].sqrt()
    return _bytes((u[:, :rank] * root).half(), (v[:rank] * root[:, None]).half())


def _decode_low_rank(stored: Tensor, shape: torch.Size) -> Tensor:
    rows, columns = _matrix(shape)
    values = stored.view(torch.float16).float()
    rank = len(values) // (rows + columns)
    if rank * (rows + columns) != len(values):
        raise ValueError(f"{len(values)} values are not two factors of {rows} and {columns} rows")
    return (values[: rows * rank].view(rows, rank) @ values[rows * rank :].view(rank, columns)).view(shape)


def _sparse(delta: Tensor, max_error: float) -> Tensor:
    flat = delta.float().flatten()
    order = flat.abs().argsort(descending=True, stable=True)
    left = (flat[order] ** 2).flip(0).cumsum(0).flip(0)
    kept = max(int((left > (0.99 * max_error) ** 2 * float(left[0])).sum()), 1)
    positions = order[:kept].sort().values
    return _bytes(_gaps(positions), flat[positions].half())


def _sparse32(delta: Tensor, max_error: float) -> Tensor:
    flat = delta.float().flatten()
    positions = flat.nonzero()[:, 0]
    return _bytes(_gaps(positions), flat[positions])


def _gaps(positions: Tensor) -> Tensor:
    """Rising positions as their gaps in a Rice code: a gap is q · 2^k + r, q ones and a zero, and the k bits of r.

    Four bytes of their number, one of k, the remainders' bits, then the quotients'. Gaps between positions that lie anywhere
    with equal chance have a geometric distribution, for which such a code is the best there is (Gallager and van Voorhis,
    1975) but for k being whole.
    """
    count = len(positions)
    gaps = np.diff(positions.numpy(), prepend=-1) - 1
    bits = min(range(32), key=lambda k: count * (k + 1) + int((gaps >> k).sum()))
    low = (gaps[:, None] >> np.arange(bits)[::-1]) & 1
    high = gaps >> bits
    ends = np.cumsum(high + 1) - 1
    unary = np.ones(int(ends[-1]) + 1 if count else 0, dtype=np.uint8)
    unary[ends] = 0
    head = np.frombuffer(np.array([count], dtype="<u4").tobytes() + bytes([bits]), dtype=np.uint8)
    parts = (head, np.packbits(low.astype(np.uint8)), np.packbits(unary))
    return torch.from_numpy(np.concatenate(parts))


def _read_gaps(stored: np.ndarray, width: int) -> tuple[np.ndarray, int]:
    """Positions, and where their values of ``width`` bytes begin."""
    if len(stored) < 5:
        raise ValueError("too few bytes for positions with values")
    count, bits = int(stored[:4].view("<u4")[0]), int(stored[4])
    if bits > 31:
        raise ValueError("the bytes are no positions with values")
    middle, end = 5 + math.ceil(count * bits / 8), len(stored) - width * count
    low = np.unpackbits(stored[5:middle], count=count * bits).reshape(count, bits)
    ends = np.flatnonzero(np.unpackbits(stored[middle : max(end, middle)]) == 0)[:count]
    if len(ends) != count or end < middle:
        raise ValueError(f"the bytes are not {count} positions with values")
    high = np.diff(ends, prepend=-1) - 1
    gaps = (high << bits) + low @ (1 << np.arange(bits, dtype=np.int64)[::-1])
    return np.cumsum(gaps + 1) - 1, end


def _decode_sparse(kind: torch.dtype) -> Callable[[Tensor, torch.Size], Tensor]:
    def decode(stored: Tensor, shape: torch.Size) -> Tensor:
        positions, start = _read_gaps(stored.numpy(), kind.itemsize)
        flat = torch.zeros(math.prod(shape))
        if len(positions) and positions[-1] >= len(flat):
            raise ValueError(f"position {positions[-1]} lies outside of {len(flat)} weights")
        flat[torch.from_numpy(positions)] = stored[start:].clone().view(kind).float()
        return flat.view(shape)

    return decode


def kept(stored: Tensor) -> int:
    """Number of values of a sparse encoding."""
    return int(stored[:4].cpu().numpy().view("<u4")[0])


def is_sparse(delta: Tensor) -> bool:
    """Whether a delta is stored exactly in fewer bytes by where it is not zero."""
    return 2 * int(delta.count_nonzero()) < delta.numel()


#: name -> from a delta to bytes
_FIXED: dict[str, Callable[[Tensor], Tensor]] = {
    "float16": _half(torch.float16),
    "bfloat16": _half(torch.bfloat16),
    **{f"int{bits}": _integers(bits) for bits in BITS},
}
#: name -> from a delta and a bound on the error to bytes
_BOUNDED: dict[str, Callable[[Tensor, float], Tensor]] = {
    "low_rank": _low_rank,
    "sparse16": _sparse,
    "sparse32": _sparse32,
}
_DECODERS: dict[str, Callable[[Tensor, torch.Size], Tensor]] = {
    "float16": lambda stored, shape: stored.view(torch.float16).float().view(shape),
    "bfloat16": lambda stored, shape: stored.view(torch.bfloat16).float().view(shape),
    **{f"int{bits}": _decode_integers(bits) for bits in BITS},
    "low_rank": _decode_low_rank,
    "sparse16": _decode_sparse(torch.float16),
    "sparse32": _decode_sparse(torch.float32),
}
ENCODINGS = tuple(_DECODERS)


def encode_as(name: str, delta: Tensor, max_error: float = 0.0) -> Tensor:
    """A delta as the encoding ``name``, (bytes,) uint8; ``max_error`` matters to low rank and sparse alone."""
    delta = delta.detach().cpu()
    return _FIXED[name](delta) if name in _FIXED else _BOUNDED[name](delta, max_error)


def encode(delta: Tensor, max_error: float) -> tuple[str, Tensor] | None:
    """The encoding of a delta that takes the fewest bytes.

    Args:
        delta: any floating-point tensor.
        max_error: bound on the measured error, >= 0.

    Returns:
        Its name and its bytes; ``None`` where none is within the bound and smaller than the delta itself.
    """
    best: tuple[str, Tensor] | None = None
    for name, stored in _all(delta, max_error):
        smaller = len(stored) < (delta.nbytes if best is None else len(best[1]))
        if smaller and error_of(delta, decode(name, stored, delta.shape, delta.dtype)) <= max_error:
            best = (name, stored)
    return best


def _all(delta: Tensor, max_error: float) -> Iterator[tuple[str, Tensor]]:
    for name in ENCODINGS:
        yield name, encode_as(name, delta, max_error)


def decode(name: str, stored: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The delta that was stored as the encoding ``name``.

    Raises:
        ValueError, RuntimeError: if the bytes are not one of this shape.
    """
    return _DECODERS[name](stored.cpu().clone(), shape).to(dtype)
