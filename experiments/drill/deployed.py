"""Deployed: drills on real processes of this machine: SuperLink, SuperExec, SuperNodes, workers, over TLS and gRPC on loopback.

What is killed is killed with -9, by its pid. What a client's worker does wrong it does in a worker of the drill's own (worker.py).
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from clients import launch as client_side
from experiments.drill.event import CLIENTS, SMALL, Event, Ran, read_ran
from experiments.drill.line import Line
from experiments.drill.twice import SENT
from experiments.drill.worker import HELD
from fedpeft.config import app_folder
from fedpeft.ledger import Ledger
from fedpeft.processes import Processes
from server import certs
from server import launch as server_side

LONGEST = 900.0  # seconds that a drill waits for what has to come next
PATIENT = "deadline=200"  # unless the drill is about it: on a busy machine a worker takes a minute to begin
KILLED = "killed by signal 9"
SLOW = 1000.0  # bytes a second: an update of 89 kB takes longer than its round
LINED = 1  # the client whose line to the server runs through this process
OUTSIDE = ("killed", "gone", "late", "slow", "worker", "supernode", "server", "superlink", "host")  # while clients are in mid-fit


@dataclass(eq=False)
class Deployed:
    """A `Runner`; all lies in `folder`. Up within `with`; runs follow one another on the same processes, as far as they live."""

    folder: Path
    _odd: set[int] = field(default_factory=set)  # clients whose worker is the drill's
    _line: Line = field(init=False)

    def __enter__(self) -> "Deployed":
        ports = _free_ports(2)
        self._line = Line(ports[0])
        certs.create(self.folder / "certs", ["localhost"], now=datetime.now(UTC))
        for client in range(CLIENTS):
            certs.make_client(self.folder / "certs", f"client{client}")
            self._site_file(client).write_text(
                f"client: {client}\nstate: client{client}\nsuperlink: 127.0.0.1:{self._line.port if client == LINED else ports[0]}\n"
                f"tls: {{ca: certs/ca.crt, key: certs/client{client}}}\nengine: {{stacked: false}}\n"  # as the simulation's
            )
        (self.folder / "server.yaml").write_text(
            f"state: server\nclients: {CLIENTS}\nfleet: 127.0.0.1:{ports[0]}\ncontrol: 127.0.0.1:{ports[1]}\nkeys: [certs]\n"
            "tls: {ca: certs/ca.crt, cert: certs/server.pem, key: certs/server.key}\n"
        )
        self._server_up()
        return self

    def __exit__(self, *_: object) -> None:
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda client: client_side.down(self._site(client)), range(CLIENTS)))
        server_side.down(self._server)
        self._line.close()

    def run(self, event: Event, overrides: tuple[str, ...] = ()) -> Ran:
        """See `Runner`."""
        self._prepare(event)
        with self._doubled(event), self._followed(*SMALL, PATIENT, *overrides) as first:
            stopped = self._happens(event, first) if event.kind in OUTSIDE else None
            if stopped is None and first.wait():
                stopped = first.said()
        if stopped is not None:
            with self._followed("--resume", str(first.place)) as second:
                if second.wait():
                    raise OSError(f"it was not resumed: {second.said()}{self._logs()}")
        return read_ran(first.place, stopped)

    def _prepare(self, event: Event) -> None:
        """Everything runs; the event's clients with a worker to which it happens."""
        for client in self._odd | set(event.held):
            processes = self._processes(client)
            processes.stop("worker")
            (self._state(client) / HELD).unlink(missing_ok=True)
            if client in event.held and event.kind != "none":
                command = [*_own("worker"), str(self._site_file(client)), json.dumps(asdict(event))]
                self._state(client).mkdir(mode=0o700, exist_ok=True)
                processes.start("worker", command, os.environ)
        self._odd = set(event.held)
        self._server_up()
        for client in self._odd if event.kind != "none" else ():
            _met(partial(client_side.answers, self._site(client).socket), f"client {client}'s worker did not begin{self._logs()}")
        with ThreadPoolExecutor() as pool:
            list(pool.map(self._client_up, range(CLIENTS)))

    @contextmanager
    def _doubled(self, event: Event) -> Iterator[None]:
        """With SuperNodes that send twice, where that is the event."""
        clients = event.clients if event.kind == "twice" else ()
        try:
            for client in clients:
                self._sends_twice(client)
            yield
        finally:
            for client in clients:
                self._processes(client).stop("supernode")
        for client in clients:
            if not (self._state(client) / SENT).exists():
                raise OSError(f"client {client} sent nothing twice")

    def _sends_twice(self, client: int) -> None:
        """The client's SuperNode from now on."""
        processes, state = self._processes(client), self._state(client)
        processes.stop("supernode")
        (state / SENT).unlink(missing_ok=True)
        before = len(processes.said("supernode"))
        command = [*_own("twice"), *client_side.supernode(self._site(client))[1:]]
        processes.start("supernode", command, client_side.variables_of(state))
        _met(lambda: b"SuperNode ID:" in processes.said("supernode", before), f"client {client} was not let in{self._logs()}")

    def _happens(self, event: Event, run: "Following") -> str | None:
        """Does what is done from outside, once the event's clients are in mid-fit; gives why the run has to be resumed."""
        held = [self._state(client) / HELD for client in event.held]
        run.until(lambda: all(path.exists() for path in held), f"no message reached the workers{self._logs()}")
        server, stopped = Processes(self._server.state), None
        for client in event.clients:
            if event.kind in ("killed", "gone", "supernode"):
                _kill(self._processes(client), "supernode")
            if event.kind in ("killed", "gone", "worker"):
                _kill(self._processes(client), "worker")
            if event.kind in ("killed", "supernode"):
                self._client_up(client)  # which takes the minute until the server has missed it
        if event.kind == "server":
            stopped = _kill_inside(server, "superexec", "serverapp")
        if event.kind in ("superlink", "host"):
            _kill(server, "superlink")
        if event.kind == "host":
            stopped = _kill(server, "superexec")
        over = partial(run.until, lambda: len(Ledger(run.place / "ledger.jsonl").entries()) > event.rounds[-1], "the round did not end")
        if event.kind == "late":
            over()
        if event.kind == "slow":
            self._line.rate = SLOW
        for path in held:
            path.unlink(missing_ok=True)
        if event.kind == "slow":
            over()
            self._line.rate = None
        if event.kind in ("superlink", "host"):
            self._server_up()
        if event.kind == "worker":
            for client in event.clients:
                self._client_up(client)
        return stopped

    @contextmanager
    def _followed(self, *words: str) -> Iterator["Following"]:
        """`fedpeft server run`, which is ended with the block: that ends no run."""
        said = self.folder / f"run{len(list(self.folder.glob('run*.txt')))}.txt"
        command = [sys.executable, "-c", "from fedpeft.cli import main; main()", "server", "run", *words]
        with said.open("w") as file, subprocess.Popen(command, cwd=self.folder, stdout=file, stderr=file) as process:
            made = Following(process, said)
            try:
                made.until(lambda: ", in " in said.read_text() or process.poll() is not None, "no run began")
                if process.poll() is not None:
                    raise OSError(f"no run began: {made.said()}{self._logs()}")
                yield made
            finally:
                process.kill()

    @property
    def _server(self) -> server_side.ServerFile:
        return server_side.read(self.folder / "server.yaml")

    def _server_up(self) -> None:
        server_side.up(self._server)

    def _client_up(self, client: int) -> None:
        client_side.up(self._site_file(client), self._site(client))

    def _site_file(self, client: int) -> Path:
        return self.folder / f"site{client}.yaml"

    def _site(self, client: int) -> client_side.SiteFile:
        return client_side.read(self._site_file(client))

    def _state(self, client: int) -> Path:
        return self.folder / f"client{client}"

    def _processes(self, client: int) -> Processes:
        return Processes(self._state(client))

    def _logs(self) -> str:
        return "".join(f"\n== {path}\n{path.read_text(errors='replace')[-1500:]}" for path in sorted(self.folder.glob("*/*.log")))


