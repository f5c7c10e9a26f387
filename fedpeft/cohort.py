"""Draws the cohort of a round.

Who takes part in a cohort of fixed size follows from the run's seed, so that both sides can plan by it; a Poisson cohort is secret.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fedpeft import seeds

Draw = Callable[[int, int], "Cohort"]  # (round, attempt) -> cohort


@dataclass(frozen=True)
class Cohort:
    """The clients of a round, sorted, and the share of all clients that it is."""

    clients: tuple[int, ...]
    rate: float


def fixed(clients: int, size: int, seed: int) -> Draw:
    """Draws `size` of `clients` without replacement; a function of (round, attempt), so that a round nobody answered is drawn anew."""

    def cohort(round: int, attempt: int) -> Cohort:
        rng = seeds.generator(seed, round=round, purpose=f"cohort {attempt}")
        return Cohort(tuple(sorted(torch.randperm(clients, generator=rng)[:size].tolist())), size / clients)

    return cohort


def poisson(clients: int, rate: float, uniform: Callable[[int], Tensor]) -> Draw:
    """Each client takes part with probability `rate`, independently of all others and of other rounds; a cohort may be empty."""

    def cohort(round: int, attempt: int) -> Cohort:
        return Cohort(tuple((uniform(clients) < rate).nonzero()[:, 0].tolist()), rate)

    return cohort
