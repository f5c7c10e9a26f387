"""Deployment: what server.yaml and site.yaml have in common: how they are read, and when a connection may be without TLS."""

import difflib
import ipaddress
import os
import sysconfig
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from fedpeft.config import ConfigError

T = TypeVar("T")
# A SuperLink writes each piece of a message into its database, and whoever waits 5 s for another's write loses the message. With Flower's
# 5 MB pieces, two at a time, 8 clients of 40 MB each reach that; with these the longest wait is under 2 s. (Disk of 70 MB/s, busy machine.)
PIECES = {"FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE": str(1 << 20), "FLWR_PRIVATE_MAX_CONCURRENT_OBJ_PUSHES": "1"}


@dataclass(frozen=True)
class Tls:
    """Files that prove who somebody is: `fedpeft certs` makes them. Paths are as seen from the file that names them."""

    ca: Path | None = None  # ca.crt: the authority that all trust
    cert: Path | None = None  # the server's certificate
    key: Path | None = None  # the private key of the server, or of a client


def mapping_of(path: Path) -> dict[str, Any]:
    """The fields of a YAML file."""
    import yaml  # type: ignore[import-untyped]  # it has no types

    try:
        found = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{path} is not there; docs/deploy.md has one to begin with") from None
    except (yaml.YAMLError, UnicodeDecodeError) as fault:
        raise ConfigError(f"{path} is no YAML: {str(fault).splitlines()[0]}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: needed are fields, such as `state: FOLDER`")
    return {str(key): value for key, value in found.items()}


def filled(kind: type[T], found: Mapping[str, Any], where: str) -> T:
    """A frozen dataclass from the fields that a file gives; one that it does not know, or lacks, is a fault."""
    names = {field.name: field for field in fields(kind)}  # type: ignore[arg-type]  # a dataclass
    faults = []
    for name in found:
        if name not in names:
            close = difflib.get_close_matches(name, names, 1)
            faults.append(
                f"{where}{name}: there is no such field; {f'did you mean {close[0]}? ' if close else ''}There are {', '.join(names)}"
            )
    for name, field in names.items():
        if name not in found and field.default is MISSING and field.default_factory is MISSING:
            faults.append(f"{where}{name} is missing")
    if faults:
        raise ConfigError("\n".join(faults))
    return kind(**{name: found[name] for name in names if name in found})


def tls_of(value: object, folder: Path, where: str) -> Tls:
    """The paths under `tls:`; relative ones begin at `folder`."""
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}: needed are fields, such as ca: ca.crt")
    given = filled(Tls, value, f"{where}.")
    return Tls(*(None if path is None else folder / str(path) for path in (given.ca, given.cert, given.key)))


def host_and_port(address: str, where: str) -> tuple[str, int]:
    """Both parts of host:port, or of [host]:port for IPv6."""
    host, colon, port = str(address).rpartition(":")
    bare = ":" in host and not (host.startswith("[") and host.endswith("]"))
    if bare or not (colon and host and port.isdigit() and 0 < int(port) < 65536):
        raise ConfigError(f"{where}={address}: needed is host:port, such as 127.0.0.1:9092 or [::1]:9092")
    return host.strip("[]"), int(port)


def is_loopback(host: str) -> bool:
    """True if only this machine can be meant."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_secured(*, insecure: bool, addresses: Mapping[str, str], files: Mapping[str, Path | None]) -> None:
    """Raises `ConfigError` unless all `files` are there, or the deployment is on this machine alone and says `insecure`."""
    if insecure:
        for where, address in addresses.items():
            if not is_loopback(host_and_port(address, where)[0]):
                raise ConfigError(
                    f"insecure: {where}={address} can be reached from other machines, so updates could be read and forged there; make keys "
                    "with `fedpeft certs` and name them under tls, or bind to 127.0.0.1"
                )
        return
    for where, path in files.items():
        if path is None:
            raise ConfigError(f"{where} is missing: `fedpeft certs` makes it; or insecure: true, where all are on this machine")
        if not path.is_file():
            raise ConfigError(f"{where}: {path} is not there; `fedpeft certs` makes it")


def program(name: str) -> str:
    """The path of one of Flower's commands, installed beside this Python."""
    path = Path(sysconfig.get_path("scripts")) / name
    if not path.exists():
        raise ConfigError(f"{path} is not there: install Flower where fedpeft is, `pip install 'flwr>=1.39,<1.40'`")
    return str(path)


def environment(state: Path, *, poll: float) -> dict[str, str]:
    """That of Flower's processes: its files in `state`, nothing sent to its makers, and asked for work every `poll` seconds."""
    scripts = sysconfig.get_path("scripts")
    return {
        **PIECES,
        **os.environ,
        "PATH": f"{scripts}{os.pathsep}{os.environ.get('PATH', '')}",  # Flower starts its own commands by name
        "FLWR_HOME": str(state / "flwr"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": str(poll),
        "PYTHONUNBUFFERED": "1",
    }


def state_folder(path: Path) -> Path:
    """The folder, made if need be, closed to others: it holds databases, secrets and sockets."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    (path / "flwr").mkdir(mode=0o700, exist_ok=True)
    return path
