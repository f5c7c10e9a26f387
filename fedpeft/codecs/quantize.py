"""Blockwise integers of 8 or 4 bits: each block of entries by its largest magnitude, rounded by chance so that the mean is kept.

Alistarh et al., QSGD: Communication-Efficient SGD via Gradient Quantization and Encoding, NeurIPS 2017. https://arxiv.org/abs/1610.02132
(there: buckets by their norm; here by the largest magnitude, which uses all levels).
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
import numpy.typing as npt

from fedpeft.codecs.base import CodecError, Layout
from fedpeft.codecs.envelope import KINDS, Sizes, Vector, opened, packed, sealed, unpacked
from fedpeft.tensors import Tensors

MOST = np.float32(3.3895313892515355e38)  # of a scale: the largest bf16, so that no product leaves fp32
TINY = 2.0**-100  # a block that stays below is zero: levels would be subnormal


@dataclass(frozen=True)
class Quantize:
    """Wire: the scale of each block, then a code for each entry from -127 to 127 (8 bits) or -7 to 7 (4 bits). Blocks end with a tensor."""

    bits: Literal[4, 8] = 8
    block: int = 64  # entries that share a scale
    scales: Literal["bf16", "fp32"] = "bf16"  # bf16 is rounded up, so that no entry is cut; fp16 would lose scales below 6e-8
    rounding: Literal["stochastic", "nearest"] = "stochastic"  # unbiased with the round's seed; or half the largest error

    lossless = False

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ValueError(f"bits={self.bits}: needed is 4 or 8")
        if self.block < 1:
            raise ValueError(f"block={self.block}: needed is at least 1 entry")
        if self.scales not in ("bf16", "fp32"):
            raise ValueError(f"scales={self.scales}: needed is bf16 or fp32")
        if self.rounding not in ("stochastic", "nearest"):
            raise ValueError(f"rounding={self.rounding}: needed is stochastic or nearest")

    def encode(self, tensors: Tensors, *, seed: int = 0) -> bytes:
        """The payload; `seed` draws the roundings."""
        return sealed(repr(self), tensors, lambda vector, sizes: self._pack(vector, sizes, seed))

    def decode(self, data: bytes, layout: Layout, *, seed: int = 0) -> Tensors:
        """code * scale / levels."""
        return opened(repr(self), data, layout, self._unpack)

    def _pack(self, vector: Vector, sizes: Sizes, seed: int) -> bytes:
        starts, lengths = self._blocks(sizes)
        if not len(starts):
            return b""
        scales = self._rounded_up(np.maximum.reduceat(np.abs(vector), starts))
        safe = np.where(scales > 0, scales, np.float32(1))
        codes = vector * np.repeat(np.where(scales > 0, np.float32(self._levels) / safe, np.float32(0)), lengths)
        codes += np.random.default_rng(seed).random(len(codes), np.float32) if self.rounding == "stochastic" else np.float32(0.5)
        np.floor(codes, out=codes)
        np.clip(codes, -self._levels, self._levels, out=codes)
        return packed(scales, self.scales) + self._narrow(codes.astype(np.int8))

    def _unpack(self, data: memoryview, sizes: Sizes) -> list[Vector]:
        entries, blocks = sum(sizes), sum(-(-size // self.block) for size in sizes)
        first = blocks * KINDS[self.scales].itemsize
        if len(data) != first + (entries * self.bits + 7) // 8:
            raise CodecError(f"{blocks} scales and {entries} codes of {self.bits} bits do not fit {len(data)} bytes")
        scales = unpacked(data[:first], self.scales)
        codes = self._wide(np.frombuffer(data[first:], np.uint8), entries)
        if entries and (scales.min() < 0 or scales.max() > MOST or codes.min() < -self._levels):
            raise CodecError("the payload holds a scale or a code that no sender makes")
        whole: Vector = np.multiply(codes, np.repeat(scales / np.float32(self._levels), self._blocks(sizes)[1]), dtype=np.float32)
        return [part.copy() for part in np.split(whole, np.cumsum(sizes)[:-1])] if sizes else []

    @property
    def _levels(self) -> int:
        return 127 if self.bits == 8 else 7

    def _blocks(self, sizes: Sizes) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Where each block starts, and its length."""
        ends = np.cumsum([0, *sizes])
        starts = np.concatenate([np.zeros(0, np.int64), *(np.arange(a, b, self.block) for a, b in pairwise(ends))])
        return starts, np.diff(starts, append=ends[-1])

    def _rounded_up(self, scales: Vector) -> Vector:
        made: Vector = np.where(scales < TINY, np.float32(0), scales)
        if self.scales == "bf16":
            made = ((made.view(np.uint32) + 0xFFFF) & np.uint32(0xFFFF0000)).view(np.float32)
        return np.minimum(made, MOST)

    def _narrow(self, codes: npt.NDArray[np.int8]) -> bytes:
        if self.bits == 8:
            return codes.tobytes()
        nibbles = np.append(codes, np.zeros(len(codes) % 2, np.int8)).view(np.uint8) & 15
        return (nibbles[::2] | nibbles[1::2] << 4).tobytes()

    def _wide(self, data: npt.NDArray[np.uint8], entries: int) -> npt.NDArray[np.int8]:
        if self.bits == 8:
            return data.view(np.int8)
        if entries % 2 and data[-1] >> 4:
            raise CodecError("the payload's last half byte is not empty")
        codes = np.empty(2 * len(data), np.int8)
        codes[::2] = (data << 4).view(np.int8) >> 4  # the shift back carries the sign
        codes[1::2] = data.view(np.int8) >> 4
        return codes[:entries]
