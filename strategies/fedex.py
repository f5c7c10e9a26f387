"""FedEx-LoRA: average A and B, and add what that misses to the base.

Singhal et al., FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of Foundation Models, ACL 2025.
https://arxiv.org/abs/2410.09432
"""

from collections.abc import Iterable
from dataclasses import dataclass

from fedpeft.aggregate import Mean
from fedpeft.lowrank import LowRank, appended, pair, total
from fedpeft.messages import Broadcast, Update, proportions
from fedpeft.tensors import targets
from strategies.fedavg import FedAvg


@dataclass(frozen=True)
class FedEx(FedAvg):
    """Exact, unless the residual sum p_k B_k A_k - B A is cut to its best approximation of rank `residual` (the paper's cheaper way)."""

    residual: int | None = None
    low_rank: bool = True
    mean_only = False

    def __post_init__(self) -> None:
        if self.residual is not None and self.residual < 1:
            raise ValueError(f"strategy.residual={self.residual}: needed is a rank of at least 1, or null for all of it")

    def aggregate(self, state: Broadcast, round: int, updates: Iterable[Update], mean: Mean) -> Broadcast:
        """Holds all updates: the residual is a sum over their products.

        It is sum p_k (B_k - B)(A_k - A) (algorithms 0.1a). Since the p_k (B_k - B) add up to zero, A_1 may stand for A: the term of the
        first client vanishes, and (K - 1) r ranks are sent.
        """
        parts = proportions(updates)
        tensors = state.tensors | mean(update for _, update in parts)
        missed = {}
        for layer in targets(tensors):
            middle, first = pair(tensors, layer), pair(parts[0][1].tensors, layer)
            apart = [(p, LowRank(own.B - middle.B, own.A - first.A)) for p, update in parts[1:] for own in [pair(update.tensors, layer)]]
            if apart:
                missed[layer] = total(apart) if self.residual is None else total(apart).truncate(self.residual)
        return Broadcast(tensors, appended(state.base_delta, missed))


def fedex(residual: int | None = None) -> FedEx:
    """FedAvg of the factors, made exact by the base."""
    return FedEx(residual=residual)
