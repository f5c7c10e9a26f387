"""`fedpeft drill`: a small federation in which one thing breaks, and whether what follows is what was declared.

A drill is an event and a declared outcome; a `Runner` brings the event about. Here it is the in-process grid with each client as a process
of its own: its own site, memory on disk, and what it holds lost when it is killed.
"""

import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode

from clients.memory import Memory
from clients.site import Site, site_of
from fedpeft.codecs.base import Payload, header, layout
from fedpeft.codecs.raw import Raw
from fedpeft.config import ConfigError, app_folder, load
from fedpeft.records import from_records, to_records
from fedpeft.setting import Setting, open_setting
from fedpeft.simulation import InProcessGrid
from fedpeft.tensors import Tensors, rank_axes
from server.app import federate
from server.folder import create, reopen
from server.rounds import ATTEMPTS, RoundFailed

CLIENTS, ROUNDS = 4, 4
SMALL = (
    f"rounds={ROUNDS}", f"clients={CLIENTS}", f"cohort={CLIENTS}", "min_clients=2", "train.steps=2", "model.epochs=2", "deadline=60",
    f"evaluate.every={ROUNDS}", "evaluate.head_only=false", "engine.stacked=false", "engine.lanes=1", "run.device=cpu",
)  # fmt: skip
KEEPING = ("strategy=fedsa", "downlink=int8")  # B stays at the client, on its disk; and it is sent changes of a model that it holds
MANY = 64 * 2**20  # bytes of an update that is far too large; the whole adapter has 0.1 MB

Kind = Literal[
    "none", "raises", "killed", "gone", "silent", "late", "restarted", "twice", "stale", "truncated", "nan", "rank", "oversized", "disk",
    "server",
]  # fmt: skip


@dataclass(frozen=True)
class Event:
    """What breaks: in which rounds, at which clients, and in how many attempts of each such round."""

    kind: Kind
    rounds: tuple[int, ...] = (1,)
    clients: tuple[int, ...] = (1,)
    times: int = 1


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


DRILLS = (
    Drill("raises", "A client's training raises", Event("raises"), "out of memory"),
    Drill("killed", "A client is killed in mid-fit; it is back in the next round, with its disk", Event("killed"), "Node Unavailable"),
    Drill("gone", "A client is killed in mid-fit and never comes back", Event("gone", (1, 2, 3)), "Node Unavailable"),
    Drill("silent", "A client's reply never comes", Event("silent"), "no answer within 2 s", overrides=("deadline=2",)),
    Drill("late", "A client's reply comes after the deadline, in the next round", Event("late"), "no answer within 2 s",
          overrides=("deadline=2",)),
    Drill("restarted", "A client is killed between rounds: its disk is kept, the model it held is lost", Event("restarted"), resent=True,
          overrides=KEEPING),
    Drill("twice", "A reply comes twice", Event("twice")),
    Drill("stale", "A client answers with its update of the round before", Event("stale"), "its reply is of round 0"),
    Drill("truncated", "Half of an update's bytes are missing", Event("truncated"), "payload holds"),
    Drill("nan", "An update holds a NaN", Event("nan"), "not finite"),
    Drill("rank", "An update has a rank more than it was sent", Event("rank"), "sent was"),
    Drill("oversized", f"An update is {MANY >> 20} MB too long", Event("oversized"), "payload holds"),
    Drill("disk", "A client's disk is full", Event("disk"), "could not be written"),
    Drill("few", "Three of four clients raise, min_clients=2; not in the second attempt", Event("raises", clients=(1, 2, 3)),
          "out of memory", count=True),
    Drill("too few", "Three of four clients raise in every attempt, min_clients=2", Event("raises", clients=(1, 2, 3), times=ATTEMPTS),
          count=True, stopped="1 clients answered, min_clients=2 are needed"),
    Drill("server", "The server is killed with -9 in mid-round", Event("server"), count=True, stopped="killed by signal 9"),
    Drill("server+state", "The same where clients keep half of the adapter", Event("server"), count=True, stopped="killed by signal 9",
          resent=True, overrides=KEEPING),
)  # fmt: skip


@dataclass(frozen=True)
class Result:
    """What a drill came to."""

    drill: Drill
    happened: str
    wrong: tuple[str, ...]  # what differs from what was declared
    seconds: float


