"""FedAvg of every shared tensor; with LoRA this is FedIT.

McMahan et al., Communication-Efficient Learning of Deep Networks from Decentralized Data, AISTATS 2017. https://arxiv.org/abs/1602.05629
Zhang et al., Towards Building the Federated GPT: Federated Instruction Tuning, ICASSP 2024. https://arxiv.org/abs/2305.05644
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from fedpeft.aggregate import Mean
from fedpeft.messages import Broadcast, Update
from fedpeft.strategy import Phase, always
from fedpeft.tensors import Tensors, targets


@dataclass(frozen=True)
class FedAvg:
    """The mean of what clients share replaces what the server had. Not exact for LoRA: the mean of products is not the product of means."""

    phase: Callable[[int], Phase] = always(Phase())
    low_rank: bool = False  # True: refuses an adapter that has no low-rank pairs
    mean_only = True  # no annotation: not a field, so that no config can switch it

    def init(self, adapter: Tensors) -> Broadcast:
        """The adapter's start."""
        if self.low_rank and not targets(adapter):
            raise ValueError("this strategy treats the factors of low-rank pairs differently, the adapter has none; choose adapter=lora")
        return Broadcast(adapter)

    def broadcast(self, state: Broadcast, round: int, client: int | None) -> Broadcast:
        """One object for all clients: packed and encoded once."""
        return state

    def aggregate(self, state: Broadcast, round: int, updates: Iterable[Update], mean: Mean) -> Broadcast:
        """What is not shared stays as it was."""
        return replace(state, tensors=state.tensors | mean(updates))
