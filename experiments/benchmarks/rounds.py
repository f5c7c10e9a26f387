"""Time of a round beyond the job's own compute, for resident clients on loopback, against the floor that Flower sets.

One run of one SuperLink (TLS, node keys), in turns: an echo app as Flower comes; the same with the polls that fedpeft sets; a round of
fedpeft, less the seconds of its slowest worker. All carry the same payload to as many nodes. What Flower 1.39 fixes and nothing sets: a
SuperNode looks for a message every 3 s and for its ClientApp's reply every 0.5 s, each message starts a ClientApp, and who finds a message
before its objects looks again after 1 s.
"""

import json
import shlex
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from clients.launch import POLL, free_port
from experiments.benchmarks.loopback import Loopback, again_and_again, federation, project, until
from fedpeft.deployment import environment, program, state_folder
from fedpeft.processes import Processes

OVERRIDES = ("evaluate.every=100000", "engine.wave=1", "engine.lanes=1", "evaluate.head_only=false")
TASK_POLL = 1.0  # seconds, of Flower's SuperExec where nobody sets it
AT_SERVER = """
import sys
from fedpeft.config import app_folder
sys.path.insert(0, str(app_folder()))
import experiments.benchmarks.turns
app = experiments.benchmarks.turns.app
"""
AT_CLIENT = """
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
app = ClientApp()

@app.train()
def echo(message, context):
    return Message(message.content, reply_to=message)

@app.query()
def name(message, context):
    return Message(RecordDict({"facts": ConfigRecord({"name": context.node_config["name"]})}), reply_to=message)
"""
Turn = dict[str, Any]


def measure(folder: Path, *, turns: int, clients: int, overrides: Sequence[str]) -> list[Turn]:
    """Seconds of each kind in each turn, and `compute`: of the slowest worker in the same rounds."""
    echoes = {f"{name}{index}": (name, index) for name in ("flower", "floor") for index in range(clients)}
    words = [f"clients={clients}", f"cohort={clients}", f"rounds={2 * turns + 2}", *OVERRIDES, *overrides]
    with ExitStack() as stack:
        there = stack.enter_context(federation(folder, clients=clients, run=[], keys=list(echoes)))
        for key, (name, index) in echoes.items():
            stack.enter_context(_echo_node(there, key, name, clients + index))
        seen = stack.enter_context(_watched([there.state(client) / "worker.json" for client in range(clients)]))
        out = folder / "turns.jsonl"
        _submit(there, shlex.join(words), out, nodes=clients + len(echoes), turns=turns)
        until(lambda: bool(there.serverapps()), why="no ServerApp begins")
        until(lambda: len(_lines(out)) >= turns or not there.serverapps(), seconds=300 + 120 * turns, why="turns take too long")
        if len(_lines(out)) < turns:
            raise OSError(f"the run ended after {len(_lines(out))} turns:\n{there.server().last_words('superexec', 40)}")
        time.sleep(0.2)  # a look at the last worker.json
    return [turn | {"compute": [max(took[round] for took in seen) for round in turn["rounds"]]} for turn in _lines(out)]


@contextmanager
def _echo_node(there: Loopback, key: str, name: str, index: int) -> Iterator[None]:
    """A SuperNode that runs the echo app as Flower does; `flower` has Flower's own polls."""
    state = state_folder(there.folder / key)
    certs, processes = there.folder / "certs", Processes(state)
    command = [program("flower-supernode"), "--root-certificates", str(certs / "ca.crt"), "--superlink", f"127.0.0.1:{there.fleet}",
               "--auth-supernode-private-key", str(certs / key), "--host", "127.0.0.1", "--port", str(free_port()),
               "--node-config", f'partition-id={index} name="{name}"']  # fmt: skip
    processes.start("supernode", command, environment(state, poll=TASK_POLL if name == "flower" else POLL))
    try:
        yield
    finally:
        processes.stop("supernode")


@contextmanager
def _watched(files: Sequence[Path]) -> Iterator[list[dict[int, float]]]:
    """Of each worker: seconds of each round, read from what it notes after every message."""
    found: list[dict[int, float]] = [{} for _ in files]
    before = [0.0 for _ in files]

    def look() -> None:
        for index, file in enumerate(files):
            if file.exists() and (noted := json.loads(file.read_text()))["seconds"] > before[index]:
                if noted.get("round") is not None:
                    found[index][int(noted["round"])] = noted["seconds"] - before[index]
                before[index] = noted["seconds"]

    with again_and_again(look, 0.05):
        yield found


def _submit(there: Loopback, overrides: str, out: Path, *, nodes: int, turns: int) -> None:
    app = project(there.folder / "app", AT_SERVER, AT_CLIENT, overrides=overrides, out=str(out), nodes=nodes, turns=turns)
    there.flwr("run", str(app), "local")


def _lines(file: Path) -> list[Turn]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def table(turns: Sequence[Mapping[str, Any]]) -> str:
    """Medians and ranges over the turns, of rounds that began when the one before had ended."""
    flower, floor, whole, compute = ([turn[name][1] for turn in turns] for name in ("flower", "floor", "fedpeft", "compute"))
    over = [a - b for a, b in zip(whole, compute, strict=True)]
    rows = [
        ("echo app, as Flower comes", flower),
        ("echo app, polls as fedpeft sets them (the floor)", floor),
        ("round of fedpeft", whole),
        ("its worker's compute", compute),
        ("round less compute", over),
        ("that less the floor of the same turn", [a - b for a, b in zip(over, floor, strict=True)]),
        ("that less the echo as Flower comes", [a - b for a, b in zip(over, flower, strict=True)]),
    ]
    lines = [f"| seconds, payload {turns[0]['payload'] / 1e6:.2f} MB each way | median | range of {len(turns)} |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {statistics.median(took):.2f} | {min(took):.2f} to {max(took):.2f} |" for name, took in rows)])