def play(drill: Drill, runner: Runner) -> Result:
    """Plays one drill, and compares with the same run without its event or without its clients."""
    began = time.perf_counter()
    event = drill.event
    ran = runner.run(event, drill.overrides)
    seconds = time.perf_counter() - began
    whole = runner.run(Event("none"), drill.overrides)
    out = bool(drill.reason) and not drill.count
    like = runner.run(Event("raises", event.rounds, event.clients), drill.overrides) if out else whole
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
        *([ran.stopped] if ran.stopped else []),
        *dict.fromkeys(f"{reason}" for reason in ran.faults.values()),
        f"{' '.join(map(str, answers))} answers",
        f"{'the declared' if ran.end == like.end else 'another'} adapter",
        *([f"{more} bytes more down"] if drill.resent else []),
    ]
    return Result(drill, "; ".join(text if len(text) <= 100 else text[:100] + " ..." for text in said), tuple(wrong), seconds)


def drill(names: Sequence[str], say: Callable[[str], None] = print) -> int:
    """Plays the drills of these names, or all, as lines of a Markdown table; 1 if one came out otherwise than declared."""
    known = {one.name: one for one in DRILLS}
    if unknown := [name for name in names if name not in known]:
        raise ConfigError(f"{unknown[0]}: there is no such drill; there are {', '.join(known)}")
    say("| drill | what was done | declared outcome | what happened | seconds | |")
    say("|---|---|---|---|---|---|")
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        runner = Simulation(Path(folder))
        for name in names or known:
            made = play(known[name], runner)
            failed += bool(made.wrong)
            verdict = "differs: " + "; ".join(made.wrong) if made.wrong else "as declared"
            cells = (name, made.drill.done, made.drill.declared, made.happened, f"{made.seconds:.1f}", verdict)
            say(f"| {' | '.join(text.replace('|', '/').replace(chr(10), ' ') for text in cells)} |")
    return 1 if failed else 0


# In simulation


@dataclass(eq=False)
class Simulation:
    """A `Runner` on the in-process grid; runs lie in `folder`. Runs without an odd event are run once."""

    folder: Path
    _settings: dict[tuple[str, ...], Setting] = field(default_factory=dict)
    _plain: dict[tuple[Event, tuple[str, ...]], Ran] = field(default_factory=dict)

    def run(self, event: Event, overrides: tuple[str, ...] = ()) -> Ran:
        """See `Runner`."""
        key = (event, overrides)
        if event.kind in ("none", "raises") and key in self._plain:
            return self._plain[key]
        place = Path(tempfile.mkdtemp(dir=self.folder)) / "run"
        words, stopped = [*SMALL, *overrides], None
        if event.kind == "server":
            stopped = _in_a_process_that_dies(place, words, event)
        else:
            try:
                sitting(place, words, event, self._setting(words))
            except RoundFailed as fault:
                stopped = str(fault)
        if stopped:
            sitting(place, words, Event("none"), self._setting(words))
        lines = (place / "ledger.jsonl").read_text().replace(f"{place}/", "").splitlines()
        entries = [json.loads(line) for line in lines]
        adapter = (place / "adapter" / "adapter_model.safetensors").read_bytes()
        end = hashlib.sha256(adapter + json.dumps([entries[-1]["loss"], entries[-1]["accuracy"]]).encode()).hexdigest()
        self._plain[key] = Ran(stopped, entries, end)
        return self._plain[key]

    def _setting(self, words: list[str]) -> Setting:
        if tuple(words) not in self._settings:
            self._settings[tuple(words)] = open_setting(load(words))
        return self._settings[tuple(words)]


def sitting(place: Path, overrides: Sequence[str], event: Event, setting: Setting) -> None:
    """One sitting of the run in `place`: from its start, or from its last checkpoint, to its end or to what ends it."""
    if (place / "manifest.json").exists():
        folder, config = reopen(place)
    else:
        config = setting.config
        folder = create(place, config, overrides)
    setting.off()  # another run may have left a trained adapter there
    for _ in federate(config, setting, Network(setting, place / "memory", event), folder):
        pass


def doomed(place: str, overrides: Sequence[str], event: Event) -> None:
    """A sitting in a process of its own, which the event kills."""
    sitting(Path(place), overrides, event, open_setting(load(overrides)))


def _in_a_process_that_dies(place: Path, overrides: Sequence[str], event: Event) -> str:
    program = (
        f"import sys; sys.path.insert(0, {str(app_folder())!r})\n"
        f"from experiments.drill import Event, doomed\ndoomed({str(place)!r}, {list(overrides)!r}, {event!r})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    return f"killed by signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}: {done.stderr[-300:]}"


