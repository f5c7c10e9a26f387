"""What `fedpeft client up` starts on a client's host: its worker, and Flower's SuperNode, which calls the server.

Nothing listens for other machines.
"""

import logging
import os
import re
import shlex
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clients.policy import Policy
from fedpeft.config import ConfigError, app_folder
from fedpeft.deployment import Tls, check_secured, environment, filled, mapping_of, program, state_folder, tls_of
from fedpeft.processes import Processes

LONGEST = 100  # letters of a unix socket's path; the system takes 107
POLL = 0.1  # seconds between two looks for a message to start a ClientApp for; Flower's own is 1
READY = 120.0  # seconds until the worker listens
CALLS = 30.0  # seconds in which a SuperNode is let in, or not, by a server that is there
MISSED = 75.0  # seconds after which a server has missed a killed SuperNode, twice Flower's heartbeat and some, and lets its key in again
AGAIN = 3.0  # seconds between two tries
REFUSED = ("flwr-agentapp", "flwr-connector", "flwr-model", "flwr-serverapp", "flwr-simulation")  # of Flower's task types
OWN = ("data", "model", "engine", "run")  # families whose fields a site may set for itself


log = logging.getLogger("fedpeft")


@dataclass(frozen=True)
class SiteFile:
    """site.yaml: one client, and what is its own."""

    client: int  # index, from 0
    state: Path  # folder of logs, sockets and memory; back it up: the privacy ledger is in it
    superlink: str = "127.0.0.1:9092"
    tls: Tls = field(default_factory=Tls)  # ca and key
    insecure: bool = False
    whole: bool = False  # all rows of data.path are this client's; False: its share of them, as in a simulation
    data: Mapping[str, Any] = field(default_factory=dict)  # path, text, label, ...: fields of data=
    model: Mapping[str, Any] = field(default_factory=dict)  # id: where the base model lies here
    engine: Mapping[str, Any] = field(default_factory=dict)
    run: Mapping[str, Any] = field(default_factory=dict)  # device, threads
    policy: Policy = field(default_factory=Policy)

    @property
    def overrides(self) -> dict[str, str]:
        """What this site says in place of the server. One client is trained, so nothing is measured for waves and lanes."""
        usual = {"engine.wave": 1, "engine.lanes": 1} | ({"data.partition.scheme": "iid"} if self.whole else {})
        said = {f"{family}.{name}": value for family in OWN for name, value in getattr(self, family).items()}
        return {key: _word(value) for key, value in (usual | said).items()}

    @property
    def socket(self) -> Path:
        """Where the worker answers."""
        return self.state / "worker.sock"


def read(path: Path, *, insecure: bool = False) -> SiteFile:
    """The site of a file; relative paths begin at its folder. Raises `ConfigError`."""
    found, folder = mapping_of(path), path.resolve().parent
    for name in (*OWN, "policy"):
        if not isinstance(found.get(name, {}), dict):
            raise ConfigError(f"{path}: {name}={found[name]}: needed are fields")
    found["tls"] = tls_of(found.get("tls", {}), folder, "tls")
    found["policy"] = filled(Policy, {name: _listed(value) for name, value in found.get("policy", {}).items()}, "policy.")
    if isinstance(found.get("data"), dict) and found["data"].get("path"):
        found["data"] = found["data"] | {"path": str(folder / str(found["data"]["path"]))}
    found |= {"insecure": found.get("insecure", False) is True or insecure, "state": folder / str(found.get("state", "fedpeft-client"))}
    site = filled(SiteFile, found, "")
    if type(site.client) is not int or site.client < 0:
        raise ConfigError(f"client={site.client}: needed is the client's index, 0 or more")
    if len(os.fsencode(site.socket)) > LONGEST or any(mark in str(site.socket) for mark in "\"' "):
        raise ConfigError(
            f"state={site.state}: a socket lies in it, whose path may have {LONGEST} letters and no blanks; choose another folder"
        )
    check_secured(
        insecure=site.insecure, addresses={"superlink": site.superlink}, files={"tls.ca": site.tls.ca, "tls.key": site.tls.key}
    )  # fmt: skip
    return site


