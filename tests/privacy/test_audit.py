"""The audit catches every planted fault, and leaves the mechanism as claimed alone."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from fedpeft.privacy.audit import Check, Claim, Step, audit_mechanism, check_mechanism, core
from fedpeft.privacy.mechanism import add_noise, clip_each
from fedpeft.privacy.noise import Secret, SeededInsecure, Source
from fedpeft.tensors import Tensors

CLAIM = Claim(clip=0.5, noise_multiplier=5.0, expected=16.0, steps=50, delta=1e-5)  # mu 1.41, epsilon 6.573
FASTER = Claim(clip=0.5, noise_multiplier=1 / math.sqrt(2), expected=16.0, steps=1, delta=1e-5)  # the same in one step


def source(seed: int) -> Source:
    return SeededInsecure(torch.Generator().manual_seed(seed))


def less(factor: float) -> Callable[[Claim, Source, bool], Step]:
    """Noise that is too small."""
    return lambda claim, draws, noise: core(replace(claim, noise_multiplier=claim.noise_multiplier / factor), draws, noise=noise)


def none(claim: Claim, draws: Source, noise: bool) -> Step:
    return core(claim, draws, noise=False)


def made(claim: Claim, draws: Source, noise: bool, *, clip: Callable[[Tensors, float], object] = clip_each, realised: bool = False) -> Step:
    """`core` with a part of it exchanged."""

    def step(each: Tensors) -> Tensors:
        many = len(each["A"])
        clip(each, claim.clip)
        sums = {name: part.sum(0) for name, part in each.items()}
        add_noise(sums, claim.noise_multiplier * claim.clip if noise else 0.0, draws)
        return {name: total / (max(many, 1) if realised else claim.expected) for name, total in sums.items()}

    return step


def each_alone(each: Tensors, clip: float) -> None:
    for name, part in each.items():
        clip_each({name: part}, clip)


def not_of_a_nan(each: Tensors, clip: float) -> None:
    norms = torch.stack([part.square().sum(1) for part in each.values()]).sum(0).sqrt()
    for part in each.values():
        part.mul_((clip / norms).clamp(max=1.0).nan_to_num(1.0)[:, None])


def reused(claim: Claim, draws: Source, noise: bool) -> Step:
    """The same noise in every step, as of a generator that starts anew."""
    return lambda each: core(claim, source(0), noise=noise)(each)


def of_one_tensor(claim: Claim, draws: Source, noise: bool) -> Step:
    def step(each: Tensors) -> Tensors:
        bare, noised = core(claim, draws, noise=False), core(claim, draws, noise=noise)
        return bare({name: part.clone() for name, part in each.items()}) | {"A": noised(each)["A"]}

    return step


def twice(claim: Claim, draws: Source, noise: bool) -> Step:
    return lambda each: core(claim, draws, noise=noise)({name: torch.cat([part, part]) for name, part in each.items()})


def failed(plant: Callable[[Claim, Source, bool], Step], seed: int = 0) -> list[str]:
    draws = source(seed)
    checks = check_mechanism(plant(CLAIM, draws, True), plant(CLAIM, draws, False), CLAIM)
    return [check.name for check in checks if not check.holds]


CLIP, DENOMINATOR, LEVEL, FRESH = (
    "one contribution moves the sum by the clip at most", "the sum is divided by the expected batch, not the drawn",
    "an empty batch has all the noise", "no noise is used twice",
)  # fmt: skip


@pytest.mark.fast
@pytest.mark.parametrize("plant", [less(10.0), less(2.0), none, twice], ids=["noise/10", "noise/2", "no noise", "counted twice"])
def test_noise_that_is_too_small_is_caught_by_canaries(plant: Callable[[Claim, Source, bool], Step]) -> None:
    for seed in range(5):
        draws = source(seed)
        assert audit_mechanism(plant(FASTER, draws, True), FASTER, canaries=1000, coins=draws).caught


@pytest.mark.fast
def test_noise_over_the_root_of_two_is_caught_by_2000_canaries() -> None:
    caught = []
    for seed in range(20):
        draws = source(seed)
        caught.append(audit_mechanism(less(math.sqrt(2))(FASTER, draws, True), FASTER, canaries=2000, coins=draws).caught)
    assert sum(caught) >= 17  # 0.97 of 500 simulated ones


@pytest.mark.fast
def test_the_mechanism_as_claimed_is_not_flagged() -> None:
    for seed in range(25):
        draws = source(100 + seed)
        step = core(FASTER, draws)
        for size in (1.0, 1e4):
            verdict = audit_mechanism(step, FASTER, canaries=1000, coins=draws, size=size)
            assert not verdict.caught, (seed, verdict)
            assert 2.0 < verdict.lower < verdict.claim
        assert all(check.holds for check in check_mechanism(step, core(FASTER, draws, noise=False), FASTER)), seed


def test_fifty_steps_compose_to_the_claim() -> None:
    draws = source(0)
    verdict = audit_mechanism(core(CLAIM, draws), CLAIM, canaries=2000, coins=draws)
    assert verdict.claim == pytest.approx(6.573, abs=1e-3)
    assert 3.8 < verdict.lower < 6.573
    assert 1.0 < verdict.one_run < verdict.lower
    assert verdict.seconds > 0


@pytest.mark.fast
def test_a_missing_clip_is_caught_by_large_canaries_and_not_by_small_ones() -> None:
    draws = source(0)
    step = made(FASTER, draws, True, clip=lambda each, clip: None)
    assert audit_mechanism(step, FASTER, canaries=1000, coins=draws, size=1e4).caught
    assert not audit_mechanism(step, FASTER, canaries=1000, coins=draws, size=1.0).caught


@pytest.mark.fast
@pytest.mark.parametrize(
    ("plant", "want"),
    [
        (lambda claim, draws, noise: core(claim, draws, noise=noise), []),
        (less(10.0), [LEVEL]),
        (less(2.0), [LEVEL]),
        (less(math.sqrt(2)), [LEVEL]),
        (less(1.03), [LEVEL]),
        (less(0.9), [LEVEL]),
        (none, [LEVEL]),
        (lambda *how: made(*how, clip=lambda each, clip: None), [CLIP]),
        (lambda *how: made(*how, clip=each_alone), [CLIP, DENOMINATOR]),
        (lambda *how: made(*how, clip=not_of_a_nan), [CLIP]),
        (lambda *how: made(*how, realised=True), [CLIP, DENOMINATOR, LEVEL]),
        (reused, [FRESH]),
        (of_one_tensor, [LEVEL]),
        (twice, [CLIP, DENOMINATOR]),
    ],
    ids=["right", "noise/10", "noise/2", "noise/1.41", "noise/1.03", "noise/0.9", "no noise", "no clip", "clip by tensor", "nan passes",
         "drawn denominator", "noise reused", "noise in one tensor", "counted twice"],
)  # fmt: skip
def test_each_planted_fault_fails_its_check(plant: Callable[[Claim, Source, bool], Step], want: list[str]) -> None:
    found = failed(plant)
    assert set(want) <= set(found)
    assert bool(want) == bool(found)


@pytest.mark.fast
def test_secret_noise_and_coins_will_do() -> None:
    secret = Secret()
    checks = check_mechanism(core(CLAIM, secret), core(CLAIM, secret, noise=False), CLAIM)
    assert [check.name for check in checks] == [CLIP, DENOMINATOR, LEVEL, FRESH]
    assert all(isinstance(check, Check) and check.holds for check in checks)
    assert audit_mechanism(less(4.0)(FASTER, secret, True), FASTER, canaries=1000, coins=secret).caught


@pytest.mark.fast
def test_a_release_that_is_not_finite_stops_the_audit() -> None:
    def broken(each: Tensors) -> Tensors:
        return {name: torch.full(part.shape[1:], math.nan) for name, part in each.items()}

    with pytest.raises(ValueError, match="not finite"):
        audit_mechanism(broken, FASTER, canaries=100, coins=source(0))


@pytest.mark.fast
@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"noise_multiplier": 0.0}, "claims no privacy"),
        ({"clip": 0.0}, "needed are a clip"),
        ({"steps": 0}, "steps of at least 1"),
        ({"delta": 1.0}, r"delta in \(0, 1\)"),
    ],
)
def test_a_claim_that_is_none_is_refused(fields: dict[str, float], said: str) -> None:
    right = {"clip": 1.0, "noise_multiplier": 1.0, "expected": 1.0, "steps": 1, "delta": 1e-5}
    with pytest.raises(ValueError, match=said):
        Claim(**right | fields)  # type: ignore[arg-type]  # steps is whole where it is given
