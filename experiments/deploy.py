"""`fedpeft server`, `fedpeft client`, `fedpeft status`: a federation on real hosts, each started by one command and one file."""

import json
import logging
import sys
import time
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

server = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="The server of a federation on real hosts.")
client = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="One client of a federation on real hosts.")
ServerConfig = Annotated[Path, typer.Option("--config", "-c", help="server.yaml")]
SiteConfig = Annotated[Path, typer.Option("--config", "-c", help="site.yaml")]
Insecure = Annotated[bool, typer.Option("--insecure", help="Without TLS and keys: on loopback alone.")]
LOST = 300.0  # seconds that the SuperLink may be gone, while somebody starts it again: the run outlives it
QUIET = 10.0  # seconds without a round after which Flower is asked whether the run still goes on
SHARE = 0.1  # of the time that passes, at most, goes into asking: a question costs seconds of a core, on a busy machine more


@server.command("up")
def server_up(config: ServerConfig = Path("server.yaml"), insecure: Insecure = False) -> None:
    """Start the server in the background: clients can connect. What runs already is left alone."""
    told = server_side.read(config, insecure=insecure)
    _check_certificates(told.insecure, told.tls.ca, told.tls.cert)
    _say_started(server_side.up(told), told.state)


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
    """Start a run on all clients and follow it. Ctrl-C stops following, not the run.

    \b
    Examples:
      fedpeft server run rounds=20 strategy=ffa
      fedpeft server run --resume state/runs/2026-01-31-120000
    """
    told = server_side.read(config, insecure=insecure)
    if resume is not None:
        if overrides:
            raise ConfigError(f"--resume takes the config of {resume} as it is; leave out {' '.join(overrides)}, or begin another run")
        folder = resume.resolve()
        words = _begun(folder)
    else:
        folder = told.state / "runs" / f"{datetime.now():%Y-%m-%d-%H%M%S}"
        words = server_side.words_of(told, overrides or [], folder)
    number = server_side.submit(told, words)
    print(f"run {number}, in {folder}", flush=True)
    try:
        _follow(told, number, folder)
    except KeyboardInterrupt:
        print(f"the run goes on: `fedpeft status -c {config}` shows it, `fedpeft report {folder}` writes its page when it has ended")


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


def _of_server(config: Path, insecure: bool) -> dict[str, Any]:
    told = server_side.read(config, insecure=insecure)
    running = _running(Processes(told.state))
    found: dict[str, Any] = {"running": running}
    if "superlink" in running:
        found |= {"nodes": _online(told), "clients": told.clients}
    runs = sorted((told.state / "runs").glob("*/ledger.jsonl"), key=lambda path: path.stat().st_mtime)
    if runs and (entries := Ledger(runs[-1]).entries()):
        last = entries[-1]
        found |= {"run": str(runs[-1].parent), "round": int(str(last["round"])) + 1, "accuracy": last["accuracy"]}
        for way in ("up", "down"):
            counts = [entry.get(f"socket_{way}") for entry in entries]
            whole = None if None in counts else sum(int(str(count)) for count in counts)
            sent = int(str(last[f"total_{way}"]))
            found |= {f"bytes_{way}": sent, f"socket_{way}": whole, f"ratio_{way}": None if whole is None or not sent else whole / sent}
        found |= {"epsilon": last["epsilon"], "faults": last["faults"]}
    return found


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
    from server.folder import alone, reopen

    words = [str(word) for word in reopen(folder)[0].manifest()["overrides"]]
    begun = [word.removeprefix("run.dir=") for word in words if word.startswith("run.dir=")]
    if not begun:
        raise ConfigError(f"{folder} holds a simulation; go on with `fedpeft run --resume {folder}`")
    if Path(begun[-1]).resolve() != folder:
        raise ConfigError(f"{folder} is not where this run was begun: move it back to {begun[-1]}")
    with alone(folder):
        return words


def _follow(told: server_side.ServerFile, number: int, folder: Path) -> None:
    """Prints each round until the run has ended. Raises `OSError` if it failed."""
    ledger, said, ended = Ledger(folder / "ledger.jsonl"), -1, False
    asked = there = time.monotonic()  # when Flower was asked or a round came; when one of them last answered
    patience = QUIET
    while True:
        for entry in ledger.entries():
            if int(str(entry["round"])) > said:
                said = int(str(entry["round"]))
                asked = there = time.monotonic()
                print(_line(entry), flush=True)
        if ended:
            break
        finished = (folder / "adapter" / "README.md").exists()
        if finished or time.monotonic() - asked > patience:
            asked = time.monotonic()
            try:
                state, why = server_side.state_of(told, number)
                if said < 0 and not state.startswith("finished") and (count := _online(told)) < told.clients:
                    print(f"{count} of {told.clients} nodes are connected; the run waits for the others", flush=True)
            except ConfigError:
                if asked - there > LOST:
                    raise
                continue
            there = time.monotonic()
            asked, patience = there, max(QUIET, (there - asked) / SHARE)
            ended = state.startswith("finished")
            if ended and state != "finished:completed":
                log = f"`FLWR_HOME={told.state / 'flwr'} flwr log {number} local --show` has its log"
                again = f"; `fedpeft server run --resume {folder}` goes on" if (folder / "manifest.json").exists() else ""
                raise OSError(f"{why or 'it gave no reason'}\nthe run ended as {state}; {log}{again}")
        time.sleep(0.25)
    for name, text in (*payloads(ledger.entries()), *crossed(ledger.entries())):
        print(f"{name:<19} {text}")
    print(f"finished: {folder / 'adapter'}, {write_report(folder, read_result(folder))}")


def _online(told: server_side.ServerFile) -> int:
    return sum(node["status"] == "online" for node in server_side.nodes(told))


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
    return f"{value:.4f}" if isinstance(value, float) else str(value)
