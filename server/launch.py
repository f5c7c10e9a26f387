"""What `fedpeft server up` starts: Flower's SuperLink, which clients call, and the SuperExec that starts a run's ServerApp beside it.

With the SuperExec apart and a database, a SuperLink that is killed and started again goes on with its run.
"""

import hashlib
import json
import secrets
import shlex
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedpeft.config import ConfigError, app_folder, load
from fedpeft.deployment import (
    Tls,
    check_secured,
    environment,
    filled,
    host_and_port,
    is_loopback,
    mapping_of,
    program,
    state_folder,
    tls_of,
)
from fedpeft.ledger import write_text
from fedpeft.processes import Processes
from server.sockets import FLEET_PORT

POLL = 0.25  # seconds between two looks for a run to start; Flower's own is 1
READY = 60.0  # seconds until the SuperLink listens
FREED = 5.0  # seconds until the port of one that was killed is free
LINK = "local"  # what Flower's command line calls this SuperLink


@dataclass(frozen=True)
class ServerFile:
    """server.yaml: where clients find the server, who it is, and what it runs."""

    state: Path  # folder of database, logs and runs
    clients: int
    fleet: str = "0.0.0.0:9092"  # gRPC; clients call it
    control: str = "127.0.0.1:8000"  # who reaches it can start runs: keep it on loopback
    tls: Tls = field(default_factory=Tls)
    keys: tuple[Path, ...] = ()  # public keys of clients that `up` lets in, or folders of .pub; more by `fedpeft certs register`
    insecure: bool = False
    run: tuple[str, ...] = ()  # overrides of a run, as `fedpeft run` takes them


def read(path: Path, *, insecure: bool = False) -> ServerFile:
    """The server of a file; relative paths begin at its folder. Raises `ConfigError`."""
    found, folder = mapping_of(path), path.resolve().parent
    for name in ("run", "keys"):
        if not isinstance(found.get(name, []), list):
            raise ConfigError(f"{path}: {name}={found[name]}: needed is a list, such as [{'rounds=5' if name == 'run' else 'client.pub'}]")
    found["tls"] = tls_of(found.get("tls", {}), folder, "tls")
    found["keys"] = tuple(key for text in found.get("keys", []) for key in _keys(folder / str(text)))
    found["run"] = tuple(map(str, found.get("run", [])))
    found |= {"insecure": found.get("insecure", False) is True or insecure, "state": folder / str(found.get("state", "fedpeft-server"))}
    server = filled(ServerFile, found, "")
    if type(server.clients) is not int or server.clients < 1:
        raise ConfigError(f"clients={server.clients}: needed is how many clients there are, 1 or more")
    files = {"tls.ca": server.tls.ca, "tls.cert": server.tls.cert, "tls.key": server.tls.key}
    check_secured(insecure=server.insecure, addresses={"fleet": server.fleet, "control": server.control}, files=files)
    return server


def up(server: ServerFile) -> list[str]:
    """Starts what does not run, and lets the clients' keys in; gives the names of what it started."""
    state = state_folder(server.state)
    processes, variables = Processes(state), _environment(server)
    secret = state / "superexec.secret"  # only our SuperExec may take a run's work: other users of this machine reach the port, too
    if not secret.exists():
        secret.touch(mode=0o600)
        secret.write_bytes(secrets.token_bytes(32))
    (state / "flwr" / "config.toml").write_text(_connection(server))
    started = []
    if not (state / "superlink.db").exists():
        (state / "registered.txt").unlink(missing_ok=True)
    if processes.running("superlink") is None:
        _check_free(server)
        processes.start("superlink", superlink(server, secret), variables)
        started.append("superlink")
    _wait(processes, server)
    if processes.start("superexec", superexec(server, secret), variables):
        started.append("superexec")
    if not server.insecure:
        _let_in(server)
    if not is_loopback(host_and_port(server.control, "control")[0]):
        started.append("NOTE: whoever reaches control can run code here and at all clients; let a firewall or VPN guard it")
    return started


def superlink(server: ServerFile, secret: Path) -> list[str]:
    """Flower's command."""
    host, port = host_and_port(server.control, "control")
    tls = ["--ssl-ca-certfile", str(server.tls.ca), "--ssl-certfile", str(server.tls.cert), "--ssl-keyfile", str(server.tls.key)]
    return [
        program("flower-superlink"), *(["--insecure"] if server.insecure else [*tls, "--enable-supernode-auth"]),
        "--fleet-api-address", server.fleet, "--host", host, "--port", str(port), "--database", str(server.state / "superlink.db"),
        "--isolation", "process", "--superexec-auth-secret-file", str(secret), "--disable-runtime-dependency-installation",
    ]  # fmt: skip


def superexec(server: ServerFile, secret: Path) -> list[str]:
    """Flower's command that starts the ServerApp of a run."""
    safe = ["--insecure"] if server.insecure else ["--root-certificates", str(server.tls.ca)]
    return [program("flower-superexec"), *safe, "--runtime-api-address", server.control, "--superexec-auth-secret-file", str(secret)]


def down(server: ServerFile) -> list[str]:
    """Ends what was started."""
    processes = Processes(server.state)
    return [name for name in ("superexec", "superlink") if processes.stop(name)]


