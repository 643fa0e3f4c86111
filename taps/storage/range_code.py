"""An adaptive range code for matrices of whole numbers, such as weights that were rounded to steps.

A magnitude is coded as a bin, one for each below 8 and four per octave from there, and the bits of its place in the bin. Bins are
coded by the frequencies of those that came before in the same context. The context is the magnitude to expect, in steps of three
quarters of an octave: the mean of its row, which may be sent first in half octaves, times the mean of its column so far. Contexts
start with the frequencies of a two-sided geometric distribution of their mean. Signs take a bit each.

The coder is that of ``constriction`` (Bamler, 2022). The frequencies are whole numbers, so that every machine decodes the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from constriction import stream

model, queue = stream.model, stream.queue

_OCTAVE, _ONE = 8, 16  # units of a logarithm per octave; means are multiples of 2⁻¹⁶
_CONTEXTS, _WIDTH = 30, 6
_LOWEST = (_ONE - 7) * _OCTAVE  # below, there is one context
_CLASSES, _MIDDLE = 16, 9  # classes of rows, half an octave apart; the middle one has the matrix' mean
_FEW, _SPARSE = 64, 0.25  # columns below which a row's class costs more than it saves, and mean below which it may
_START, _GAIN = 4096, 512  # weights of the frequencies at the start, in sum, and of each number
LARGEST = (1 << 15) - 1  # magnitude
_FIRST = np.array([*range(8), *((4 + part) << octave for octave in range(1, 13) for part in range(4))])  # of each bin
_BITS = np.array([0] * 8 + [octave for octave in range(1, 13) for _ in range(4)])  # of a place in the bin
_BIN = np.searchsorted(_FIRST, np.arange(LARGEST + 1), side="right") - 1

#: codes numbers by one distribution; in a decoder their values are ignored, only their count matters
Turn = Callable[[np.ndarray, Any], np.ndarray]


def pack(numbers: np.ndarray, quick: bool = False) -> bytes:
    """Return the code of a matrix of integers whose magnitudes are below 2¹⁵; if ``quick`` the first of two ways is taken, which
    may be longer."""
    sizes = np.abs(numbers).astype(np.int32)
    mean = sizes.mean(dtype=np.float64) if sizes.size else 0.0
    level = int(_log2(np.array([mean * (1 << _ONE)]))[0])
    means = _log2(sizes.mean(1, dtype=np.float64) * (1 << _ONE)) if sizes.size else np.zeros(len(sizes), int)
    classes = np.clip(_MIDDLE + (means - level + 2) // (_OCTAVE // 2), 0, _CLASSES - 1)
    ways = (False,) if sizes.shape[1] < _FEW else (True, False) if mean < _SPARSE else (True,)
    ways = ways[:1] if quick else ways
    return min((_packed(numbers, sizes, classes, level, has_classes) for has_classes in ways), key=len)


def _packed(numbers: np.ndarray, sizes: np.ndarray, classes: np.ndarray, level: int, has_classes: bool) -> bytes:
    coder = queue.RangeEncoder()

    def put(values: np.ndarray, distribution: Any) -> np.ndarray:
        coder.encode(np.ascontiguousarray(values, dtype=np.int32), distribution)
        return values

    _walk(put, sizes, classes if has_classes else None, (numbers < 0).astype(np.int32), level)
    return bytes([level, has_classes]) + np.asarray(coder.get_compressed(), dtype="<u4").tobytes()


def unpack(code: bytes, shape: tuple[int, int]) -> np.ndarray:
    """Return the matrix of this shape that :func:`pack` has coded, int32.

    Raises:
        ValueError: if the bytes are not such a code.
    """
    if len(code) % 4 != 2 or code[1] > 1:
        raise ValueError("the bytes are not a range code")
    coder = queue.RangeDecoder(np.frombuffer(code[2:], dtype="<u4").astype(np.uint32))

    def take(values: np.ndarray, distribution: Any) -> np.ndarray:
        return coder.decode(distribution, len(values))

    sizes, signs = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    try:
        _walk(take, sizes, np.zeros(shape[0], int) if code[1] else None, signs, code[0])
    except (AssertionError, OverflowError) as error:
        raise ValueError(f"the bytes are not a range code: {error}") from None
    if not coder.maybe_exhausted():
        raise ValueError(f"the bytes are not a range code of {shape[0]} × {shape[1]} numbers")
    return np.where(signs, -sizes, sizes)


def _walk(turn: Turn, sizes: np.ndarray, classes: np.ndarray | None, signs: np.ndarray, level: int) -> None:
    """Code or decode magnitudes, the classes of their rows and their signs.

    Args:
        turn: codes numbers or returns decoded ones.
        sizes: the magnitudes, filled in by a decoder, which passes zeros; so are ``classes``, one per row or ``None``, and
            ``signs``, 1 for negative numbers.
        level: logarithm of the magnitudes' mean.
    """
    rows, columns = sizes.shape
    classes = np.full(rows, _MIDDLE) if classes is None else turn(classes, _categorical(_CLASS_FREQUENCIES))
    frequencies = _FREQUENCIES.copy()
    by_row = ((classes - _MIDDLE) * (_OCTAVE // 2)).astype(np.int16)
    weights = _exp2(_ONE * _OCTAVE - by_row.astype(int)).astype(float)
    known = 4  # rows, of the matrix' mean
    sums = np.full(columns, known * int(_exp2(np.array([level]))[0]))
    bins = _BIN[sizes].astype(np.int32)
    step = max(min(max(sizes.size // 32, 1024), 1 << 16) // max(columns, 1), 1)
    for start in range(0, rows if columns else 0, step):
        part = bins[start : start + step]
        by_column = _log2(sums) - int(_log2(np.array([known]))[0])
        expected = by_row[start : start + step, None] + by_column.astype(np.int16)
        contexts = (np.clip(expected - _LOWEST, 0, _CONTEXTS * _WIDTH - 1) // _WIDTH).astype(np.uint8).ravel()
        flat = part.ravel()
        for context in np.flatnonzero(np.bincount(contexts, minlength=_CONTEXTS)):
            own = np.flatnonzero(contexts == context)
            flat[own] = found = turn(flat[own], _categorical(frequencies[context]))
            frequencies[context] += _GAIN * np.bincount(found, minlength=len(_FIRST))
        sums += (weights[start : start + step] @ _FIRST[part].astype(float)).astype(int)  # exact
        known += len(part)
    places = sizes - _FIRST[bins]
    for bits in range(1, int(_BITS[bins.max(initial=0)]) + 1):
        where = np.nonzero(_BITS[bins] == bits)
        if len(where[0]):
            places[where] = turn(places[where], model.Uniform(1 << bits))
    sizes[:] = _FIRST[bins] + np.where(_BITS[bins] > 0, places, 0)
    where = np.nonzero(sizes)
    signs[where] = turn(signs[where], model.Uniform(2))


def _categorical(frequencies: np.ndarray) -> Any:
    return model.Categorical(frequencies.astype(np.float32), perfect=False)


def _frequencies() -> np.ndarray:
    """Return the frequencies of bins at the start, by context."""
    table = np.zeros((_CONTEXTS, len(_FIRST)))
    for context in range(_CONTEXTS):
        mean = 1.25 * 2.0 ** ((_LOWEST + _WIDTH * context) / _OCTAVE - _ONE)
        ratio = (np.sqrt(1 + mean * mean) - 1) / mean  # P(m) ∝ ratio^m, twice for m > 0, has this mean
        chances = 2 * np.cumprod(np.concatenate([[1.0], np.full(LARGEST, ratio)]))
        chances[0] = 1.0
        table[context] = np.add.reduceat(chances, _FIRST)
        table[context] *= _START / table[context].sum()
    return np.maximum(np.rint(table), 1).astype(np.int64)


def _log2(values: np.ndarray) -> np.ndarray:
    """Return ⌊8·log₂⌋ of numbers, linear inside of octaves and thus exact on every machine; those below 1 count as 1."""
    fractions, exponents = np.frexp(np.maximum(values, 1.0))
    return (exponents - 1) * _OCTAVE + ((fractions - 0.5) * 2 * _OCTAVE).astype(int)


def _exp2(levels: np.ndarray) -> np.ndarray:
    """Return the whole number, at least 1, of which :func:`_log2` is the inverse."""
    octaves, rest = np.divmod(levels, _OCTAVE)
    return np.maximum((_OCTAVE + rest) * (1 << np.maximum(octaves, 0)) // _OCTAVE, 1)


_FREQUENCIES = _frequencies()
_CLASS_FREQUENCIES = np.array([1, 1, 1, 1, 2, 4, 8, 16, 32, 48, 32, 16, 8, 4, 2, 1])
