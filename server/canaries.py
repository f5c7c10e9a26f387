"""Canaries in a client-private run: clients that nobody has, in every round, whose trace in what is released tells how much noise is there.

Andrew et al., One-shot empirical privacy estimation for federated learning, ICLR 2024. https://arxiv.org/abs/2302.03098
A simulation's audit adds them; they would swamp a cohort that is there to learn.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor

from fedpeft import seeds
from fedpeft.aggregate import Mean
from fedpeft.messages import Update
from fedpeft.privacy.bounds import Estimate, canary_estimate
from fedpeft.tensors import Tensors

MOST, FEWEST = 200, 10
SMALL = 25  # entries, times a noise variance of at most 1, for each canary: with so many they lower the estimate by 2 % at most
LOUD = 10.0  # clips that a canary sends: more than it may, so that a clip that is missing shows


@dataclass(eq=False)
class Canaries:
    """The canaries of one run, and what was seen of them.

    Each has one random direction in all rounds: a change that is counted again later shows, too. All rounds' releases, each in its own
    clips, are one release of `entries` numbers; what travels may differ from round to round, for its noise is the same.
    """

    seed: int
    wanted: int | None = None  # None: `MOST`, or as few as `SMALL` says, yet `FEWEST`
    many: int = field(default=0, init=False)
    rounds: int = field(default=0, init=False)
    entries: int = field(default=0, init=False)
    noise_multiplier: float = field(default=math.nan, init=False)  # as the run claims it, of a sum
    _scores: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64), init=False)
    _square: float = field(default=0.0, init=False)

    def among(self, mean: Mean, base: Tensors, *, clip: float, noise_multiplier: float) -> Mean:
        """The mean of the clients and the canaries, all of which begin at `base`; what it gives is looked at."""
        size = sum(tensor.numel() for tensor in base.values())
        if not self.many:
            self.many = self.wanted or max(FEWEST, min(MOST, int(size * min(1.0, noise_multiplier**2) / SMALL)))
            self._scores, self.noise_multiplier = torch.zeros(self.many, dtype=torch.float64), noise_multiplier

        def joined(updates: Iterable[Update]) -> Tensors:
            released = mean(chain(updates, self._updates(base, LOUD * clip)))
            seen = torch.cat([(released[name].double() - base[name].double()).flatten() for name in sorted(base)]) / clip
            self._scores += torch.stack([self._direction(canary, size) @ seen for canary in range(self.many)])
            self._square += float(seen.square().sum())
            self.rounds, self.entries = self.rounds + 1, self.entries + size
            return released

        return joined

    @property
    def claimed(self) -> float:
        """mu of the Gaussian mechanism for a client in every round so far: the sums alone, nothing left to chance."""
        return math.sqrt(self.rounds) / self.noise_multiplier

    @property
    def estimate(self) -> Estimate:
        """mu by what was seen."""
        if not self.rounds:
            raise ValueError("no round was released, so no canary was seen")
        cosines = self._scores / math.sqrt(self.rounds * self._square)
        return canary_estimate(cosines.numpy(), entries=self.entries, releases=self.rounds)

    def _updates(self, base: Tensors, size: float) -> Iterator[Update]:
        """The canaries', and as many that change nothing: a clip that follows how many lie above it and below stays where it is."""
        names = sorted(base)
        for canary in range(self.many):
            whole = self._direction(canary, sum(base[name].numel() for name in names)) * size
            parts = whole.split([base[name].numel() for name in names])
            ends = {name: base[name].double() + part.view(base[name].shape) for name, part in zip(names, parts, strict=True)}
            yield from (Update(-1 - canary, tensors, 1.0) for tensors in (ends, base))

    def _direction(self, canary: int, size: int) -> Tensor:
        """(size,) of norm 1, float64; drawn anew each time: all at once would be as many models."""
        rng = seeds.generator(self.seed, client=canary, purpose="canary")
        drawn = torch.randn(size, generator=rng).double()
        whole: Tensor = drawn / drawn.norm()
        return whole
