"""Which entries of a vector are kept: the largest magnitudes, exactly, without sorting and in little more than one pass.

A sample bounds the threshold from below, one pass collects what lies above the bound, and the exact threshold is found among those few.
Magnitudes are compared as integers: the bits of a non-negative float are in the order of its value, and subnormals stay what they are.
"""

from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Literal

import numpy as np
import numpy.typing as npt

Positions = npt.NDArray[np.int64]
Scope = Literal["global", "tensor"]  # all tensors together, or each
CHUNK = 1 << 17  # entries looked at together: 0.5 MiB, within the second-level cache
SAMPLE = 1 << 14  # with a margin of 4 deviations the bound is too high once in 30,000 vectors; then the whole is searched
MAGNITUDE = 0x7FFFFFFF


def share(density: float, entries: int) -> int:
    """How many of `entries` are kept: max(1, floor(density * entries)), 0 of none.

    The density is the decimal the user wrote: 0.29 of 100 are 29, where 0.29 * 100 is 28.999999999999996 in binary.
    """
    return max(1, int(Fraction(repr(float(density))) * entries)) if entries else 0


def check(density: float, scope: str = "global") -> None:
    """`ValueError` unless `density` is a share and `scope` is known."""
    if not 0 < density <= 1:
        raise ValueError(f"density={density}: needed is the share of entries that are sent, more than 0 and at most 1")
    if scope not in ("global", "tensor"):
        raise ValueError(f"scope={scope}: needed is global or tensor")


def scoped(sizes: Sequence[int], scope: Scope) -> Sequence[int]:
    """The sizes of what is looked at together."""
    return sizes if scope == "tensor" else [sum(sizes)]


def shares(sizes: Sequence[int], density: float, scope: Scope) -> int:
    """How many entries are kept in all."""
    return sum(share(density, size) for size in scoped(sizes, scope))


def kept(vector: npt.NDArray[np.float32], sizes: Sequence[int], density: float, scope: Scope) -> Positions:
    """The rising positions of the `shares` largest entries."""
    ends = np.cumsum([0, *scoped(sizes, scope)]).tolist()
    parts = [largest(vector[a:b], share(density, b - a)) + a for a, b in pairwise(ends)]
    return np.concatenate([np.zeros(0, np.int64), *parts])


def largest(vector: npt.NDArray[np.float32], count: int) -> Positions:
    """The rising positions of the `count` entries of largest magnitude; of equal ones the first."""
    if count in (0, len(vector)):
        return np.arange(count)
    bits = vector.view(np.int32)
    positions, magnitudes = _above(bits, _bound(bits, count))
    if len(positions) < count:
        positions, magnitudes = _above(bits, 0)
    threshold = np.partition(magnitudes, len(magnitudes) - count)[len(magnitudes) - count]
    chosen = magnitudes >= threshold
    if over := int(np.count_nonzero(chosen)) - count:
        chosen[np.flatnonzero(magnitudes == threshold)[-over:]] = False
    return positions[np.flatnonzero(chosen)]  # five times as fast as by the mask


def _bound(bits: npt.NDArray[np.int32], count: int) -> int:
    """A magnitude that `count` entries very likely reach."""
    sample = bits[:: max(1, len(bits) // SAMPLE)] & MAGNITUDE
    expected = count * len(sample) / len(bits)
    rank = int(expected + 4 * expected**0.5) + 8
    return int(np.partition(sample, len(sample) - rank)[len(sample) - rank]) if rank < len(sample) else 0


def _above(bits: npt.NDArray[np.int32], bound: int) -> tuple[Positions, npt.NDArray[np.int32]]:
    positions, magnitudes = [], []
    for start in range(0, len(bits), CHUNK):
        chunk = bits[start : start + CHUNK] & MAGNITUDE
        found = np.flatnonzero(chunk >= bound)
        positions.append(found + start)
        magnitudes.append(chunk[found])
    return np.concatenate(positions), np.concatenate(magnitudes)
