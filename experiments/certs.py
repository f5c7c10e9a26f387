"""`fedpeft certs`: make, renew and look at what a deployment's server and clients prove themselves with, and let clients in."""

import stat
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from fedpeft.config import ConfigError
from server.certs import (
    CA,
    CA_KEY,
    DAYS,
    HEADER,
    SERVER,
    SERVER_KEY,
    create,
    faults_of,
    hosts_of,
    make_client,
    read_certificate,
)
from server.certs import renew as sign_again
from server.control import control as open_control
from server.control import key_of

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Certificates and keys of a deployment; docs/deploy.md has the tour.")

Folder = Annotated[Path, typer.Argument(help="Where the files lie.")]
Hosts = Annotated[list[str] | None, typer.Option("--host", help="What clients connect to, name or address; may be repeated.")]
Days = Annotated[int, typer.Option(help="How long the server certificate holds.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what is there.")]


@app.command()
def init(folder: Folder, host: Hosts = None, days: Days = DAYS, force: Force = False) -> None:
    """On the server: make an authority that lasts ten years, and a server certificate of it.

    \b
    Example:
      fedpeft certs init certs --host fl.example.org --host 10.0.0.5
    """
    with _taught():
        create(folder, host or [], now=datetime.now(UTC), days=days, force=force)
    print(f"{folder / CA}  to every client, which trusts the server by it")
    print(f"{folder / SERVER}, {folder / SERVER_KEY}  stay on the server")
    print(f"{folder / CA_KEY}  only `fedpeft certs renew` needs it: best kept off the server")


@app.command()
def client(folder: Folder, name: Annotated[str, typer.Argument(help="Of the client.")], force: Force = False) -> None:
    """On a client: make its key pair. The private key never leaves it; the .pub goes to the server, for `fedpeft certs register`.

    \b
    Example:
      fedpeft certs client certs north
    """
    with _taught():
        make_client(folder, name, force=force)
    print(f"{folder / name}  stays on the client")
    print(f"{folder / name}.pub  to the server: fedpeft certs register FOLDER {name}")


@app.command()
def renew(folder: Folder, host: Hosts = None, days: Days = DAYS) -> None:
    """On the server: a new server certificate for the same hosts, or those of --host. Clients go on trusting it.

    A SuperLink reads its certificate when it starts: start it again, between two runs.
    """
    with _taught():
        sign_again(folder, host or (), now=datetime.now(UTC), days=days)
        ends = read_certificate(folder / SERVER).not_valid_after_utc
    print(f"{folder / SERVER}  until {ends:%Y-%m-%d}; start the server again, clients need nothing new")


@app.command()
def show(folder: Folder) -> None:
    """List the files, what they hold for and until when. Exit code 1 if one of them is no good, or ends within 30 days."""
    now, faults = datetime.now(UTC), list[str]()
    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("file", "what", "subject", "hosts", "until", "mode"):
        table.add_column(title, overflow="fold")
    for path in _files(folder):
        table.add_row(path.name, *_row(path), f"{stat.S_IMODE(path.stat().st_mode):03o}")
        faults += faults_of(path, now)
    if not table.row_count:
        raise ConfigError(f"{folder} holds neither certificates nor keys: `fedpeft certs init` or `fedpeft certs client` makes some there")
    console = Console()
    console.print(table, highlight=False)
    for fault in faults:
        console.print(f"advice: {fault}", style="yellow", soft_wrap=True, highlight=False, markup=False)
    raise typer.Exit(1 if faults else 0)


@app.command()
def register(
    folder: Folder,
    names: Annotated[list[str], typer.Argument(help="Of clients whose NAME.pub lies in the folder.")],
    control: Annotated[str, typer.Option(help="The running SuperLink's control address, as host:port.")] = "127.0.0.1:8000",
) -> None:
    """On the server: let clients in, by their public keys. It is remembered as long as the SuperLink's database is.

    \b
    Example:
      fedpeft certs register certs north south
    """
    with _taught():
        keys = {name: key_of(folder / f"{name}.pub") for name in names}  # all are looked at before the first is let in
        read_certificate(folder / CA)
    with open_control(control, folder / CA) as link:
        nodes = {node.key: node for node in link.nodes()}
        known = {key: node.number for key, node in nodes.items()}
        for name, key in keys.items():
            if key in nodes and nodes[key].status == "unregistered":
                raise ConfigError(f"{name} was shut out, and its key stays out: `fedpeft certs client --force` makes another pair")
        for name, key in keys.items():
            before = " before" if key in known else ""
            number = known.get(key) or link.register(folder / f"{name}.pub")
            known[key] = number
            print(f"{name}: registered{before}, node {number}")


def _files(folder: Path) -> list[Path]:
    """Our files in the folder: those of the server first, then clients' pairs."""
    known = [folder / name for name in (CA, CA_KEY, SERVER, SERVER_KEY) if (folder / name).is_file()]
    others = sorted(path for path in folder.glob("*") if path.is_file() and path not in known)
    return known + [path for path in others if path.suffix == ".pub" or _opens_as_key(path)]


def _opens_as_key(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(HEADER)) == HEADER


def _row(path: Path) -> tuple[str, str, str, str]:
    """What the file is, its subject, its hosts, and its end."""
    if path.name in (CA, SERVER):
        try:
            certificate = read_certificate(path)
        except ValueError:  # said by `faults_of`
            return "certificate", "", "?", "?"
        ends = f"{certificate.not_valid_after_utc:%Y-%m-%d}"
        return "certificate", certificate.subject.rfc4514_string().removeprefix("CN="), ", ".join(hosts_of(certificate)), ends
    return ("public key" if path.suffix == ".pub" else "private key"), "", "", ""


@contextmanager
def _taught() -> Iterator[None]:
    """What is wrong with files or arguments is the user's to set right: exit code 2."""
    try:
        yield
    except ValueError as fault:
        raise ConfigError(str(fault)) from fault
