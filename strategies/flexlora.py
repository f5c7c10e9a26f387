"""FlexLoRA: average the products, give each client the best approximation of its rank.

Bai et al., Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client Resources, NeurIPS 2024.
https://arxiv.org/abs/2402.11505
"""

from collections.abc import Iterable
from dataclasses import dataclass

from fedpeft.aggregate import Mean
from fedpeft.lowrank import pair, total, unpair
from fedpeft.messages import Broadcast, Update, proportions
from fedpeft.strategy import Federation
from fedpeft.tensors import targets
from strategies.fedavg import OfProducts, beside


@dataclass(frozen=True)
class FlexLoRA(OfProducts):
    """Not exact: what lies beyond the server's rank, and for a client beyond its own, is lost.

    Singular values are sorted, so a client's cut is the best approximation of its rank.
    """

    def aggregate(self, state: Broadcast, round: int, updates: Iterable[Update], mean: Mean) -> Broadcast:
        """Holds all updates. T = sum p_k B_k A_k = U S V^T, then B = U_r S_r and A = V_r^T."""
        parts, tensors = proportions(updates), dict(state.tensors)
        for layer in targets(tensors):
            before, products = pair(tensors, layer), [(p, pair(update.tensors, layer)) for p, update in parts]
            if sum(one.rank for _, one in products) < before.rank:
                products.append((0.0, before))  # its A gives directions to the ranks left over: zero in both factors they would never learn
            tensors |= unpair(layer, total(products).truncate(before.rank))
        return Broadcast(tensors | beside(state, parts, mean))


def flexlora(run: Federation) -> FlexLoRA:
    """FedAvg of products, with clients of any rank."""
    return FlexLoRA(run=run)
