"""What a message costs a deployed client beyond its training: the ClientApp process that Flower starts for it, and the time it waits.

One run of a SuperLink with two SuperNodes on loopback: one hands its messages to a worker (which echoes) as `fedpeft client up` does, the
other runs an echo app of four lines as Flower does. Both get the same message in each turn; the CPU seconds of each process are those that
the system counted.
"""

import json
import os
import shlex
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from clients import frames
from clients.launch import free_port, own_code
from experiments.benchmarks.loopback import project
from fedpeft.deployment import environment, program, state_folder

AT_CLIENT = """
from flwr.app import Message
from flwr.clientapp import ClientApp
app = ClientApp()

@app.train()
def echo(message, context):
    return Message(message.content, reply_to=message)
"""
AT_SERVER = """
import time
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import ServerApp
app = ServerApp()

@app.main()
def main(grid, context):
    size = context.run_config["payload"]
    while len(nodes := sorted(grid.get_node_ids())) < 2:
        time.sleep(0.2)
    for turn in range(context.run_config["messages"]):
        array = Array("uint8", (size,), "fedpeft.payload", bytes(size))
        content = RecordDict({"payload": ArrayRecord({"data": array}), "facts": ConfigRecord({"header": "[]", "turn": turn})})
        list(grid.send_and_receive([Message(content, node, "train", group_id=str(turn)) for node in nodes]))
"""
# In the place of a command: runs it, and notes the CPU seconds that the system counted for it alone.
TIMED = """
import json, os, sys, time
file, *command = sys.argv[1:]
began = time.monotonic()
pid = os.posix_spawn(command[0], command, os.environ)
_, status, usage = os.wait4(pid, 0)
with open(file, "a") as out:
    out.write(json.dumps({"cpu": usage.ru_utime + usage.ru_stime, "seconds": time.monotonic() - began, "rss": usage.ru_maxrss}) + "\\n")
"""


def measure(folder: Path, *, messages: int, payload: int) -> dict[str, list[dict[str, float]]]:
    """CPU seconds, seconds and peak memory (kB) of every process, by who answered."""
    app = project(folder / "app", AT_SERVER, AT_CLIENT, overrides="", messages=messages, payload=payload)
    fleet, control, path = free_port(), free_port(), folder / "worker.sock"
    state = state_folder(folder / "superlink")
    (state / "flwr" / "config.toml").write_text(
        f'[superlink]\ndefault = "local"\n[superlink.local]\naddress = "127.0.0.1:{control}"\ninsecure = true\n'
    )
    link = [program("flower-superlink"), "--insecure", "--fleet-api-address", f"127.0.0.1:{fleet}", "--port", str(control),
            "--disable-runtime-dependency-installation"]  # fmt: skip
    nodes = {"forwarder": f'worker="{path}"', "echo app": "plain=1"}
    with _echoing(path), _running(link, environment(state, poll=0.1), folder / "superlink.log"):
        _until(lambda: _listens(control) and _listens(fleet))
        started = []
        try:
            for index, (name, more) in enumerate(nodes.items()):
                own = state_folder(folder / name.replace(" ", "-"))
                variables = environment(own, poll=0.1)
                real = str(own_code(own) / "flwr-clientapp") if name == "forwarder" else program("flwr-clientapp")
                variables["PATH"] = f"{_timed(own, real)}{os.pathsep}{variables['PATH']}"
                command = [program("flower-supernode"), "--insecure", "--superlink", f"127.0.0.1:{fleet}", "--port", str(free_port()),
                           "--node-config", f"partition-id={index} {more}"]  # fmt: skip
                started.append(_running(command, variables, own / "supernode.log"))
                started[-1].__enter__()
            subprocess.run([program("flwr"), "run", str(app), "local"], cwd=state, check=True, env=environment(state, poll=0.1),
                           stdout=subprocess.DEVNULL)  # fmt: skip
            files = {name: folder / name.replace(" ", "-") / "times.jsonl" for name in nodes}
            _until(lambda: all(len(_lines(file)) >= messages for file in files.values()), seconds=60 + 30 * messages)
            return {name: _lines(file) for name, file in files.items()}
        finally:
            for one in started:
                one.__exit__(None, None, None)


def _timed(folder: Path, real: str) -> Path:
    place = folder / "timed"
    place.mkdir()
    words = " ".join(map(shlex.quote, (sys.executable, "-S", "-c", TIMED, str(folder / "times.jsonl"), real)))
    (place / "flwr-clientapp").write_text(f'#!/bin/sh\nexec {words} "$@"\n')
    (place / "flwr-clientapp").chmod(0o700)
    return place


@contextmanager
def _running(command: list[str], variables: Mapping[str, str], log: Path) -> Iterator[None]:
    with log.open("w") as out, subprocess.Popen(command, cwd=log.parent, env=dict(variables), stdout=out, stderr=out) as process:
        try:
            yield
        finally:
            process.terminate()
            process.wait(30)


@contextmanager
def _echoing(path: Path) -> Iterator[None]:
    """A worker that gives back what it gets."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as door:
        door.bind(str(path))
        door.listen(4)

        def serve() -> None:
            while True:
                try:
                    link, _ = door.accept()
                except OSError:
                    return
                with link:
                    head, payload = frames.receive(link)
                    frames.send(link, {"facts": head["facts"]}, payload)

        threading.Thread(target=serve, daemon=True).start()
        yield
        door.shutdown(socket.SHUT_RDWR)


def _until(true: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            raise OSError(f"waited {seconds:.0f} s in vain; the logs of the SuperLink and the SuperNodes say why")
        time.sleep(0.1)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _lines(file: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def table(found: Mapping[str, list[dict[str, float]]]) -> str:
    """Medians, and the range of the ratios of the two of one turn. A process stays a while after it has answered."""
    rows = ["| process | CPU s a message | s until it was gone | peak MB |", "|---|---|---|---|"]
    for name, lines in found.items():
        cpu, wall, peak = (statistics.median(line[key] for line in lines) for key in ("cpu", "seconds", "rss"))
        rows.append(f"| {name} | {cpu:.2f} | {wall:.2f} | {peak / 1024:.0f} |")
    ratios = sorted(a["cpu"] / b["cpu"] for a, b in zip(found["forwarder"], found["echo app"], strict=False))
    rows.append(f"\nforwarder / echo app, CPU: median {statistics.median(ratios):.2f} [{ratios[0]:.2f}, {ratios[-1]:.2f}] of {len(ratios)}")
    return "\n".join(rows)
