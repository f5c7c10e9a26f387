"""A federation as it is deployed: SuperLink, SuperNodes and workers of their own, TLS and node keys, on loopback."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from fedpeft.processes import Processes

FEDPEFT = str(Path(sys.executable).parent / "fedpeft")
CLIENTS = 3
# What a lossy codec leaves out stays at the client between rounds: a worker that forgot it would end elsewhere.
RUN = ["rounds=3", "train.steps=2", "model.epochs=1", "codec=ternary", "engine.wave=1", "evaluate.head_only=false"]
ADAPTER = "adapter/adapter_model.safetensors"


@dataclass(frozen=True)
class Federation:
    """The files of one server and its clients."""

    folder: Path

    @property
    def runs(self) -> Path:
        return self.folder / "server" / "runs"

    def site(self, client: int) -> str:
        return str(self.folder / f"site{client}.yaml")

    def state(self, client: int) -> Path:
        return self.folder / f"client{client}"

    def up(self) -> None:
        self.call("server", "up")
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda client: self.call("client", "up", "-c", self.site(client)), range(CLIENTS)))

    def down(self) -> None:
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda client: self.call("client", "down", "-c", self.site(client)), range(CLIENTS)))
        self.call("server", "down")

    def call(self, *words: str, code: int = 0) -> str:
        done = subprocess.run([FEDPEFT, *words], cwd=self.folder, capture_output=True, text=True, check=False, timeout=300)
        logs = "\n".join(f"== {path}\n{path.read_text()[-3000:]}" for path in self.folder.glob("*/*.log"))
        assert done.returncode == code, done.stdout + done.stderr + logs
        return done.stdout + done.stderr


@pytest.fixture
def federation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Federation]:
    """Server and clients, up; they are ended by their pids."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with socket.socket() as one, socket.socket() as two:
        for probe in (one, two):
            probe.bind(("127.0.0.1", 0))
        fleet, control = one.getsockname()[1], two.getsockname()[1]
    made = Federation(tmp_path)
    made.call("certs", "init", "certs", "--host", "localhost")
    for client in range(CLIENTS):
        made.call("certs", "client", "certs", f"site{client}")
        Path(made.site(client)).write_text(
            f"client: {client}\nstate: client{client}\nsuperlink: 127.0.0.1:{fleet}\ntls: {{ca: certs/ca.crt, key: certs/site{client}}}\n"
            "policy: {rounds: 5, strategies: [fedavg]}\n"
        )
    (tmp_path / "server.yaml").write_text(
        f"state: server\nclients: {CLIENTS}\nfleet: 127.0.0.1:{fleet}\ncontrol: 127.0.0.1:{control}\nkeys: [certs]\n"
        f"tls: {{ca: certs/ca.crt, cert: certs/server.pem, key: certs/server.key}}\nrun: [{', '.join(RUN)}]\n"
    )
    try:
        made.up()
        yield made
    finally:
        made.down()


