"""FedSVD: FFA-LoRA whose A is made anew from the product every round, orthonormal.

Lee et al., FedSVD: Adaptive Orthogonalization for Private Federated Learning with LoRA, NeurIPS 2025. https://arxiv.org/abs/2505.12805
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from fedpeft.aggregate import Mean
from fedpeft.lowrank import pair, unpair
from fedpeft.messages import Broadcast, Update
from fedpeft.strategy import Phase, always
from fedpeft.tensors import not_a, targets
from strategies.fedavg import FedAvg


@dataclass(frozen=True)
class FedSVD(FedAvg):
    """Exact: the mean of B is the mean of the products, and B A = U S V^T goes on as B = U S, A = V^T."""

    phase: Callable[[int], Phase] = always(Phase(trains=not_a, shares=not_a, carries=False))
    low_rank: bool = True

    def aggregate(self, state: Broadcast, round: int, updates: Iterable[Update], mean: Mean) -> Broadcast:
        """A layer whose product is zero (no client moved it) keeps its A: an SVD of zero has no directions."""
        tensors = super().aggregate(state, round, updates, mean).tensors
        for layer in targets(tensors):
            product = pair(tensors, layer)
            if product.norm() > 0:
                tensors = tensors | unpair(layer, product.truncate(product.rank))
        return Broadcast(tensors)


def fedsvd() -> FedSVD:
    """B alone is trained and sent up; A comes down anew."""
    return FedSVD()
