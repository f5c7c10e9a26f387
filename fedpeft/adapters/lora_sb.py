"""LoRA-SB: a trained r x r core R between two factors, y = W x + B R A x (Ponkshe et al., https://arxiv.org/abs/2411.19557).

Fed-SB trains and exchanges R alone (Singhal et al., https://arxiv.org/abs/2502.15436): means of R are exact, since B and A are the same
everywhere. B and A are orthonormal, as LoRA-SB needs; R is zero, so the model starts unchanged. `start="xs"` takes them from the SVD of
the frozen weight (LoRA-XS, Balazy et al., https://arxiv.org/abs/2405.17604), `start="random"` from the run's seed; a strategy may send
others.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fedpeft import seeds
from fedpeft.adapters.base import Adapted, is_transposed, precision
from fedpeft.adapters.wrapped import fitting, linear, orthonormal, sides, wrap
from fedpeft.lowrank import nearest
from fedpeft.models.base import Base


@dataclass(frozen=True)
class LoraSB:
    """`targets` as for LoRA. `capped`: a layer smaller than `rank` gets the rank it has."""

    rank: int = 8
    targets: str | tuple[str, ...] | None = "all-linear"
    start: Literal["random", "xs"] = "random"
    capped: bool = False

    def __post_init__(self) -> None:
        if self.start not in ("random", "xs"):
            raise ValueError(f"adapter.start={self.start}: needed is random or xs")

    def attach(self, base: Base, seed: int) -> Adapted:
        """Wraps every target. Raises `ValueError` for a rank larger than its layer, and for a name that fits no layer."""
        rng = seeds.generator(seed, purpose="adapter")

        def make(path: str, inner: nn.Module) -> nn.Module:
            rank = fitting(self.rank, inner, path, capped=self.capped)
            return _Core(inner, *(orthonormal(*sides(inner), rank, rng) if self.start == "random" else _leading(inner, rank, seed)))

        return wrap(base, linear(base, self.targets), make, ("A", "R", "B"), "lora_sb")


def _leading(inner: nn.Module, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """The leading left (m, r) and right (r, n) singular vectors of the frozen weight, float64; signs fixed."""
    weight = inner.weight
    assert isinstance(weight, Tensor)
    left, _, right = nearest(weight.T if is_transposed(inner) else weight, rank, seed=seed).svd()  # a weight of lower rank has them too
    return left, right


class _Core(nn.Module):
    def __init__(self, inner: nn.Module, B: Tensor, A: Tensor) -> None:
        super().__init__()
        self.base_layer = inner
        weight = inner.weight
        assert isinstance(weight, Tensor)
        rank = len(A)
        self.A, self.R, self.B = (nn.Parameter(value.to(weight.device, precision(weight))) for value in (A, torch.zeros(rank, rank), B))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base_layer(x)
        inside = x.to(self.A.dtype) @ self.A.T @ self.R.T
        return y + (inside @ self.B.T).to(y.dtype)
