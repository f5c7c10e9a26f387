"""FLoRA: stack the clients' factors into the base, start a fresh LoRA every round; clients may have any rank.

Wang et al., FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank Adaptations, NeurIPS 2024.
https://arxiv.org/abs/2409.05976
"""

from collections.abc import Iterable
from dataclasses import dataclass

from fedpeft.aggregate import Mean
from fedpeft.lowrank import appended, fresh, pair, total
from fedpeft.messages import Broadcast, Update, proportions
from fedpeft.strategy import Federation
from fedpeft.tensors import targets
from strategies.fedavg import OfProducts, beside


@dataclass(frozen=True)
class FLoRA(OfProducts):
    """Exact: the base moves by sum p_k B_k A_k, and B starts at zero again."""

    def aggregate(self, state: Broadcast, round: int, updates: Iterable[Update], mean: Mean) -> Broadcast:
        """Holds all updates."""
        parts = proportions(updates)
        stack = {layer: total((p, pair(update.tensors, layer)) for p, update in parts) for layer in targets(state.tensors)}
        rest = beside(state, parts, mean)
        return Broadcast(state.tensors | fresh(state.tensors, self.run.seed, round) | rest, appended(state.base_delta, stack))


def flora(run: Federation) -> FLoRA:
    """Stacked products of clients of any rank."""
    return FLoRA(run=run)
