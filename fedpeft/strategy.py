"""The contract of a federated algorithm: a `Strategy` is the server's half, its `Phase` the client's half of a round.

The smallest useful one, run by hand:

>>> import torch
>>> from fedpeft.aggregate import weighted_mean
>>> from fedpeft.messages import Broadcast, Update
>>> class Mean:
...     mean_only = True
...     def phase(self, round): return Phase()
...     def init(self, adapter): return Broadcast(adapter)
...     def broadcast(self, state, round, client): return state
...     def aggregate(self, state, round, updates, mean): return Broadcast(mean(updates))
>>> strategy = Mean()
>>> state = strategy.init({"q.A": torch.zeros(1)})
>>> updates = [Update(0, {"q.A": torch.ones(1)}, weight=1), Update(1, {"q.A": torch.tensor([4.0])}, weight=2)]
>>> strategy.aggregate(state, 0, updates, weighted_mean).tensors
{'q.A': tensor([3.])}
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

from torch import Tensor

from fedpeft.aggregate import Mean
from fedpeft.messages import Broadcast, Update
from fedpeft.tensors import Names, Tensors, everything, nothing

S = TypeVar("S")


@dataclass(frozen=True)
class Phase:
    """What one client does in one round: all that a client must know about the method.

    `trains`, `shares`, `keeps` are predicates on names: which tensors get gradients, which are uploaded, which stay at this client and are
    laid over its next broadcast. `work="gradient"` is one full-batch SGD step at rate 1, so that the change is minus the gradient.
    `loss(now, start)` is a term added to the training loss; `finish(now, start, steps)` makes the tensors that are shared or kept.
    Both are pure and see tensors, never data.
    """

    adapter: str = "main"  # "main" is the run's `adapter=` choice; another name is a key of the strategy's own adapters
    trains: Names = everything
    shares: Names = everything
    keeps: Names = nothing
    work: Literal["train", "gradient"] = "train"
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

    def phase(self, round: int) -> Phase:
        """The clients' half of `round`."""
        ...

    def init(self, adapter: Tensors) -> S:
        """The state before round 0, from the tensors of the first phase's adapter and the head."""
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
