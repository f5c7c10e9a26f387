"""`fedpeft server`, `fedpeft client`, `fedpeft status`: a federation on real hosts, each started by one command and one file."""

import json
import logging
import sys
import time
from collections import Counter
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from clients import launch as client_side
from experiments.progress import crossed, payloads
from experiments.report import read_result, write_report
from fedpeft.config import ConfigError
from fedpeft.deployment import mapping_of
from fedpeft.ledger import Ledger
from fedpeft.processes import Processes
from server import certs
from server import launch as server_side
from server.control import Control, Node, Run

server = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="The server of a federation on real hosts.")
client = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="One client of a federation on real hosts.")
ServerConfig = Annotated[Path, typer.Option("--config", "-c", help="server.yaml")]
SiteConfig = Annotated[Path, typer.Option("--config", "-c", help="site.yaml")]
log = logging.getLogger("fedpeft")
Insecure = Annotated[bool, typer.Option("--insecure", help="Without TLS and keys: on loopback alone.")]
LOST = 300.0  # seconds that the SuperLink may be gone, while somebody starts it again: the run outlives it
ENDS = 60.0  # seconds until a ServerApp has heard that its run was stopped, and has ended
SOON = 1.0  # seconds between two questions once the adapter is there
QUIET = 5.0  # seconds without a round after which the SuperLink is asked whether the run still goes on


@server.command("up")
def server_up(config: ServerConfig = Path("server.yaml"), insecure: Insecure = False) -> None:
    """Start the server in the background: clients can connect. What runs already is left alone."""
    told = server_side.read(config, insecure=insecure)
    _check_certificates(told.insecure, told.tls.ca, told.tls.cert)
    started, let_in = server_side.up(told)
    _say_started(started, told.state)
    if let_in:
        print(f"let in: {', '.join(let_in)}")


@server.command("down")
def server_down(config: ServerConfig = Path("server.yaml"), insecure: Insecure = False) -> None:
    """End what `server up` started. A run that goes on is continued by `server run --resume`."""
    print(f"ended: {', '.join(server_side.down(server_side.read(config, insecure=insecure))) or 'nothing ran'}")


@server.command("run")
def server_run(
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value ..., after those of server.yaml.", show_default=False)] = None,
    config: ServerConfig = Path("server.yaml"),
    insecure: Insecure = False,
    resume: Annotated[Path | None, typer.Option(help="Go on with the run in this folder.", show_default=False)] = None,
) -> None:
    """Start a run on all clients and follow it. Ctrl-C stops following, not the run, which --resume follows again.

    \b
    Examples:
      fedpeft server run rounds=20 strategy=ffa
      fedpeft server run --resume state/runs/2026-01-31-120000
    """
    told = server_side.read(config, insecure=insecure)
    with server_side.control_of(told) as link:
        number: int | None = None
        if resume is None:
            folder = (told.state / "runs" / f"{datetime.now():%Y-%m-%d-%H%M%S}").resolve()
            words = server_side.words_of(told, overrides or [], folder)
            server_side.check(told, words)
        elif overrides:
            raise ConfigError(f"--resume takes the config of {resume} as it is; leave out {' '.join(overrides)}, or begin another run")
        else:
            folder = resume.resolve()
            number, words = _resumed(told, link, folder)
        goes_on = "" if number is None else " goes on"
        if number is None:
            number = _begin(told, link, words, folder)
        print(f"run {number}{goes_on}, in {folder}", flush=True)
        try:
            _follow(told, link, number, folder)
        except KeyboardInterrupt:
            again = f"fedpeft server run --resume {folder}{_named(config, insecure)}"
            print(f"the run goes on: `{again}` follows it again, `fedpeft server stop{_named(config, insecure)}` ends it")


