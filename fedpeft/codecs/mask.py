"""A random mask that both ends draw from one seed: the values of few entries, and no positions on the wire.

Konecny et al., Federated Learning: Strategies for Improving Communication Efficiency, 2016. https://arxiv.org/abs/1610.05492 (random mask).
Ours is even: of the vector cut into q nearly equal runs, one entry of each, all with the same chance. The count is then exact, and the mean
over masks of what is sent, times the length of the run, is the vector.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from numpy.random import PCG64

from fedpeft.codecs.base import CodecError, Layout
from fedpeft.codecs.envelope import KINDS, MOST, Kind, Sizes, Vector, opened, packed, sealed, unpacked
from fedpeft.codecs.largest import check, share
from fedpeft.tensors import Tensors

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Mask:
    """Wire: the values of the q = max(1, floor(density * d)) entries of the mask."""

    density: float = 0.1  # share of the entries that are sent
    values: Kind = "fp32"  # on the wire
    unbiased: bool = False  # times the length of the run, about 1 / density: the mean over masks is the update; not with error feedback

    lossless = False

    @property
    def contracts(self) -> bool:
        """True if what is left out is never larger than what was given: error feedback needs that."""
        return not self.unbiased

    def __post_init__(self) -> None:
        check(self.density)
        if self.values not in KINDS:
            raise ValueError(f"values={self.values}: needed is {', '.join(KINDS)}")

    def encode(self, tensors: Tensors, *, seed: int = 0) -> bytes:
        """The payload; `seed` draws the mask."""
        return sealed(f"{self} with seed {seed}", tensors, lambda vector, sizes: self._pack(vector, seed))

    def decode(self, data: bytes, layout: Layout, *, seed: int = 0) -> Tensors:
        """The values in the places of the same mask, all else zero."""
        return opened(f"{self} with seed {seed}", data, layout, lambda view, sizes: self._unpack(view, sizes, seed))

    def mask(self, entries: int, seed: int) -> tuple[Numbers, Numbers]:
        """The rising positions of the q entries that are sent, and the length of the run each was drawn from."""
        q = share(self.density, entries)
        step, rest = divmod(entries, max(q, 1))
        starts = np.arange(q + 1) * step + np.arange(q + 1) * rest // max(q, 1)
        lengths = np.diff(starts)
        # The raw stream of PCG64 is the same in every version of numpy; a generator's distributions need not be.
        drawn = PCG64(seed).random_raw(q) >> np.uint64(32)
        return starts[:-1] + (drawn * lengths.astype(np.uint64) >> np.uint64(32)).astype(np.int64), lengths

    def _pack(self, vector: Vector, seed: int) -> bytes:
        return packed(vector[self.mask(len(vector), seed)[0]], self.values)

    def _unpack(self, data: memoryview, sizes: Sizes, seed: int) -> list[Vector]:
        q = share(self.density, sum(sizes))
        if len(data) != q * KINDS[self.values].itemsize:
            raise CodecError(f"{q} values of {self.values} do not fit {len(data)} bytes")
        values = unpacked(data, self.values)
        places, lengths = self.mask(sum(sizes), seed)
        if self.unbiased:
            values = np.clip(values * lengths.astype(np.float64), -MOST, MOST).astype(np.float32)
        ends = np.cumsum([0, *sizes])
        cuts = np.searchsorted(places, ends)
        made = []
        for group, size in enumerate(sizes):
            own = slice(cuts[group], cuts[group + 1])
            out = np.zeros(size, np.float32)
            out[places[own] - ends[group]] = values[own]
            made.append(out)
        return made
