"""Compressed encodings of deltas.

The error of an encoded delta is ‖δ̂ − δ‖ / ‖δ‖ (Frobenius norms), measured after decoding. Each encoding is one byte string:

=====================  ======================================================  ======================================
``float16``            half-precision numbers                                  2 bytes per weight
``bfloat16``           the same with float32's range                           2 bytes per weight
``range_coded``        multiples of one step size, in an adaptive range code   the multiples' entropy, or up to 11 % less
                       (:mod:`taps.storage.range_code`)
``coded``              the same in a Huffman code, in files of versions        their entropy plus 2 to 8 %; below one
                       before 0.14, which are read                             bit per weight, up to half more
``low_rank``           two thin float16 matrices, the truncated SVD            2 · rank · (rows + columns)
``sparse16``           float16 values of the largest weights, and the gaps     2 bytes per kept weight, and positions
                       between them in a Rice code                             within 4 % of the least possible
``sparse32``           the same for all nonzero weights in float32: exact      4 bytes per kept weight, and positions
=====================  ======================================================  ======================================
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from taps.core.delta import whole_steps
from taps.storage import range_code

_STEP = math.sqrt(12)  # × the error of rounding to steps, if these are small relative to the weights
_DEAD, _COARSE = (
    0.1,
    0.5,
)  # part of a step by which fewer weights are rounded up to the first, if the error may exceed this
_LINE = 64  # values of a vector in a row of the matrix that is coded


def error_of(delta: Tensor, decoded: Tensor) -> float:
    """Return ‖δ̂ − δ‖ / ‖δ‖; infinite if a decoded value is not finite."""
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


def _range_coded(delta: Tensor, max_error: float, quick: bool = False) -> Tensor:
    """Encode weights as k · scale: rounded to steps of √12 · ``max_error`` times their root mean square, scale by least squares.

    Uniform steps with an entropy code come within a quarter of a bit of the optimum for independent weights (Gish and Pierce,
    1968); whole bits per weight with one scale per row take 1.4 times the bits for the same error at two bits.
    """
    flat = delta.float().flatten()
    step = float(flat.square().mean().sqrt()) * max(_STEP * max_error, 1e-4) if len(flat) else 0.0
    least = float(flat.abs().max()) / range_code.LARGEST if len(flat) else 0.0
    for _ in range(40):
        steps, scale = _steps(flat, max(step, least), max_error)
        if step < least or float((steps * scale - flat).norm()) <= max_error * float(flat.norm()):
            break
        step *= 0.97  # if weights are few, or all alike
    return code_steps(steps.view(delta.shape), scale, quick)


def _steps(flat: Tensor, step: float, max_error: float) -> tuple[Tensor, float]:
    steps = whole_steps(flat, max(step, 1e-30), _dead(max_error)).clamp_(-range_code.LARGEST, range_code.LARGEST)
    return steps, float((flat * steps).sum() / steps.square().sum().clamp(min=1e-30))


def _dead(max_error: float) -> float:
    return _DEAD if max_error > _COARSE else 0.0


def rounding_of(delta: Tensor, max_error: float) -> Tensor:
    """Return step, scale and dead zone with which ``range_coded`` stores a delta, shape (3,), as
    :meth:`taps.core.delta.Deltas.set_rounding` takes them; what it does to meet the bound where weights are few is left out."""
    flat = delta.detach().float().flatten()
    step = float(flat.square().mean().sqrt()) * max(_STEP * max_error, 1e-4)
    return torch.tensor([max(step, 1e-30), _steps(flat, step, max_error)[1], _dead(max_error)])


def estimated_bytes(delta: Tensor, max_error: float) -> tuple[float, Tensor]:
    """Return about how many bytes ``range_coded`` takes, by the entropy of the steps, and the weights that it stands for."""
    step, scale, dead = rounding_of(delta, max_error).tolist()
    steps = whole_steps(delta.float(), step, dead)
    counts = torch.bincount(steps.abs().clamp(max=4096).int().flatten())
    share = counts[counts > 0] / max(steps.numel(), 1)
    bits = steps.numel() * float(-(share * share.log2()).sum()) + steps.numel() - int(counts[:1].sum())
    return bits / 8 + 12, steps * scale


def code_steps(steps: Tensor, scale: float, quick: bool = False) -> Tensor:
    """Return the bytes of whole multiples of ``scale``: the scale in float32, then their range code; ``quick`` as there."""
    code = range_code.pack(_as_matrix(steps.to(torch.int32).numpy()), quick)
    return _bytes(torch.tensor([scale]), torch.frombuffer(bytearray(code), dtype=torch.uint8))


def _as_matrix(steps: np.ndarray) -> np.ndarray:
    if steps.ndim > 1:
        return steps.reshape(_matrix(torch.Size(steps.shape)))
    return np.pad(steps.reshape(-1), (0, -steps.size % _LINE)).reshape(-1, _LINE)


def _decode_range_coded(stored: Tensor, shape: torch.Size) -> Tensor:
    count = math.prod(shape)
    lines = _matrix(shape) if len(shape) > 1 else (math.ceil(count / _LINE), _LINE)
    if len(stored) < 6:
        raise ValueError("too few bytes for a range code")
    steps = range_code.unpack(stored[4:].numpy().tobytes(), lines).reshape(-1)[:count]
    return (torch.from_numpy(steps).float() * stored[:4].view(torch.float32)).view(shape)


def _decode_coded(stored: Tensor, shape: torch.Size) -> Tensor:
    count = math.prod(shape)
    largest = int(stored[4]) if len(stored) > 4 else 0
    if largest not in (1, 2, 3, 7, 127):
        raise ValueError("the bytes are not numbers of steps")
    base = 2 * largest + 1
    together = int(math.log(256, base))
    length = math.ceil(count / together)
    reader = zlib.decompressobj(-15)
    try:
        found = reader.decompress(stored[5:].numpy().tobytes(), length + 2 * count + 1)
    except zlib.error as error:
        raise ValueError(f"the bytes are not numbers of steps: {error}") from None
    packed = np.frombuffer(found[:length], dtype=np.uint8).astype(np.int16)
    digits = packed[:, None] // base ** np.arange(together) % base
    code = digits.flatten()[:count].astype(np.int16) - largest
    beyond = abs(code) >= largest
    if not reader.eof or len(found) != length + 2 * int(beyond.sum()):
        raise ValueError(f"the bytes are not {count} numbers of steps")
    code[beyond] = np.frombuffer(found[length:], dtype="<i2")
    return (torch.from_numpy(code).float() * stored[:4].view(torch.float32)).view(shape)


def _half(kind: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda delta: _bytes(delta.to(kind))


def _low_rank(delta: Tensor, max_error: float) -> Tensor:
    rows = delta.float().reshape(_matrix(delta.shape))
    u, s, v = torch.linalg.svd(rows, full_matrices=False)
    left = (s.flip(0) ** 2).cumsum(0).flip(0)  # squared norm of the singular values from each one on
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
    """Encode increasing positions as gaps in a Rice code: a gap is q · 2^k + r, coded as q ones, a zero and the k bits of r.

    The bytes are four for the count, one for k, the remainders' bits, then the quotients'. Gaps between uniformly random positions
    have a geometric distribution, for which such a code is optimal (Gallager and van Voorhis, 1975) except that k is an
    integer.
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
    """Return the positions, and the offset at which their values of ``width`` bytes start."""
    if len(stored) < 5:
        raise ValueError("too few bytes for positions with values")
    count, bits = int(stored[:4].view("<u4")[0]), int(stored[4])
    if bits > 31:
        raise ValueError("the bytes are not positions with values")
    middle, end = 5 + math.ceil(count * bits / 8), len(stored) - width * count
    if end < middle:  # before memory for them is asked for
        raise ValueError(f"the bytes are not {count} positions with values")
    low = np.unpackbits(stored[5:middle], count=count * bits).reshape(count, bits)
    ends = np.flatnonzero(np.unpackbits(stored[middle : max(end, middle)]) == 0)[:count]
    if len(ends) != count:
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


