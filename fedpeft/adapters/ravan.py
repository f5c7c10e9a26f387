"""RAVAN: several trained r x r heads between frozen orthonormal factors, y = W x + sum_i s_i B_i H_i A_i x.

Raje et al., RAVAN: Multi-Head Low-Rank Adaptation for Federated Fine-Tuning, NeurIPS 2025. https://arxiv.org/abs/2506.05568

The heads' factors lie side by side: `<layer>.B` (m, h r), `<layer>.A` (h r, n), `<layer>.H` (h, r, r), `<layer>.s` (h,).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedpeft import seeds
from fedpeft.adapters.base import Adapted, precision
from fedpeft.adapters.wrapped import fitting, linear, orthonormal, sides, wrap
from fedpeft.models.base import Base


@dataclass(frozen=True)
class Ravan:
    """`rank` is that of one head. `capped`: a layer smaller than heads * rank gets heads of the rank it has."""

    rank: int = 16
    heads: int = 4
    targets: str | tuple[str, ...] | None = "all-linear"
    capped: bool = False

    def attach(self, base: Base, seed: int) -> Adapted:
        """B and A orthonormal over all heads together, drawn from `seed`; H zero, s one."""
        if self.heads < 1:
            raise ValueError(f"strategy.heads={self.heads}: needed is at least 1")
        rng = seeds.generator(seed, purpose="adapter")

        def make(path: str, inner: nn.Module) -> nn.Module:
            most = min(sides(inner)) // self.heads
            if not most:
                raise ValueError(
                    f"strategy.heads={self.heads} are more than the layer {path} has ranks ({' x '.join(map(str, sides(inner)))}); "
                    f"needed is at most {min(sides(inner))}"
                )
            rank = fitting(self.rank, inner, path, capped=self.capped, field="strategy.rank", most=most)
            return _Heads(inner, *orthonormal(*sides(inner), self.heads * rank, rng), self.heads)

        return wrap(base, linear(base, self.targets), make, ("A", "H", "s", "B"), "ravan")


class _Heads(nn.Module):
    def __init__(self, inner: nn.Module, B: Tensor, A: Tensor, heads: int) -> None:
        super().__init__()
        self.base_layer = inner
        weight = inner.weight
        assert isinstance(weight, Tensor)
        rank = len(A) // heads
        parts = (A, torch.zeros(heads, rank, rank), torch.ones(heads), B)
        self.A, self.H, self.s, self.B = (nn.Parameter(value.to(weight.device, precision(weight))) for value in parts)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base_layer(x)
        inside = (x.to(self.A.dtype) @ self.A.T).unflatten(-1, self.H.shape[:2])
        inside = torch.einsum("...hj,hij->...hi", inside, self.H * self.s[:, None, None])
        return y + (inside.flatten(-2) @ self.B.T).to(y.dtype)