@server.command("stop")
def server_stop(config: ServerConfig = Path("server.yaml"), insecure: Insecure = False) -> None:
    """End the run that goes on. What it has reached stays in its folder, and `server run --resume` goes on with it."""
    from server.folder import held

    with server_side.control_of(server_side.read(config, insecure=insecure)) as link:
        live = [run for run in link.runs() if run.live]
        for run in live:
            try:
                link.stop(run.number)
            except OSError:
                if link.run(run.number).live:
                    raise
            until = time.monotonic() + ENDS
            while run.folder and held(run.folder) and time.monotonic() < until:  # its ServerApp hears of it when it calls next
                time.sleep(0.1)
            print(f"stopped: run {run.number}, in {run.folder}")
            if run.folder and held(run.folder):
                log.warning("its ServerApp has not ended within %.0f s; `--resume` has to wait until it has", ENDS)
    if not live:
        print("no run goes on")


@server.command("unregister")
def server_unregister(
    names: Annotated[list[str], typer.Argument(help="Of clients: their .pub's names, or their nodes' numbers.")],
    config: ServerConfig = Path("server.yaml"),
    insecure: Insecure = False,
) -> None:
    """Shut clients out. Their SuperNodes end, and their keys stay out for as long as the database is kept.

    \b
    Example:
      fedpeft server unregister north
    """
    told = server_side.read(config, insecure=insecure)
    if told.insecure:
        raise ConfigError("insecure: no keys are asked for, so nobody can be shut out")
    files = server_side.public_keys(told)
    with server_side.control_of(told) as link:
        nodes = [node for node in link.nodes() if node.status != "unregistered"]
        chosen: dict[int, Node] = {}
        for name in names:
            found = [node for node in nodes if name in (node.name, str(node.number))]
            if not found:
                raise ConfigError(f"{name} is not let in; there are {_shown(_names(nodes))}")
            if len(found) > 1:
                which = ", ".join(f"{one.number} ({one.status}{f', {files[one.key]}' if one.key in files else ''})" for one in found)
                raise ConfigError(f"{name} is the name of several nodes, say which by its number: {which}")
            chosen[found[0].number] = found[0]
        for node in chosen.values():
            link.unregister(node.number)
            print(f"{node.name or node.number}: shut out, node {node.number}")
            if node.key in files:
                print(f"take {files[node.key]} away, else `server up` warns of it")


@client.command("up")
def client_up(config: SiteConfig = Path("site.yaml"), insecure: Insecure = False) -> None:
    """Start this client in the background: its worker, and the SuperNode that calls the server. What runs already is left alone."""
    told = client_side.read(config, insecure=insecure)
    _check_certificates(told.insecure, told.tls.ca)
    _say_started(client_side.up(config, told), told.state)


@client.command("down")
def client_down(config: SiteConfig = Path("site.yaml"), insecure: Insecure = False) -> None:
    """End what `client up` started. Memory and privacy ledger stay."""
    print(f"ended: {', '.join(client_side.down(client_side.read(config, insecure=insecure))) or 'nothing ran'}")


@client.command("worker")
def client_worker(config: SiteConfig = Path("site.yaml"), insecure: Insecure = False) -> None:
    """Run the worker alone, in the foreground: what `client up` starts, for a service manager."""
    from clients.worker import Worker, serve

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    told = client_side.read(config, insecure=insecure)
    told.state.mkdir(mode=0o700, parents=True, exist_ok=True)
    serve(Worker(told), told.socket)


def status(
    config: Annotated[Path, typer.Option("--config", "-c", help="server.yaml or site.yaml")],
    insecure: Insecure = False,
    as_json: Annotated[bool, typer.Option("--json", help="Only one JSON object.")] = False,
) -> None:
    """What runs on this host: nodes, round, bytes, epsilon."""
    found = _of_client(config, insecure) if "client" in mapping_of(config) else _of_server(config, insecure)
    if as_json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        print(f"{name:<11} {'not measured' if value is None and name.startswith('socket') else _shown(value)}")
    if not found["running"]:
        side = "client" if "client" in found else "server"
        print(f"advice: nothing runs here; `fedpeft {side} up -c {config}` starts it")


