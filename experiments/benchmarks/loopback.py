"""A federation on this machine as docs/deploy.md sets it up: TLS, node keys, a worker and a SuperNode for each client. For benchmarks."""

import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from clients.launch import free_port
from experiments.benchmarks.memory import tree
from fedpeft.deployment import environment, program
from fedpeft.processes import Processes

PATIENCE = 900.0  # seconds that one command may take on a busy machine
PACKAGES = ("flwr", "grpcio", "torch")


PROJECT = """
[project]
name = "echo"
version = "1.0.0"
description = ""
license = "Apache-2.0"
dependencies = []
[tool.flwr.app]
publisher = "fedpeft"
[tool.flwr.app.components]
serverapp = "at_server:app"
clientapp = "at_client:app"
[tool.flwr.app.config]
"""


def project(folder: Path, at_server: str, at_client: str, **config: str | int) -> Path:
    """A Flower app of these two modules and this run config, in `folder`."""
    folder.mkdir()
    said = "".join(f"{name} = {json.dumps(value)}\n" for name, value in config.items())
    for name, text in (("pyproject.toml", PROJECT + said), ("at_server.py", at_server), ("at_client.py", at_client)):
        (folder / name).write_text(text)
    return folder


@contextmanager
def again_and_again(look: Callable[[], None], seconds: float) -> Iterator[None]:
    """Calls `look` every so many seconds, in a thread, until the block ends."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(seconds):
            look()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


@dataclass(frozen=True)
class Loopback:
    """The folder of one server, its clients and its keys."""

    folder: Path
    fleet: int  # port
    clients: int

    def call(self, *words: str) -> str:
        """What `fedpeft` prints. Raises `OSError` with the logs if it fails."""
        command = [sys.executable, "-c", "from fedpeft.cli import main; main()", *words]
        done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, check=False, timeout=PATIENCE)
        if done.returncode:
            logs = "\n".join(f"== {path.name}\n{path.read_text()[-2000:]}" for path in self.folder.glob("*/*.log"))
            raise OSError(f"fedpeft {' '.join(words)} failed:\n{done.stdout}{done.stderr}\n{logs}")
        return done.stdout

    def server(self) -> Processes:
        """SuperLink and SuperExec."""
        return Processes(self.folder / "server")

    def serverapps(self) -> list[int]:
        """Pids of the runs that go on: what the SuperExec started and has not ended."""
        superexec = self.server().running("superexec")
        tasks = Path(f"/proc/{superexec}/task").glob("*/children")
        return [pid for task in tasks for pid in map(int, task.read_text().split()) if tree(pid)]  # an ended one has no memory

    def site(self, client: int) -> str:
        """The client's file."""
        return str(self.folder / f"site{client}.yaml")

    def state(self, client: int) -> Path:
        """The client's folder."""
        return self.folder / f"client{client}"

    def each(self, *words: str) -> None:
        """`fedpeft client ...` for all clients, two at a time: a worker's start is all imports."""
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda client: self.call("client", *words, "-c", self.site(client)), range(self.clients)))

    def flwr(self, *words: str) -> str:
        """What Flower's command line prints, of this server."""
        done = subprocess.run(
            [program("flwr"), *words], cwd=self.folder / "server", env=environment(self.folder / "server", poll=0.25), check=False,
            capture_output=True, text=True, timeout=PATIENCE,
        )  # fmt: skip
        if done.returncode:
            raise OSError(f"flwr {' '.join(words)} failed:\n{done.stdout}{done.stderr}")
        return done.stdout


@contextmanager
def federation(folder: Path, *, clients: int, run: Sequence[str], keys: Sequence[str] = ()) -> Iterator[Loopback]:
    """All of it up, and down at the end by pid; `keys` are of further nodes that may connect."""
    made = Loopback(folder, free_port(), clients)
    made.call("certs", "init", "certs", "--host", "localhost")
    for name in (*(f"site{client}" for client in range(clients)), *keys):
        made.call("certs", "client", "certs", name)
    for client in range(clients):
        Path(made.site(client)).write_text(
            f"client: {client}\nstate: {made.state(client).name}\nsuperlink: 127.0.0.1:{made.fleet}\n"
            f"tls: {{ca: certs/ca.crt, key: certs/site{client}}}\n"
        )
    (folder / "server.yaml").write_text(
        f"state: server\nclients: {clients}\nfleet: 127.0.0.1:{made.fleet}\ncontrol: 127.0.0.1:{free_port()}\nkeys: [certs]\n"
        f"tls: {{ca: certs/ca.crt, cert: certs/server.pem, key: certs/server.key}}\nrun: [{', '.join(run)}]\n"
    )
    try:
        made.call("server", "up")
        made.each("up")
        yield made
    finally:
        with suppress(OSError):
            made.each("down")
        made.call("server", "down")


def until(true: Callable[[], bool], *, seconds: float = PATIENCE, why: str) -> None:
    """Waits for it; `OSError` says `why` it does not come."""
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            raise OSError(f"waited {seconds:.0f} s in vain: {why}")
        time.sleep(0.1)


def machine() -> str:
    """Versions, machine and how busy it is, for the line below a table."""
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in PACKAGES)
    load = " ".join(f"{one:.2f}" for one in os.getloadavg())
    return f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {versions}; load average {load}"
