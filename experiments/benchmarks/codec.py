"""Size against the entropy bound, and speed, of the wire codecs.

    python -m experiments.benchmarks.codec --json codec.jsonl
    python -m experiments.benchmarks.codec --updates rounds=6 clients=20 cohort=5

Input is independent normal entries in fp32, in one tensor or many. The bound is that of an even ternary vector of d entries,
d ((1-k) log2 1/(1-k) + k log2 2/k) bits. Speeds are MB of fp32 input a second on one thread: median, lowest and highest over the turns, by
the clock (encode, decode) and by processor time (*_cpu, what a core that is not shared gives). A turn encodes and decodes once.

Prints a table in Markdown, its lines as they are measured; --json has more, the machine and its load too.

`--updates` runs a federation with the overrides that follow and codes what its clients send: `over` then is the size over the bound that
knows only the density, and `single` that of the support as one group; both are of all updates together, headers included.
"""

import argparse
import dataclasses
import json
import math
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

import clients.site
from experiments.simulate import simulate
from fedpeft.codecs import rice
from fedpeft.codecs.base import Codec, layout
from fedpeft.codecs.largest import kept
from fedpeft.codecs.mask import Mask
from fedpeft.codecs.quantize import Quantize
from fedpeft.codecs.raw import Half, Raw
from fedpeft.codecs.sign import Sign
from fedpeft.codecs.ternary import Ternary
from fedpeft.codecs.topk import TopK
from fedpeft.messages import Broadcast, Update
from fedpeft.records import difference, pack_update
from fedpeft.tensors import Tensors

DENSITIES = (0.05, 0.1, 0.2)
Row = dict[str, object]
COLUMNS = {
    "name": "codec", "updates": "updates", "entries": "entries", "tensors": "tensors", "bits": "bits an entry",
    "bound_bits": "entropy bound", "over": "over the bound, %", "single": "as one group, %",
    "encode": "encode MB/s", "decode": "decode MB/s",
}  # fmt: skip
WIRE = ("name", "entries", "tensors", "bits", "over", "encode", "decode")
UPDATES = ("name", "updates", "entries", "bits", "bound_bits", "over", "single")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--entries", type=float, nargs="+", default=[1e6, 2e7])
    options.add_argument("--turns", type=int, default=21)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--quick", action="store_true", help="1e6 entries, 5 turns")
    options.add_argument("--updates", nargs="+", metavar="OVERRIDE", help="measure the updates of a federation instead")
    options.add_argument("--json", type=Path, help="write the rows here too, one a line")
    args = options.parse_args()
    torch.set_num_threads(1)
    facts = {"seed": args.seed, "machine": platform.machine(), "python": platform.python_version()}
    facts |= {name: metadata.version(name) for name in ("numpy", "torch")}
    columns, lines = UPDATES if args.updates else WIRE, list[str]()
    print(f"| {' | '.join(COLUMNS[name] for name in columns)} |\n|{'---|' * len(columns)}", flush=True)
    for row in of_updates(args.updates) if args.updates else rows(args):
        lines.append(json.dumps(row | facts | {"load": round(os.getloadavg()[0], 1)}))
        print(f"| {' | '.join(shown(row.get(name)) for name in columns)} |", flush=True)
        if args.json:
            args.json.write_text("\n".join(lines) + "\n")


def rows(args: argparse.Namespace) -> Iterator[Row]:
    """Ternary at every size and density, and cut into many tensors; then every codec at the first size."""
    sizes = [1_000_000] if args.quick else [int(entries) for entries in args.entries]
    turns = 5 if args.quick else args.turns
    for entries in sizes:
        whole = normal(entries, args.seed)
        for parts in (1, 200):
            tensors = {f"w{number:03d}": part.clone() for number, part in enumerate(whole.chunk(parts))}
            for density in DENSITIES:
                yield row(Ternary(density), tensors, turns) | over(Ternary(density), tensors, density)
    tensors = {"w": normal(sizes[0], args.seed)}
    others: list[Codec] = [Raw(), Half(), Quantize(8), Quantize(4), Sign(), TopK(), Mask(), Ternary(scale="std", scales="tensor")]
    for codec in others:
        yield row(codec, tensors, turns)


