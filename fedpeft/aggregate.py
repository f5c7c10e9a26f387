"""Folds over a stream of updates: each makes one `Tensors` of many."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable

import torch

from fedpeft.messages import Update
from fedpeft.tensors import Tensors

Mean = Callable[[Iterable[Update]], Tensors]


def weighted_mean(updates: Iterable[Update]) -> Tensors:
    """Mean of the updates, weighted by examples, per name, summed in float64. Holds one update at a time.

    A tensor is averaged over the clients that sent it: with one common total, a layer that few clients hold would shrink.
    """
    totals: dict[str, float] = defaultdict(float)
    sums: Tensors = {}
    kinds: dict[str, torch.dtype] = {}
    for update in updates:
        for name, tensor in update.tensors.items():
            totals[name] += update.weight
            part = update.weight * tensor.double()
            sums[name] = sums[name] + part if name in sums else part
            kinds[name] = tensor.dtype
    if not any(totals.values()):
        raise ValueError("the mean has no update that carries weight; did every client fail this round?")
    if not math.isfinite(sum(totals.values())):
        raise ValueError("the mean has no weights of finite sum; each is a client's number of examples")
    return {name: (tensor / totals[name]).to(kinds[name]) for name, tensor in sums.items() if totals[name]}


def weighted() -> Mean:
    """`weighted_mean`, as a preset builds it."""
    return weighted_mean


def trimmed_mean(trim: float = 0.1) -> Mean:
    """Mean per coordinate without the `trim` share of the smallest and of the largest values (Yin et al., ICML 2018). Holds all updates.

    `trim` lies in [0, 0.5]; at least one value (two if their number is even) always remains, so 0.5 is the median.
    """
    if not 0 <= trim <= 0.5:
        raise ValueError(f"mean.trim={trim}: needed is a share between 0 and 0.5")

    def mean(updates: Iterable[Update]) -> Tensors:
        held = list(updates)
        stacks: dict[str, list[torch.Tensor]] = defaultdict(list)
        for update in held:
            for name, tensor in update.tensors.items():
                stacks[name].append(tensor)
        if not stacks:
            raise ValueError("trimmed_mean: no update came; did every client fail this round?")
        return {name: _trimmed(torch.stack(tensors), trim) for name, tensors in stacks.items()}

    return mean


def median() -> Mean:
    """Median per coordinate, the mean of the two middle values if their number is even. Holds all updates."""
    return trimmed_mean(0.5)


def _trimmed(stack: torch.Tensor, trim: float) -> torch.Tensor:
    cut = min(int(trim * len(stack)), (len(stack) - 1) // 2)
    ordered = stack.double().sort(0).values
    return ordered[cut : len(stack) - cut].mean(0).to(stack.dtype)
