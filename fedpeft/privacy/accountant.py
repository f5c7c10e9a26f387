"""What noisy sums give away: epsilon at a given delta, and the noise, the steps or the sampling rate that an epsilon allows.

Privacy loss distributions (Koskela et al. 2020; connecting the dots, Doroshenko et al. 2022, https://arxiv.org/abs/2207.04380) as
dp-accounting computes them, and Renyi DP (Mironov 2017) as a looser bound beside it. Every epsilon is an upper bound, never an estimate, so
there is no accounting by the central limit theorem (GDP). Relation: one unit is added or removed. Sampling: Poisson, or everybody.

There is no replace-one relation and no sample of a fixed size: dp-accounting 0.6 doubles the sensitivity for them in one accountant and
leaves it to the caller in the other, so that the same sigma gives 3.6 or 21.0 for the same run.
"""

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Literal

FINE, COARSE = 1e-4, 1e-3  # losses of PLD are rounded up to multiples; the coarse one is ten times as fast and at most 0.0021 above
LEAST_DELTA = 1e-12  # PLD cuts tails of 1e-15 and sums in float64: below, its bound is far too high
LEAST_NOISE, MOST_NOISE, LEAST_RATE = 1e-3, 1e6, 1e-9  # of samples: beyond, losses overflow or vanish in float64
MOST_COUNT = 10**6
SPAN_ONE, SPAN_ALL = 40, 400  # losses of one release and of all that `step` covers: four million points, a second or two, at the fine one
GRID = 4000  # noise and rates are searched in steps of 1/4000 of themselves
Name = Literal["pld", "rdp"]


@dataclass(frozen=True)
class Event:
    """`count` releases of a sum with Gaussian noise of multiplier `sigma`, each over a Poisson sample of rate `rate` (1: everybody).

    sigma is the noise's standard deviation over the norm that one unit's contribution is clipped to.
    """

    sigma: float
    rate: float = 1.0
    count: int = 1

    def __post_init__(self) -> None:
        if not (math.isfinite(self.sigma) and self.sigma >= 0):
            raise ValueError(f"sigma={self.sigma}: needed is a finite number of at least 0, the noise over the clipping norm")
        if not 0 <= self.rate <= 1:
            raise ValueError(f"rate={self.rate}: needed is a number from 0 to 1, the chance of one unit to be in a sample")
        if isinstance(self.count, bool) or not isinstance(self.count, int) or self.count < 0:
            raise ValueError(f"count={self.count!r}: needed is a whole number of at least 0")


def epsilon(events: Sequence[Event], delta: float, *, accountant: Name = "pld", step: float = FINE) -> float:
    """Smallest epsilon that is shown at `delta` for all `events` together; infinite if one has no noise.

    `step` is the grid of privacy losses of "pld". It is made finer where losses are small against it, and coarser where an epsilon in the
    hundreds would need a grid that no memory holds; each grid gives a bound. Where everybody takes part in all, the answer is exact.
    """
    if not LEAST_DELTA <= delta < 1:
        raise ValueError(f"delta={delta}: needed is a number from {LEAST_DELTA} to below 1, and for N units below 1/N")
    if accountant not in ("pld", "rdp"):
        raise ValueError(f"accountant={accountant!r}: needed is pld or rdp; GDP is no bound and there is none")
    if not (math.isfinite(step) and step > 0):
        raise ValueError(f"step={step}: needed is a positive number, usually {FINE}")
    return _epsilon(_canonical(events), float(delta), accountant, float(step) if accountant == "pld" else 0.0)


def delta_of(events: Sequence[Event], epsilon: float) -> float:
    """Smallest delta that is shown at `epsilon` for all `events` together, by PLD."""
    if not (math.isfinite(epsilon) and epsilon >= 0):
        raise ValueError(f"epsilon={epsilon}: needed is a finite number of at least 0")
    return _delta(_canonical(events), float(epsilon))


def noise_for(target: float, delta: float, make: Callable[[float], Sequence[Event]], *, step: float = FINE) -> float:
    """Smallest noise multiplier, from 0.001 to a million and to a relative 1e-3, with which `make(sigma)` stays within epsilon `target`.

    With `step` `COARSE` the search takes a fifth of the time, and finds noise that is larger by a thousandth.
    """
    _check_target(target)

    def sigma(k: int) -> float:
        return math.exp(-k / GRID)

    def cost(accountant: Name, step: float, k: int) -> float:
        return epsilon(make(sigma(k)), delta, accountant=accountant, step=step)

    least, most = -14 * GRID, 7 * GRID
    best = _most(cost, target, 0, least, most, lambda k: GRID, step)
    if best is None:
        left = epsilon(make(sigma(least)), delta)
        raise ValueError(
            f"epsilon={target} at delta={delta}: no noise reaches it; with a multiplier of a million the releases still cost {left:.4g}. "
            "What is released beside this noise costs too much: give that more noise, release it less often, or raise epsilon"
        )
    return sigma(best)


