"""Gaussian noise from the operating system's entropy through a cipher: whoever knows the run's seed knows nothing of it.

A 256-bit key from `os.urandom`, the key stream of ChaCha20 (RFC 8439), and the transform of Box and Muller (1958). One draw a number, in
float32: the tails end at 6.5 standard deviations, which a draw passes once in 10^10.
"""

import math
import os

import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from torch import Tensor

PIECE = 1 << 16  # numbers of one pass: they stay in the processor's cache


class SecretNoise:
    """A stream of standard normal numbers that nobody can draw again."""

    def __init__(self) -> None:
        self._renew()

    def normal(self, size: int) -> Tensor:
        """(size,) float32."""
        if self._process != os.getpid():  # after a fork two processes would draw the same
            self._renew()
        made = torch.empty(size + size % 2)
        for begin in range(0, len(made), PIECE):
            self._fill(made[begin : begin + PIECE])
        return made[:size]

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
