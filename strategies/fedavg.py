"""FedAvg of every shared tensor; with LoRA this is FedIT.

McMahan et al., Communication-Efficient Learning of Deep Networks from Decentralized Data, AISTATS 2017. https://arxiv.org/abs/1602.05629
Zhang et al., Towards Building the Federated GPT: Federated Instruction Tuning, ICASSP 2024. https://arxiv.org/abs/2305.05644
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fedpeft.aggregate import Mean
from fedpeft.messages import Broadcast, Update, sized
from fedpeft.strategy import Adapters, Federation, Phase, always
from fedpeft.tensors import Tensors, not_factor, targets


def plain(adapter: Tensors) -> Tensors:
    """The adapter, if each of its pairs is the product B A. Raises `ValueError` if it has none, or a core between B and A."""
    if not targets(adapter):
        raise ValueError("this strategy treats the factors of low-rank pairs differently, the adapter has none; choose adapter=lora")
    if any(name.endswith((".R", ".H")) for name in adapter):
        raise ValueError("this strategy works on products B A, the adapter has a core between B and A; choose adapter=lora")
    return adapter


def borrowed(main: Any, strategy: str) -> Any:
    """The run's low-rank adapter, of whose fields the strategy's own takes rank and targets. Raises `ValueError` for what would be lost."""
    if not hasattr(main, "rank") or not hasattr(main, "targets"):
        raise ValueError(f"strategy={strategy} takes rank and targets of a low-rank adapter, the run's has none; choose adapter=lora")
    for name in ("dropout", "dora", "rank_pattern"):
        if value := getattr(main, name, None):
            raise ValueError(f"adapter.{name}={value}: strategy={strategy} takes only rank and targets of the adapter; leave it out")
    return main


def beside(state: Broadcast, parts: Iterable[tuple[float, Update]], mean: Mean) -> Tensors:
    """The mean of what is shared beside the factors: the head of a classifier; nothing in a language model."""
    if not any(not_factor(name) for name in state.tensors):
        return {}
    return mean(update.only(not_factor) for _, update in parts)


@dataclass(frozen=True)
class FedAvg:
    """The mean of what clients share replaces what the server had. Not exact for LoRA: the mean of products is not the product of means."""

    phase: Callable[[int], Phase] = always(Phase())
    adapters: Adapters = field(default_factory=dict)
    low_rank: bool = False  # True: refuses an adapter that is not made of products B A
    mean_only = True  # no annotation: not a field, so that no config can switch it

    def init(self, starts: Mapping[str, Tensors]) -> Broadcast:
        """The first adapter's start."""
        adapter = starts[self.phase(0).adapter]
        if self.low_rank and not self.mean_only and any(name.endswith(".magnitude") for name in adapter):
            raise ValueError("this strategy combines products B A, DoRA divides its own by a norm; choose adapter=lora")
        return Broadcast(plain(adapter) if self.low_rank else adapter)

    def broadcast(self, state: Broadcast, round: int, client: int | None) -> Broadcast:
        """One object for all clients: packed and encoded once."""
        return state

    def aggregate(self, state: Broadcast, round: int, updates: Iterable[Update], mean: Mean) -> Broadcast:
        """What is not shared stays as it was."""
        return replace(state, tensors=state.tensors | mean(updates))


@dataclass(frozen=True)
class OfProducts(FedAvg):
    """What methods share that combine clients' products, of any rank, and make factors anew in every round."""

    run: Federation = field(default_factory=Federation)
    phase: Callable[[int], Phase] = always(Phase(carries=False))
    low_rank: bool = True
    mean_only = False

    def broadcast(self, state: Broadcast, round: int, client: int | None) -> Broadcast:
        """The model, for a client cut to the first rows and columns that its device has."""
        return sized(state, self.run.rank(client))