def is_sparse(delta: Tensor) -> bool:
    """Return whether storing only its nonzero weights, exactly, makes a delta smaller."""
    return 2 * int(delta.count_nonzero()) < delta.numel()


#: name -> function from a delta to bytes
_FIXED: dict[str, Callable[[Tensor], Tensor]] = {
    "float16": _half(torch.float16),
    "bfloat16": _half(torch.bfloat16),
}


#: name -> function from a delta and an error bound to bytes
_BOUNDED: dict[str, Callable[[Tensor, float], Tensor]] = {
    "range_coded": _range_coded,
    "low_rank": _low_rank,
    "sparse16": _sparse,
    "sparse32": _sparse32,
}


_DECODERS: dict[str, Callable[[Tensor, torch.Size], Tensor]] = {
    "float16": lambda stored, shape: stored.view(torch.float16).float().view(shape),
    "bfloat16": lambda stored, shape: stored.view(torch.bfloat16).float().view(shape),
    "coded": _decode_coded,
    "range_coded": _decode_range_coded,
    "low_rank": _decode_low_rank,
    "sparse16": _decode_sparse(torch.float16),
    "sparse32": _decode_sparse(torch.float32),
}


ENCODINGS = tuple(_DECODERS)


@dataclass(frozen=True)
class EncodedDelta:
    """A delta encoded as ``name`` in the bytes ``data``, uint8 of shape (bytes,)."""

    name: str
    data: Tensor

    @property
    def count(self) -> int | None:
        """Number of values of a sparse encoding, else ``None``."""
        return int(self.data[:4].cpu().numpy().view("<u4")[0]) if self.name.startswith("sparse") else None

    def decode(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Return the decoded delta, on the CPU.

        Raises:
            ValueError, RuntimeError: if the bytes do not encode a delta of this shape.
        """
        return _DECODERS[self.name](self.data.cpu().clone(), shape).to(dtype)


def quick_size(delta: Tensor, max_error: float) -> int:
    """Return the bytes that ``range_coded`` takes, or a few more, in half the time."""
    return len(_range_coded(delta.detach().cpu(), max_error, quick=True))


def encode_as(name: str, delta: Tensor, max_error: float = 0.0) -> EncodedDelta:
    """Return a delta encoded as ``name``; half-precision encodings ignore ``max_error``."""
    delta = delta.detach().cpu()
    return EncodedDelta(name, _FIXED[name](delta) if name in _FIXED else _BOUNDED[name](delta, max_error))


def encode(delta: Tensor, max_error: float) -> EncodedDelta | None:
    """Return the encoding of a delta that takes the fewest bytes.

    Args:
        delta: any floating-point tensor.
        max_error: bound on the measured error, >= 0.

    Returns:
        ``None`` if no encoding is within the bound and smaller than the delta itself.
    """
    best: EncodedDelta | None = None
    if not delta.numel():
        return None
    for name in (*_FIXED, *_BOUNDED):
        found = encode_as(name, delta, max_error)
        smaller = len(found.data) < (delta.nbytes if best is None else len(best.data))
        if smaller and error_of(delta, found.decode(delta.shape, delta.dtype)) <= max_error:
            best = found
    return best
