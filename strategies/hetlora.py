"""HetLoRA: each client trains a truncation of its own rank and may prune itself; the server pads with zeros and weighs by product norms.

Cho et al., Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models, EMNLP 2024. https://arxiv.org/abs/2401.06432
Rank-wise renormalization (row j divided by the weight of the clients that have it) as in RB-LoRA, EACL 2026.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from fedpeft.aggregate import Mean
from fedpeft.lowrank import cut, pad, pair, rank_of
from fedpeft.messages import Broadcast, Update, sized
from fedpeft.strategy import Adapters, Federation, Phase, always
from fedpeft.tensors import Tensors, targets


@dataclass(frozen=True)
class State:
    """The model, and the ranks of the clients that pruned themselves."""

    model: Broadcast
    ranks: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class HetLoRA:
    """Not exact: factors are averaged apart. `rankwise` keeps the high rows, which few clients have, from shrinking."""

    run: Federation = field(default_factory=Federation)
    weights: Literal["norm", "examples"] = "norm"  # of the clients: ||B_k A_k|| as in the paper, or as the run says
    rankwise: bool = False
    phase: Callable[[int], Phase] = always(Phase())
    adapters: Adapters = field(default_factory=dict)
    mean_only = False

    def __post_init__(self) -> None:
        if self.weights not in ("norm", "examples"):
            raise ValueError(f"strategy.weights={self.weights}: needed is norm or examples")

    def init(self, starts: Mapping[str, Tensors]) -> State:
        """The adapter's start at the server's rank."""
        if not targets(starts["main"]):
            raise ValueError("this strategy pads low-rank pairs, the adapter has none; choose adapter=lora")
        return State(Broadcast(starts["main"]))

    def broadcast(self, state: State, round: int, client: int | None) -> Broadcast:
        """The first rows and columns, as many as the client has left."""
        return state.model if client is None else sized(state.model, state.ranks.get(client, self.run.rank(client)))

    def aggregate(self, state: State, round: int, updates: Iterable[Update], mean: Mean) -> State:
        """Holds one update at a time, and with `rankwise` the weights of each row."""
        model, ranks = state.model.tensors, dict(state.ranks)
        full, seen, whole = rank_of(model), dict[str, Tensor](), 0.0

        def padded() -> Iterable[Update]:
            nonlocal whole
            for update in updates:
                if (rank := rank_of(update.tensors)) < (self.run.rank(update.client) or full):
                    ranks[update.client] = rank
                weight = update.weight
                if self.weights == "norm":  # zero products (no step was taken) leave the run's weights
                    norm = sum(pair(update.tensors, layer).norm() ** 2 for layer in targets(update.tensors)) ** 0.5
                    weight = norm if norm > 0 else weight
                whole += weight
                for layer in targets(model):
                    rows = seen.setdefault(layer, torch.zeros(len(model[layer + ".A"]), dtype=torch.float64))
                    rows[: len(update.tensors[layer + ".A"])] += weight
                yield replace(update, tensors=pad(update.tensors, model), weight=weight)

        made = mean(padded())
        if self.rankwise:
            for layer, rows in seen.items():
                factor = torch.where(rows > 0, whole / rows, 0.0).to(made[layer + ".A"].dtype)
                made |= {layer + ".A": made[layer + ".A"] * factor[:, None], layer + ".B": made[layer + ".B"] * factor}
        return State(Broadcast(model | made), ranks)


def hetlora(
    run: Federation, penalty: float = 1e-3, gamma: float = 0.99, weights: Literal["norm", "examples"] = "norm", rankwise: bool = False
) -> HetLoRA:
    """Adds penalty * sum over layers of ||B[:, gamma r:]|| ||A[gamma r:]|| to the loss; a client whose sum fell gives those ranks up.

    `penalty` 0 switches both off. The constants are those of a public re-implementation; the paper's own were not readable.
    """
    if penalty < 0 or not 0 < gamma < 1:
        raise ValueError(f"strategy.penalty={penalty}, strategy.gamma={gamma}: needed are at least 0, and a share in (0, 1)")

    def tail(tensors: Tensors) -> Tensor:
        keep = int(gamma * rank_of(tensors))
        return torch.stack([tensors[t + ".B"][:, keep:].norm() * tensors[t + ".A"][keep:].norm() for t in targets(tensors)]).sum()

    def finish(now: Tensors, start: Tensors, steps: int) -> Tensors:
        rank = rank_of(now)
        return cut(now, max(1, int(gamma * rank))) if rank > 1 and float(tail(now)) < float(tail(start)) else now

    phase = Phase(loss=lambda now, start: penalty * tail(now), finish=finish) if penalty else Phase()
    return HetLoRA(run, weights, rankwise, always(phase))
