"""The loop: draw a cohort, broadcast, gather, aggregate."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Generic, Literal, TypeVar

from fedpeft.aggregate import Mean
from fedpeft.cohort import Cohort, Draw
from fedpeft.exactness import Gap, Meter
from fedpeft.messages import Broadcast, Update, checked
from fedpeft.privacy.spending import SPENT, BudgetSpent
from fedpeft.privacy.statement import Spent
from fedpeft.select import Selection, everyone
from fedpeft.strategy import Strategy
from server.exchange import Exchange, Fault, Traffic
from server.private import Hidden

S = TypeVar("S")
EVERYONE, NO_GAP = everyone(), Gap(None, None)
ATTEMPTS = 3  # of a round that too few clients answer


class RoundFailed(RuntimeError):
    """Too few clients answered a round, however often it was drawn; what was reached before it is kept."""


class Exhausted(RoundFailed):
    """A round would have spent more than the privacy budget of everybody it asked; nothing of it was released."""


@dataclass(frozen=True)
class Round(Generic[S]):
    """What one round did."""

    round: int
    state: S  # after it
    cohort: Cohort
    traffic: Traffic
    loss: float  # mean training loss of the clients, weighted by examples
    answers: int
    seconds: float
    gap: Gap  # between what was aggregated and the true mean
    measuring: float  # seconds that the gap took
    spent: Spent | None = None  # so far: the most that clients said, or that those did whom the server hides


def run(
    strategy: Strategy[S], state: S, exchange: Exchange, draw: Draw, mean: Mean, *,
    first: int, rounds: int, min_clients: int = 1, select: Selection = EVERYONE, weights: Literal["examples", "uniform"] = "examples",
    hidden: Hidden | None = None,
) -> Iterator[Round[S]]:  # fmt: skip
    """Rounds `first` to `rounds` - 1, one at a time. A round that fewer than `min_clients` answer
    leaves no trace at the server and is drawn again (clients that did answer may have moved what they keep).

    `hidden` takes the place of `mean`, and nothing of a client then stands in the round but what its noised mean tells.
    """
    for round in range(first, rounds):
        began, traffic = time.perf_counter(), Traffic()
        same = strategy.phase(round).adapter == strategy.phase(round + 1).adapter
        for attempt in range(ATTEMPTS):
            cohort = draw(round, attempt)
            meter = Meter(strategy.phase(round), strategy.broadcast(state, round, None), same_adapter=same)
            needed = min_clients if hidden is None else 0  # who answers must not decide whom the sum is over
            try:
                taken = _Taken(strategy, state, round, cohort, exchange, traffic, needed, weights == "uniform")
                updates = select(iter(taken), taken.sent)
                if hidden is None:
                    state = strategy.aggregate(state, round, meter.watch(updates, taken.sent), mean)
                else:
                    state = strategy.aggregate(state, round, updates, taken.hidden_by(hidden))
            except _TooFew:
                if traffic.faults and all(SPENT in fault.reason for fault in traffic.faults):
                    raise Exhausted(f"round {round}: {traffic.faults[0].reason}") from None
                continue
            except BudgetSpent as fault:
                raise Exhausted(f"round {round}: {fault}") from fault
            except ValueError as fault:
                raise RoundFailed(f"round {round}: {fault}") from fault
            gap = meter.read(strategy.broadcast(state, round + 1, None)) if hidden is None else NO_GAP
            loss, spent = (taken.loss, taken.spent) if hidden is None else (float("nan"), hidden.spent)
            yield Round(
                round, state, cohort, traffic, loss, taken.count, time.perf_counter() - began, gap, meter.seconds, spent
            )  # fmt: skip
            break
        else:
            raise RoundFailed(_explained(round, taken.count, min_clients, traffic.faults))


class _TooFew(Exception):
    """Raised at the end of a cohort's updates, so that no aggregate of too few ever comes to be."""


class _Taken:
    """The checked updates of one cohort, counted as they pass; `_TooFew` after the last if they are fewer than `needed`."""

    def __init__(
        self, strategy: Strategy[S], state: S, round: int, cohort: Cohort, exchange: Exchange, traffic: Traffic, needed: int, alike: bool
    ) -> None:  # fmt: skip
        self._alike = alike  # every client counts once
        self.spent: Spent | None = None
        self._usual = strategy.broadcast(state, round, None)
        self.count, self._needed, self._loss, self._weight = 0, needed, 0.0, 0.0
        self._out = exchange.prepared({client: strategy.broadcast(state, round, client) for client in cohort.clients})
        self._phase = strategy.phase(round)
        self._equal = strategy.mean_only or self._phase.finish is None  # else a client's rank is what it was sent
        self._round, self._exchange, self._traffic = round, exchange, traffic

    def __iter__(self) -> Iterator[Update]:
        for update in self._exchange.train(self._round, self._out, self._traffic, self._phase.shares):
            try:
                good = checked(update, self._out[update.client], self._phase.shares, equal=self._equal)
            except ValueError as fault:
                self._traffic.fault(update.client, str(fault))
                continue
            good = replace(good, weight=1.0) if self._alike else good
            if (said := _said(update)) is not None:
                self.spent = said.most(self.spent)
            self.count += 1
            self._loss += update.weight * update.metrics.get("loss", float("nan"))
            self._weight += update.weight
            yield good
        if self.count < self._needed:
            raise _TooFew

    def hidden_by(self, hidden: Hidden) -> Mean:
        """The noised mean of these updates."""
        start = next(iter(self._out.values()), self._usual)
        query = self._phase.work == "gradient"
        return hidden.mean(self._round, start, self._out, self._phase.shares, query=query)

    def sent(self, client: int) -> Broadcast:
        """What that client started from."""
        return self._out[client]

    @property
    def loss(self) -> float:
        return self._loss / self._weight if self._weight else float("nan")


def _said(update: Update) -> Spent | None:
    """What a client said that it has spent; None if it said nothing that could be."""
    epsilon, delta = (update.metrics.get(name, -1.0) for name in ("epsilon", "delta"))
    return Spent(epsilon, delta, heard=True) if epsilon >= 0 and 0 <= delta <= 1 else None


def _explained(round: int, got: int, needed: int, faults: list[Fault]) -> str:
    why = f" First fault: client {faults[0].client}: {faults[0].reason}" if faults else ""
    return (
        f"round {round}: {got} clients answered, min_clients={needed} are needed, in each of {ATTEMPTS} draws.{why} "
        "All rounds before are kept; continue with `fedpeft run --resume`."
    )
