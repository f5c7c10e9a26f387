"""One bit an entry: its sign, times the mean magnitude of its tensor.

Bernstein et al., signSGD: Compressed Optimisation for Non-Convex Problems, ICML 2018. https://arxiv.org/abs/1802.04434; the scale is
that of Karimireddy et al., Error Feedback Fixes SignSGD, ICML 2019. https://arxiv.org/abs/1901.09847
"""

from dataclasses import dataclass

import numpy as np

from fedpeft.codecs.base import CodecError, Layout
from fedpeft.codecs.envelope import Sizes, Vector, opened, packed, sealed, unpacked
from fedpeft.tensors import Tensors


@dataclass(frozen=True)
class Sign:
    """Wire: a scale (fp32) for each tensor, a bit for each entry. A zero counts as positive."""

    lossless = False

    def encode(self, tensors: Tensors, *, seed: int = 0) -> bytes:
        """The payload."""
        return sealed(repr(self), tensors, self._pack)

    def decode(self, data: bytes, layout: Layout, *, seed: int = 0) -> Tensors:
        """-scale or +scale everywhere."""
        return opened(repr(self), data, layout, self._unpack)

    def _pack(self, vector: Vector, sizes: Sizes) -> bytes:
        parts = np.split(vector, np.cumsum(sizes)[:-1]) if sizes else []
        scales = [np.abs(part).mean(dtype=np.float64) if len(part) else 0.0 for part in parts]
        return packed(np.array(scales, np.float32), "fp32") + np.packbits(vector < 0).tobytes()

    def _unpack(self, data: memoryview, sizes: Sizes) -> list[Vector]:
        entries, first = sum(sizes), 4 * len(sizes)
        if len(data) != first + (entries + 7) // 8:
            raise CodecError(f"{len(sizes)} scales and {entries} signs do not fit {len(data)} bytes")
        scales = unpacked(data[:first], "fp32")
        if len(scales) and scales.min() < 0:
            raise CodecError("the payload holds a scale below zero")
        bits = np.unpackbits(np.frombuffer(data[first:], np.uint8))
        if bits[entries:].any():
            raise CodecError("the payload's last bits are not empty")
        made, done = [], 0
        for size, scale in zip(sizes, scales, strict=True):
            made.append(scale * (1 - 2 * bits[done : done + size].view(np.int8)).astype(np.float32))
            done += size
        return made
