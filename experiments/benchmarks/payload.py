"""A payload of a 7B model's LoRA (about 40 MB) to and from 8 clients: memory of SuperLink and ServerApp, seconds and bytes of a round.

The base is a vision transformer of random weights whose every tensor is trained (adapter=full), so that the payload is large and a step
is cheap. Memory is PSS, which counts what processes share once, sampled while the rounds go on.
"""

import json
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.benchmarks.loopback import Loopback, again_and_again, federation
from experiments.benchmarks.memory import tree

LARGE = (  # 8 * 640^2 weights in each of 3 layers: 39 MB of float32
    "model.width=640", "model.layers=3", "model.epochs=0", "adapter=full", "train.steps=1", "train.batch=2", "evaluate.every=100000",
    "evaluate.head_only=false",
)  # fmt: skip
BOUND = 1.5e9  # bytes that we promise for SuperLink and ServerApp each


@dataclass
class Peaks:
    """Most bytes of PSS that were seen."""

    superlink: int = 0
    serverapp: int = 0
    samples: int = 0


def measure(folder: Path, *, clients: int, rounds: int, overrides: Sequence[str]) -> tuple[Peaks, list[dict[str, Any]]]:
    """Peaks of memory, and the run's ledger."""
    with federation(folder, clients=clients, run=[f"rounds={rounds}", *LARGE, *overrides]) as there:
        with _sampled(there) as peaks:
            try:
                there.call("server", "run")
            except OSError as fault:
                fault.add_note(f"until then: {peaks}")
                raise
        (ledger,) = (folder / "server" / "runs").glob("*/ledger.jsonl")
        return peaks, [json.loads(line) for line in ledger.read_text().splitlines()]


@contextmanager
def _sampled(there: Loopback) -> Iterator[Peaks]:
    peaks, superlink = Peaks(), there.server().running("superlink")
    assert superlink is not None

    def look() -> None:
        peaks.superlink = max(peaks.superlink, tree(superlink))
        peaks.serverapp = max(peaks.serverapp, sum(map(tree, there.serverapps())))
        peaks.samples += 1

    with again_and_again(look, 0.1):
        yield peaks


def table(peaks: Peaks, entries: Sequence[dict[str, Any]]) -> str:
    """Memory against the bound, and what a round carried."""
    rows = [f"| process | peak PSS, MB, of {peaks.samples} samples | bound |", "|---|---|---|"]
    for name, peak in (("SuperLink", peaks.superlink), ("ServerApp", peaks.serverapp)):
        rows.append(f"| {name} | {peak / 1e6:.0f} | {'kept' if peak < BOUND else 'BROKEN'}: {BOUND / 1e6:.0f} |")
    rows += [
        "",
        "| round | answers | seconds | payload up, MB | at the socket | payload down, MB | at the socket |",
        "|---|---|---|---|---|---|---|",
    ]
    for entry in entries:
        ways = " | ".join(f"{entry[f'bytes_{way}'] / 1e6:.1f} | {_ratio(entry, way)}" for way in ("up", "down"))
        rows.append(f"| {entry['round'] + 1} | {entry['answers']} | {entry['round_seconds']:.1f} | {ways} |")
    rows.append(f"\nmedian round {statistics.median(entry['round_seconds'] for entry in entries):.1f} s")
    return "\n".join(rows)


def _ratio(entry: dict[str, Any], way: str) -> str:
    crossed = entry[f"socket_{way}"]
    return "not measured" if crossed is None else f"x {crossed / entry[f'bytes_{way}']:.4f}" if entry[f"bytes_{way}"] else f"{crossed} B"
