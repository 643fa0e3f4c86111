"""Deltas in fewer bytes.

The error of an encoded delta is ‖δ̂ − δ‖ / ‖δ‖ (Frobenius norms), measured after decoding. Encodings, each one string of bytes:

=====================  ======================================================  ======================================
``float16``            half-precision numbers                                  2 bytes a weight
``bfloat16``           the same with float32's range                           2 bytes a weight
``coded``              whole numbers of steps of one size, in a Huffman code   the entropy of the numbers and 2 to 8 %, of
                                                                               less than a bit up to half more
``low_rank``           two thin float16 matrices, the truncated SVD            2 · rank · (rows + columns)
``sparse16``           float16 values of the largest weights, and the gaps     2 bytes a kept weight, and the bits that say
                       between them in a Rice code                             where: within 4 % of the least possible
``sparse32``           the same of all that are not 0, in float32: exact       4 bytes a kept weight, and those bits
=====================  ======================================================  ======================================
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

#: largest numbers of steps that share a byte with their neighbours, or fill one; larger ones are written apart
_LARGEST = (1, 2, 3, 7, 127)
_STEP = math.sqrt(12)  # × the error that rounding to steps leaves, where they are small beside the weights


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


def _coded(delta: Tensor, max_error: float) -> Tensor:
    """Weights as k · scale: rounded to steps of √12 · ``max_error`` times their root mean square, the scale by least squares.

    Steps of one size and an entropy code come within a quarter of a bit of what any code can do for independent weights
    (Gish and Pierce, 1968); whole bits a weight and a scale a row need 1.4 times the bits for the same error at two bits.
    """
    flat = delta.float().flatten()
    step = float(flat.square().mean().sqrt()) * max(_STEP * max_error, 1e-4) if len(flat) else 0.0
    for _ in range(40):
        steps = (flat / max(step, 1e-30)).round_().clamp_(-32767, 32767)
        scale = (flat * steps).sum() / steps.square().sum().clamp(min=1e-30)
        if float((steps * scale - flat).norm()) <= max_error * float(flat.norm()):
            break
        step *= 0.97  # where weights are few, or all alike
    code = steps.to(torch.int16).numpy()
    found = _huffman(code, _best_largest(code))
    return _bytes(scale.reshape(1), torch.frombuffer(bytearray(found), dtype=torch.uint8))


def _best_largest(code: np.ndarray) -> int:
    """The largest digit that is expected to take the fewest bits: the digits' entropy, or a bit a byte where that is more, and
    two bytes for each that is written apart."""
    sizes = np.bincount(np.minimum(abs(code), _LARGEST[-1]), minlength=_LARGEST[-1] + 1)

    def bits(largest: int) -> float:
        counts = np.append(sizes[:largest], sizes[largest:].sum())
        share = counts[counts > 0] / max(len(code), 1)
        entropy = float(-(share * np.log2(share)).sum()) + 1.0 - sizes[0] / max(len(code), 1)  # and the signs
        return len(code) * max(entropy, 1 / int(math.log(256, 2 * largest + 1))) + 16.0 * int(counts[-1])

    return min(_LARGEST, key=bits)


def _huffman(code: np.ndarray, largest: int) -> bytes:
    """A byte that names ``largest``, then deflated: numbers as digits of base 2 · ``largest`` + 1, as many a byte as fit, and
    those that the outermost digits stand for as two bytes each."""
    base = 2 * largest + 1
    together = int(math.log(256, base))
    digits = np.clip(code, -largest, largest) + largest
    digits = np.pad(digits, (0, -len(digits) % together)).reshape(-1, together)
    packed = (digits @ base ** np.arange(together)).astype(np.uint8)
    beyond = code[abs(code) >= largest].astype("<i2")
    compressor = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    return bytes([largest]) + compressor.compress(packed.tobytes() + beyond.tobytes()) + compressor.flush()


def _decode_coded(stored: Tensor, shape: torch.Size) -> Tensor:
    count = math.prod(shape)
    largest = int(stored[4]) if len(stored) > 4 else 0
    if largest not in _LARGEST:
        raise ValueError("the bytes are no numbers of steps")
    base = 2 * largest + 1
    together = int(math.log(256, base))
    length = math.ceil(count / together)
    reader = zlib.decompressobj(-15)
    try:
        found = reader.decompress(stored[5:].numpy().tobytes(), length + 2 * count + 1)
    except zlib.error as error:
        raise ValueError(f"the bytes are no numbers of steps: {error}") from None
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
}
#: name -> from a delta and a bound on the error to bytes
_BOUNDED: dict[str, Callable[[Tensor, float], Tensor]] = {
    "coded": _coded,
    "low_rank": _low_rank,
    "sparse16": _sparse,
    "sparse32": _sparse32,
}
_DECODERS: dict[str, Callable[[Tensor, torch.Size], Tensor]] = {
    "float16": lambda stored, shape: stored.view(torch.float16).float().view(shape),
    "bfloat16": lambda stored, shape: stored.view(torch.bfloat16).float().view(shape),
    "coded": _decode_coded,
    "low_rank": _decode_low_rank,
    "sparse16": _decode_sparse(torch.float16),
    "sparse32": _decode_sparse(torch.float32),
}
ENCODINGS = tuple(_DECODERS)


def encode_as(name: str, delta: Tensor, max_error: float = 0.0) -> Tensor:
    """A delta as the encoding ``name``, (bytes,) uint8; ``max_error`` matters to all but half precision."""
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