@pytest.mark.slow
def test_a_deployed_run_gives_the_adapter_of_fedpeft_run_though_a_worker_is_killed_on_the_way(
    federation: Federation,
) -> None:
    own = federation.folder / "own"
    federation.call("run", f"clients={CLIENTS}", f"cohort={CLIENTS}", *RUN, f"run.dir={own}", "--quiet")
    with subprocess.Popen([FEDPEFT, "server", "run"], cwd=federation.folder, stdout=subprocess.PIPE, text=True) as following:
        assert following.stdout is not None
        said = [following.stdout.readline(), following.stdout.readline()]
        assert "round 1" in said[1], said
        worker = json.loads((federation.state(1) / "worker.pid").read_text())["pid"]
        os.kill(worker, signal.SIGKILL)
        until = time.monotonic() + 60
        while Processes(federation.state(1)).running("worker") is not None:  # its memory goes first
            assert time.monotonic() < until
            time.sleep(0.05)
        assert federation.call("client", "up", "-c", federation.site(1)).startswith("started: worker;")
        said += following.stdout.read().splitlines()
        assert following.wait(300) == 0, said
    (there,) = federation.runs.iterdir()
    assert (there / ADAPTER).read_bytes() == (own / ADAPTER).read_bytes()
    entries = [json.loads(line) for line in (there / "ledger.jsonl").read_text().splitlines()]
    assert [entry["answers"] for entry in entries] == [CLIENTS] * 3
    for entry in entries:  # about 14 kB of calls and signatures go up for each message, and 1 kB for each poll of a longer round
        for way in ("up", "down"):
            assert entry[f"bytes_{way}"] < entry[f"socket_{way}"] < 1.2 * entry[f"bytes_{way}"] + 100_000 * CLIENTS, entry
    assert any(line.startswith("at the socket up") and " x payload" in line for line in said), said
    assert "at the socket down" in (there / "report.html").read_text()

    told = json.loads(federation.call("status", "-c", "server.yaml", "--json"))
    assert (told["nodes"], told["clients"], told["round"], told["epsilon"]) == (CLIENTS, CLIENTS, 3, None)
    assert (told["online"], told["offline"], told["state"]) == (["site0", "site1", "site2"], [], "finished:completed")
    assert told["socket_up"] == sum(entry["socket_up"] for entry in entries) > told["bytes_up"] > 0
    site = json.loads(federation.call("status", "-c", federation.site(0), "--json"))
    assert (site["messages"], site["round"], site["fault"]) == (4, 3, None)
    assert not (federation.state(0) / "flwr" / "apps").exists(), "a site runs its own code, not what came with the run"

    _stopped_followed_and_resumed(federation, entries[0])

    pids = [json.loads(path.read_text())["pid"] for path in federation.folder.glob("*/*.pid")]
    assert len(pids) == 2 + 2 * CLIENTS
    federation.down()
    until = time.monotonic() + 60  # Flower's SuperExec looks for its parent every few seconds
    while any(_lives(federation.folder)):
        assert time.monotonic() < until, list(_lives(federation.folder))
        time.sleep(0.1)


def _stopped_followed_and_resumed(federation: Federation, first: dict[str, object]) -> None:
    """Another run: who followed it goes away, somebody follows it again, it is stopped, and goes on; then a client is shut out."""
    with subprocess.Popen(
        [FEDPEFT, "server", "run", "rounds=5"], cwd=federation.folder, stdout=subprocess.PIPE, text=True, preexec_fn=_hears
    ) as following:
        assert following.stdout is not None
        place = following.stdout.readline().strip().partition(", in ")[2]
        assert "round 1" in following.stdout.readline()
        following.send_signal(signal.SIGINT)
        assert f"--resume {place}` follows it again" in following.stdout.read()
    resume = [FEDPEFT, "server", "run", "--resume", place]
    with subprocess.Popen(resume, cwd=federation.folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as following:
        assert following.stdout is not None
        assert "goes on, in" in following.stdout.readline()
        assert "round 1" in following.stdout.readline(), "it has all rounds, not those to come alone"
        assert federation.call("server", "stop").startswith("stopped: run ")
        rest = following.stdout.read()
        assert following.wait(300) == 1
    assert "`fedpeft server stop` ended it\nfedpeft: the run ended as finished:stopped" in rest
    assert "round 5" not in rest
    assert federation.call("server", "stop") == "no run goes on\n"
    told = json.loads(federation.call("status", "-c", "server.yaml", "--json"))
    assert (told["run"], told["state"], told["round"] < 5) == (place, "finished:stopped", True)
    said = federation.call("server", "run", "--resume", place)
    assert said.startswith("run ")
    assert "goes on, in" not in said
    assert "round 5" in said
    assert "finished: " in said
    entries = [json.loads(line) for line in (Path(place) / "ledger.jsonl").read_text().splitlines()]
    assert [entry["round"] for entry in entries] == list(range(5))
    assert entries[0]["loss"] == first["loss"]

    assert federation.call("server", "unregister", "site2").startswith("site2: shut out, node ")
    told = json.loads(federation.call("status", "-c", "server.yaml", "--json"))
    assert told["online"] == ["site0", "site1"]
    assert "site2 was shut out, and its key stays out" in federation.call("server", "up")


def _hears() -> None:
    """Ctrl-C is heard, though a shell that starts commands in the background has them ignore it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _lives(folder: Path) -> Iterator[str]:
    """Command lines of the processes that work in `folder`."""
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if str((place / "cwd").readlink()).startswith(str(folder)):
                yield (place / "cmdline").read_text()
        except OSError:
            continue