def words_of(server: ServerFile, overrides: Sequence[str], folder: Path) -> list[str]:
    """The overrides of a new run in `folder`: the file's, then `overrides`; all clients take part in a round unless they say otherwise."""
    words = [*server.run, *overrides]
    if not any(word.startswith("cohort=") for word in words):
        words.insert(0, f"cohort={server.clients}")
    return [f"clients={server.clients}", *words, f"run.dir={folder}"]


def submit(server: ServerFile, words: Sequence[str]) -> int:
    """Hands a run to the SuperLink; gives its number. Clients know a run by these very words: a resumed one has them again."""
    config = load(words)
    if config.clients != server.clients:
        raise ConfigError(
            f"clients={config.clients}: server.yaml has clients: {server.clients}, each with a key of its own; change it there"
        )
    text = " ".join(shlex.quote(word) for word in words)
    said = server.state / "run.toml"
    said.write_text(f"overrides = {json.dumps(text)}\n")
    bundle = app_folder() / "experiments" / "bundle"
    found = _flwr(server, "run", str(bundle), LINK, "--run-config", str(said), "--format", "json")
    return int(found["run-id"])


def state_of(server: ServerFile, run: int) -> tuple[str, str]:
    """What Flower says of a run, and why: pending, starting, running, finished:completed, finished:failed, finished:stopped."""
    found = _flwr(server, "list", LINK, "--run-id", str(run), "--format", "json")["runs"][0]
    return str(found["status"]), str(found.get("status-details") or "").removeprefix("ServerApp failed with exception: ")


def nodes(server: ServerFile) -> list[dict[str, Any]]:
    """The SuperNodes that the SuperLink knows."""
    return list(_flwr(server, "supernode", "list", LINK, "--format", "json")["nodes"])


def _let_in(server: ServerFile) -> None:
    """Registers every key that the database does not have; it is Flower's command once for each."""
    noted = server.state / "registered.txt"  # Flower lists nodes, but not whose keys they have
    known = noted.read_text().splitlines() if noted.exists() else []
    for key in server.keys:
        digest = hashlib.sha256(key.read_bytes()).hexdigest()
        if digest in known:
            continue
        try:
            _flwr(server, "supernode", "register", str(key), LINK, "--name", key.stem, "--format", "json")
        except ConfigError as fault:
            if "already in use" not in str(fault):
                raise
        known.append(digest)
        write_text(noted, "\n".join(known) + "\n")


def _flwr(server: ServerFile, *words: str) -> dict[str, Any]:
    """What Flower's command line answers. Raises `ConfigError` with what it says."""
    done = subprocess.run(
        [program("flwr"), *words], env=_environment(server), cwd=server.state, capture_output=True, text=True, check=False
    )  # fmt: skip
    begins = done.stdout.find("{")
    try:
        found = json.JSONDecoder().raw_decode(done.stdout, begins)[0] if begins >= 0 else {}
    except json.JSONDecodeError:
        found = {}
    if done.returncode or not found or found.get("success") is False:
        why = found.get("error-message") or (done.stderr or done.stdout).strip()[-600:]
        raise ConfigError(f"flwr {' '.join(words[:2])}: {why}")
    return dict(found)


def _environment(server: ServerFile) -> Mapping[str, str]:
    return environment(server.state, poll=POLL) | {FLEET_PORT: str(host_and_port(server.fleet, "fleet")[1])}


def _connection(server: ServerFile) -> str:
    trust = "insecure = true" if server.insecure else f"root-certificates = {json.dumps(str(server.tls.ca))}"
    return f'[superlink]\ndefault = "{LINK}"\n[superlink.{LINK}]\naddress = "{server.control}"\n{trust}\n'


def _addresses(server: ServerFile) -> list[tuple[str, str, int]]:
    """(field, host to call from here, port) of what the SuperLink listens at."""
    made = []
    for where, address in (("control", server.control), ("fleet", server.fleet)):
        host, port = host_and_port(address, where)
        made.append((where, "127.0.0.1" if host in ("0.0.0.0", "::") else host, port))
    return made


def _check_free(server: ServerFile) -> None:
    """Raises `ConfigError` if somebody else listens: who takes it for the SuperLink would hand it a run, or wait for clients in vain."""
    until = time.monotonic() + FREED
    for where, host, port in _addresses(server):
        while _listens(host, port):
            if time.monotonic() < until:
                time.sleep(0.05)
                continue
            raise ConfigError(
                f"{where}: another process listens at {host}:{port} already, such as a SuperLink of another server.yaml; end it, or choose "
                "another port"
            )


def _wait(processes: Processes, server: ServerFile) -> None:
    until = time.monotonic() + READY
    for where, host, port in _addresses(server):
        address = getattr(server, where)
        while not _listens(host, port):
            if processes.running("superlink") is None:
                raise ConfigError(f"the SuperLink ended: {processes.last_words('superlink')}")
            if time.monotonic() > until:
                raise ConfigError(f"the SuperLink did not listen at {address} within {READY:.0f} s: {processes.last_words('superlink')}")
            time.sleep(0.05)


def _listens(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=5):
            return True
    except OSError:
        return False


def _keys(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(path.glob("*.pub"))
    if not path.is_file():
        raise ConfigError(f"keys: {path} is not there; a client makes it with `fedpeft certs client`")
    return [path]