def up(path: Path, site: SiteFile) -> list[str]:
    """Starts what does not run; gives the names of what it started. Raises `ConfigError` if the worker cannot begin, or the server does not
    let the SuperNode in; one that was killed is kept out until the server has missed it, for about a minute.
    """
    state = state_folder(site.state)
    processes, variables = Processes(state), variables_of(state)
    started = []
    command = [sys.executable, "-c", "from fedpeft.cli import main; main()", "client", "worker", "--config", str(path.resolve())]
    begun = state / "begun.yaml"  # the file as worker and SuperNode began with it
    if processes.running("worker") is None and processes.running("supernode") is None:
        begun.write_bytes(path.read_bytes())
    elif begun.exists() and begun.read_bytes() != path.read_bytes():
        log.warning("%s has changed since this client began: `fedpeft client down`, then `fedpeft client up` make it count", path)
    if processes.start("worker", command + ["--insecure"] * site.insecure, variables):
        started.append("worker")
        _wait(processes, site.socket)
    until, warned = time.monotonic() + MISSED, False
    while processes.running("supernode") is None:
        before = len(processes.said("supernode"))
        processes.start("supernode", supernode(site), variables)
        if not _ended(processes, before):
            return [*started, "supernode"]
        processes.stop("supernode")  # its SuperExec, which misses it only where dead processes are reaped
        if why := _refused(processes.said("supernode", before), site):
            raise ConfigError(why)
        if time.monotonic() > until:
            raise ConfigError(
                f"the SuperNode ended: {processes.last_words('supernode')}\nIf it was not let in: is its key registered at the server, and "
                "not shut out (`fedpeft status` there has the names)?"
            )
        if not warned:
            log.warning("the server does not let the SuperNode in; one that was killed it still waits for, a minute at most: trying again")
            warned = True
        time.sleep(AGAIN)
    return started


def variables_of(state: Path) -> dict[str, str]:
    """The environment of worker and SuperNode."""
    made = environment(state, poll=POLL)
    return made | {"PATH": f"{own_code(state)}{os.pathsep}{made['PATH']}"}


def supernode(site: SiteFile) -> list[str]:
    """Flower's command: it calls the server, and starts a ClientApp for each message."""
    safe = ["--insecure"] if site.insecure else ["--root-certificates", str(site.tls.ca), "--auth-supernode-private-key", str(site.tls.key)]
    return [
        program("flower-supernode"), *safe, "--superlink", site.superlink, "--host", "127.0.0.1", "--port", str(free_port()),
        "--node-config", f'partition-id={site.client} worker="{site.socket}"',
    ]  # fmt: skip


def down(site: SiteFile) -> list[str]:
    """Ends what was started; the SuperNode first, so that no message is lost in between."""
    processes = Processes(site.state)
    return [name for name in ("supernode", "worker") if processes.stop(name)]


def own_code(state: Path) -> Path:
    """A folder with a `flwr-clientapp` that runs the ClientApp installed here, whatever code comes with a run; see clients/process.py.

    The other programs that a SuperNode starts for whoever controls the server are refused: each would run code that came with a run.
    """
    script = "import sys; sys.path.insert(0, sys.argv.pop(1)); from clients.process import main; main()"
    command = state / "bin" / "flwr-clientapp"
    command.parent.mkdir(mode=0o700, exist_ok=True)
    words = " ".join(map(shlex.quote, (sys.executable, "-c", script, str(app_folder()))))
    command.write_text(f'#!/bin/sh\nexec {words} "$@"\n')
    command.chmod(0o700)
    for name in REFUSED:
        command.with_name(name).write_text(f'#!/bin/sh\necho "{name}: this site runs nothing but its own ClientApp" >&2\nexit 1\n')
        command.with_name(name).chmod(0o700)
    return command.parent


def _refused(said: bytes, site: SiteFile) -> str:
    """Why no other try would help, from what the SuperNode said; "" if one might."""
    lines = [line for line in said.decode(errors="replace").splitlines() if "CERTIFICATE_VERIFY_FAILED" in line]
    if not lines:
        return ""
    return (
        f"the certificate at superlink={site.superlink} was not taken: {lines[-1].strip()}\nIs tls.ca={site.tls.ca} the server's own "
        "ca.crt (compare `sha256sum`), and is the address one of its certificate's hosts (`fedpeft certs show` at the server)?"
    )


def _ended(processes: Processes, before: int) -> bool:
    """Waits until the SuperNode is let in, or `CALLS` for a server that is not there; True if it ended. `before`: bytes of its log."""
    until = time.monotonic() + CALLS
    while (runs := processes.running("supernode") is not None) and time.monotonic() < until:
        if b"SuperNode ID:" in processes.said("supernode", before):
            break
        time.sleep(0.1)
    return not runs


def _wait(processes: Processes, path: Path) -> None:
    until = time.monotonic() + READY
    while not answers(path):
        if processes.running("worker") is None:
            raise ConfigError(f"the worker ended: {processes.last_words('worker')}")
        if time.monotonic() > until:
            raise ConfigError(f"the worker did not begin within {READY:.0f} s: {processes.last_words('worker')}")
        time.sleep(0.05)


def answers(path: Path) -> bool:
    """True if a worker listens at the socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
        return link.connect_ex(str(path)) == 0


def free_port() -> int:
    """For the SuperNode's own ClientApps; each on this host needs another."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _listed(value: Any) -> Any:
    return tuple(map(str, value)) if isinstance(value, list) else value


def _word(value: Any) -> str:
    """A YAML value as an override says it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{','.join(map(_word, value))}]"
    if isinstance(value, str) and not re.fullmatch(r"[\w./:+-]+", value):
        return "'" + value.replace("'", "\\'") + "'"
    return str(value)
