"""Whose presence a run hides, and with what settings: the presets of `privacy=`."""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

from fedpeft.privacy.accountant import COARSE, Event, noise_for

LEAST = 1e-6  # of a clip
Noise = Literal["os", "seeded-insecure"]  # the operating system's entropy; or from the run's seed, which hides nothing from who knows it


@dataclass(frozen=True, kw_only=True)
class _Unit:
    epsilon: float = 8.0  # the budget; infinite: whatever the noise costs
    noise_multiplier: float | None = None  # noise over clip; None: the least that keeps the budget
    delta: float | None = None  # None: min(1e-5, 1 / (10 N)), N the examples of a client or the clients
    clip: float = 1.0  # largest norm of a contribution
    noise: Noise = "os"

    def __post_init__(self) -> None:
        if math.isinf(self.epsilon) and self.noise_multiplier is None:
            raise ValueError("privacy.epsilon=inf and privacy.noise_multiplier=null say nothing; set the budget, or the noise, or both")
        for name in ("epsilon", "noise_multiplier", "clip"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and (math.isfinite(value) or name == "epsilon")):
                raise ValueError(f"privacy.{name}={value}: needed is a positive number; without noise nobody is hidden (privacy=none)")
        if not LEAST <= self.clip <= 1 / LEAST:  # beyond, floats would keep the clip and lose the noise
            raise ValueError(f"privacy.clip={self.clip:g}: needed is a number from {LEAST:g} to {1 / LEAST:g}")
        if self.delta is not None and not 0 < self.delta < 1:
            raise ValueError(f"privacy.delta={self.delta}: needed is a probability above 0 and below 1")
        if self.noise not in get_args(Noise):
            raise ValueError(f"privacy.noise={self.noise}: needed is os or seeded-insecure")

    def delta_for(self, many: int) -> float:
        """Delta where `many` examples or clients are hidden among each other. Raises `ValueError` for one that would let it name one."""
        if self.delta is None:
            return min(1e-5, 1 / (10 * many))
        if self.delta > 1 / many:
            raise ValueError(
                f"privacy.delta={self.delta} is more than 1/{many}: to publish one of {many} at random would keep it; "
                f"leave it null for {min(1e-5, 1 / (10 * many)):.2g}"
            )
        return self.delta


@dataclass(frozen=True, kw_only=True)
class Example(_Unit):
    """One example of one client is hidden from everybody who sees what that client sends, the server among them."""

    query_noise_multiplier: float | None = None  # of each round of gradients that a strategy begins with; None: no such round
    adversary: Literal["server", "outsider"] = "server"
    backend: Literal["auto", "wave", "hooks", "vmap", "loop"] = "auto"  # what finds the gradient of each example
    published: bool = False  # count as Fed-SB's published code does, which is no valid claim: to compare with its tables alone

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.published and self.delta is not None:
            raise ValueError(f"privacy.delta={self.delta}: privacy.published=true takes one over the number of batches; leave it null")
        noise = self.query_noise_multiplier
        if noise is not None and not (noise > 0 and math.isfinite(noise)):
            raise ValueError(f"privacy.query_noise_multiplier={noise}: needed is a positive number, or null")
        if self.adversary != "server":
            raise ValueError(
                f"privacy.adversary={self.adversary}: an example's epsilon gets no credit for rounds its client sits out, for the server "
                "sees who takes part; leave it at server, or set privacy=client"
            )
        if self.backend not in ("auto", "wave", "hooks", "vmap", "loop"):
            raise ValueError(f"privacy.backend={self.backend}: needed is auto, wave, hooks, vmap or loop")


@dataclass(frozen=True, kw_only=True)
class Client(_Unit):
    """One client is hidden from everybody who sees the models the server releases; the server itself is trusted."""

    query_clip: float | None = None  # clip of a round of gradients, whose norm is another; None: clip
    adversary: Literal["participants", "outsider"] = "participants"  # knows who takes part in a round; or sees the models alone
    sampling: Literal["fixed", "poisson"] = "fixed"  # poisson: each client by a secret coin of probability cohort / clients
    quantile: float | None = None  # adapt the clip to this quantile of the norms (Andrew et al., NeurIPS 2021); None: keep it
    clip_rate: float = 0.2  # of the geometric steps that adapt it
    count_noise: float | None = None  # standard deviation of the noisy count below the clip; None: cohort / 20

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.adversary not in ("participants", "outsider") or self.sampling not in ("fixed", "poisson"):
            raise ValueError(
                f"privacy.adversary={self.adversary}: needed is participants or outsider; "
                f"privacy.sampling={self.sampling}: needed is fixed or poisson"
            )
        if self.adversary == "outsider" and self.sampling != "poisson":
            raise ValueError(
                "privacy.adversary=outsider takes credit for clients that a round leaves out, which needs each to be drawn by a secret "
                "coin of its own; set privacy.sampling=poisson"
            )
        if self.quantile is not None and not 0 < self.quantile < 1:
            raise ValueError(f"privacy.quantile={self.quantile}: needed is a share above 0 and below 1, or null")
        if self.query_clip is not None and not LEAST <= self.query_clip <= 1 / LEAST:
            raise ValueError(
                f"privacy.query_clip={self.query_clip:g}: needed is a number from {LEAST:g} to {1 / LEAST:g}, a positive number"
            )
        for name in ("clip_rate", "count_noise"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"privacy.{name}={value}: needed is a positive number")