def _of_server(config: Path, insecure: bool) -> dict[str, Any]:
    told = server_side.read(config, insecure=insecure)
    found: dict[str, Any] = {"running": _running(Processes(told.state))}
    runs: list[Run] = []
    if "superlink" in found["running"]:
        try:
            with server_side.control_of(told) as link:
                nodes, runs = [node for node in link.nodes() if node.status != "unregistered"], link.runs()
            online = [node for node in nodes if node.status == "online"]
            found |= {"nodes": len(online), "clients": told.clients, "online": _names(online)}
            found |= {"offline": _names([node for node in nodes if node not in online and node.name])}
        except OSError as fault:
            found |= {"unreachable": str(fault)}
    if runs:
        folder = runs[-1].folder
        found |= {"run": str(folder), "state": runs[-1].status} | ({"reason": runs[-1].why} if runs[-1].why else {})
    else:  # what the database does not have, or cannot be asked for
        folder = max((path.parent for path in (told.state / "runs").glob("*/manifest.json")), default=None)
        found |= {} if folder is None else {"run": str(folder)}
    if folder is not None:
        found |= _reached(Ledger(folder / "ledger.jsonl").entries())
    return found


def _reached(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """What a run's ledger says so far."""
    if not entries:
        return {"round": 0}
    last = entries[-1]
    found = {"round": int(str(last["round"])) + 1, "accuracy": last["accuracy"]}
    for way in ("up", "down"):
        counts = [entry.get(f"socket_{way}") for entry in entries]
        whole = None if None in counts else sum(int(str(count)) for count in counts)
        sent = int(str(last[f"total_{way}"]))
        found |= {f"bytes_{way}": sent, f"socket_{way}": whole, f"ratio_{way}": None if whole is None or not sent else whole / sent}
    return found | {"epsilon": last["epsilon"], "faults": last["faults"]}


def _names(nodes: list[Node]) -> list[str]:
    """Names of nodes, with their numbers where a name is not one's alone; or their numbers."""
    many = Counter(node.name for node in nodes)
    return sorted(f"{node.name} ({node.number})" if node.name and many[node.name] > 1 else node.name or str(node.number) for node in nodes)


def _of_client(config: Path, insecure: bool) -> dict[str, Any]:
    told = client_side.read(config, insecure=insecure)
    path = told.state / "worker.json"
    done = json.loads(path.read_text()) if path.exists() else {}
    if done.get("round") is not None:
        done["round"] += 1  # rounds are counted from 1 where people read them
    return {"client": told.client, "running": _running(Processes(told.state)), **done}


def _running(processes: Processes) -> dict[str, int]:
    return {name: pid for name in processes.names() if (pid := processes.running(name)) is not None}


def _begun(folder: Path) -> list[str]:
    """The overrides that the run in `folder` began with, for clients know it by these. Raises `ConfigError` if it cannot go on."""
    from server.folder import reopen

    words = [str(word) for word in reopen(folder)[0].manifest()["overrides"]]
    begun = [word.removeprefix("run.dir=") for word in words if word.startswith("run.dir=")]
    if not begun:
        raise ConfigError(f"{folder} holds a simulation; go on with `fedpeft run --resume {folder}`")
    if Path(begun[-1]).resolve() != folder:
        raise ConfigError(f"{folder} is not where this run was begun: move it back to {begun[-1]}")
    return words


def _resumed(told: server_side.ServerFile, link: Control, folder: Path) -> tuple[int | None, list[str]]:
    """(number of the run in `folder` if it goes on, the overrides that it began with). Raises `ConfigError` if it neither does nor can."""
    try:
        words = _begun(folder)
        server_side.check(told, words)
    except ConfigError:
        with suppress(OSError):
            if (number := _live(link, folder)) is not None:
                return number, []
        raise
    return _live(link, folder), words


def _live(link: Control, folder: Path) -> int | None:
    """The number of the run that writes into the folder, or is about to; None if there is none."""
    from server.folder import held, last_sitting

    runs = [run.number for run in link.runs() if run.live and run.folder == folder]
    if held(folder) and not runs:
        raise ConfigError(f"{folder}: this run goes on in another process; end that before you resume it")
    if not runs or (not held(folder) and last_sitting(folder) == str(runs[-1])):
        return None  # its ServerApp has ended, which the SuperLink will miss
    return runs[-1]


def _begin(told: server_side.ServerFile, link: Control, words: list[str], folder: Path) -> int:
    """Hands the run over, after a word on others that go on."""
    for other in [run for run in link.runs() if run.live and run.folder != folder]:
        log.warning(
            "run %d goes on at the same time (%s): a client loads model and data again whenever it changes from one run to the other; "
            "`fedpeft server stop` ends runs", other.number, other.folder,
        )  # fmt: skip
    return server_side.submit(told, words)


def _named(config: Path, insecure: bool) -> str:
    """The options by which another command means the same server."""
    return (f" -c {config}" if config != Path("server.yaml") else "") + (" --insecure" if insecure else "")


def _follow(told: server_side.ServerFile, link: Control, number: int, folder: Path) -> None:
    """Prints each round until the run has ended. Raises `OSError` if it failed."""
    ledger, said, ended = Ledger(folder / "ledger.jsonl"), -1, False
    asked = there = time.monotonic()  # when the SuperLink was asked or a round came; when one of them last answered
    while True:
        for entry in ledger.entries():
            if int(str(entry["round"])) > said:
                said = int(str(entry["round"]))
                asked = there = time.monotonic()
                print(_line(entry), flush=True)
        if ended:
            break
        finished = (folder / "adapter" / "README.md").exists()
        if time.monotonic() - asked > (SOON if finished else QUIET):
            asked = time.monotonic()
            try:
                run = link.run(number)
                if said < 0 and run.live and (count := sum(node.status == "online" for node in link.nodes())) < told.clients:
                    print(f"{count} of {told.clients} nodes are connected; the run waits for the others", flush=True)
            except OSError:
                if asked - there > LOST:
                    raise
                continue
            there = time.monotonic()
            ended = not run.live
            if ended and run.status != "finished:completed":
                why = run.why or ("`fedpeft server stop` ended it" if run.status == "finished:stopped" else "it gave no reason")
                log_of = f"`FLWR_HOME={told.state / 'flwr'} flwr log {number} local --show` has its log"
                again = f"; `fedpeft server run --resume {folder}` goes on" if (folder / "manifest.json").exists() else ""
                raise OSError(f"{why}\nthe run ended as {run.status}; {log_of}{again}")
        time.sleep(0.25)
    for name, text in (*payloads(ledger.entries()), *crossed(ledger.entries())):
        print(f"{name:<19} {text}")
    print(f"finished: {folder / 'adapter'}, {write_report(folder, read_result(folder))}")


def _line(entry: dict[str, Any]) -> str:
    parts = [f"round {entry['round'] + 1}", f"answers {entry['answers']}", f"loss {_shown(entry['loss'])}"]
    parts += [f"accuracy {entry['accuracy']:.4f}"] if entry["accuracy"] is not None else []
    parts += [f"up {entry['bytes_up']}", f"down {entry['bytes_down']}", f"{entry['round_seconds']:.1f} s"]
    parts += [f"epsilon {entry['epsilon']:.3f}"] if entry["epsilon"] is not None else []
    parts += [f"client {fault['client']}: {fault['reason']}" for fault in entry["faults"]]
    return "  ".join(parts)


def _check_certificates(insecure: bool, *paths: Path | None) -> None:
    """Warns of certificates that end soon. Raises `ConfigError` if one has ended, or is none that the other side will trust."""
    now = datetime.now(UTC)
    for path in paths:
        if insecure or path is None:
            continue
        try:
            faults, soon = certs.certificate_faults(path, now), certs.ending(path, now)
        except ValueError as fault:
            raise ConfigError(str(fault)) from fault
        if faults:
            raise ConfigError("\n".join(faults))
        for text in soon:
            print(f"fedpeft: WARNING: {text}", file=sys.stderr)


def _say_started(names: list[str], state: Path) -> None:
    print(f"started: {', '.join(names) or 'nothing, all runs already'}; logs in {state}")


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {one}" for name, one in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(_shown, value)) or "none"
    return f"{value:.4f}" if isinstance(value, float) else str(value)
