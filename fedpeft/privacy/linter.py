"""What would void a guarantee, refused before anything is trained: each rule with its reason and what to do instead."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from fedpeft.config import Config
from fedpeft.privacy.unit import Client, Example, Unit
from fedpeft.strategy import Strategy

COUPLING = (nn.modules.batchnorm._BatchNorm,)  # layers through which one example of a batch changes another's output


@dataclass(frozen=True)
class Facts:
    """What rules look at. `sizes`: examples of each client."""

    config: Config
    unit: Unit
    strategy: Strategy[Any]
    sizes: Sequence[int]
    module: nn.Module

    @property
    def example(self) -> Example | None:
        """The unit, if it is one example."""
        return self.unit if isinstance(self.unit, Example) else None

    @property
    def client(self) -> Client | None:
        """The unit, if it is one client."""
        return self.unit if isinstance(self.unit, Client) else None

    def chosen(self, family: str) -> str:
        """As the user wrote it."""
        return f"{family}={self.config.choices[family]}"

    def some(self, holds: Callable[[Any], bool]) -> int | None:
        """The first round whose phase satisfies `holds`."""
        return next((round for round in range(self.config.rounds) if holds(self.strategy.phase(round))), None)


Rule = Callable[[Facts], str | None]


def faults(facts: Facts) -> list[str]:
    """One sentence for every setting that would void the guarantee."""
    return [f"privacy={facts.config.choices['privacy']}: {why}" for rule in RULES.values() if (why := rule(facts))]


def _weights(facts: Facts) -> str | None:
    if facts.config.weights == "uniform":
        return None
    if facts.client:
        return "weights=examples lets a client of many examples count for more than the clip allows; set weights=uniform"
    return "weights=examples would have each client send how many examples it has, without noise; set weights=uniform"


def _select(facts: Facts) -> str | None:
    if not facts.client or facts.config.choices["select"] == "all":
        return None
    return f"{facts.chosen('select')} looks at updates before they are clipped: one client can decide which others count; set select=all"


def _mean(facts: Facts) -> str | None:
    if not facts.client or facts.config.choices["mean"] == "weighted":
        return None
    return f"{facts.chosen('mean')} is no sum: noise made for the clipped sum does not hide a client in it; set mean=weighted"


def _mean_only(facts: Facts) -> str | None:
    if not facts.client or facts.strategy.mean_only:
        return None
    return (
        f"{facts.chosen('strategy')} combines updates by more than their mean, so the noised mean would not be all that it learns; "
        "set strategy=fedavg, ffa, rolora, fed_sb, fedprox or fedopt, or privacy=example"
    )


def _variates(facts: Facts) -> str | None:
    if not facts.client or facts.some(lambda phase: phase.rates) is None:
        return None
    return f"{facts.chosen('strategy')} has clients send control variates, which no clip covers; set strategy=fedprox, or privacy=example"


def _personal(facts: Facts) -> str | None:
    if facts.some(lambda phase: any(phase.keeps(name) for name in ("q.A", "q.B", "head.weight"))) is None:
        return None
    return (
        f"{facts.chosen('strategy')} keeps tensors at the clients, whose accuracy they would report without noise; "
        "set strategy=ffa (A fixed) or another with one model for all"
    )


def _queries(facts: Facts) -> str | None:
    """Gradients that a strategy begins with are releases like all others."""
    round = facts.some(lambda phase: phase.work == "gradient")
    if not facts.example:
        return None
    if round is None:
        given = facts.example.query_noise_multiplier
        return None if given is None else f"privacy.query_noise_multiplier={given}: no round of this run is one of gradients; leave it null"
    if facts.example.query_noise_multiplier is not None or facts.example.published:
        return None
    return (
        f"{facts.chosen('strategy')} takes full gradients of the data in round {round}, which must be noised and counted too; set "
        "privacy.query_noise_multiplier (8, say), or strategy.start=xs, which looks at the weights alone"
    )


def _sign(facts: Facts) -> str | None:
    if facts.example and facts.config.strategy.get("start") == "sign" and not facts.example.published:
        return (
            "strategy.start=sign has every weight of a layer as one entry of its gradient: noise on that many hides the start itself; "
            "set strategy.start=xs, or gradient with privacy.query_noise_multiplier"
        )
    return None


def _delta(facts: Facts) -> str | None:
    many = len(facts.sizes) if facts.client else max(facts.sizes)
    try:
        facts.unit.delta_for(many)
    except ValueError as fault:
        return str(fault)
    return None


def _batch_norm(facts: Facts) -> str | None:
    if not facts.example:
        return None
    found = next((name for name, module in facts.module.named_modules() if isinstance(module, COUPLING)), None)
    return found and f"{found} normalizes over the batch, so one example changes the gradients of others; choose a model with layer norms"


def _dropout(facts: Facts) -> str | None:
    rate = facts.config.adapter.get("dropout") or 0
    return (
        f"adapter.dropout={rate} draws its masks from the run's seed, not in secret; set adapter.dropout=0"
        if facts.example and rate
        else None
    )


def _public(facts: Facts) -> str | None:
    if not facts.config.data.get("public_small_groups"):
        return None
    return "data.public_small_groups=true makes the base model of small clients' data, without noise; leave it false"


def _redrawn(facts: Facts) -> str | None:
    if facts.client and facts.config.min_clients > 1:
        return (
            f"min_clients={facts.config.min_clients} would draw a round again that too few answer: one failure would decide whom the "
            "sum is over; set min_clients=1 (who does not answer counts as no change, an empty cohort is a round of noise)"
        )
    return None


def _crowd(facts: Facts) -> str | None:
    if facts.client and facts.config.clients < 2:
        return "clients=1: there is nobody to hide one client among; set privacy=example"
    return None


def _ranks(facts: Facts) -> str | None:
    if facts.client and facts.config.devices is not None:
        return "devices: clients of other ranks send other shapes, and one clip over all means another thing for each; leave devices=null"
    return None


def _gone(facts: Facts) -> str | None:
    """Clients of one example each: there the two units are one."""
    if facts.example is None or max(facts.sizes) > 1:
        return None
    return "every client has one example: to hide it is to hide the client; set privacy=client"


def _second_clip(facts: Facts) -> str | None:
    if facts.config.train.clip is None or not facts.example:
        return None
    return (
        f"train.clip={facts.config.train.clip} clips the mean of a batch, which bounds no single example; "
        "leave it null, privacy.clip does it for each"
    )


def _backend(facts: Facts) -> str | None:
    if facts.example and facts.example.backend == "wave" and not facts.config.engine.stacked:
        return "privacy.backend=wave needs engine.stacked=true"
    return None


RULES: Mapping[str, Rule] = {
    "weights": _weights,
    "selection": _select,
    "mean": _mean,
    "strategy": _mean_only,
    "control variates": _variates,
    "personal models": _personal,
    "gradient rounds": _queries,
    "signs of gradients": _sign,
    "delta": _delta,
    "batch norm": _batch_norm,
    "dropout": _dropout,
    "public data": _public,
    "redrawn cohorts": _redrawn,
    "one client": _crowd,
    "mixed ranks": _ranks,
    "one example": _gone,
    "batch clip": _second_clip,
    "backend": _backend,
}
