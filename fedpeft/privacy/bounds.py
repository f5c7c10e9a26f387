"""What scores of canaries prove about a mechanism: lower bounds of mu and epsilon, and one estimate that proves nothing.

A score is large where the canary was in. Every bound holds with probability 1 - significance, if the scores of a mechanism that keeps
its claim are as independent as the bound says. A lower bound above the claim refutes the claim; one below it proves nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import betaincinv, ndtr, ndtri
from scipy.stats import binom

from fedpeft.privacy.accountant import gaussian_epsilon

Numbers = NDArray[np.float64]
MOST = 30.0  # epsilon of the one-run bounds ends here: no run has the guesses to prove more


@dataclass(frozen=True)
class Guesses:
    """Of `canaries` that were each in with probability 1/2, `made` were guessed and `right` of the guesses are right; others abstained."""

    canaries: int
    made: int
    right: int

    def __post_init__(self) -> None:
        if not 0 <= self.right <= self.made <= self.canaries:
            raise ValueError(f"needed are right <= made <= canaries, got {self}")


# Gaussian differential privacy: mu is the distance of two normal distributions of spread 1


def gaussian_mu_of(epsilon: float, delta: float) -> float:
    """The mu whose Gaussian mechanism has exactly `epsilon` at `delta`."""
    return float(brentq(lambda mu: gaussian_epsilon(mu, delta) - epsilon, 1e-6, 10 + 2 * epsilon, xtol=1e-9)) if epsilon > 0 else 0.0


def share_at_least(hits: Numbers, trials: int, significance: float) -> Numbers:
    """Clopper and Pearson's (1934) lower end for each of `hits` of `trials`, one side at `significance`."""
    return np.where(hits > 0, betaincinv(np.maximum(hits, 1), trials - hits + 1, significance), 0.0)


def share_at_most(hits: Numbers, trials: int, significance: float) -> Numbers:
    """Their upper end."""
    return 1.0 - share_at_least(trials - hits, trials, significance)


def gaussian_mu(inside: Numbers, outside: Numbers, *, significance: float) -> float:
    """Lower bound of mu from the scores of canaries that were in and that were out, if those scores are independent.

    mu >= Phi^-1(TPR) - Phi^-1(FPR) at every threshold. The threshold is chosen on the even-numbered scores; the bound is that of the
    odd-numbered ones, which had no say in it, with half of `significance` for each of the two rates. Never below 0.
    """
    if min(len(inside), len(outside)) < 2:
        return 0.0
    thresholds = np.unique(np.concatenate([inside[::2], outside[::2]]))
    between = np.append(thresholds, np.inf)  # scores at least the threshold are guessed to be in
    best = between[int(np.argmax(_mu_at(between, inside[::2], outside[::2], significance)))]
    return max(0.0, float(_mu_at(np.array([best]), inside[1::2], outside[1::2], significance)[0]))


def _mu_at(thresholds: Numbers, inside: Numbers, outside: Numbers, significance: float) -> Numbers:
    true = share_at_least(_at_least(thresholds, inside), len(inside), significance / 2)
    false = share_at_most(_at_least(thresholds, outside), len(outside), significance / 2)
    low, high = ndtri(true), ndtri(false)
    return np.where((true > 0) & (false < 1), low - np.where(np.isfinite(high), high, 0.0), -np.inf)


def _at_least(thresholds: Numbers, scores: Numbers) -> Numbers:
    """How many of the scores reach each threshold."""
    return (len(scores) - np.searchsorted(np.sort(scores), thresholds, side="left")).astype(np.float64)


# One run, no assumption but that the coins of the canaries were fair


def guesses(inside: Numbers, outside: Numbers, *, most: int, least: int) -> Guesses:
    """The `most` highest scores guessed to be in, the `least` lowest to be out. Both numbers must be fixed before the scores are seen."""
    scores = np.concatenate([inside, outside])
    if most + least > len(scores):
        raise ValueError(f"{most} + {least} guesses of {len(scores)} canaries")
    there = np.concatenate([np.ones(len(inside), bool), np.zeros(len(outside), bool)])[np.argsort(scores, kind="stable")]
    return Guesses(len(scores), most + least, int(there[len(scores) - most :].sum() + (~there[:least]).sum()))


Refutes = Callable[[Guesses, float, float, float], bool]  # (found, epsilon, delta, significance) -> whether epsilon is refuted


