"""Sparse additive tuning: y = W x + S x, where S is zero but at fixed places that the run's seed draws alike at every client.

The places cross no wire: `support` makes them from the seed and the layer's name. SLoRA's first stage (Babakniya et al., 2023,
https://arxiv.org/abs/2308.06522) trains the values there; with density 1 they are the whole matrix, and a gradient step gives its gradient.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedpeft import seeds
from fedpeft.adapters.base import Adapted, precision
from fedpeft.adapters.wrapped import linear, sides, wrap
from fedpeft.models.base import Base


def support(seed: int, path: str, shape: tuple[int, int], density: float) -> Tensor:
    """The places (nnz,) int64 in the flat (m, n) matrix of the layer `path`: each is in with probability `density`; at least one."""
    m, n = shape
    if density >= 1:
        return torch.arange(m * n)
    drawn = torch.rand(m * n, generator=seeds.generator(seed, purpose=f"support of {path}"))
    found = (drawn < density).nonzero()[:, 0]
    return found if len(found) else drawn.argmin().view(1)


@dataclass(frozen=True)
class Sparse:
    """`density` is the share of a layer's entries; None: as many as a LoRA of rank `like` has there."""

    density: float | None = None
    like: int = 8
    targets: str | tuple[str, ...] | None = "all-linear"

    def attach(self, base: Base, seed: int) -> Adapted:
        """All values zero, so the model starts unchanged."""

        def make(path: str, inner: nn.Module) -> nn.Module:
            shape = sides(inner)
            return _Sparse(inner, shape, support(seed, path, shape, self.of(shape)))

        return wrap(base, linear(base, self.targets), make, ("values",), "sparse")

    def of(self, shape: tuple[int, int]) -> float:
        """The density in a layer of this shape."""
        return min(1.0, self.like * sum(shape) / (shape[0] * shape[1])) if self.density is None else self.density


class _Sparse(nn.Module):
    def __init__(self, inner: nn.Module, shape: tuple[int, int], places: Tensor) -> None:
        super().__init__()
        self.base_layer, self._shape = inner, shape
        weight = inner.weight
        assert isinstance(weight, Tensor)
        self.places = places.to(weight.device)
        self.values = nn.Parameter(torch.zeros(len(places), dtype=precision(weight), device=weight.device))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base_layer(x)
        m, n = self._shape
        change = self.values.new_zeros(m * n).index_put((self.places,), self.values).view(m, n)
        return y + F.linear(x.to(change.dtype), change).to(y.dtype)
