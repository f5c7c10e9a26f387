"""Worker: the resident process of a deployed client. Base model, data, memory and ledger stay loaded between messages.

Flower starts a ClientApp process for each message; it hands the message over a unix socket that only this user can open, and takes the
answer back. The worker answers one message at a time. What must survive it lies on disk, under the overrides of its run, so that it is
found again when the server resumes the run under another number.
"""

import fcntl
import hashlib
import json
import logging
import os
import shlex
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clients import frames
from clients.faults import WHERE, Told
from clients.launch import SiteFile
from clients.policy import own, refused, refused_base, unnamed
from fedpeft.config import ConfigError, load
from fedpeft.ledger import write_text

if TYPE_CHECKING:
    from clients.site import Site
    from fedpeft.config import Config

KINDS = ("query", "train", "evaluate")
SILENCE = 60.0  # seconds that a ClientApp may take to say its message, once it is connected
log = logging.getLogger("fedpeft")
Head = dict[str, Any]


@dataclass(eq=False)
class Worker:
    """Answers for one client, as the site's own file allows."""

    site: SiteFile
    done: dict[str, Any] = field(
        default_factory=lambda: {"messages": 0, "seconds": 0.0, "bytes_up": 0, "bytes_down": 0}
    )  # what `fedpeft status` shows
    _open: "tuple[str, Site] | None" = None

    def answer(self, head: Mapping[str, Any], payload: bytes) -> tuple[Head, bytes]:
        """Head and payload of the reply: what went wrong is a reply too, and the next message finds the worker as it was."""
        began = time.perf_counter()
        reason: str | None = None
        try:
            made, data = self._answered(head, payload)
        except Exception as fault:  # of data, model or any library: who knows what its words hold?
            log.exception("a %s message was not answered", head.get("kind"))
            made, data = {"fault": str(fault) if isinstance(fault, Told) else f"its message was not answered; {WHERE}"}, b""
            reason = str(fault.__cause__ or fault) or repr(fault)
        self._note(head, made, len(payload), len(data), time.perf_counter() - began, reason)
        return made, data

    def _answered(self, head: Mapping[str, Any], payload: bytes) -> tuple[Head, bytes]:
        from fedpeft.codecs.base import Payload
        from fedpeft.records import from_records, to_records

        kind, facts = head.get("kind"), head.get("facts")
        if kind not in KINDS or not isinstance(facts, dict) or not isinstance(head.get("overrides"), str):
            raise Told(f"a message of kind {kind!r} that a worker does not know; is fedpeft the same version there?")
        said = {name: value for name, value in facts.items() if name != "header"}
        content = to_records(Payload(str(facts.get("header", "[]")), payload), said)
        made = self._site(head["overrides"]).answer(self.site.client, kind, content)
        back = from_records(made)
        reply: Head = {"facts": dict(made.config_records["facts"])}
        if "metrics" in made.metric_records:
            reply["metrics"] = dict(made.metric_records["metrics"])
        return reply, back.data

    def _site(self, overrides: str) -> "Site":
        """What answers a run; loaded when its first message comes, and kept until another run's does."""
        if self._open is None or self._open[0] != overrides:
            self._open = None  # the old one's memory is free before the new one is loaded
            self._open = (overrides, self._opened(overrides))
        return self._open[1]

    def _opened(self, overrides: str) -> "Site":
        from clients.memory import Memory
        from clients.site import site_of
        from fedpeft.setting import open_setting

        client, folder = self.site.client, self.folder(overrides)
        config = self._config(overrides)
        if faults := refused(self.site.policy, config, spent=self.spent(but=folder / "memory" / f"{client:06d}")) + unnamed(
            config, whole=self.site.whole
        ):
            raise Told("\n".join(faults))
        if client >= config.clients:
            raise Told(f"this site is client {client}, the run has clients={config.clients}; raise clients, or change client in site.yaml")
        with _untold("its data and model cannot be opened"):
            setting = open_setting(config, whole=client if self.site.whole else None)
        if faults := refused_base(self.site.policy, setting.base.fingerprint):
            raise Told("\n".join(faults))
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "overrides.txt", overrides + "\n")
        return site_of(setting, Memory(folder / "memory"))

    def _config(self, overrides: str) -> "Config":
        """What this site makes of a run's overrides. A fault in the server's own words is told in them."""
        try:
            asked = shlex.split(overrides)
            load(own({}, asked))
        except ValueError as fault:
            raise Told(str(fault)) from fault
        with _untold("what site.yaml says does not fit this run"):
            return load(own(self.site.overrides, asked))

    def folder(self, overrides: str) -> Path:
        """Where the memory of a run lies."""
        return self.site.state / "runs" / hashlib.blake2b(overrides.encode(), digest_size=12).hexdigest()

    def spent(self, *, but: Path | None = None) -> float:
        """The epsilon of this site's runs, added up, without that of the memory in folder `but`."""
        from fedpeft.privacy.spending import Spending

        places = (self.site.state / "runs").glob("*/memory/*/privacy.jsonl")  # also of another index that it once had
        return sum(Spending(path).reached[0] for path in places if path.parent != but)

    def _note(self, head: Mapping[str, Any], made: Mapping[str, Any], down: int, up: int, seconds: float, fault: str | None) -> None:
        facts, metrics = head.get("facts") or {}, made.get("metrics") or {}
        self.done |= {
            "messages": self.done["messages"] + 1, "seconds": self.done["seconds"] + seconds,
            "bytes_up": self.done["bytes_up"] + up, "bytes_down": self.done["bytes_down"] + down,
            "run": head.get("run"), "round": facts.get("round", self.done.get("round")), "fault": fault,
            "epsilon": metrics.get("epsilon", self.done.get("epsilon")),
        }  # fmt: skip
        with suppress(OSError):  # of a full disk: the answer is not lost with it
            write_text(self.site.state / "worker.json", json.dumps(self.done) + "\n")


@contextmanager
def _untold(what: str) -> Iterator[None]:
    """Whatever goes wrong inside is told as `what`, and no more."""
    try:
        yield
    except Exception as fault:  # of data, model or any library: who knows what its words hold?
        raise Told(f"{what}; {WHERE}") from fault


def serve(worker: Worker, path: Path) -> None:
    """Answers whoever connects to the socket `path`, one after the other, until the process is ended."""
    lock = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise ConfigError(f"another worker answers at {path}; one client has one worker, `fedpeft client down` ends it") from None
    with suppress(FileNotFoundError):
        path.unlink()  # of a worker that was killed: the lock says that none lives
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as door:
        before = os.umask(0o177)
        try:
            door.bind(str(path))
        finally:
            os.umask(before)
        door.listen(4)
        log.info("client %d answers at %s", worker.site.client, path)
        if worker.site.policy.epsilon is None:
            log.warning("policy has no epsilon: this site takes part in runs without differential privacy, if the server asks for one")
        while True:
            link, _ = door.accept()
            with link:
                _talk(worker, link)


def _talk(worker: Worker, link: socket.socket) -> None:
    link.settimeout(SILENCE)
    try:
        if not link.recv(1, socket.MSG_PEEK):
            return  # somebody looked whether this worker answers
        head, payload = frames.receive(link)
        made, data = worker.answer(head, payload)
        frames.send(link, made, data)
    except OSError as fault:  # the ClientApp is gone; if it was to be answered, the server asks again
        log.warning("a message was lost: %s", fault)
