"""Draws of private runs, from the operating system's entropy through a cipher: whoever knows the run's seed knows nothing of them.

A 256-bit key from `os.urandom`, the key stream of ChaCha20 (RFC 8439), the transform of Box and Muller (1958) with radii of 64 random bits,
and the sum of two draws for each number: one draw alone lies on a lattice that shows through a released sum, and tells what was added to it
(Mironov, CCS 2012; Holohan and Braghin, 2021). Tails end at 13 standard deviations, which nobody will see.
"""

import math
import os
from typing import Protocol

import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from torch import Tensor

PIECE = 1 << 16  # numbers of one pass: they stay in the processor's cache


class Source(Protocol):
    """Where noise and secret samples come from."""

    def normal(self, size: int) -> Tensor:
        """(size,) independent standard normal numbers, float64."""
        ...

    def uniform(self, size: int) -> Tensor:
        """(size,) independent numbers in [0, 1), float64."""
        ...


class Secret:
    """A stream that nobody can draw again."""

    def __init__(self) -> None:
        self._renew()

    def normal(self, size: int) -> Tensor:
        """(size,) independent standard normal numbers, float64."""
        self._check()
        made = torch.empty(size + size % 2, dtype=torch.float64)
        for begin in range(0, len(made), PIECE):
            some = made[begin : begin + PIECE]
            torch.add(self._pairs(len(some) // 2), self._pairs(len(some) // 2), out=some).mul_(0.5**0.5)
        return made[:size]

    def uniform(self, size: int) -> Tensor:
        """(size,) independent numbers in [0, 1), multiples of 2^-53, float64."""
        self._check()
        raw = torch.frombuffer(bytearray(self._stream.update(bytes(8 * size)) if size else b"\0" * 8), dtype=torch.int64)[:size]
        return raw.bitwise_and(2**53 - 1).double().mul_(2.0**-53)

    def _check(self) -> None:
        if self._process != os.getpid():  # after a fork two processes would draw the same
            self._renew()

    def _renew(self) -> None:
        self._process = os.getpid()
        self._stream = Cipher(algorithms.ChaCha20(os.urandom(32), bytes(16)), mode=None).encryptor()

    def _pairs(self, half: int) -> Tensor:
        """(2 half,) float64: cosine and sine of as many angles, times radii."""
        bits = torch.frombuffer(bytearray(self._stream.update(bytes(8 * half))), dtype=torch.int64)
        radius = bits.double().mul_(2.0**-64).add_(0.5 + 2.0**-65)  # in [2^-65, 1): near zero float64 keeps every bit
        small = radius < 2.0**-10  # where adding one half has rounded bits away
        radius[small] = (bits[small] - torch.iinfo(torch.int64).min).double().add_(0.5).mul_(2.0**-64)
        radius = radius.log_().mul_(-2.0).sqrt_()
        turns = torch.frombuffer(bytearray(self._stream.update(bytes(4 * half))), dtype=torch.int32).to(torch.float32)
        angle = turns.mul_(math.pi * 2.0**-31)
        return torch.cat([radius * angle.cos(), radius * angle.sin()])


class SeededInsecure:
    """A stream that whoever knows `generator`'s seed can draw again and subtract: for tests and repeatable simulations alone."""

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator

    def normal(self, size: int) -> Tensor:
        """(size,) standard normal numbers, float64."""
        return torch.randn(size, generator=self._generator, dtype=torch.float64)

    def uniform(self, size: int) -> Tensor:
        """(size,) numbers in [0, 1), float64."""
        return torch.rand(size, generator=self._generator, dtype=torch.float64)
