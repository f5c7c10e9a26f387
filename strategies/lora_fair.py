"""LoRA-FAIR: average A and B, then correct one of the means so that their product comes near the mean of the products.

Bian et al., LoRA-FAIR: Federated LoRA Fine-Tuning with Aggregation and Initialization Refinement, ICCV 2025.
https://arxiv.org/abs/2411.14961
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedpeft.aggregate import Mean
from fedpeft.lowrank import LowRank, pair, total
from fedpeft.messages import Broadcast, Update, proportions
from fedpeft.tensors import targets
from strategies.fedavg import FedAvg

RATE, MOST, STILL = 0.01, 1000, 1e-6  # of the server's descent (the rate per ||B||^2): the paper's were not readable, these are ours


@dataclass(frozen=True)
class LoRAFair(FedAvg):
    """With T = sum p_k B_k A_k, `cosine` (as published) minimizes 1 - cos(T, (B + D) A) + penalty ||D|| by gradient descent from D = 0.

    `ridge` (ours) minimizes ||T - (B + D) A||^2 + penalty ||D||^2 in closed form. `residual` says which mean is corrected: B, A, or first B
    and then A beside the corrected B.
    """

    solver: Literal["cosine", "ridge"] = "cosine"
    residual: Literal["B", "A", "both"] = "B"
    penalty: float = 0.01
    low_rank: bool = True
    mean_only = False

    def __post_init__(self) -> None:
        if self.solver not in ("cosine", "ridge"):
            raise ValueError(f"strategy.solver={self.solver}: needed is cosine or ridge")
        if self.residual not in ("B", "A", "both"):
            raise ValueError(f"strategy.residual={self.residual}: needed is B, A or both")
        if not self.penalty >= 0:
            raise ValueError(f"strategy.penalty={self.penalty}: needed is at least 0")

    def aggregate(self, state: Broadcast, round: int, updates: Iterable[Update], mean: Mean) -> Broadcast:
        """Holds all updates: the means are needed before the products' part along them."""
        parts = proportions(updates)
        tensors = state.tensors | mean(update for _, update in parts)
        for layer in targets(tensors):
            true = total((p, pair(update.tensors, layer)) for p, update in parts)
            B, A = tensors[layer + ".B"], tensors[layer + ".A"]
            if self.residual != "A":
                B = (B.double() + self._correction(true, B.double(), A.double())).to(B.dtype)
            if self.residual != "B":
                A = (A.double() + self._correction(true.T, A.double().T, B.double().T).T).to(A.dtype)
            tensors |= {layer + ".B": B, layer + ".A": A}
        return Broadcast(tensors)

    def _correction(self, true: LowRank, B: Tensor, A: Tensor) -> Tensor:
        """D (m, r), float64, from m x r and r x r matrices alone: C = T A^T and G = A A^T."""
        C, G = true.B.double() @ (true.A.double() @ A.T), A @ A.T
        if self.solver == "cosine":
            return _descended(C, G, true.norm(), B, self.penalty)
        apart, ridge = C - B @ G, G + self.penalty * torch.eye(len(G), dtype=G.dtype)
        solved: Tensor = apart @ torch.linalg.pinv(ridge, hermitian=True)  # a zero penalty may leave G singular
        return solved


def _descended(C: Tensor, G: Tensor, size: float, B: Tensor, penalty: float) -> Tensor:
    """The best D seen on the way down; the cosine's gradient in X = B + D is C / (t n) - <C, X> X G / (t n^3), n = ||X A||.

    It falls as 1 / ||B|| while B grows, so the rate grows as ||B||^2: one rate for all sizes would throw a small B to many times its norm.
    """
    rate = RATE * float(B.square().sum())
    best = D = torch.zeros_like(B)
    least = before = float("inf")
    for _ in range(MOST):
        X = B + D
        n = float(((X @ G) * X).sum().clamp(min=0).sqrt())
        if not n or not size:
            return best
        along, length = float((C * X).sum()), float((D.square().sum() + 1e-12).sqrt())
        value = 1 - along / (size * n) + penalty * length
        if value < least:
            best, least = D, value
        if abs(before - value) < STILL:
            break
        before = value
        D = D - rate * (penalty * D / length - C / (size * n) + along / (size * n**3) * (X @ G))
    return best


def lora_fair(
    solver: Literal["cosine", "ridge"] = "cosine", residual: Literal["B", "A", "both"] = "B", penalty: float = 0.01
) -> LoRAFair:  # fmt: skip
    """FedAvg of the factors with a correction of their product."""
    return LoRAFair(solver=solver, residual=residual, penalty=penalty)
