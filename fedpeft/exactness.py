"""Exactness: how far what a round aggregated lies from the true weighted mean of the clients' products s_k B_k A_k.

Measured in every round of real training: updates are folded as they pass, so that none is held (algorithms.md 0.1: identity (a) says why
the mean of products is not the product of means).
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedpeft.lowrank import LowRank, product
from fedpeft.messages import Broadcast, Update
from fedpeft.strategy import Phase
from fedpeft.tensors import Tensors, is_own, targets

CLOSE, PROBES = 1e-10, 16  # a squared difference below CLOSE of the squared norm is the estimate from so many random vectors
BOUND = 512  # ranks that a fold of factors holds; a layer that is no larger is summed exactly


@dataclass(frozen=True)
class Gap:
    """Relative Frobenius error and cosine against the true mean; None where there is none. `dropped` bounds the relative norm that folds of
    more than `BOUND` ranks left out: the true error lies from (error - dropped) / (1 + dropped) to (error + dropped) / (1 - dropped)."""

    error: float | None
    cosine: float | None
    dropped: float = 0.0
    layers: Mapping[str, tuple[float, float] | None] = field(default_factory=dict)  # (error, cosine); None: a factor is not shared

    def entry(self) -> dict[str, object]:
        """As the ledger keeps it."""
        layers = {name: None if pair is None or not math.isfinite(pair[0]) else pair for name, pair in self.layers.items()}
        error = self.error if self.error is None or math.isfinite(self.error) else None  # nothing to be relative to
        return {"error": error, "cosine": self.cosine, "dropped": self.dropped, "layers": layers}


class Meter:
    """Of one round: `watch` the updates that are aggregated, then `read` the gap."""

    def __init__(self, phase: Phase, before: Broadcast, *, same_adapter: bool = True) -> None:
        self._before, self._sums, self._weight = before, dict[str, _Sum](), 0.0
        self.seconds = 0.0  # that measuring took
        self._layers: dict[str, bool] = {}  # layer -> whether its product is known to the server
        if phase.work == "train" and same_adapter:
            for layer in targets(name for name in before.tensors if not is_own(name)):
                parts = [f"{layer}.{part}" for part in "ABRH" if f"{layer}.{part}" in before.tensors]
                self._layers[layer] = all(phase.shares(name) or not (phase.trains(name) or phase.keeps(name)) for name in parts)

    def watch(self, updates: Iterable[Update], sent: Callable[[int], Broadcast]) -> Iterator[Update]:
        """The updates as they are, each folded in on its way."""
        for update in updates:
            began = time.perf_counter()
            tensors = sent(update.client).tensors | update.tensors
            self._weight += update.weight
            for layer in self._known:
                one = product(tensors, layer)
                self._sums.setdefault(layer, _Sum(one.B.shape[0], one.A.shape[1])).add(update.weight, one)
            self.seconds += time.perf_counter() - began
            yield update

    def read(self, after: Broadcast) -> Gap:
        """The gap between what `after` adds to the base, beyond what was added before, and the mean of what was seen."""
        began = time.perf_counter()
        if not self._sums or not self._weight:
            return Gap(None, None, layers=dict.fromkeys(self._layers))
        old, new = _chunks(self._before), _chunks(after)
        found = {layer: self._layer(layer, after.tensors, old, new) for layer in self._known}
        far, true, made, dot = (sum(row[i] for row in found.values()) for i in range(4))
        layers = {name: _ratios(*found[name]) if known else None for name, known in self._layers.items()}
        error, cosine = _ratios(far, true, made, dot)
        lost = math.hypot(*(total.lost for total in self._sums.values())) / self._weight
        self.seconds += time.perf_counter() - began
        return Gap(error, cosine, lost / math.sqrt(true) if true else 0.0, layers)

    @property
    def _known(self) -> list[str]:
        return [layer for layer, known in self._layers.items() if known]

    def _layer(
        self, layer: str, tensors: Tensors, old: Mapping[str, list[LowRank]], new: Mapping[str, list[LowRank]]
    ) -> tuple[float, float, float, float]:
        """Squared norms of the difference, of the true mean and of what was made, and their inner product."""
        same = {id(part.B) for part in old.get(layer, ())} & {id(part.B) for part in new.get(layer, ())}
        made = [(1.0, product(tensors, layer))]
        for sign, parts in ((1.0, new.get(layer, ())), (-1.0, old.get(layer, ()))):
            made += [(sign, part) for part in parts if id(part.B) not in same]
        return self._sums[layer].compared(self._weight, made)


class _Sum:
    """A sum of weight * product: exact up to `BOUND` ranks or in a layer no larger, else the best rank BOUND / 2 from time to time."""

    def __init__(self, m: int, n: int) -> None:
        self._shape, self._parts, self._rank = (m, n), list[LowRank](), 0
        self._dense: Tensor | None = None
        self.lost = 0.0  # norm of what was cut off, at most: each cut's added up, for they may lie in one direction

    def add(self, weight: float, part: LowRank) -> None:
        B, A = weight * part.B.double(), part.A.double()
        if self._dense is None and self._rank + part.rank > min(*self._shape, BOUND):
            if min(self._shape) <= BOUND:
                self._dense = sum((kept.dense() for kept in self._parts), torch.zeros(self._shape, dtype=torch.float64))
                self._parts = []
            elif self._parts:
                self._cut()
        if self._dense is not None:
            self._dense.addmm_(B, A)
            return
        self._parts.append(LowRank(B, A))
        self._rank += part.rank

    def compared(self, whole: float, made: list[tuple[float, LowRank]]) -> tuple[float, float, float, float]:
        if self._dense is not None or sum(self._shape) <= 2 * (self._rank + sum(part.rank for _, part in made)):
            dense = self._dense if self._dense is not None else _stack([(1.0, part) for part in self._parts]).dense()
            true = dense / whole
            other = _stack(made).dense()
            return tuple(float((a * b).sum()) for a, b in ((other - true,) * 2, (true,) * 2, (other,) * 2, (other, true)))  # type: ignore[return-value]  # four
        true_, other_ = _stack([(1 / whole, part) for part in self._parts]), _stack(made)
        # A difference of nearly equal products drowns in their Grams. E ||D x||^2 = ||D||^2 for standard normal x, and D x needs no Gram.
        x = torch.randn(self._shape[1], PROBES, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        far = float((other_.B @ (other_.A @ x) - true_.B @ (true_.A @ x)).square().sum()) / PROBES
        size = true_.inner(true_)
        if far <= CLOSE * size:
            return far, size, size, size
        there, dot = other_.inner(other_), other_.inner(true_)
        return size + there - 2 * dot, size, there, dot

    def _cut(self) -> None:
        whole = _stack([(1.0, part) for part in self._parts])
        kept = whole.truncate(BOUND // 2)
        self.lost += math.sqrt(max(whole.norm() ** 2 - kept.norm() ** 2, 0.0))
        self._parts, self._rank = [kept], kept.rank


def _stack(parts: list[tuple[float, LowRank]]) -> LowRank:
    return LowRank(torch.cat([sign * part.B.double() for sign, part in parts], 1), torch.cat([part.A.double() for _, part in parts]))


def _chunks(sent: Broadcast) -> dict[str, list[LowRank]]:
    found: dict[str, list[LowRank]] = {}
    for chunk in sent.base_delta:
        for layer, part in chunk.items():
            found.setdefault(layer, []).append(part)
    return found


def _ratios(far: float, true: float, made: float, dot: float) -> tuple[float, float]:
    """(relative error, cosine) of squared norms; two zeros are equal."""
    if true == 0 or made == 0:
        return (0.0, 1.0) if true == made else (math.inf if true == 0 else 1.0, 0.0)
    return math.sqrt(far / true), dot / math.sqrt(true * made)
