"""LowRank: the product `B @ A` without forming it.

On this boundary a pair means exactly `B @ A`: a client's alpha / rank is already inside B, so pairs of any rank and any alpha can be added.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from fedpeft.tensors import Tensors


@dataclass(frozen=True, eq=False)
class LowRank:
    """The (m, n) matrix `B @ A` with `B` (m, r) and `A` (r, n)."""

    B: Tensor
    A: Tensor

    def __post_init__(self) -> None:
        if self.B.dim() != 2 or self.A.dim() != 2 or self.B.shape[1] != self.A.shape[0]:
            raise ValueError(f"B {tuple(self.B.shape)} and A {tuple(self.A.shape)} have no product; needed are (m, r) and (r, n)")

    @property
    def rank(self) -> int:
        """The width r of the factors, an upper bound of the product's rank."""
        return self.A.shape[0]

    def dense(self) -> Tensor:
        """The (m, n) product."""
        return self.B @ self.A

    def inner(self, other: "LowRank") -> float:
        """Frobenius inner product by Grams: O((m + n) r^2)."""
        return float(((self.B.T @ other.B) * (self.A @ other.A.T)).sum())

    def norm(self) -> float:
        """Frobenius norm."""
        return math.sqrt(max(self.inner(self), 0.0))

    def truncate(self, rank: int) -> "LowRank":
        """Best rank-`rank` approximation in Frobenius norm (Eckart-Young), without forming the m x n product.

        Costs O((m + n) r^2). Singular values go into B; a product of lower rank is padded with zeros, so that shapes do not depend on data.
        Signs are fixed (the largest entry of each column of B is positive) so that equal inputs give equal bits.
        """
        qb, rb = torch.linalg.qr(self.B.double())
        qa, ra = torch.linalg.qr(self.A.double().T)
        u, s, vt = torch.linalg.svd(rb @ ra.T, full_matrices=False)
        u, vt = (qb @ u)[:, :rank], (vt @ qa.T)[:rank]
        sign = u.gather(0, u.abs().argmax(0, keepdim=True)).sign()
        sign[sign == 0] = 1
        short = max(rank - len(s), 0)
        b = torch.nn.functional.pad(u * s[:rank] * sign, (0, short))
        a = torch.nn.functional.pad(vt * sign.T, (0, 0, 0, short))
        return LowRank(b.to(self.B.dtype), a.to(self.A.dtype))


def total(pairs: Iterable[tuple[float, LowRank]]) -> LowRank:
    """The sum of weight * product, exact: the factors are stacked, and past full rank refactored, which is exact too."""
    weights, parts = zip(*pairs, strict=True)
    both = LowRank(torch.cat([w * p.B for w, p in zip(weights, parts, strict=True)], 1), torch.cat([p.A for p in parts], 0))
    full = min(both.B.shape[0], both.A.shape[1])
    return both if both.rank <= full else both.truncate(full)


def pair(tensors: Tensors, target: str) -> LowRank:
    """The pair of the layer `target`."""
    return LowRank(tensors[target + ".B"], tensors[target + ".A"])
