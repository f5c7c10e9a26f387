"""Event: one thing that breaks; Drill: an event and its declared outcome; Runner: what brings the event about. `play` compares."""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

CLIENTS, ROUNDS = 4, 4
SMALL = (
    f"rounds={ROUNDS}", f"clients={CLIENTS}", f"cohort={CLIENTS}", "min_clients=2", "train.steps=2", "model.epochs=2", "deadline=60",
    f"evaluate.every={ROUNDS}", "evaluate.head_only=false", "engine.stacked=false", "engine.lanes=1", "run.device=cpu",
)  # fmt: skip

Kind = Literal[
    "none", "raises", "killed", "gone", "silent", "late", "restarted", "twice", "stale", "truncated", "nan", "rank", "oversized", "disk",
    "server", "lost", "slow", "worker", "supernode", "superlink", "host",
]  # fmt: skip


@dataclass(frozen=True)
class Event:
    """What breaks: in which rounds, at which clients, and in how many attempts of each such round."""

    kind: Kind
    rounds: tuple[int, ...] = (1,)
    clients: tuple[int, ...] = (1,)
    times: int = 1

    def at(self, round: object, client: int) -> bool:
        """Whether it happens to this client in this round."""
        return round in self.rounds and client in self.clients

    @property
    def held(self) -> tuple[int, ...]:
        """Clients that are kept in mid-fit while it happens: its own, and another where the round has to last until one is back."""
        if self.kind == "twice":  # which is the SuperNode's doing
            return ()
        return (*self.clients, 0) if self.kind in ("killed", "supernode") else self.clients


@dataclass(frozen=True)
class Ran:
    """What a run with an event in it came to, resumed if it ended early."""

    stopped: str | None  # why the first sitting ended early
    entries: Sequence[Mapping[str, Any]]  # of the ledger
    end: str  # digest of the adapter and of the last round's loss

    @property
    def faults(self) -> dict[tuple[int, int], str]:
        """(round, client) -> reason."""
        return {(entry["round"], fault["client"]): fault["reason"] for entry in self.entries for fault in entry["faults"]}


def read_ran(place: Path, stopped: str | None = None) -> Ran:
    """What the run in the folder `place` came to."""
    lines = (place / "ledger.jsonl").read_text().replace(f"{place}/", "").splitlines()
    entries = [json.loads(line) for line in lines]
    adapter = (place / "adapter" / "adapter_model.safetensors").read_bytes()
    end = hashlib.sha256(adapter + json.dumps([entries[-1]["loss"], entries[-1]["accuracy"]]).encode()).hexdigest()
    return Ran(stopped, entries, end)


class Runner(Protocol):
    """Runs the federation of `overrides` with an event in it, in simulation or on real hosts."""

    def run(self, event: Event, overrides: tuple[str, ...] = ()) -> Ran:
        """To its last round: a run that ends early is resumed, without the event."""
        ...


@dataclass(frozen=True)
class Drill:
    """An event, in words too, and its declared outcome."""

    name: str
    done: str
    event: Event
    reason: str | None = None  # words of the fault that each of its clients becomes; None: there is none
    count: bool = False  # the clients' updates count all the same: in another attempt of the round, or from where the run was resumed
    stopped: str | None = None  # words of why the run ends and is resumed; None: it does not end
    resent: bool = False  # the client is sent more than it would have been
    overrides: tuple[str, ...] = ()

    @property
    def declared(self) -> str:
        """The outcome in words."""
        one = "the client" if len(self.event.clients) == 1 else "each client"
        parts = [f"the run ends ({self.stopped}) and is resumed"] if self.stopped else []
        parts += [f"{one} is a fault ({self.reason})"] if self.reason else ["no fault"]
        parts += ["what was held is sent again"] if self.resent else []
        if self.reason and not self.count:
            back = self.event.rounds[-1] + 1 < ROUNDS
            parts += [f"adapter as without it in {_numbered(self.event.rounds)}"]
            return ", ".join([*parts, *(["then it is back"] if back else [])])
        return ", ".join([*parts, "the same adapter as if nothing had happened"])


@dataclass(frozen=True)
class Result:
    """What a drill came to."""

    drill: Drill
    happened: str
    wrong: tuple[str, ...]  # what differs from what was declared
    seconds: float


def play(drill: Drill, runner: Runner, plain: Runner | None = None) -> Result:
    """Plays one drill, and compares with the same run of `plain` (or of `runner`) without its event or without its clients."""
    plain = plain or runner
    began = time.perf_counter()
    event = drill.event
    ran = runner.run(event, drill.overrides)
    seconds = time.perf_counter() - began
    whole = plain.run(Event("none"), drill.overrides)
    out = bool(drill.reason) and not drill.count
    like = plain.run(Event("raises", event.rounds, event.clients), drill.overrides) if out else whole
    places = {(round, client) for round in event.rounds for client in event.clients} if drill.reason else set()
    more = sum(entry["bytes_down"] for entry in ran.entries) - sum(entry["bytes_down"] for entry in whole.entries)
    answers = [entry["answers"] for entry in ran.entries]
    wrong = [
        *([f"it ended: {ran.stopped}" if ran.stopped else "it did not end"] if (drill.stopped is None) != (ran.stopped is None) else []),
        *([f"it ended otherwise: {ran.stopped}"] if drill.stopped and ran.stopped and drill.stopped not in ran.stopped else []),
        *([f"faults at (round, client) {sorted(ran.faults)}"] if ran.faults.keys() != places else []),
        *[f"another reason: {reason}" for reason in ran.faults.values() if (drill.reason or "") not in reason],
        *([f"answers {answers}"] if answers != [CLIENTS - len(event.clients) * (out and r in event.rounds) for r in range(ROUNDS)] else []),
        *([f"{more} bytes more went down"] if drill.resent != (more > 0) and not ran.faults else []),
        *(["another adapter"] if ran.end != like.end else []),
    ]
    said = [
        *([ran.stopped[max(0, ran.stopped.find(drill.stopped or "")) :]] if ran.stopped else []),
        *dict.fromkeys(f"{reason}" for reason in ran.faults.values()),
        f"{' '.join(map(str, answers))} answers",
        f"{'the declared' if ran.end == like.end else 'another'} adapter",
        *([f"{more} bytes more down"] if drill.resent else []),
    ]
    return Result(drill, "; ".join(text if len(text) <= 100 else text[:100] + " ..." for text in said), tuple(wrong), seconds)


def _numbered(rounds: Sequence[int]) -> str:
    return f"round {rounds[0]}" if len(rounds) == 1 else f"rounds {', '.join(map(str, rounds))}"
