"""Simulation: drills on the in-process grid, with each client as a process of its own: its own site, memory on disk, and what it holds lost
when it is killed."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode

from clients.memory import Memory
from clients.site import Site, site_of
from experiments.drill.event import SMALL, Event, Ran, read_ran
from experiments.drill.spoiled import SPOILED, full_disk
from fedpeft.config import app_folder, load
from fedpeft.records import from_records, to_records
from fedpeft.setting import Setting, open_setting
from fedpeft.simulation import InProcessGrid
from server.app import federate
from server.folder import create, reopen
from server.rounds import RoundFailed


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
        self._plain[key] = read_ran(place, stopped)
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
        f"from experiments.drill.event import Event\n"
        f"from experiments.drill.simulation import doomed\ndoomed({str(place)!r}, {list(overrides)!r}, {event!r})"
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
        return event.kind != "none" and event.at(round, client) and self._turns[client, round] <= event.times

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
                with full_disk():
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
