"""Random low-rank products, and when two matrices count as equal."""

import torch

from fedpeft.lowrank import LowRank


def drawn(m: int, rank: int, n: int, seed: int = 0) -> LowRank:
    rng = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(m, rank, generator=rng, dtype=torch.float64), torch.randn(rank, n, generator=rng, dtype=torch.float64))


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-12) -> bool:
    return a.shape == b.shape and bool((a - b).norm() <= tolerance * (1 + b.norm()))