class Network(InProcessGrid):
    """Clients that are processes of their own, over a grid that waits until the deadline for what does not come. `event` happens to it."""

    def __init__(self, setting: Setting, memory: Path, event: Event) -> None:
        super().__init__(self._answered, setting.config.clients)
        self._setting, self._memory, self._event = setting, memory, event
        self._sites = {client: self._begun() for client in range(setting.config.clients)}
        self._shapes = {name: torch.zeros(tensor.shape) for name, tensor in setting.adapted.read().items()}
        self._turns: Counter[tuple[int, object]] = Counter()  # (client, round) -> attempts
        self._before: dict[int, RecordDict] = {}  # client -> its last reply
        self._late: list[Message] = []
        self._missing = False

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Late replies first, and a wait for those that are missing, as Flower's grid does it."""
        late, self._late, self._missing = self._late, [], False
        until = time.monotonic() + (timeout or 0.0)
        replies = super().send_and_receive(messages)
        yield from late
        yield from replies
        if self._missing:
            time.sleep(max(0.0, until - time.monotonic()))

    def _begun(self) -> Site:
        """A client's process, just started: what is on its disk is all it has."""
        self._setting.off()  # so that what it makes for itself is what a run begins with
        return site_of(self._setting, Memory(self._memory))

    def _answered(self, messages: Sequence[Message]) -> Iterator[Message]:
        for message in messages:
            client = message.metadata.dst_node_id - self.FIRST
            facts: Mapping[str, object] = message.content.config_records.get("facts", {})
            if message.metadata.message_type == "train" and self._hits(client, facts["round"]):
                yield from self._broken(client, message)
            else:
                yield self._reply(client, message)

    def _hits(self, client: int, round: object) -> bool:
        self._turns[client, round] += 1
        event = self._event
        return event.kind != "none" and client in event.clients and round in event.rounds and self._turns[client, round] <= event.times

    def _reply(self, client: int, message: Message) -> Message:
        """As a ClientApp answers: what it raises is an error."""
        try:
            content = self._sites[client].answer(client, message.metadata.message_type, message.content)
        except Exception as fault:
            return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, str(fault)), reply_to=message)
        self._before[client] = content
        return Message(content, reply_to=message)

    def _broken(self, client: int, message: Message) -> Iterator[Message]:
        match self._event.kind:
            case "raises":
                yield Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "the GPU is out of memory"), reply_to=message)
            case "killed" | "gone":  # Flower says so in its own name
                error = Message(Error(ErrorCode.NODE_UNAVAILABLE, "Node Unavailable"), reply_to=message)
                error.metadata.__dict__["_src_node_id"] = SUPERLINK_NODE_ID
                self._sites[client] = self._begun()
                yield error
            case "silent":
                self._missing = True
            case "late":
                self._missing = True
                self._late.append(self._reply(client, message))
            case "restarted":
                self._sites[client] = self._begun()
                yield self._reply(client, message)
            case "twice":
                reply = self._reply(client, message)
                yield from (reply, reply)
            case "stale":
                yield Message(self._before[client], reply_to=message)
            case "disk":
                with _full_disk():
                    reply = self._reply(client, message)
                yield reply
            case "server":
                os.kill(os.getpid(), signal.SIGKILL)
            case kind:
                content = self._reply(client, message).content
                spoiled = SPOILED[kind](from_records(content), self._shapes)
                made = to_records(spoiled, {})
                made["facts"] = ConfigRecord(dict(content.config_records["facts"]) | {"header": spoiled.header})
                made["metrics"] = content["metrics"]
                yield Message(made, reply_to=message)


def _higher_rank(payload: Payload, shapes: Tensors) -> Payload:
    """A well-formed update of zeros whose factors have a rank more."""
    made = {n: torch.zeros([size + (axis in rank_axes(n)) for axis, size in enumerate(t.shape)]) for n, t in shapes.items()}
    return Payload(header(layout(made)), Raw().encode(made))


SPOILED: Mapping[str, Callable[[Payload, Tensors], Payload]] = {
    "truncated": lambda payload, _: replace(payload, data=payload.data[: len(payload.data) // 2]),
    "nan": lambda payload, _: replace(payload, data=torch.tensor([torch.nan]).numpy().tobytes() + payload.data[4:]),
    "rank": _higher_rank,
    "oversized": lambda payload, _: replace(payload, data=payload.data + bytes(MANY)),
}


@contextmanager
def _full_disk() -> Iterator[None]:
    """No file of this process can grow past 1000 bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def _numbered(rounds: Sequence[int]) -> str:
    return f"round {rounds[0]}" if len(rounds) == 1 else f"rounds {', '.join(map(str, rounds))}"
