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
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clients import frames
from clients.launch import SiteFile
from clients.policy import own, refused, refused_base
from fedpeft.config import ConfigError, load
from fedpeft.ledger import write_text

if TYPE_CHECKING:
    from clients.site import Site

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
        try:
            made, data = self._answered(head, payload)
        except (ValueError, KeyError, OSError, RuntimeError, MemoryError) as fault:  # torch raises RuntimeError
            log.exception("a %s message was not answered", head.get("kind"))
            made, data = {"fault": str(fault) or repr(fault)}, b""
        self._note(head, made, len(payload), len(data), time.perf_counter() - began)
        return made, data

    def _answered(self, head: Mapping[str, Any], payload: bytes) -> tuple[Head, bytes]:
        from fedpeft.codecs.base import Payload
        from fedpeft.records import from_records, to_records

        kind, facts = head.get("kind"), head.get("facts")
        if kind not in KINDS or not isinstance(facts, dict) or not isinstance(head.get("overrides"), str):
            raise ValueError(f"a message of kind {kind!r} that a worker does not know; is fedpeft the same version there?")
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
        from fedpeft.data.partition import Split
        from fedpeft.setting import open_setting

        config = load(own(self.site.overrides, shlex.split(overrides)))
        client, folder = self.site.client, self.folder(overrides)
        if faults := refused(self.site.policy, config, spent=self.spent(but=folder)):
            raise ConfigError("\n".join(faults))
        if client >= config.clients:
            raise ConfigError(
                f"this site is client {client}, the run has clients={config.clients}; raise clients, or change client in site.yaml"
            )
        setting = open_setting(config)
        if faults := refused_base(self.site.policy, setting.base.fingerprint):
            raise ConfigError("\n".join(faults))
        if self.site.whole:
            import torch

            rows = [torch.arange(len(setting.dataset.train.labels) if one == client else 0) for one in range(config.clients)]
            setting.split = Split(tuple(rows), "all of this site's rows are its own", tuple(map(str, range(config.clients))))
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "overrides.txt", overrides + "\n")
        return site_of(setting, Memory(folder / "memory"))

    def folder(self, overrides: str) -> Path:
        """Where the memory of a run lies."""
        return self.site.state / "runs" / hashlib.blake2b(overrides.encode(), digest_size=12).hexdigest()

    def spent(self, *, but: Path | None = None) -> float:
        """The epsilon of this site's runs, added up, without that of the run in folder `but`."""
        whole = 0.0
        for path in (self.site.state / "runs").glob("*/memory/*/privacy.jsonl"):  # also of another index that it once had
            lines = path.read_text().rpartition("\n")[0].splitlines()
            whole += 0.0 if but in path.parents or not lines else float(json.loads(lines[-1])["epsilon"])
        return whole

    def _note(self, head: Mapping[str, Any], made: Mapping[str, Any], down: int, up: int, seconds: float) -> None:
        facts, metrics = head.get("facts") or {}, made.get("metrics") or {}
        self.done |= {
            "messages": self.done["messages"] + 1, "seconds": self.done["seconds"] + seconds,
            "bytes_up": self.done["bytes_up"] + up, "bytes_down": self.done["bytes_down"] + down,
            "run": head.get("run"), "round": facts.get("round", self.done.get("round")), "fault": made.get("fault"),
            "epsilon": metrics.get("epsilon", self.done.get("epsilon")),
        }  # fmt: skip
        write_text(self.site.state / "worker.json", json.dumps(self.done) + "\n")


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
        while True:
            link, _ = door.accept()
            with link:
                _talk(worker, link)


def _talk(worker: Worker, link: socket.socket) -> None:
    link.settimeout(SILENCE)
    try:
        head, payload = frames.receive(link)
        made, data = worker.answer(head, payload)
        frames.send(link, made, data)
    except OSError as fault:  # the ClientApp is gone; if it was to be answered, the server asks again
        log.warning("a message was lost: %s", fault)
