"""FLoRIST: FLoRA whose stack is cut to the singular values that hold a share of its energy.

Ramesh and Li, FLoRIST: Singular Value Thresholding for Efficient and Accurate Federated Fine-Tuning, 2025. https://arxiv.org/abs/2506.09199
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
class FLoRIST(OfProducts):
    """Exact up to `energy`: a layer's error is at most sqrt(1 - energy) of its norm. The rank p follows, per layer and round."""

    energy: float = 0.99  # share of the squared singular values that is kept

    def __post_init__(self) -> None:
        if not 0 < self.energy <= 1:
            raise ValueError(f"strategy.energy={self.energy}: needed is a share in (0, 1]")

    def aggregate(self, state: Broadcast, round: int, updates: Iterable[Update], mean: Mean) -> Broadcast:
        """Holds all updates. By QR of the stacks, which equals the paper's SVDs of both (algorithms 0.1e)."""
        parts, kept = proportions(updates), {}
        for layer in targets(state.tensors):
            whole = total((p, pair(update.tensors, layer)) for p, update in parts)
            kept[layer] = whole.truncate(whole.energy_rank(self.energy))
        rest = beside(state, parts, mean)
        return Broadcast(state.tensors | fresh(state.tensors, self.run.seed, round) | rest, appended(state.base_delta, kept))


def florist(run: Federation, energy: float = 0.99) -> FLoRIST:
    """FLoRA with thresholded singular values."""
    return FLoRIST(run=run, energy=energy)