Unit = Example | Client


def none() -> None:
    """No differential privacy."""
    return


@dataclass(frozen=True)
class Terms:
    """What one unit's releases are, and cost: `sigma` is the noise multiplier of the sums whose Poisson samples have `rate`."""

    rate: float
    sigma: float
    delta: float
    budget: float
    query_sigma: float | None = None
    steps: int = 1  # sums of one ordinary round
    published: bool = False  # gradients of a start are neither noised nor counted

    def events(self, *, query: bool = False) -> tuple[Event, ...]:
        """The releases of one round."""
        if not query:
            return (Event(self.sigma, self.rate, self.steps),)
        if self.query_sigma is None and self.published:
            return ()
        if self.query_sigma is None:
            raise ValueError("a round of gradients has no noise of its own: set privacy.query_noise_multiplier")
        return (Event(self.query_sigma, 1.0, 1),)


def example_delta(unit: Example, examples: int, batch: int) -> float:
    """Delta of a client with `examples` examples."""
    if unit.published:
        return min(1 / math.ceil(examples / batch), 0.5)  # of one batch: with delta 1 everything may be told
    return unit.delta_for(examples)


@lru_cache(maxsize=4096)
def example_terms(unit: Example, *, examples: int, batch: int, steps: int, rounds: int, queries: int = 0) -> Terms:
    """Those of a client with `examples` examples that trains `steps` steps in each of `rounds` rounds, `queries` of them of gradients.

    Noise that keeps a budget is found for the number of examples rounded down to two digits, so that clients of nearly one size share
    one search; what is spent is counted with the real rate.
    """
    delta, rate = example_delta(unit, examples, batch), min(1.0, batch / examples)
    noise = unit.query_noise_multiplier
    sigma = unit.noise_multiplier
    if sigma is None:
        digits = max(len(str(examples)) - 2, 0)
        beside = () if noise is None else (Event(noise, 1.0, queries),)
        sigma = _least(
            unit.epsilon, delta, min(1.0, batch / (examples // 10**digits * 10**digits)), steps * max(rounds - queries, 1), beside
        )
    return Terms(rate, sigma, delta, unit.epsilon, noise, steps, unit.published)


@lru_cache(maxsize=4096)
def _least(budget: float, delta: float, rate: float, count: int, beside: tuple[Event, ...]) -> float:
    return noise_for(budget, delta, lambda sigma: (Event(sigma, rate, count), *beside), step=COARSE)


@lru_cache(maxsize=64)
def client_terms(unit: Client, *, clients: int, cohort: int, rounds: int, turns: int) -> Terms:
    """Those of a run of `rounds` rounds in which no client takes part more than `turns` times."""
    delta = unit.delta_for(clients)
    rate = cohort / clients if unit.adversary == "outsider" else 1.0
    count = rounds if unit.adversary == "outsider" or unit.sampling == "poisson" else turns
    sigma = unit.noise_multiplier or noise_for(unit.epsilon, delta, lambda sigma: (Event(sigma, rate, count),), step=COARSE)
    if unit.quantile is not None:
        sum_noise(unit, sigma, cohort)
    return Terms(rate, sigma, delta, unit.epsilon)


def sum_noise(unit: Client, sigma: float, cohort: int) -> float:
    """Noise multiplier of the clipped sum itself, so that sum and noisy count together cost what one release at `sigma` does.

    Andrew et al., Differentially Private Learning with Adaptive Clipping, NeurIPS 2021, theorem 1: (sigma^-2 - (2 count_noise)^-2)^-1/2.
    """
    if unit.quantile is None:
        return sigma
    count = cohort / 20 if unit.count_noise is None else unit.count_noise
    if 2 * count <= sigma:
        raise ValueError(
            f"privacy.quantile={unit.quantile}: a count with noise {count:g} alone costs more than noise multiplier {sigma:.3g} allows; "
            f"set privacy.count_noise above {sigma / 2:.3g}, or privacy.quantile=null"
        )
    return float((sigma**-2 - (2 * count) ** -2) ** -0.5)
