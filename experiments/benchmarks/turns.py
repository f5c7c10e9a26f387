"""ServerApp of `deployment rounds`: in each turn two echoes by Flower's own grid, two by ours, two rounds of fedpeft, each pair in a row.

The second of a pair begins when the first has just ended, as a round does in a run: where a SuperNode then stands in its 3 s is the same.
"""

import json
import shlex
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from fedpeft.config import load
from fedpeft.setting import open_setting
from server.app import federate
from server.folder import create
from server.polling import Prompt

FEW = 0.2  # seconds between two looks for nodes


@dataclass(eq=False)
class Only(Prompt):
    """Those nodes alone."""

    nodes: tuple[int, ...] = ()

    def get_node_ids(self) -> Iterable[int]:
        """The nodes that it was told of."""
        return self.nodes


app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Writes the seconds of each turn into a line of the file `out`; the first round, which loads the base, is in none."""
    facts = context.run_config
    config, out = load(shlex.split(str(facts["overrides"]))), Path(str(facts["out"]))
    known = _sorted(grid, int(str(facts["nodes"])))
    ours = Only(grid, known["fedpeft"])
    rounds = federate(config, open_setting(config), ours, create(out.with_suffix(""), config, []))
    first = next(rounds)
    size = max(first["bytes_up"], first["bytes_down"]) // config.clients
    for _ in range(int(str(facts["turns"]))):
        took: dict[str, list[float]] = {"flower": [], "floor": []}
        for _ in range(2):
            took["flower"].append(_echo(grid, known["flower"], size))
        for _ in range(2):
            took["floor"].append(_echo(Prompt(grid), known["floor"], size))
        entries = [next(rounds) for _ in range(2)]
        took["fedpeft"] = [entry["round_seconds"] for entry in entries]
        with out.open("a") as file:
            file.write(json.dumps(took | {"rounds": [entry["round"] for entry in entries], "payload": size}) + "\n")


def _sorted(grid: Grid, nodes: int) -> dict[str, tuple[int, ...]]:
    """The nodes by what they say that they are: an echo app its name, a client of fedpeft its index."""
    while len(ids := sorted(grid.get_node_ids())) < nodes:
        time.sleep(FEW)
    found: dict[str, tuple[int, ...]] = {}
    for reply in Prompt(grid).send_and_receive([Message(RecordDict(), node, "query", group_id="who") for node in ids]):
        name = str(reply.content.config_records["facts"].get("name", "fedpeft"))
        found[name] = (*found.get(name, ()), reply.metadata.src_node_id)
    return found


def _echo(grid: Grid, nodes: Iterable[int], size: int) -> float:
    """Seconds until all have given `size` bytes back."""
    array = Array("uint8", (size,), "fedpeft.payload", bytes(size))
    content = RecordDict({"payload": ArrayRecord({"data": array}), "facts": ConfigRecord({"sent": time.time()})})
    began = time.perf_counter()
    replies: Iterator[Message] = iter(grid.send_and_receive([Message(content, node, "train", group_id="echo") for node in nodes]))
    for reply in replies:
        if reply.has_error():
            raise OSError(f"the echo app failed: {reply.error.reason}")
    return time.perf_counter() - began
