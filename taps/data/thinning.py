"""Lines of one pixel: morphological thinning of maps of yes and no."""

from __future__ import annotations

import numpy as np

#: (row, column) of the neighbours in the order of the rule: from the east round against the clock
_NEIGHBOURS = ((0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1), (1, 0), (1, 1))


def _tables() -> tuple[np.ndarray, np.ndarray]:
    """For each of the 256 neighbourhoods, bit i for neighbour i: may the pixel go, in the first and in the second half-step?"""
    codes = np.arange(256)
    x = [(codes >> bit) & 1 == 1 for bit in range(8)]
    ring = [*x, x[0]]
    crossings = sum((~ring[i] & (ring[i + 1] | ring[i + 2])).astype(int) for i in range(0, 7, 2))
    odd = sum((ring[i] | ring[i + 1]).astype(int) for i in range(0, 7, 2))
    even = sum((ring[i + 1] | ring[i + 2]).astype(int) for i in range(0, 7, 2))
    least = np.minimum(odd, even)
    simple = (crossings == 1) & (least >= 2) & (least <= 3)
    first = simple & ~((x[1] | x[2] | ~x[7]) & x[0])
    second = simple & ~((x[5] | x[6] | ~x[3]) & x[4])
    return first, second


_HALF_STEPS = _tables()


def thin(mask: np.ndarray) -> np.ndarray:
    """The skeleton of a mask, of the same connectedness, by Guo and Hall's parallel thinning (CACM 32(3), 1989).

    Pixels are taken off in two half-steps, from two sides in turn, until none can go; the rule is that of MATLAB's
    ``bwmorph(mask, "thin", inf)``. What is thin already stays as it is.

    Args:
        mask: (H, W) of booleans.

    Returns:
        (H, W) of booleans, a subset of ``mask``.
    """
    framed = np.pad(np.asarray(mask, bool), 1)
    flat = framed.ravel()
    steps = np.array([down * framed.shape[1] + across for down, across in _NEIGHBOURS])

    def neighbourhood(places: np.ndarray) -> np.ndarray:
        return sum(flat[places + step].astype(np.int64) << bit for bit, step in enumerate(steps))

    # Only pixels with a free side can go: those are looked at, and their neighbours once they have gone.
    watched = np.flatnonzero(flat)
    watched = watched[neighbourhood(watched) != 255]
    listed = np.zeros(flat.shape, bool)
    listed[watched] = True
    taken = True
    while taken:
        taken = False
        for table in _HALF_STEPS:
            goes = table[neighbourhood(watched)]
            gone, watched = watched[goes], watched[~goes]
            flat[gone] = False
            bared = (gone[:, None] + steps).ravel()
            bared = np.unique(bared[flat[bared] & ~listed[bared]])
            listed[bared] = True
            watched = np.concatenate([watched, bared])
            taken = taken or len(gone) > 0
    return framed[1:-1, 1:-1]
