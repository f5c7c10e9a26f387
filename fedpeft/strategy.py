"""The contract of a federated algorithm: a `Strategy` is the server's half, its `Phase` the client's half of a round.

The smallest useful one, run by hand:

>>> import torch
>>> from fedpeft.aggregate import weighted_mean
>>> from fedpeft.messages import Broadcast, Update
>>> class Mean:
...     mean_only = True
...     adapters = {}
...     def phase(self, round): return Phase()
...     def init(self, starts): return Broadcast(starts["main"])
...     def broadcast(self, state, round, client): return state
...     def aggregate(self, state, round, updates, mean): return Broadcast(mean(updates))
>>> strategy = Mean()
>>> state = strategy.init({"main": {"q.A": torch.zeros(1)}})
>>> updates = [Update(0, {"q.A": torch.ones(1)}, weight=1), Update(1, {"q.A": torch.tensor([4.0])}, weight=2)]
>>> strategy.aggregate(state, 0, updates, weighted_mean).tensors
{'q.A': tensor([3.])}
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

from torch import Tensor

from fedpeft.adapters.base import Adapter
from fedpeft.aggregate import Mean
from fedpeft.messages import Broadcast, Update
from fedpeft.tensors import Names, Tensors, everything, nothing

S = TypeVar("S")
Adapters = Mapping[str, Callable[[Any], Adapter]]  # name -> what makes that adapter of the run's own `adapter=`


@dataclass(frozen=True)
class Federation:
    """What a strategy may know of the run it serves. A preset's function gets it if it has a parameter `run`."""

    rounds: int = 40
    clients: int = 100
    cohort: int = 10  # clients a round
    seed: int = 0
    ranks: tuple[int, ...] | None = None  # of each client's device; None: all have the adapter's
    optimizer: str = "adamw"  # of the clients
    momentum: float = 0.0
    clip: float | None = None
    lr: float = 5e-3
    steps: int | None = 5  # local steps a round; None: epochs

    def rank(self, client: int | None) -> int | None:
        """The rank of a client's device; None: the adapter's own."""
        return None if client is None or self.ranks is None else self.ranks[client]


@dataclass(frozen=True)
class Phase:
    """What one client does in one round: all that a client must know about the method.

    `trains`, `shares`, `keeps` are predicates on names: which tensors get gradients, which are uploaded, which stay at this client and are
    laid over its next broadcast. `work="gradient"` is one full-batch SGD step at rate 1, so that the change is minus the gradient.
    `loss(now, start)` is a term added to the training loss; `finish(now, start, steps)` makes the tensors that are shared or kept.
    Both are pure and see tensors, never data. With `rates`, `start` also has `rate/<name>` for every tensor: how far a step of plain SGD
    moves it per unit of gradient, in boundary values. `carries` is False where the server makes factors anew: what a lossy codec left out
    of one round's difference means nothing in the next.
    """

    adapter: str = "main"  # "main" is the run's `adapter=` choice; another name is a key of the strategy's `adapters`
    trains: Names = everything
    shares: Names = everything
    keeps: Names = nothing
    work: Literal["train", "gradient"] = "train"
    rates: bool = False
    carries: bool = True
    loss: Callable[[Tensors, Tensors], Tensor] | None = None
    finish: Callable[[Tensors, Tensors, int], Tensors] | None = None


class Strategy(Protocol[S]):
    """The server's half. State is a value: tensors, numbers, strings, dicts, tuples and frozen dataclasses of these.

    `round` counts aggregations from 0: a round that nobody answers is drawn again under the same number.
    """

    @property
    def mean_only(self) -> bool:
        """True if `aggregate` reads updates through `mean` alone, all of equal names and shapes: what DP and secure sums need."""
        ...

    @property
    def adapters(self) -> Adapters:
        """The adapters that phases name beside "main"."""
        ...

    def phase(self, round: int) -> Phase:
        """The clients' half of `round`; also of rounds past the last, whose adapter is the one that is evaluated and exported."""
        ...

    def init(self, starts: Mapping[str, Tensors]) -> S:
        """The state before round 0, from the start of every adapter that a phase names, each with the head."""
        ...

    def broadcast(self, state: S, round: int, client: int | None) -> Broadcast:
        """What `client` starts `round` from; None asks for the global model (evaluation, export)."""
        ...

    def aggregate(self, state: S, round: int, updates: Iterable[Update], mean: Mean) -> S:
        """The state after `round`. Reads the updates to their end: only then is it known whether enough clients answered."""
        ...


def always(phase: Phase) -> Callable[[int], Phase]:
    """The same phase in every round."""
    return lambda round: phase
