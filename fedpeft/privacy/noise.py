"""Draws of private runs, from the operating system's entropy through a cipher: whoever knows the run's seed knows nothing of them.

A 256-bit key from `os.urandom`, the key stream of ChaCha20 (RFC 8439), and the transform of Box and Muller (1958). One draw a number, in
float32: the tails end at 6.5 standard deviations, which a draw passes once in 10^10.
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
        """(size,) independent standard normal numbers, float32."""
        ...

    def uniform(self, size: int) -> Tensor:
        """(size,) independent numbers in [0, 1), float64."""
        ...


class Secret:
    """A stream that nobody can draw again."""

    def __init__(self) -> None:
        self._renew()

    def normal(self, size: int) -> Tensor:
        """(size,) independent standard normal numbers, float32."""
        self._check()
        made = torch.empty(size + size % 2)
        for begin in range(0, len(made), PIECE):
            self._fill(made[begin : begin + PIECE])
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

    def _fill(self, into: Tensor) -> None:
        half = len(into) // 2
        raw = torch.frombuffer(bytearray(self._stream.update(bytes(8 * half))), dtype=torch.int32)
        positive = raw[:half].bitwise_and_(0x7FFFFFFF)
        uniform = positive.to(torch.float32).add_(1.0).mul_(2.0**-31)  # in [2^-31, 1]: small ones in full precision, and never zero
        radius = uniform.log_().mul_(-2.0).clamp_(min=0.0).sqrt_()
        angle = raw[half:].to(torch.float32).mul_(math.pi * 2.0**-31)
        torch.mul(radius, angle.cos(), out=into[:half])
        torch.mul(radius, angle.sin_(), out=into[half:])


class SeededInsecure:
    """A stream that whoever knows `generator`'s seed can draw again and subtract: for tests and repeatable simulations alone."""

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator

    def normal(self, size: int) -> Tensor:
        """(size,) standard normal numbers, float32."""
        return torch.randn(size, generator=self._generator)

    def uniform(self, size: int) -> Tensor:
        """(size,) numbers in [0, 1), float64."""
        return torch.rand(size, generator=self._generator, dtype=torch.float64)
