"""Spending: the releases of one unit, on disk before they are made. What was reserved is spent, whether it was sent or not."""

import fcntl
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedpeft.privacy.accountant import COARSE, FINE, Event, epsilon

Lines = Sequence[Mapping[str, Any]]


SPENT = "the privacy budget is spent"


class BudgetSpent(ValueError):
    """A release was refused: with it more than the budget would be spent. Nothing was released."""


@dataclass(frozen=True)
class Spending:
    """The lines of `path`, one for each reservation, written through to the disk."""

    path: Path

    def lines(self) -> list[dict[str, Any]]:
        """All whole lines. Of one that a crash cut short nothing was released; raises `OSError` for a damaged one before the last."""
        if not self.path.exists():
            return []
        try:
            return [json.loads(line) for line in self.path.read_text().rpartition("\n")[0].splitlines()]
        except ValueError as fault:
            raise OSError(f"{self.path} cannot be read ({fault}): what was spent is not known, so nothing more is released") from None

    @property
    def reached(self) -> tuple[float, float]:
        """(epsilon, delta) as the last line has them; zeros if there is none."""
        lines = self.lines()
        return (float(lines[-1]["epsilon"]), float(lines[-1]["delta"])) if lines else (0.0, 0.0)

    def check(self, events: Sequence[Event], *, budget: float, delta: float, clients: Sequence[int] | None = None) -> float:
        """Epsilon with `events`: the largest of `clients` where they are given. Raises `BudgetSpent` if that is more than `budget`."""
        lines = self.lines()
        whole = _most(lines, events, clients, delta, COARSE)
        if whole > budget and (whole := _most(lines, events, clients, delta, FINE)) > budget:
            raise BudgetSpent(
                f"{SPENT}: epsilon {self.spent(delta):.3f} of {budget:g} at delta {delta:.2g}, another round would make it {whole:.3f}"
            )
        return whole

    def reserve(
        self, events: Sequence[Event], *, budget: float, delta: float,
        clients: Sequence[int] | None = None, facts: Mapping[str, Any] | None = None,
    ) -> float:  # fmt: skip
        """`check`, and then writes down that `events` will be released; two processes take turns."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            return self._reserved(events, budget, delta, clients, {} if facts is None else facts)

    def _reserved(
        self, events: Sequence[Event], budget: float, delta: float, clients: Sequence[int] | None, facts: Mapping[str, Any]
    ) -> float:  # fmt: skip
        whole = self.check(events, budget=budget, delta=delta, clients=clients)
        line = {**facts, "events": [asdict(event) for event in events], "epsilon": whole, "delta": delta}
        self._append(json.dumps(line if clients is None else {**line, "clients": list(clients)}) + "\n")
        return whole

    def spent(self, delta: float, *, step: float = COARSE) -> float:
        """Epsilon of everything so far: the largest of all clients, where lines name them."""
        lines = self.lines()
        named = sorted({client for line in lines for client in line.get("clients", ())})
        return _most(lines, (), named if any("clients" in line for line in lines) else None, delta, step)

    def _append(self, line: str) -> None:
        new = not self.path.exists()
        with self.path.open("a+b") as file:
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)  # what a crash cut short
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())
        if new:  # the file's name lies in the folder, which has a cache of its own
            folder = os.open(self.path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


def _most(lines: Lines, more: Sequence[Event], clients: Sequence[int] | None, delta: float, step: float) -> float:
    """Epsilon of the lines and `more`; the largest of `clients`, each of whom the lines concern that name it or nobody."""
    if clients is None:
        return epsilon([*_events(lines), *more], delta, step=step)
    each = [[*_events([line for line in lines if one in line.get("clients", (one,))]), *more] for one in clients]
    return max((epsilon(events, delta, step=step) for events in each), default=0.0)


def _events(lines: Lines) -> list[Event]:
    return [Event(**event) for line in lines for event in line["events"]]
