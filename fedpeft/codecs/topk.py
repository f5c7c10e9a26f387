"""Top-k: the entries of largest magnitude with their values, all others zero.

Aji and Heafield, Sparse Communication for Distributed Gradient Descent, EMNLP 2017. https://arxiv.org/abs/1704.05021
"""

from dataclasses import dataclass

import numpy as np

from fedpeft.codecs import rice
from fedpeft.codecs.base import CodecError, Layout
from fedpeft.codecs.envelope import KINDS, Kind, Sizes, Vector, entropy, opened, packed, sealed, unpacked
from fedpeft.codecs.largest import Scope, check, kept, shares
from fedpeft.tensors import Tensors


@dataclass(frozen=True)
class TopK:
    """Wire: the values of the q = max(1, floor(density * d)) kept entries, the positions. Of equal magnitudes the first is kept."""

    density: float = 0.05  # share of the entries that are kept
    values: Kind = "fp32"  # on the wire; fp16 ends at 65504 and loses what is below 6e-8
    scope: Scope = "global"  # the largest of all tensors together, or of each

    lossless = False

    def __post_init__(self) -> None:
        check(self.density, self.scope)
        if self.values not in KINDS:
            raise ValueError(f"values={self.values}: needed is {', '.join(KINDS)}")

    def encode(self, tensors: Tensors, *, seed: int = 0) -> bytes:
        """The payload."""
        return sealed(repr(self), tensors, self._pack)

    def decode(self, data: bytes, layout: Layout, *, seed: int = 0) -> Tensors:
        """The kept values in their places."""
        return opened(repr(self), data, layout, self._unpack)

    def entropy(self, decoded: Tensors) -> float:
        """Bits that the support of `decoded` needs, see `envelope.entropy`, and its values as they are sent."""
        return entropy(decoded, 8 * KINDS[self.values].itemsize)

    def _pack(self, vector: Vector, sizes: Sizes) -> bytes:
        positions = kept(vector, sizes, self.density, self.scope)
        return packed(vector[positions], self.values) + rice.encode(positions, sizes)

    def _unpack(self, data: memoryview, sizes: Sizes) -> list[Vector]:
        q = shares(sizes, self.density, self.scope)
        end = q * KINDS[self.values].itemsize
        if len(data) < end:
            raise CodecError(f"{q} values need {end} bytes, the payload holds {len(data)}")
        values = unpacked(data[:end], self.values)
        places = rice.decode(data[end:], sizes, q)
        if sum(map(len, places)) != q:
            raise CodecError(f"the payload has {sum(map(len, places))} positions for {q} values")
        made, done = [], 0
        for where, size in zip(places, sizes, strict=True):
            out = np.zeros(size, np.float32)
            out[where] = values[done : done + len(where)]
            done += len(where)
            made.append(out)
        return made
