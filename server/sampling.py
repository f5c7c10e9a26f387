"""Draws the cohort of a round."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from fedpeft import seeds


@dataclass(frozen=True)
class Cohort:
    """The clients of a round, sorted, and the share of all clients that it is."""

    clients: tuple[int, ...]
    rate: float


def fixed(clients: int, size: int, seed: int) -> Callable[[int, int], Cohort]:
    """Draws `size` of `clients` without replacement; a function of (round, attempt), so that a round nobody answered is drawn anew."""

    def cohort(round: int, attempt: int) -> Cohort:
        rng = seeds.generator(seed, round=round, purpose=f"cohort {attempt}")
        return Cohort(tuple(sorted(torch.randperm(clients, generator=rng)[:size].tolist())), size / clients)

    return cohort
