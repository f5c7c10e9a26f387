"""The ClientApp of a deployed client hands bytes on, waits for a worker that comes back, and never loads torch."""

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import clients.app
from clients import forward as forwarder
from clients import frames
from fedpeft.codecs.base import Payload
from fedpeft.config import ConfigError, load
from fedpeft.records import from_records, to_records

ROOT = Path(__file__).parents[2]
# What Flower does with a message, in a process of its own.
ONE_MESSAGE = """
import sys
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 7, 1, 1
from clients.app import app
array = Array("uint8", (3,), "fedpeft.payload", b"abc")
content = RecordDict({"payload": ArrayRecord({"data": array}), "facts": ConfigRecord({"header": "[]", "round": 2})})
message = Message(content, 5, "train", group_id="2")
context = Context(7, 5, {"partition-id": 1, "worker": sys.argv[1]}, RecordDict(), {"overrides": "rounds=3"})
reply = app(message, context)
print(reply.content["payload"]["data"].data, reply.content["metrics"]["loss"])
print(sorted({"torch", "transformers", "peft", "hydra", "omegaconf"} & set(sys.modules)))
print(sorted(name for name in sys.modules if name.partition(".")[0] in ("fedpeft", "server", "strategies")))
"""


class FakeWorker:
    """Answers each connection by the next of `says`, and keeps what it was told."""

    def __init__(self, path: Path, says: list[Callable[[socket.socket], None]]) -> None:
        self.heard: list[tuple[dict[str, Any], bytes]] = []
        self.door = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.door.bind(str(path))
        self.door.listen(1)
        self.says = says
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    def _serve(self) -> None:
        for say in self.says:
            link, _ = self.door.accept()
            with link:
                self.heard.append(frames.receive(link))
                say(link)

    def __enter__(self) -> "FakeWorker":
        return self

    def __exit__(self, *_: object) -> None:
        self.thread.join(20)
        self.door.close()
        assert not self.thread.is_alive()


def answer(link: socket.socket) -> None:
    frames.send(link, {"facts": {"header": "[]", "client": 1}, "metrics": {"loss": 0.5, "weight": 3.0}}, b"xyz")


def nothing(link: socket.socket) -> None:
    """It dies."""


def test_the_clientapp_hands_a_message_to_the_worker_and_loads_neither_torch_nor_fedpeft(tmp_path: Path) -> None:
    with FakeWorker(tmp_path / "w.sock", [answer]) as worker:
        done = subprocess.run(
            [sys.executable, "-c", ONE_MESSAGE, tmp_path / "w.sock"], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-3:] == ["b'xyz' 0.5", "[]", "[]"]
    ((head, payload),) = worker.heard
    assert payload == b"abc"
    assert head == {"kind": "train", "run": 7, "overrides": "rounds=3", "facts": {"header": "[]", "round": 2}}


@pytest.mark.fast
def test_a_node_without_a_worker_does_nothing_outside_flowers_simulation(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no policy, and would open what the server names."""
    context = SimpleNamespace(node_config={"partition-id": 1}, run_config={"overrides": "rounds=3"}, run_id=7)
    monkeypatch.setattr(clients.app, "_site", lambda overrides, run: SimpleNamespace(setting=load(["clients=1", "cohort=1"])))
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    with pytest.raises(ConfigError, match="this node has no worker: start it by `fedpeft client up`"):
        clients.app._answer(None, context)  # type: ignore[arg-type]  # nobody looks at it
    monkeypatch.setitem(sys.modules, "ray", sys)
    with pytest.raises(AttributeError, match="config"):  # it went on
        clients.app._answer(None, context)  # type: ignore[arg-type]


@pytest.mark.fast
def test_a_message_is_handed_over_again_when_the_worker_ends_in_the_middle(tmp_path: Path) -> None:
    with FakeWorker(tmp_path / "w.sock", [nothing, answer]) as worker:
        content = to_records(Payload("[1]", b"abc"), {"round": 0})
        made = forwarder.forward(str(tmp_path / "w.sock"), "train", content, run=7, overrides="")
    assert from_records(made) == Payload("[]", b"xyz")
    assert worker.heard[0] == worker.heard[1]


@pytest.mark.fast
def test_a_worker_that_always_ends_is_a_fault_and_not_an_endless_wait(tmp_path: Path) -> None:
    dies = FakeWorker(tmp_path / "w.sock", [nothing] * forwarder.AGAIN)
    with dies, pytest.raises(ValueError, match="ended 3 times over one message"):
        forwarder.forward(str(tmp_path / "w.sock"), "train", to_records(Payload("[]", b""), {}), run=7, overrides="")


@pytest.mark.fast
def test_a_worker_that_never_comes_is_named_with_the_command_that_starts_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forwarder, "PATIENCE", 0.2)
    with pytest.raises(ValueError, match=r"^this client's worker does not answer; start it: fedpeft client up$"):
        forwarder.forward(str(tmp_path / "w.sock"), "query", to_records(Payload("[]", b""), {}), run=7, overrides="")


@pytest.mark.fast
def test_the_workers_fault_is_the_clients(tmp_path: Path) -> None:
    refuses = FakeWorker(tmp_path / "w.sock", [lambda link: frames.send(link, {"fault": "rounds=9: this site's policy allows 5"})])
    with refuses, pytest.raises(ValueError, match="policy allows 5"):
        forwarder.forward(str(tmp_path / "w.sock"), "query", to_records(Payload("[]", b""), {}), run=7, overrides="")


@pytest.mark.fast
def test_a_message_is_the_same_after_it_was_plain() -> None:
    content = to_records(Payload("[2]", b"abc"), {"round": 1, "text": "a", "yes": True, "share": 0.25}, {"loss": 1.5, "steps": 2})
    head, payload = forwarder.plain(content)
    again = forwarder.recorded(json.loads(json.dumps(head)), payload)
    assert again["payload"]["data"].data == b"abc"
    assert dict(again["facts"]) == dict(content["facts"])
    assert dict(again["metrics"]) == dict(content["metrics"])
