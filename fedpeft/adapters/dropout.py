"""Dropout whose mask depends on a key of each sample and on nothing else: not on its neighbours in a batch, nor on padding.

With one global generator a client's result would depend on who shares its wave. A key is drawn by the client's own generator for each
sample of each step; the mask is a hash of key, layer and position (the finalizer of MurmurHash3, Appleby 2008).
"""

import torch
from torch import Tensor, nn


class Keys:
    """The keys (N,) int32 of the samples of the present batch; None outside of training, when nothing is dropped."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self.present: Tensor | None = None


class KeyedDropout(nn.Module):
    """Dropout of layer number `layer` by `keys`."""

    def __init__(self, keys: Keys, layer: int) -> None:
        super().__init__()
        self._keys, self._layer = keys, layer

    def forward(self, x: Tensor) -> Tensor:
        """(N, d) or (N, L, d) -> the same."""
        if self._keys.present is None:
            return x
        return x * factors(self._keys.present, self._layer, x if x.dim() == 3 else x.unsqueeze(1), self._keys.rate).view(x.shape)


def factors(keys: Tensor, layer: int, x: Tensor, rate: float) -> Tensor:
    """(N, L, d) in the dtype of x: 0 with probability `rate`, else 1 / (1 - rate)."""
    n, length, width = x.shape
    made = torch.arange(length * width, dtype=torch.int32, device=x.device).mul_(_signed(0x9E3779B1))
    made = made.unsqueeze(0) ^ (keys.to(x.device) + _signed((layer * 0x85EBCA6B) & 0xFFFFFFFF)).mul(_signed(0xC2B2AE35)).unsqueeze(1)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, None)):
        made = made ^ ((made >> shift) & ((1 << (32 - shift)) - 1))
        if factor is not None:
            made = made.mul_(_signed(factor))
    kept = (made & 0x7FFFFFFF) >= round(rate * 2**31)
    return kept.to(x.dtype).div_(1 - rate).view(n, length, width)


def _signed(word: int) -> int:
    return word - (1 << 32) if word >= 1 << 31 else word
