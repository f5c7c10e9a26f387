"""Budget: what the clients of this process may still release of their examples, and how their sums are drawn and noised."""

import math
from collections import Counter
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from clients.train import Private, poisson
from fedpeft import seeds
from fedpeft.cohort import fixed
from fedpeft.privacy.noise import Secret, SeededInsecure, Source
from fedpeft.privacy.spending import Spending
from fedpeft.privacy.statement import Spent
from fedpeft.privacy.unit import Example, Terms, example_terms
from fedpeft.setting import Setting
from fedpeft.strategy import Phase, Strategy


@dataclass(eq=False)
class Budget:
    """Each client's own: terms from its number of examples, and a file of what it has released in `folder`/<client>."""

    unit: Example
    setting: Setting
    strategy: Strategy[Any]
    folder: Path

    def spending(self, client: int) -> Spending:
        """What the client has released."""
        return Spending(self.folder / f"{client:06d}" / "privacy.jsonl")

    def spent(self) -> Spent:
        """What was spent so far, by all clients' own files: of replies that were lost, too."""
        each = [Spending(place).reached for place in sorted(self.folder.glob("*/privacy.jsonl"))]
        return Spent(max((epsilon for epsilon, _ in each), default=0.0), max((delta for _, delta in each), default=0.0))

    def terms(self, client: int) -> Terms:
        """What its rounds release, planned for as many as the run's cohorts give it."""
        many, work = len(self.setting.split.clients[client]), self.setting.config.train
        steps = work.steps or max(1, round((work.epochs or 1.0) * many / min(work.batch, many)))
        turns, queries = self._turns
        return example_terms(
            self.unit,
            examples=many,
            batch=work.batch,
            steps=steps,
            rounds=max(1, turns[client]),
            queries=min(queries[client], turns[client]),
        )

    def reserve(self, client: int, round: int, phase: Phase) -> dict[str, float]:
        """Counts a round of `client` as spent, and gives what it may say of that. Raises `BudgetSpent`."""
        if not self.spending(client).path.exists() and any((self.folder / f"{client:06d}").glob("*.safetensors")):
            raise OSError(f"client {client} has answered before, but {self.spending(client).path} is gone: what was spent is not known")
        terms = self.terms(client)
        events = terms.events(query=phase.work == "gradient")
        spent = self.spending(client).reserve(events, budget=terms.budget, delta=terms.delta, facts={"round": round})
        return {"epsilon": spent, "delta": terms.delta}

    def private(self, client: int, round: int, phase: Phase) -> Private:
        """How the client's sums of this round are drawn, clipped and noised."""
        terms, many, source = self.terms(client), len(self.setting.split.clients[client]), self._source(client, round)
        if phase.work == "gradient":
            if terms.query_sigma is None:  # as published; else `events` has refused
                return Private(math.inf, float(many), 0.0, source, lambda rows: [rows])
            return Private(self.unit.clip, float(many), terms.query_sigma, source, lambda rows: [rows])
        draw = partial(poisson, rate=terms.rate, steps=terms.steps, source=source)
        return Private(self.unit.clip, terms.rate * many, terms.sigma, source, draw)

    def _source(self, client: int, round: int) -> Source:
        if self.unit.noise == "os":
            return self._secret
        return SeededInsecure(seeds.generator(self.setting.config.seed, round=round, client=client, purpose="noise"))

    @cached_property
    def _secret(self) -> Secret:
        return Secret()

    @cached_property
    def _turns(self) -> tuple[Counter[int], Counter[int]]:
        """How many rounds each client takes part in, and how many of those are of gradients."""
        config, turns, queries = self.setting.config, Counter[int](), Counter[int]()
        draw = fixed(config.clients, config.cohort, config.seed)
        for round in range(config.rounds):
            cohort = draw(round, 0).clients
            turns.update(cohort)
            if self.strategy.phase(round).work == "gradient":
                queries.update(cohort)
        return turns, queries
