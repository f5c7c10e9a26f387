"""The audit of the mechanism: canaries through the clip and the noise that private training uses, and what comes out against the claim.

A canary is a contribution along one direction of its own, in every step with probability 1/2 once for all. What is released along its
direction is its score; `bounds` turns scores into a lower bound of epsilon, which a mechanism that keeps its claim exceeds with
probability `significance` at most. Faults that scores show badly are checked directly, at zero noise.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedpeft.privacy.accountant import gaussian_epsilon
from fedpeft.privacy.bounds import Numbers, gaussian_mu, guesses, one_run
from fedpeft.privacy.mechanism import add_noise, clip_each
from fedpeft.privacy.noise import Source
from fedpeft.tensors import Tensors, norm

Step = Callable[[Tensors], Tensors]  # contributions, each tensor (N, ...), which it may overwrite -> what is released
GUESSED = 20  # one in so many canaries is guessed to be in, and as many out; tried at m = 500 and 2000, mu = 1.41
EXACT = 1e-4  # relative; sums of float32
DEVIATIONS = 5.5  # of a normal number, which an honest one exceeds once in 26 million


@dataclass(frozen=True)
class Claim:
    """What a mechanism says of itself: `steps` sums over all examples, of contributions of norm `clip` at most."""

    clip: float
    noise_multiplier: float  # standard deviation of a sum's noise over `clip`
    expected: float  # contributions that a sum is divided by
    steps: int
    delta: float

    def __post_init__(self) -> None:
        if not (self.clip > 0 and self.expected > 0 and self.steps >= 1 and 0 < self.delta < 1):
            raise ValueError(f"needed are a clip and an expected batch above 0, steps of at least 1, and delta in (0, 1); got {self}")
        if not self.noise_multiplier > 0:
            raise ValueError(f"noise_multiplier={self.noise_multiplier} claims no privacy: there is nothing to audit")

    @property
    def epsilon(self) -> float:
        """Of the Gaussian mechanism, exact: every example is in every step."""
        return gaussian_epsilon(math.sqrt(self.steps) / self.noise_multiplier, self.delta)


@dataclass(frozen=True)
class Verdict:
    """What `canaries` of norm `size` times the clip proved."""

    canaries: int
    size: float
    claim: float  # epsilon
    lower: float  # epsilon, if the scores are independent (Gaussian, split threshold)
    one_run: float  # epsilon, whatever the mechanism (Steinke et al.)
    seconds: float

    @property
    def caught(self) -> bool:
        """True if the claim is refuted. False proves nothing."""
        return max(self.lower, self.one_run) > self.claim


@dataclass(frozen=True)
class Check:
    """One property that a mechanism must have whatever its epsilon."""

    name: str
    holds: bool
    found: str


def core(claim: Claim, source: Source, *, noise: bool = True) -> Step:
    """One step of private training as `claim` has it, from the clip and the noise that all private training goes through."""

    def step(each: Tensors) -> Tensors:
        clip_each(each, claim.clip)
        sums = {name: part.sum(0) for name, part in each.items()}
        add_noise(sums, claim.noise_multiplier * claim.clip if noise else 0.0, source)
        return {name: total / claim.expected for name, total in sums.items()}

    return step


def audit_mechanism(step: Step, claim: Claim, *, canaries: int, coins: Source, size: float = 1.0, significance: float = 0.05) -> Verdict:
    """Puts canaries of norm `size` times the clip through `claim.steps` steps; `coins` decides which are in.

    Half of `significance` goes to each of the two bounds. They are cautious: of 2000 simulated verdicts on a right mechanism (m = 2000,
    mu = 1.41) one was wrong.
    """
    began = time.perf_counter()
    there = coins.uniform(canaries) < 0.5
    scores = torch.zeros(canaries, dtype=torch.float64)
    for _ in range(claim.steps):
        release = step(_canaries(there, size * claim.clip))
        scores += torch.cat([release["A"], release["B"]]).double()
    if not scores.isfinite().all():
        raise ValueError("the mechanism released what is not finite; one such contribution tells everyone that it was there")
    inside, outside = _numbers(scores[there]), _numbers(scores[~there])
    lower = gaussian_epsilon(gaussian_mu(inside, outside, significance=significance / 2), claim.delta)
    some = guesses(inside, outside, most=canaries // GUESSED, least=canaries // GUESSED)
    proven = one_run(some, delta=claim.delta, significance=significance / 2)
    return Verdict(canaries, size, claim.epsilon, lower, proven, time.perf_counter() - began)


def check_mechanism(step: Step, bare: Step, claim: Claim) -> list[Check]:
    """What must hold of `step`, and of `bare`, which is `step` without its noise."""
    return [_sensitivity(bare, claim), _denominator(bare, claim), _level(step, claim), _fresh(step)]


def _sensitivity(bare: Step, claim: Claim) -> Check:
    """One contribution more, of any kind, beside any others."""
    worst = 0.0
    for others in (0, 1, 7):
        beside = _spread(others, claim.clip)
        for factor in (1e-3, 1.0, 1e4, math.inf, math.nan):
            for kept in (("A", "B"), ("A",), ("B",)):
                one = {name: part * factor if name in kept else torch.zeros_like(part) for name, part in _spread(1, claim.clip).items()}
                more = {name: torch.cat([beside[name], one[name]]) for name in one}
                with_it, without = bare(more), bare({name: part.clone() for name, part in beside.items()})
                moved = norm({name: with_it[name].double() - without[name].double() for name in with_it}) * claim.expected / claim.clip
                worst = max(worst, moved) if math.isfinite(moved) else math.inf
    return Check("one contribution moves the sum by the clip at most", worst <= 1 + EXACT, f"{worst:.4f} clips")


def _denominator(bare: Step, claim: Claim) -> Check:
    """Sums grow with the batch: what they are divided by does not."""
    found = {}
    for many in (1, 2, 8):
        alike = {name: part.expand(many, -1).clone() for name, part in _spread(1, claim.clip).items()}
        found[many] = norm(bare(alike)) * claim.expected / claim.clip
    holds = all(abs(size - many) <= EXACT * many for many, size in found.items())
    return Check("the sum is divided by the expected batch, not the drawn", holds, ", ".join(f"{n} give {s:.3f}" for n, s in found.items()))


def _level(step: Step, claim: Claim) -> Check:
    """An empty batch is all noise, in every tensor."""
    release = step(_spread(0, claim.clip, entries=100_000))
    levels = [float(part.double().square().mean().sqrt()) * claim.expected / claim.clip for part in release.values()]
    off = max(abs(level / claim.noise_multiplier - 1) * math.sqrt(2 * 100_000) for level in levels)
    said = " and ".join(f"{level:.4g}" for level in levels)
    return Check("an empty batch has all the noise", off <= DEVIATIONS, f"{said} clips, claimed {claim.noise_multiplier:.4g}")


def _fresh(step: Step) -> Check:
    """No noise is used twice, neither in two steps nor in two tensors."""
    first, second = (step(_spread(0, 1.0, entries=100_000)) for _ in range(2))
    pairs = [(first["A"], second["A"]), (first["B"], second["B"]), (first["A"], first["B"]), (first["A"], second["B"])]
    most = max(abs(float(torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=0))) for a, b in pairs)
    return Check("no noise is used twice", most <= DEVIATIONS / math.sqrt(100_000), f"largest correlation {most:.4f}")


def _canaries(there: Tensor, size: float) -> Tensors:
    """(N, entries) contributions, one for each canary that is in: `size` in the canary's entry; half of the entries lie in each tensor."""
    which = there.nonzero()[:, 0]
    whole = torch.zeros(len(which), len(there))
    whole[torch.arange(len(which)), which] = size
    half = len(there) // 2
    return {"A": whole[:, :half], "B": whole[:, half:]}


def _spread(many: int, size: float, entries: int = 64) -> Tensors:
    """(many, entries) contributions that have norm `size` in each tensor by itself, so more than that together, all equal."""
    return {name: torch.full((many, entries), size / math.sqrt(entries)) for name in ("A", "B")}


def _numbers(scores: Tensor) -> Numbers:
    made: Numbers = scores.numpy().astype(np.float64)
    return made
