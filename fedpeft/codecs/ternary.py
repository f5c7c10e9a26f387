"""ComPEFT: the largest entries become one number with their sign, all others zero.

Yadav et al., ComPEFT: Compression for Communicating Parameter Efficient Updates via Sparsification and Quantization, 2023.
https://arxiv.org/abs/2311.13171. Three things differ from its code: exactly q = max(1, floor(density * d)) entries are kept (there one more
and all ties), of equal ones the first; a single entry has its magnitude for a deviation, not NaN; the bits are written, not simulated.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
import numpy.typing as npt

from fedpeft.codecs import rice
from fedpeft.codecs.base import CodecError, Layout
from fedpeft.codecs.envelope import MOST, Sizes, Vector, entropy, opened, packed, sealed, unpacked
from fedpeft.codecs.largest import Positions, Scope, check, kept, scoped, shares
from fedpeft.tensors import Tensors

CHUNK = 1 << 16  # entries summed together in float64


@dataclass(frozen=True)
class Ternary:
    """Wire: the scales (fp32), a sign bit for each of the q entries, the positions.

    Where fewer than q entries are not zero, only those are kept; the signs keep their length, so that a short payload never asks for much
    memory.
    """

    density: float = 0.05  # share of the entries that are kept
    scale: Literal["std", "mean"] = "mean"  # deviation of all entries, as published; or mean magnitude of the kept: the least squares
    alpha: float = 1.0  # times the scale
    scope: Scope = "global"  # the largest of all tensors together, or of each
    scales: Scope = "global"  # one scale, or one for each tensor

    lossless = False

    @property
    def contracts(self) -> bool:
        """True if what is left out is never larger than what was given: error feedback needs that. With `std` it depends on the update."""
        return self.scale == "std" or self.alpha < 2

    def __post_init__(self) -> None:
        check(self.density, self.scope)
        if not 0 < self.alpha < MOST:
            raise ValueError(f"alpha={self.alpha}: needed is a finite number above 0")
        if self.scale not in ("std", "mean"):
            raise ValueError(f"scale={self.scale}: needed is std or mean")
        if self.scales not in ("global", "tensor"):
            raise ValueError(f"scales={self.scales}: needed is global or tensor")

    def encode(self, tensors: Tensors, *, seed: int = 0) -> bytes:
        """The payload."""
        return sealed(repr(self), tensors, self._pack)

    def decode(self, data: bytes, layout: Layout, *, seed: int = 0) -> Tensors:
        """-scale, 0 or +scale everywhere."""
        return opened(repr(self), data, layout, self._unpack)

    def entropy(self, decoded: Tensors) -> float:
        """Bits that the support and the signs of `decoded` need, see `envelope.entropy`."""
        return entropy(decoded, 1)

    def _pack(self, vector: Vector, sizes: Sizes) -> bytes:
        positions = kept(vector, sizes, self.density, self.scope)
        signs = np.zeros(len(positions), bool)
        values = vector[positions]
        if not values.all():
            some = np.flatnonzero(values)
            positions, values = positions[some], values[some]
        np.signbit(values, out=signs[: len(values)])
        scales = self._scales(vector, sizes, positions, values)
        return packed(scales, "fp32") + np.packbits(signs).tobytes() + rice.encode(positions, sizes)

    def _unpack(self, data: memoryview, sizes: Sizes) -> list[Vector]:
        q, number = shares(sizes, self.density, self.scope), len(scoped(sizes, self.scales))
        first = 4 * number
        second = first + (q + 7) // 8
        if len(data) < second:
            raise CodecError(f"{number} scales and {q} signs need {second} bytes, the payload holds {len(data)}")
        scales = unpacked(data[:first], "fp32")
        if number and scales.min() < 0:
            raise CodecError("the payload holds a scale below zero")
        places = rice.decode(data[second:], sizes, q)
        signs = np.unpackbits(np.frombuffer(data[first:second], np.uint8))
        if signs[sum(map(len, places)) :].any():
            raise CodecError("the payload has more signs than positions")
        each = scales if self.scales == "tensor" else scales.repeat(len(sizes))
        return list(_placed(places, sizes, signs.astype(np.uint32) << np.uint32(31), each))

    def _scales(self, vector: Vector, sizes: Sizes, positions: Positions, values: Vector) -> Vector:
        ends = np.cumsum([0, *scoped(sizes, self.scales)])
        cuts = np.searchsorted(positions, ends)
        if self.scale == "mean":
            found = [_mean_magnitude(values[a:b]) for a, b in pairwise(cuts)]
        else:
            found = [_deviation(vector[a:b]) for a, b in pairwise(ends)]
        return np.array([min(self.alpha * each, MOST) for each in found], np.float32)


def _placed(places: Sequence[Positions], sizes: Sizes, signs: npt.NDArray[np.uint32], scales: Vector) -> Iterator[Vector]:
    done = 0
    for where, size, scale in zip(places, sizes, scales, strict=True):
        out = np.zeros(size, np.float32)
        out[where] = (signs[done : done + len(where)] | scale.view(np.uint32)).view(np.float32)
        done += len(where)
        yield out


def _mean_magnitude(values: Vector) -> float:
    return float(np.abs(values).mean(dtype=np.float64)) if len(values) else 0.0


def _deviation(vector: Vector) -> float:
    """Sample deviation about the mean, in float64; the moments of chunks are joined as in Chan, Golub and LeVeque, 1979."""
    if len(vector) < 2:
        return float(np.abs(vector).sum(dtype=np.float64))
    count, mean, squares = 0, 0.0, 0.0
    for start in range(0, len(vector), CHUNK):
        chunk = vector[start : start + CHUNK].astype(np.float64)
        own = float(chunk.mean())
        chunk -= own
        step, both = own - mean, count + len(chunk)
        squares += float(chunk @ chunk) + step * step * count * len(chunk) / both
        mean += step * len(chunk) / both
        count = both
    return math.sqrt(squares / (count - 1))
