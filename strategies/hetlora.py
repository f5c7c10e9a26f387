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
from strategies.fedavg import plain

NOTHING = 1e-30  # examples times this: what a zero product counts for beside any other, and beside its likes by its examples


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
        return State(Broadcast(plain(starts["main"])))

    def broadcast(self, state: State, round: int, client: int | None) -> Broadcast:
        """The first rows and columns, as many as the client has left."""
        return state.model if client is None else sized(state.model, state.ranks.get(client, self.run.rank(client)))

    def aggregate(self, state: State, round: int, updates: Iterable[Update], mean: Mean) -> State:
        """Holds one update at a time, and with `rankwise` the weights of each row.

        Rows beyond the ranks that were sent out in this round stay: with zeros in both factors they could never learn again.
        """
        model, ranks = state.model.tensors, dict(state.ranks)
        full, sent, seen, whole = rank_of(model), 1, dict[str, Tensor](), 0.0

        def padded() -> Iterable[Update]:
            nonlocal sent, whole
            for update in updates:
                had = min(state.ranks.get(update.client, self.run.rank(update.client) or full), full)
                if (rank := rank_of(update.tensors)) < had:
                    ranks[update.client] = rank
                sent, weight = max(sent, had), update.weight
                if self.weights == "norm":
                    norm = sum(pair(update.tensors, layer).norm() ** 2 for layer in targets(update.tensors)) ** 0.5
                    weight = norm if norm > 0 else NOTHING * weight
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
        for layer in targets(made) if sent < full else ():
            (a, b), (old_a, old_b) = ((tensors[layer + ".A"], tensors[layer + ".B"]) for tensors in (made, model))
            made |= {layer + ".A": torch.cat([a[:sent], old_a[sent:]]), layer + ".B": torch.cat([b[:, :sent], old_b[:, sent:]], 1)}
        return State(Broadcast(model | made), ranks)


def hetlora(
    run: Federation, penalty: float = 1e-3, gamma: float = 0.99, weights: Literal["norm", "examples"] = "norm", rankwise: bool = False
) -> HetLoRA:
    """Adds penalty * sum over layers of ||B[:, gamma r:]|| ||A[gamma r:]|| to the loss; a client whose sum fell gives those ranks up.

    `penalty` 0 switches both off. The constants are those of a public re-implementation; the paper's own were not readable.
    """
    if not penalty >= 0 or not 0 < gamma < 1:
        raise ValueError(f"strategy.penalty={penalty}, strategy.gamma={gamma}: needed are at least 0, and a share in (0, 1)")

    def kept(tensors: Tensors) -> int:
        return max(1, int(gamma * rank_of(tensors)))

    def tail(tensors: Tensors) -> Tensor:
        keep = kept(tensors)
        return torch.stack([tensors[t + ".B"][:, keep:].norm() * tensors[t + ".A"][keep:].norm() for t in targets(tensors)]).sum()

    def finish(now: Tensors, start: Tensors, steps: int) -> Tensors:
        return cut(now, kept(now)) if float(tail(now)) < float(tail(start)) else now

    phase = Phase(loss=lambda now, start: penalty * tail(now), finish=finish) if penalty else Phase()
    return HetLoRA(run, weights, rankwise, always(phase))