@dataclass(frozen=True)
class Following:
    """A `fedpeft server run` that goes on."""

    process: "subprocess.Popen[bytes]"
    output: Path

    @property
    def place(self) -> Path:
        """The run's folder."""
        return Path(self.output.read_text().partition(", in ")[2].splitlines()[0])

    def said(self) -> str:
        """What it printed last."""
        return " ".join(line.removeprefix("fedpeft: ") for line in self.output.read_text().splitlines()[-4:])

    def until(self, met: Callable[[], bool], fault: str) -> None:
        """Waits for what has to come while it goes on."""
        end = time.monotonic() + LONGEST
        while not met():
            if time.monotonic() > end or (self.process.poll() is not None and not met()):
                raise OSError(f"{fault}; it said: {self.said()}")
            time.sleep(0.05)

    def wait(self) -> int:
        """Its exit code, when it ends."""
        self.until(lambda: self.process.poll() is not None, f"it did not end within {LONGEST:.0f} s")
        return self.process.wait()


def _own(module: str) -> list[str]:
    """What begins one of the drills' own programs."""
    return [
        sys.executable,
        "-c",
        f"import sys; sys.path.insert(0, {str(app_folder())!r}); from experiments.drill.{module} import main; main()",
    ]


def _kill(processes: Processes, name: str) -> str:
    """Kills a process of ours and all that it started, as the machine's end would."""
    pid = processes.running(name)
    if pid is None:
        raise OSError(f"{name} does not run: {processes.last_words(name)}")
    os.killpg(pid, signal.SIGKILL)
    _met(lambda: processes.running(name) is None, f"{name} was killed and lives")
    return KILLED


def _kill_inside(processes: Processes, name: str, what: str) -> str:
    """Kills those processes of the session that `name` leads whose program is called `what`."""
    found = [pid for pid in _session(processes.running(name)) if what in _program(pid)]
    if not found:
        raise OSError(f"{name} has started no {what}")
    for pid in found:
        os.kill(pid, signal.SIGKILL)
    _met(lambda: not any(_program(pid) for pid in found), f"{what} was killed and lives")
    return KILLED


def _session(leader: int | None) -> Iterator[int]:
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if os.getsid(int(place.name)) == leader:
                yield int(place.name)


def _program(pid: int) -> str:
    """The command line of a process, "" of one that has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def _met(met: Callable[[], bool], fault: str) -> None:
    end = time.monotonic() + 120
    while not met():
        if time.monotonic() > end:
            raise OSError(fault)
        time.sleep(0.02)


def _free_ports(count: int) -> Sequence[int]:
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()
