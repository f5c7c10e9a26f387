"""What `fedpeft server up` starts: Flower's SuperLink, which clients call, and the SuperExec that starts a run's ServerApp beside it.

With the SuperExec apart and a database, a SuperLink that is killed and started again goes on with its run.
"""

import json
import logging
import secrets
import shlex
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

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
from fedpeft.processes import Processes
from server.control import Control, control, key_of
from server.sockets import FLEET_PORT

POLL = 0.25  # seconds between two looks for a run to start; Flower's own is 1
READY = 60.0  # seconds until the SuperLink listens
FREED = 5.0  # seconds until the port of one that was killed is free
ANY = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}  # all addresses of a host -> the one by which it calls itself
LINK = "local"  # what Flower's command line calls this SuperLink
log = logging.getLogger("fedpeft")


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


def up(server: ServerFile) -> tuple[list[str], list[str]]:
    """Starts what does not run, and lets the clients' keys in; gives the names of what it started, and of the clients it let in."""
    if not server.insecure:
        public_keys(server)
    state = state_folder(server.state)
    processes, variables = Processes(state), _environment(server)
    secret = state / "superexec.secret"  # only our SuperExec may take a run's work: other users of this machine reach the port, too
    if not secret.exists():
        secret.touch(mode=0o600)
        secret.write_bytes(secrets.token_bytes(32))
    (state / "flwr" / "config.toml").write_text(_connection(server))
    started = []
    if processes.running("superlink") is None:
        _check_free(server)
        processes.start("superlink", superlink(server, secret), variables)
        started.append("superlink")
    _wait(processes, server)
    if processes.start("superexec", superexec(server, secret), variables):
        started.append("superexec")
    if not is_loopback(host_and_port(server.control, "control")[0]):
        log.warning("whoever reaches control=%s can run code here and at all clients; let a firewall or VPN guard it", server.control)
    try:
        return started, [] if server.insecure else _let_in(server)
    except OSError as fault:
        if "superlink" in started:
            raise
        log.warning("no key was let in: %s", fault)  # it runs, and so may a run: who calls this in a loop ends neither
        return started, []


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
    return [
        program("flower-superexec"),
        *safe,
        "--runtime-api-address",
        _reached(server.control),
        "--superexec-auth-secret-file",
        str(secret),
    ]


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


def check(server: ServerFile, words: Sequence[str]) -> None:
    """Raises `ConfigError` if there is no run of these words, or none with this server's clients."""
    config = load(words)
    if config.clients != server.clients:
        raise ConfigError(
            f"clients={config.clients}: server.yaml has clients: {server.clients}, each with a key of its own; change it there"
        )


def submit(server: ServerFile, words: Sequence[str]) -> int:
    """Hands a run to the SuperLink; gives its number. Clients know a run by these very words: a resumed one has them again."""
    text = " ".join(shlex.quote(word) for word in words)
    said = server.state / "run.toml"
    said.write_text(f"overrides = {json.dumps(text)}\n")
    bundle = app_folder() / "experiments" / "bundle"
    command = [program("flwr"), "run", str(bundle), LINK, "--run-config", str(said), "--format", "json"]
    done = subprocess.run(command, env=_environment(server), cwd=server.state, capture_output=True, text=True, check=False)
    begins = done.stdout.find("{")
    try:
        found = json.JSONDecoder().raw_decode(done.stdout, begins)[0] if begins >= 0 else {}
    except json.JSONDecodeError:
        found = {}
    if done.returncode or "run-id" not in found:
        raise OSError(f"flwr run: {found.get('error-message') or (done.stderr or done.stdout).strip()[-600:]}")
    return int(found["run-id"])


def public_keys(server: ServerFile) -> dict[bytes, Path]:
    """The keys that `up` lets in, as a SuperLink holds them, and their files. Raises `ConfigError` if a file is none."""
    try:
        return {key_of(path): path for path in server.keys}
    except ValueError as fault:
        raise ConfigError(f"keys: {fault}") from fault


@contextmanager
def control_of(server: ServerFile) -> Iterator[Control]:
    """Its control port, to ask."""
    with control(_reached(server.control), None if server.insecure else server.tls.ca) as made:
        yield made


def _let_in(server: ServerFile) -> list[str]:
    """Registers every key that the SuperLink does not have; gives their names."""
    with control_of(server) as link:
        known, made = {node.key: node.status for node in link.nodes()}, []
        for key, path in public_keys(server).items():
            if key not in known:
                link.register(path)
                made.append(path.stem)
            elif known[key] == "unregistered":
                log.warning(
                    "%s was shut out, and its key stays out: take %s away, or let it make another pair (`fedpeft certs client --force`)",
                    path.stem, path,
                )  # fmt: skip
    return made


def _environment(server: ServerFile) -> Mapping[str, str]:
    return environment(server.state, poll=POLL) | {FLEET_PORT: str(host_and_port(server.fleet, "fleet")[1])}


def _connection(server: ServerFile) -> str:
    trust = "insecure = true" if server.insecure else f"root-certificates = {json.dumps(str(server.tls.ca))}"
    return f'[superlink]\ndefault = "{LINK}"\n[superlink.{LINK}]\naddress = "{_reached(server.control)}"\n{trust}\n'


def _addresses(server: ServerFile) -> list[tuple[str, str, int]]:
    """(field, host to call from here, port) of what the SuperLink listens at."""
    made = []
    for where, address in (("control", server.control), ("fleet", server.fleet)):
        host, _, port = _reached(address).rpartition(":")
        made.append((where, host.strip("[]"), int(port)))
    return made


def _reached(address: str) -> str:
    """The address as it is called from this host."""
    host, port = host_and_port(address, "address")
    return f"{ANY[host]}:{port}" if host in ANY else address


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
