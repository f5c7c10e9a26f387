"""Best rank-r approximation of a weighted sum of K low-rank products: `total(...).truncate(rank)` against the dense route.

    python -m experiments.benchmarks.lowrank --json lowrank.jsonl

Dense: form the m x n sum, `torch.linalg.svd` in float64, keep `rank` triplets. The factors are independent noise, the hardest case: every
stacked rank is full and the singular values at the cut are close. Paired and interleaved: each turn times all ways one after the other;
the dense SVD takes its turn only in the first `--dense-turns`. Printed are medians and ranges of seconds, and of the ratios to ours of the
same turn; `error` is the largest distance of ours to another way's result, over that result's norm. While K * rank <= size, factors are
stacked; past it they are folded into one dense sum, `add_s` is linear in K, and one dense SVD remains.

`--tree` adds a merge tree: pairwise sums, each compacted to its numerical rank. It does not pay, so `total` has none: size 4096, rank 16,
one core, 0.21 s against 0.03 at 10 clients, 3.3 against 0.6 at 50, 13.5 against 3.0 at 100. Its last merge costs as much as the stack,
unless products share factors.

Nor does a cheaper SVD of the R x R core (0.2 s of 0.6 at R = 800, 1.4 of 2.7 at 1600). `eigh` of its Gram takes 0.6 times that, but where
values 2 to R lie at 1e-4, 1e-5, 1e-6 of the first, the result is off by 1e-10, 3e-9, 7e-7 (SVD: 1e-14); one step of orthogonal iteration
gains a factor 3 to 40. Block Krylov reaches 1e-13, in 0.02 s where the clients agree on a direction, but in 0.7 s on noise (of the folded
4096 x 4096 sum of 300: 0.4 and 6.7 s against 38): how long it takes depends on the data.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path

import torch

from fedpeft.lowrank import LowRank, distance, total

Pairs = list[tuple[float, LowRank]]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--size", type=int, default=4096, help="m = n")
    options.add_argument("--rank", type=int, default=16, help="of every product, and of the result")
    options.add_argument("--clients", type=int, nargs="+", default=[10, 50, 100, 200, 400])
    options.add_argument("--turns", type=int, default=3)
    options.add_argument("--dense-turns", type=int, default=1, help="the dense SVD of 4096 x 4096 takes 40 s on one core")
    options.add_argument("--tree", action="store_true", help="time the merge tree too, where factors are stacked")
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--json", type=Path, help="write the rows here too, one a line")
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    facts = {
        "size": args.size,
        "rank": args.rank,
        "threads": args.threads,
        "torch": metadata.version("torch"),
        "machine": platform.machine(),
    }
    total(drawn(args.size, args.rank, 2)).truncate(args.rank)  # warm-up
    lines = []
    for clients in args.clients:
        lines.append(json.dumps(row(args, clients) | facts))
        print(lines[-1], flush=True)
        if args.json:
            args.json.write_text("\n".join(lines) + "\n")


def row(args: argparse.Namespace, clients: int) -> dict[str, object]:
    """All ways at one number of clients."""
    pairs = drawn(args.size, args.rank, clients)
    stacked = clients * args.rank <= args.size
    seconds: dict[str, list[float]] = {"ours": [], "add": [], "dense": [], "tree": []}
    ratios: dict[str, list[float]] = {"dense": [], "tree": []}
    error = 0.0
    for turn in range(args.turns):
        add, both = timed(partial(total, pairs))
        cut, ours = timed(partial(both.truncate, args.rank))
        seconds["add"].append(add)
        seconds["ours"].append(add + cut)
        others: dict[str, Callable[[Pairs, int], LowRank]] = {"dense": dense} if turn < args.dense_turns else {}
        for name, way in (others | ({"tree": tree} if args.tree and stacked else {})).items():
            spent, theirs = timed(partial(way, pairs, args.rank))
            seconds[name].append(spent)
            ratios[name].append(spent / (add + cut))
            error = max(error, distance(ours, theirs) / theirs.norm())
    out: dict[str, object] = {"clients": clients, "stacked": stacked}
    out |= {f"{name}_s": spread(times) for name, times in seconds.items() if times}
    return out | {f"{name}_ratio": spread(times) for name, times in ratios.items() if times} | {"error": float(f"{error:.1e}")}


def drawn(size: int, rank: int, clients: int) -> Pairs:
    """Products of independent normal factors, client k of weight k + 1."""
    rng = torch.Generator().manual_seed(0)
    pairs = []
    for client in range(clients):
        b, a = (torch.randn(shape, generator=rng, dtype=torch.float64) for shape in ((size, rank), (rank, size)))
        pairs.append((2 * (client + 1) / (clients * (clients + 1)), LowRank(b, a)))
    return pairs


def dense(pairs: Pairs, rank: int) -> LowRank:
    """The textbook way."""
    whole = torch.zeros(pairs[0][1].shape, dtype=torch.float64)
    for weight, part in pairs:
        whole.addmm_(weight * part.B, part.A)
    u, s, vt = torch.linalg.svd(whole, full_matrices=False)
    return LowRank(u[:, :rank] * s[:rank], vt[:rank])


def tree(pairs: Pairs, rank: int) -> LowRank:
    """Sums two by two, each compacted to the rank it has in float64."""
    level = [LowRank(weight * part.B, part.A) for weight, part in pairs]
    while len(level) > 1:
        level = [compacted(level[i : i + 2]) for i in range(0, len(level), 2)]
    return level[0].truncate(rank)


def compacted(parts: list[LowRank]) -> LowRank:
    u, s, vt = total((1.0, part) for part in parts).svd()
    kept = max(1, int((s > 1e-14 * s[0]).sum()))
    return LowRank(u[:, :kept] * s[:kept], vt[:kept])


def timed(work: Callable[[], LowRank]) -> tuple[float, LowRank]:
    began = time.perf_counter()
    made = work()
    return time.perf_counter() - began, made


def spread(values: list[float]) -> list[float]:
    """Median, smallest, largest."""
    return [round(statistics.median(values), 3), round(min(values), 3), round(max(values), 3)]


if __name__ == "__main__":
    main()
