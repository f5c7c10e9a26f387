"""SLoRA: some rounds of sparse tuning at places drawn alike everywhere, then LoRA begun from the best low-rank form of what they found.

Babakniya et al., SLoRA: Federated Parameter Efficient Fine-Tuning of Language Models, 2023. https://arxiv.org/abs/2308.06522
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from fedpeft.adapters.sparse import Sparse, support
from fedpeft.aggregate import Mean
from fedpeft.lowrank import nearest, unpair
from fedpeft.messages import Broadcast, Update
from fedpeft.strategy import Adapters, Federation, Phase
from fedpeft.tensors import Tensors, targets
from strategies.fedavg import plain


@dataclass(frozen=True)
class State:
    """The model, and the LoRA that follows the sparse rounds; empty once it has begun."""

    model: Broadcast
    lora: Tensors


@dataclass(frozen=True)
class SLoRA:
    """FedAvg of the values at the shared places, then FedAvg of the factors. The base never moves: nothing is counted twice."""

    run: Federation
    sparse_rounds: int
    density: float | None
    phase: Callable[[int], Phase]
    adapters: Adapters
    mean_only = True  # no annotation: not a field, so that no config can switch it

    def init(self, starts: Mapping[str, Tensors]) -> State:
        """The sparse adapter's zeros; without sparse rounds plain LoRA."""
        lora = plain(starts["main"])
        if not self.sparse_rounds:
            return State(Broadcast(lora), {})
        if any(name.endswith(".magnitude") for name in lora):
            raise ValueError("strategy=slora goes on with products B A, DoRA divides its own by a norm; choose adapter=lora")
        return State(Broadcast(starts["sparse"]), lora)

    def broadcast(self, state: State, round: int, client: int | None) -> Broadcast:
        """The model."""
        return state.model

    def aggregate(self, state: State, round: int, updates: Iterable[Update], mean: Mean) -> State:
        """After the last sparse round the change dW of each layer goes on as B = U_r S_r, A = V_r^T; the head as it is."""
        tensors = state.model.tensors | mean(updates)
        return State(Broadcast(self._begun(tensors, state.lora)), {}) if round == self.sparse_rounds - 1 else replace(
            state, model=Broadcast(tensors)
        )  # fmt: skip

    def _begun(self, tensors: Tensors, lora: Tensors) -> Tensors:
        made = dict(lora)
        for layer in targets(lora):
            values, rank = tensors[f"{layer}.values"], len(lora[f"{layer}.A"])
            shape = (len(lora[f"{layer}.B"]), lora[f"{layer}.A"].shape[1])
            places = support(self.run.seed, layer, shape, Sparse(self.density, rank).of(shape))
            change = torch.zeros(shape, dtype=torch.float64)
            change.view(-1)[places] = values.double()
            if bool(values.any()):  # an SVD of zero has no directions; LoRA's own start has
                made |= {name: t.to(values.dtype) for name, t in unpair(layer, nearest(change, rank)).items()}
        return made | {name: t for name, t in tensors.items() if name in lora and name.rpartition(".")[0] not in targets(lora)}


def slora(run: Federation, density: float | None = None, share: float = 0.1, sparse_rounds: int | None = None) -> SLoRA:
    """`share` of the run's rounds are sparse, or `sparse_rounds` of them. `density` None: as many values as LoRA has entries."""
    if density is not None and not 0 < density <= 1:
        raise ValueError(f"strategy.density={density}: needed is a share in (0, 1], or null for as many values as LoRA has")
    if not 0 <= share < 1:
        raise ValueError(f"strategy.share={share}: needed is a share in [0, 1)")
    many = max(1, round(share * run.rounds)) if sparse_rounds is None and share else (sparse_rounds or 0)
    if many < 0:
        raise ValueError(f"strategy.sparse_rounds={many}: needed is at least 0")
    if many >= run.rounds:
        raise ValueError(f"strategy.sparse_rounds={many} leaves none of rounds={run.rounds} to LoRA; needed is at most {run.rounds - 1}")
    sparse, lora = Phase("sparse"), Phase()
    return SLoRA(run, many, density, lambda round: sparse if round < many else lora, {"sparse": partial(_sparse, density)})


def _sparse(density: float | None, main: Any) -> Sparse:
    if not hasattr(main, "rank") or not hasattr(main, "targets"):
        raise ValueError("strategy=slora ends in low-rank pairs, the adapter has none; choose adapter=lora")
    if density is None and getattr(main, "rank_pattern", None):
        raise ValueError("strategy.density=null counts the values of adapter.rank, adapter.rank_pattern has others; set strategy.density")
    return Sparse(density, main.rank, main.targets)
