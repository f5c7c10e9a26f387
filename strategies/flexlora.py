"""FlexLoRA: average the products, give each client the best approximation of its rank.

Bai et al., Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client Resources, NeurIPS 2024.
https://arxiv.org/abs/2402.11505
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from fedpeft.aggregate import Mean
from fedpeft.lowrank import pair, rank_of, total, unpair
from fedpeft.messages import Broadcast, Update, proportions, sized
from fedpeft.strategy import Federation
from fedpeft.tensors import targets
from strategies.fedavg import FedAvg, beside


@dataclass(frozen=True)
class FlexLoRA(FedAvg):
    """Not exact: what lies beyond the server's rank, and for a client beyond its own, is lost (the smallest singular values)."""

    run: Federation = field(default_factory=Federation)
    low_rank: bool = True
    mean_only = False

    def broadcast(self, state: Broadcast, round: int, client: int | None) -> Broadcast:
        """Singular values are sorted, so a cut is the best approximation of every rank."""
        return sized(state, self.run.rank(client))

    def aggregate(self, state: Broadcast, round: int, updates: Iterable[Update], mean: Mean) -> Broadcast:
        """Holds all updates. T = sum p_k B_k A_k = U S V^T, then B = U_r S_r and A = V_r^T."""
        parts, tensors = proportions(updates), dict(state.tensors)
        for layer in targets(tensors):
            whole = total((p, pair(update.tensors, layer)) for p, update in parts)
            tensors |= unpair(layer, whole.truncate(rank_of({layer + ".A": tensors[layer + ".A"]})))
        return Broadcast(tensors | beside(state, parts, mean))


def flexlora(run: Federation) -> FlexLoRA:
    """FedAvg of products, with clients of any rank."""
    return FlexLoRA(run=run)