def row(codec: Codec, tensors: Tensors, turns: int) -> Row:
    """Size and speed of one codec."""
    entries, specs = sum(tensor.numel() for tensor in tensors.values()), layout(tensors)
    data = codec.encode(tensors, seed=1)
    seconds: dict[str, list[float]] = {"encode": [], "decode": [], "encode_cpu": [], "decode_cpu": []}
    for _ in range(turns):
        for name, work in (("encode", partial(codec.encode, tensors, seed=1)), ("decode", partial(codec.decode, data, specs, seed=1))):
            clock, processor = timed(work)
            seconds[name].append(clock)
            seconds[f"{name}_cpu"].append(processor)
    size: Row = {
        "codec": repr(codec),
        "name": called(codec),
        "entries": entries,
        "tensors": len(tensors),
        "bytes": len(data),
        "bits": round(8 * len(data) / entries, 4),
    }
    return size | {name: spread([4e-6 * entries / spent for spent in times]) for name, times in seconds.items()} | {"turns": turns}


def over(codec: Codec, tensors: Tensors, density: float) -> Row:
    """Percent above the bound."""
    entries = sum(tensor.numel() for tensor in tensors.values())
    return {"bound_bits": round(entropy(density), 4), "over": percent(len(codec.encode(tensors)), entropy(density) * entries / 8)}


def of_updates(overrides: list[str]) -> Iterator[Row]:
    """Ternary on what the clients of a federation send."""
    sent: list[Tensors] = []

    def recorded(update: Update, start: Broadcast, codec: Codec, **rest: Any) -> object:
        sent.append({name: tensor.clone() for name, tensor in difference(update.tensors, start.tensors).items()})
        return pack_update(update, start, codec, **rest)

    with tempfile.TemporaryDirectory() as folder, patch.object(clients.site, "pack_update", recorded):
        simulate([*overrides, f"run.dir={folder}/run", "evaluate.head_only=false", "engine.lanes=1"])
    for density in DENSITIES:
        yield together(sent, density)


def together(sent: list[Tensors], density: float) -> Row:
    """Sizes of all updates at one density."""
    size, single, bound, entries = 0, 0, 0.0, 0
    for tensors in sent:
        count = sum(tensor.numel() for tensor in tensors.values())
        data = Ternary(density).encode(tensors)
        sizes = [tensor.numel() for _, tensor in sorted(tensors.items())]
        positions = kept(torch.cat([tensor.reshape(-1) for _, tensor in sorted(tensors.items())]).numpy(), sizes, density, "global")
        size += len(data)
        single += len(data) - len(rice.encode(positions, sizes)) + len(rice.encode(positions, [count]))
        bound += entropy(density) * count / 8
        entries += count
    made: Row = {
        "codec": repr(Ternary(density)),
        "name": called(Ternary(density)),
        "updates": len(sent),
        "entries": entries // len(sent),
        "bytes": size // len(sent),
    }
    bits = round(8 * size / entries, 4)
    return made | {"bits": bits, "bound_bits": round(entropy(density), 4), "over": percent(size, bound), "single": percent(single, bound)}


def called(codec: Any) -> str:
    """The codec's name, its density or bits, and the fields that are not its defaults."""
    own = {field.name: (getattr(codec, field.name), field.default) for field in dataclasses.fields(codec)}
    main = [f"{value:g}" for name, (value, _) in own.items() if name in ("density", "bits")]
    others = [f"{name}={value}" for name, (value, usual) in own.items() if value != usual and name not in ("density", "bits")]
    return " ".join([type(codec).__name__.lower(), *main, *others])


def shown(value: object) -> str:
    """A cell: nothing for what was not measured, `median (lowest to highest)` for a spread."""
    if isinstance(value, list):
        return f"{value[0]} ({value[1]} to {value[2]})"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def normal(entries: int, seed: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(entries, dtype=np.float32))


def entropy(density: float) -> float:
    """Bits an entry of an even ternary vector."""
    return -(1 - density) * math.log2(1 - density) - density * math.log2(density / 2)


def percent(size: float, bound: float) -> float:
    return round(100 * (size / bound - 1), 2)


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds by the clock and of the processor."""
    clock, processor = time.perf_counter(), time.thread_time()
    made = work()
    spent = time.perf_counter() - clock, time.thread_time() - processor
    del made
    return spent


def spread(values: list[float]) -> list[int]:
    """Median, lowest, highest."""
    return [round(statistics.median(values)), round(min(values)), round(max(values))]


if __name__ == "__main__":
    main()