def refuted(found: Guesses, epsilon: float, delta: float, significance: float) -> bool:
    """Whether an (epsilon, delta) mechanism, of any kind, lets so many guesses be right with less than probability `significance`.

    Steinke, Nasr, Jagielski, Privacy auditing with one (1) training run, NeurIPS 2023. https://arxiv.org/abs/2305.08846
    """
    n, right, q = found.made, found.right, 1 / (1 + np.exp(-epsilon))
    chance = float(binom.sf(right - 1, n, q))
    if delta and right:
        i = np.arange(1, right + 1)
        chance += 2 * found.canaries * delta * float(np.max((binom.sf(right - i - 1, n, q) - chance) / i))
    return chance < significance


def gaussian_refuted(found: Guesses, epsilon: float, delta: float, significance: float) -> bool:
    """`refuted` for a Gaussian mechanism: far sharper, as it uses the whole trade-off curve. All guesses must be "in".

    Mahloujifar, Melis, Chaudhuri, Auditing f-differential privacy in one run, 2024. https://arxiv.org/abs/2410.22235
    """
    n, right, mu = found.made, found.right, gaussian_mu_of(epsilon, delta)
    r, h = significance * right / found.canaries, significance * (n - right) / found.canaries
    for i in range(right - 1, -1, -1):
        above = max(h, float(ndtr(ndtri(r) - mu)))
        if above == h and i < right - 1:
            break
        r, h = min(1.0, r + i / (n - i) * (above - h)), above
    return r + h > n / found.canaries


def one_run(found: Guesses, *, delta: float, significance: float, refutes: Refutes = refuted) -> float:
    """Lower bound of epsilon from one run: the largest that is refuted, canaries of any dependence.

    Without delta, n guesses all right give ln(q / (1 - q)) with q = significance^(1 / n), the most that n guesses can prove.
    """
    low, high = 0.0, MOST
    if refutes(found, high, delta, significance):
        return high
    while high - low > 1e-7:
        middle = (low + high) / 2
        low, high = (middle, high) if refutes(found, middle, delta, significance) else (low, middle)
    return low


def over_hull(
    inside: Numbers, outside: Numbers, *, delta: float, significance: float, refutes: Refutes = refuted
) -> tuple[float, Guesses]:  # fmt: skip
    """The best `one_run` over the corners of the ROC's convex hull, each at `significance` over their number, as jax-privacy has it.

    To compare with published figures, not to claim anything: which thresholds are corners depends on who was in, so the division is no
    valid correction. A claim needs `guesses` of numbers fixed before.
    """
    corners = hull(inside, outside)
    each, best, by = significance / len(corners), 0.0, corners[0]
    for at in np.random.default_rng(0).permutation(len(corners)):  # shuffled, few are better than all before
        found = corners[at]
        if refutes(found, best, delta, each):
            best, by = one_run(found, delta=delta, significance=each, refutes=refutes), found
    return best, by


def hull(inside: Numbers, outside: Numbers) -> list[Guesses]:
    """The guesses "in" at every corner of the upper convex hull of the ROC, from the fewest to the most."""
    thresholds = np.unique(np.concatenate([inside, outside]))[::-1]
    points = np.stack([_at_least(thresholds, outside), _at_least(thresholds, inside)], 1)
    corners: list[Numbers] = [np.zeros(2)]
    for point in points:
        while len(corners) > 1 and _turn(corners[-2], corners[-1], point) >= 0:
            corners.pop()
        corners.append(point)
    return [Guesses(len(inside) + len(outside), int(f + t), int(t)) for f, t in corners]


def _turn(a: Numbers, b: Numbers, c: Numbers) -> float:
    return float((b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0]))


# One shot, an estimate


@dataclass(frozen=True)
class Estimate:
    """What a mechanism's mu seems to be."""

    mu: float
    error: float  # standard error of mu


def canary_estimate(cosines: Numbers, *, entries: int, releases: int = 1) -> Estimate:
    """mu from the cosines of canaries, all of them in, with what was released: an estimate, never a bound.

    `entries` are those of all `releases` together. Andrew et al., One-shot empirical privacy estimation for federated learning, ICLR 2024
    (https://arxiv.org/abs/2302.03098): canaries are random directions of norm clip. Out, a cosine is N(0, 1 / entries); in, its mean grows
    and its spread does not, so that mu is the mean times sqrt(entries). It is low where what the others sent, or the canaries themselves,
    is not small beside the noise: by sqrt(1 + canaries / (d sigma^2)) for the canaries, d the entries of one release.

    The error is that of a mean of as many scores, by their own spread, and of the canaries' products with each other: each pair's stands
    in two scores, which the spread counts as one; the rest is mu^2 / d of variance.
    """
    scores = cosines * np.sqrt(entries)
    mu = float(scores.mean())
    return Estimate(mu, float(np.sqrt(scores.var(ddof=1) / len(scores) + mu * mu * releases / entries)))
