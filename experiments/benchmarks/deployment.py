"""What a deployed federation costs beyond its training, on this machine alone: everything is started, measured, and ended.

    python -m experiments.benchmarks.deployment messages    CPU and memory of the process that answers one message, against an echo app
    python -m experiments.benchmarks.deployment rounds      seconds of a round beyond its compute, against Flower's floor
    python -m experiments.benchmarks.deployment payload     40 MB each way to 8 clients: memory, seconds, bytes at the socket

Words after the options are overrides as `fedpeft run` takes them: `rounds --turns 7 codec=ternary`. The tables are markdown; under each
stand versions, machine and load average, for a busy machine makes other numbers. `COMMAND --help` says how each is measured. `messages`
takes a minute, `rounds` half a minute a turn, `payload` a minute a round.
"""

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

from experiments.benchmarks import messages, payload, rounds
from experiments.benchmarks.loopback import machine


def main() -> None:
    chosen = _parser().parse_args()
    overrides = [f"seed={chosen.seed}", *chosen.overrides]
    found: Any
    with tempfile.TemporaryDirectory(prefix="fp") as place:  # a short name: sockets lie in it
        folder = Path(place).resolve()
        before = machine()
        if chosen.command == "messages":
            found = messages.measure(folder, messages=chosen.messages, payload=chosen.payload)
            text = messages.table(found)
        elif chosen.command == "rounds":
            found = rounds.measure(folder, turns=chosen.turns, clients=chosen.clients, overrides=overrides)
            text = rounds.table(found)
        else:
            peaks, entries = payload.measure(folder, clients=chosen.clients, rounds=chosen.rounds, overrides=overrides)
            found, text = {"peaks": dataclasses.asdict(peaks), "ledger": entries}, payload.table(peaks, entries)
    said = f"seed {chosen.seed}, overrides {' '.join(chosen.overrides) or 'none'}; before: {before}; after: {machine().rpartition('; ')[2]}"
    print(json.dumps(found) if chosen.json else f"{text}\n\n{said}")


def _parser() -> argparse.ArgumentParser:
    whole = argparse.ArgumentParser(
        prog="python -m experiments.benchmarks.deployment", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = whole.add_subparsers(dest="command", required=True, metavar="COMMAND")
    made = {
        name: commands.add_parser(
            name, description=doc, help=(doc or "").partition("\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter
        )
        for name, doc in (("messages", messages.__doc__), ("rounds", rounds.__doc__), ("payload", payload.__doc__))
    }
    made["messages"].add_argument("--messages", type=int, default=6, help="to each")
    made["messages"].add_argument("--payload", type=int, default=400_000, help="bytes, of a small adapter")
    made["rounds"].add_argument("--turns", type=int, default=7, help="of two echoes of each kind and two rounds")
    made["rounds"].add_argument("--clients", type=int, default=1, help="and as many echo apps of each kind")
    made["payload"].add_argument("--clients", type=int, default=8)
    made["payload"].add_argument("--rounds", type=int, default=3)
    for one in made.values():
        one.add_argument("--seed", type=int, default=0)
        one.add_argument("--json", action="store_true", help="everything that was measured, as one JSON value")
        one.add_argument("overrides", nargs="*", default=[], help="key=value of the run")
    return whole


if __name__ == "__main__":
    main()
