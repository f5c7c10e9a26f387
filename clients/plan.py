"""Micro-batches: the pooled samples of a wave's clients, sorted by length and cut so that fixed cost and padding together cost least.

One forward and backward pass over n padded tokens costs F + c n; with F counted in tokens the best cut of the sorted pool is a shortest
path over its distinct lengths. Gradients of a sum of per-sample losses add up over any cut, so the plan changes speed and nothing else.
"""

from dataclasses import dataclass

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class Plan:
    """What was measured of a machine: kept with the run, because another cut rounds otherwise."""

    fixed: int = 32  # F: tokens that cost as much as a pass itself
    tokens: int = 2048  # most padded tokens of a micro-batch
    wave: int = 16  # clients trained at once
    token_us: float = 0.0  # c: microseconds a token took, for the record

    def cut(self, lengths: Tensor) -> list[Tensor]:
        """Positions (int64) of the samples of each micro-batch, for samples of `lengths` (N,) tokens."""
        order = lengths.argsort(stable=True)
        sizes, counts = np.unique(lengths.numpy(), return_counts=True)
        made: list[Tensor] = []
        for first, last in _path(sizes, counts, self.fixed):
            many, size = int(counts[first:last].sum()), int(sizes[last - 1])
            begin = int(counts[:first].sum())
            most = max(1, self.tokens // size)
            made += list(order[begin : begin + many].chunk(-(-many // most)))
        return made


def _path(sizes: np.ndarray, counts: np.ndarray, fixed: int) -> list[tuple[int, int]]:
    """[first, last) of the distinct sizes in each piece of the cheapest cut; cutting between equal sizes never pays."""
    n = len(sizes)
    before = np.concatenate([[0], counts.cumsum()])
    best, cut = np.zeros(n + 1), np.zeros(n + 1, dtype=np.int64)
    for j in range(1, n + 1):
        costs = best[:j] + fixed + (before[j] - before[:j]) * sizes[j - 1]
        cut[j] = int(costs.argmin())
        best[j] = costs[cut[j]]
    pieces, j = [], n
    while j:
        pieces.append((int(cut[j]), j))
        j = int(cut[j])
    return pieces[::-1]


def waves(clients: list[int], work: dict[int, float], most: int, lanes: int) -> list[list[int]]:
    """The clients of a round, sorted, cut into waves of at most `most`, a multiple of `lanes` of them if there are so many clients.

    Cut where the work (samples to be seen) is even; who is free plays no part, so that equal settings give equal waves.
    """
    ordered = sorted(clients)
    count = -(-len(ordered) // most)
    count = min(len(ordered), -(-count // lanes) * lanes)
    if not count:
        return []
    made: list[list[int]] = []
    left = sum(work[client] for client in ordered)
    at = 0
    for remaining in range(count, 0, -1):
        share, wave, done = left / remaining, list[int](), 0.0
        while at < len(ordered) - (remaining - 1) and len(wave) < most:
            more = work[ordered[at]]
            if wave and remaining > 1 and done + more / 2 > share and len(ordered) - at <= (remaining - 1) * most:
                break
            wave.append(ordered[at])
            done += more
            at += 1
        left -= done
        made.append(wave)
    return made