def count_for(target: float, delta: float, sigma: float, rate: float) -> int:
    """Most releases that stay within epsilon `target`, at most a million."""
    _check_target(target)

    def cost(accountant: Name, step: float, k: int) -> float:
        return epsilon([Event(sigma, rate, k)], delta, accountant=accountant, step=step)

    best = _most(cost, target, 1, 0, MOST_COUNT, lambda k: k)
    assert best is not None, "no release costs nothing"
    return best


def rate_for(target: float, delta: float, sigma: float, count: int) -> float:
    """Largest Poisson rate, to a relative 1e-3, with which `count` releases stay within epsilon `target`; 0 if none from 1e-7 does."""
    _check_target(target)

    def cost(accountant: Name, step: float, k: int) -> float:
        return epsilon([Event(sigma, math.exp(k / GRID), count)], delta, accountant=accountant, step=step)

    best = _most(cost, target, 0, -16 * GRID, 0, lambda k: GRID)
    return 0.0 if best is None else math.exp(best / GRID)


def gaussian_delta(mu: float, epsilon: float) -> float:
    """Exact delta of the Gaussian mechanism, sensitivity over noise `mu`: Phi(mu/2 - eps/mu) - e^eps Phi(-mu/2 - eps/mu).

    Balle and Wang 2018, theorem 8, https://arxiv.org/abs/1805.06530.
    """
    if not (mu >= 0 and epsilon >= 0):
        raise ValueError(f"mu={mu}, epsilon={epsilon}: needed are numbers of at least 0")
    from scipy.special import log_ndtr

    if mu == 0 or math.isinf(epsilon):
        return 0.0
    if math.isinf(mu):
        return 1.0
    first, second = float(log_ndtr(mu / 2 - epsilon / mu)), epsilon + float(log_ndtr(-mu / 2 - epsilon / mu))
    return max(0.0, -math.exp(first) * math.expm1(min(second - first, 0.0)))


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Exact epsilon of the Gaussian mechanism at `delta`: the inverse of `gaussian_delta`, rounded up in the twelfth digit."""
    if not 0 < delta < 1:
        raise ValueError(f"delta={delta}: needed is a number between 0 and 1")
    if gaussian_delta(mu, 0.0) <= delta:
        return 0.0
    if not math.isfinite(mu * mu):
        return math.inf
    low, high = 0.0, mu * mu / 2 + mu  # where a normal loss of this mean and spread lies below one spread from its mean
    while gaussian_delta(mu, high) > delta:
        low, high = high, 2 * high
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if gaussian_delta(mu, middle) <= delta else (middle, high)
    return high


def _canonical(events: Sequence[Event]) -> tuple[Event, ...]:
    """Equal events merged, in order; those over everybody are one Gaussian, whose squares of 1/sigma add.

    Where PLD's arithmetic ends, a bound stands in: samples under next to no noise count as everybody, and rarer samples or larger noise as
    the rarest or the largest that it can do.
    """
    counts: Counter[tuple[float, float]] = Counter()
    for event in events:
        if event.count and event.rate:
            sampled = event.rate < 1
            sigma = min(event.sigma, MOST_NOISE) if sampled else event.sigma
            counts[float(sigma), float(max(event.rate, LEAST_RATE))] += event.count
    if any(sigma == 0 for sigma, _ in counts):
        return (Event(0.0),)
    square = math.fsum(count / sigma / sigma for (sigma, rate), count in counts.items() if rate == 1)
    if square > LEAST_NOISE**-2 or any(sigma < LEAST_NOISE for sigma, _ in counts):
        return (Event(1 / math.sqrt(math.fsum(count / sigma / sigma for (sigma, _), count in counts.items()))),)
    whole = [Event(1 / math.sqrt(square))] if square else []
    return tuple(whole + [Event(*key, count) for key, count in sorted(counts.items()) if key[1] < 1])


@lru_cache(maxsize=4096)
def _epsilon(releases: tuple[Event, ...], delta: float, accountant: Name, step: float) -> float:
    if not releases:
        return 0.0
    if releases[0].sigma == 0:
        return math.inf
    if accountant == "rdp":
        return _renyi(releases, delta)
    if all(release.rate == 1 for release in releases):
        return gaussian_epsilon(1 / releases[0].sigma, delta)
    return float(_distribution(releases, step).get_epsilon_for_delta(delta))


@lru_cache(maxsize=4096)
def _delta(releases: tuple[Event, ...], epsilon: float) -> float:
    if not releases:
        return 0.0
    if releases[0].sigma == 0:
        return 1.0
    if all(release.rate == 1 for release in releases):
        return gaussian_delta(1 / releases[0].sigma, epsilon)
    return float(_distribution(releases, FINE).get_delta_for_epsilon(epsilon))


def _distribution(releases: tuple[Event, ...], step: float) -> Any:
    grid = _grid(releases, step)
    parts = [_single(release.sigma, release.rate, grid).self_compose(release.count) for release in releases]
    made = parts[0]
    for part in parts[1:]:
        made = made.compose(part)
    return made


@lru_cache(maxsize=4)  # megabytes each; two thirds of the time when only the number of releases changes
def _single(sigma: float, rate: float, grid: float) -> Any:
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution, from_gaussian_mechanism

    made = from_gaussian_mechanism(sigma, sampling_prob=rate, value_discretization_interval=grid)  # pessimistic, add or remove one
    # Dense: to compose a sparse one n times dp-accounting 0.6 first computes points**n, a whole number that takes hours for n = 10^9.
    return PrivacyLossDistribution(made._pmf_remove.to_dense_pmf(), made._pmf_add.to_dense_pmf())


def _grid(releases: tuple[Event, ...], step: float) -> float:
    """`step`, or less where losses are small, or more where their span is large; times a power of two, so that `_single` is used again.

    Rounding to multiples of h adds at most h^2 to the variance of each loss: a tenth of the losses' spread keeps that below a percent.
    Float64 adds a mass of about 1e-16 (highest loss) / h^2 to each release; where that comes to more than one for all, the bound is lost.
    """
    reach, drift, variance, count = 0.0, 0.0, 0.0, 0
    for release in releases:
        exponent = (10 + 0.5 / release.sigma) / release.sigma  # of the likelihood ratio where the tail is e^-50
        highest = exponent + math.log(release.rate) if exponent > 700 else math.log1p(release.rate * math.expm1(exponent))
        square = 1 / release.sigma / release.sigma
        spread = min(release.rate * math.sqrt(math.expm1(min(square, 700.0))), max(highest, 0.0))
        reach = max(reach, highest)
        drift += release.count * min(release.rate * square / 2, math.log1p(spread * spread))
        variance += release.count * spread * spread
        count += release.count
    span = max(reach / SPAN_ONE, (reach + drift + 10 * math.sqrt(variance)) / SPAN_ALL)
    wanted = max(min(step, math.sqrt(variance / count) / 10), span * step, 1e-8 * math.sqrt(reach * count))
    return float(step * 2.0 ** (math.floor(math.log2(wanted / step)) if wanted < step else math.ceil(math.log2(wanted / step))))


def _renyi(releases: tuple[Event, ...], delta: float) -> float:
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant()
    with _unheard():
        for release in releases:
            accountant.compose(PoissonSampledDpEvent(release.rate, GaussianDpEvent(release.sigma)), release.count)
        return float(accountant.get_epsilon(delta))


@contextmanager
def _unheard() -> Iterator[None]:
    """Without the warnings of orders that do not converge or lie at the end of the list: the other orders still give a bound."""

    def drop(record: logging.LogRecord) -> bool:
        return record.levelno > logging.WARNING

    logger = logging.getLogger("absl")
    logger.addFilter(drop)
    try:
        yield
    finally:
        logger.removeFilter(drop)


def _check_target(target: float) -> None:
    if not (math.isfinite(target) and target > 0):
        raise ValueError(f"epsilon={target}: needed is a positive number")


Cost = Callable[[Name, float, int], float]


def _most(
    cost: Cost, target: float, start: int, low: int, high: int, size: Callable[[int], float], step: float = FINE
) -> int | None:  # fmt: skip
    """Largest k of `low` to `high` whose cost at `step` is within `target`, None if `low` is not; `cost` rises in k.

    From the quick bound to the tight one, each beginning where the one before ended; `size(k)` is the change of k that doubles or halves
    what it stands for, or about that.
    """
    stages: tuple[tuple[Name, float, float], ...] = (("rdp", COARSE, 1.0), ("pld", COARSE, 0.1), ("pld", FINE, 2.5e-4))
    found: int | None = start
    for accountant, grid, share in stages[: 3 if step < COARSE else 2]:
        begin = low if found is None else found
        found = _last(partial(cost, accountant, grid), target, begin, max(1, int(share * size(begin))), low, high)
    return found


def _last(cost: Callable[[int], float], target: float, start: int, stride: int, low: int, high: int) -> int | None:
    """Largest k of `low` to `high` with `cost(k) <= target`, None if there is none; `cost` rises in k, and the answer is near `start`."""
    least = most = start
    below = above = cost(start)
    while below > target:  # downwards until one fits
        if least == low:
            return None
        most, above = least, below
        least, stride = max(low, least - stride), 2 * stride
        below = cost(least)
    while above <= target:  # upwards until one does not
        if most == high:
            return high
        least, below = most, above
        most, stride = min(high, most + stride), 2 * stride
        above = cost(most)
    slow = 0
    while most - least > 1:
        width = most - least
        share = 0.5 if slow > 1 or not math.isfinite(above) else (target - below) / (above - below)
        middle = min(max(least + math.floor(share * width), least + 1), most - 1)
        now = cost(middle)
        least, below, most, above = (middle, now, most, above) if now <= target else (least, below, middle, now)
        slow = slow + 1 if 2 * (most - least) > width else 0
    return least
