"""A client-private mean: each client's change clipped, the sum noised once, divided by the expected and not the real number of clients.

McMahan et al., Learning Differentially Private Recurrent Language Models, ICLR 2018. The clip may follow a quantile of the norms: Andrew et
al., Differentially Private Learning with Adaptive Clipping, NeurIPS 2021.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from fedpeft import seeds
from fedpeft.aggregate import Mean
from fedpeft.cohort import Draw, fixed, poisson
from fedpeft.config import ConfigError
from fedpeft.messages import Broadcast, Update
from fedpeft.privacy.mechanism import add_noise, clip_each
from fedpeft.privacy.noise import Secret, SeededInsecure, Source
from fedpeft.privacy.spending import Spending
from fedpeft.privacy.statement import Spent
from fedpeft.privacy.unit import Client, Terms, client_terms, sum_noise
from fedpeft.tensors import Names, Tensors, is_own, only
from server.canaries import Canaries


@dataclass(eq=False)
class Hidden:
    """The clients of a run, hidden among each other. `cohort` is the expected number of a round."""

    unit: Client
    clients: int
    cohort: int
    rounds: int
    seed: int
    spending: Spending
    canaries: Canaries | None = None  # of an audit

    @cached_property
    def terms(self) -> Terms:
        """What the rounds release."""
        turns = [0] * self.clients
        public = fixed(self.clients, self.cohort, self.seed)
        for round in range(self.rounds):
            for client in public(round, 0).clients:
                turns[client] += 1
        return client_terms(self.unit, clients=self.clients, cohort=self.cohort, rounds=self.rounds, turns=max(turns))

    @property
    def draw(self) -> Draw:
        """Cohorts: by the run's seed, or by secret coins."""
        if self.unit.sampling == "fixed":
            return fixed(self.clients, self.cohort, self.seed)
        if self.unit.noise == "os":
            return poisson(self.clients, self.cohort / self.clients, self._secret.uniform)
        return lambda round, attempt: poisson(
            self.clients, self.cohort / self.clients, self._seeded(round, f"coins {attempt}").uniform
        )(round, attempt)  # fmt: skip

    def mean(self, round: int, start: Broadcast, clients: Iterable[int], shares: Names, *, query: bool = False) -> Mean:
        """The noised mean of a round whose clients begin at `start`. Raises `BudgetSpent` at once if the round cannot be paid.

        The release is on disk as spent when the mean is asked for its value, after the last update and before any noise is drawn.
        """
        named, terms = None if self.unit.adversary == "outsider" else sorted(clients), self.terms
        events = terms.events()
        clip = self.unit.query_clip or self.unit.clip if query else self.clip(round)
        noise = sum_noise(self.unit, terms.sigma, self.cohort)
        self.spending.check(events, budget=terms.budget, delta=terms.delta, clients=named)
        base = only(start.tensors, lambda name: shares(name) and not is_own(name))

        def mean(updates: Iterable[Update]) -> Tensors:
            sums = {name: torch.zeros(tensor.shape, dtype=torch.float64) for name, tensor in base.items()}
            below = 0.0  # of each client 1/2 if its change is short, else -1/2: one client more moves it by 1/2
            for update in updates:
                change = {name: (update.tensors[name].double() - tensor.double())[None] for name, tensor in base.items()}
                below += 0.5 if float(clip_each(change, clip)[0]) <= clip else -0.5
                for name, part in change.items():
                    sums[name] += part[0]
            source = self._secret if self.unit.noise == "os" else self._seeded(round, "noise")
            facts: dict[str, Any] = {"round": round, "clip": clip}
            if self.unit.quantile is not None and not query:
                facts["next_clip"] = self._adapted(clip, below, source)
            self.spending.reserve(events, budget=terms.budget, delta=terms.delta, clients=named, facts=facts)
            add_noise(sums, noise * clip, source)
            return {name: (base[name].double() + total / self.cohort).to(base[name].dtype) for name, total in sums.items()}

        return mean if self.canaries is None else self.canaries.among(mean, base, clip=clip, noise_multiplier=noise)

    def clip(self, round: int) -> float:
        """That of an ordinary round, which follows from those before it."""
        adapted = [line["next_clip"] for line in self.spending.lines() if line["round"] < round and "next_clip" in line]
        return float(adapted[-1]) if adapted else self.unit.clip

    @property
    def spent(self) -> Spent:
        """What is spent so far."""
        return Spent(self.spending.spent(self.terms.delta), self.terms.delta)

    def check_resumed(self, first: int) -> None:
        """Raises `ConfigError` if a run that goes on with round `first` has released more than its ledger says."""
        if missing := set(range(first)) - {line["round"] for line in self.spending.lines()}:
            raise ConfigError(
                f"{self.spending.path} has nothing of round {min(missing) + 1} and {len(missing) - 1} more, which the checkpoint has: what "
                "was spent is not known, and nothing more is released; put the run's own file back, or begin another run"
            )

    def _adapted(self, clip: float, below: float, source: Source) -> float:
        """A step towards the clip that the wanted share of norms lies below (Andrew et al., algorithm 1); the count is noised."""
        assert self.unit.quantile is not None
        noise = self.cohort / 20 if self.unit.count_noise is None else self.unit.count_noise
        share = 0.5 + (below + noise * float(source.normal(1)[0])) / self.cohort
        return clip * math.exp(-self.unit.clip_rate * (share - self.unit.quantile))

    @cached_property
    def _secret(self) -> Secret:
        return Secret()

    def _seeded(self, round: int, purpose: str) -> SeededInsecure:
        return SeededInsecure(seeds.generator(self.seed, round=round, purpose=f"private {purpose}"))
