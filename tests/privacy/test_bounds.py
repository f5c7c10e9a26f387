"""What scores prove: golden values, closed forms, and bounds that a mechanism as claimed does not exceed."""

import math

import numpy as np
import pytest
from scipy.special import ndtri
from scipy.stats import beta

from fedpeft.privacy.accountant import gaussian_epsilon
from fedpeft.privacy.bounds import (
    Guesses,
    canary_estimate,
    gaussian_mu,
    gaussian_mu_of,
    gaussian_refuted,
    guesses,
    hull,
    one_run,
    over_hull,
    refuted,
    share_at_least,
    share_at_most,
)

MU = math.sqrt(2)  # 50 steps at noise 5: epsilon 6.573 at delta 1e-5


def drawn(canaries: int, mu: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Scores of the canaries of an exact Gaussian mechanism that were in, and of those that were out."""
    there = rng.random(canaries) < 0.5
    scores = rng.normal(size=canaries) + mu * there
    return scores[there], scores[~there]


def quantiles(mu: float) -> tuple[np.ndarray, np.ndarray]:
    outside = ndtri((np.arange(10_000) + 0.5) / 10_000)
    return outside + mu, outside


@pytest.mark.fast
@pytest.mark.parametrize(("hits", "trials"), [(0, 20), (1, 20), (7, 20), (20, 20)])
def test_shares_are_those_of_clopper_and_pearson(hits: int, trials: int) -> None:
    low, high = share_at_least(np.array([hits]), trials, 0.05)[0], share_at_most(np.array([hits]), trials, 0.05)[0]
    assert low == pytest.approx(0.0 if hits == 0 else beta.ppf(0.05, hits, trials - hits + 1), abs=1e-12)
    assert high == pytest.approx(1.0 if hits == trials else beta.ppf(0.95, hits + 1, trials - hits), abs=1e-12)


@pytest.mark.fast
def test_all_of_n_hits_prove_a_share_of_the_nth_root_of_the_significance() -> None:
    assert share_at_least(np.array([30]), 30, 0.05)[0] == pytest.approx(0.05 ** (1 / 30))


@pytest.mark.fast
def test_mu_and_epsilon_are_each_others_inverse() -> None:
    assert gaussian_mu_of(gaussian_epsilon(MU, 1e-5), 1e-5) == pytest.approx(MU, abs=1e-6)
    assert gaussian_mu_of(0.0, 1e-5) == 0.0


@pytest.mark.fast
@pytest.mark.parametrize(("canaries", "want"), [(500, 3.71), (2000, 4.93), (5000, 5.48)])
def test_the_gaussian_bound_has_the_size_that_was_measured_before(canaries: int, want: float) -> None:
    rng = np.random.default_rng(0)
    found = [gaussian_epsilon(gaussian_mu(*drawn(canaries, MU, rng), significance=0.05), 1e-5) for _ in range(60)]
    assert np.mean(found) == pytest.approx(want, abs=0.25)


@pytest.mark.fast
def test_the_gaussian_bound_of_a_mechanism_as_claimed_exceeds_it_less_often_than_its_significance() -> None:
    rng = np.random.default_rng(1)
    found = [gaussian_mu(*drawn(500, MU, rng), significance=0.05) for _ in range(400)]
    assert np.mean(np.array(found) > MU) < 0.05
    assert np.mean(found) > 0.8


@pytest.mark.fast
def test_scores_that_tell_nothing_prove_nothing() -> None:
    rng = np.random.default_rng(2)
    assert max(gaussian_mu(*drawn(300, 0.0, rng), significance=0.05) for _ in range(50)) < 0.35
    assert gaussian_mu(np.ones(50), np.ones(50), significance=0.05) == 0.0
    assert gaussian_mu(np.ones(1), np.zeros(500), significance=0.05) == 0.0


@pytest.mark.fast
def test_scores_that_tell_all_prove_what_their_number_allows() -> None:
    share = 0.025 ** (1 / 500)  # 500 on each side vote, each side at half the significance
    assert gaussian_mu(np.ones(1000), np.zeros(1000), significance=0.05) == pytest.approx(2 * ndtri(share))


@pytest.mark.fast
@pytest.mark.parametrize(("n", "want"), [(50, 2.7847), (100, 3.4930), (1000, 5.8091)])
def test_guesses_that_are_all_right_prove_the_closed_form_and_no_more(n: int, want: float) -> None:
    assert one_run(Guesses(n, n, n), delta=0.0, significance=0.05) == pytest.approx(want, abs=5e-5)
    q = 0.05 ** (1 / n)
    assert one_run(Guesses(n, n, n), delta=0.0, significance=0.05) == pytest.approx(math.log(q / (1 - q)), abs=1e-6)


@pytest.mark.fast
def test_half_of_the_guesses_right_prove_nothing() -> None:
    assert one_run(Guesses(1000, 200, 100), delta=1e-6, significance=0.05) == 0.0
    assert one_run(Guesses(1000, 0, 0), delta=1e-6, significance=0.05) == 0.0
    assert one_run(Guesses(1000, 200, 100), delta=1e-6, significance=0.05, refutes=gaussian_refuted) < 1e-3


@pytest.mark.parametrize(
    ("mu", "corners", "want", "best", "gaussian"),
    [
        (1, 386, 1.13346, (2807, 569), 2.164749),
        (2, 374, 2.311945, (4499, 167), 4.7218075),
        (4, 140, 4.395568, (8223, 10), 9.133752),
    ],
)
def test_golden_values_of_jax_privacy(mu: float, corners: int, want: float, best: tuple[int, int], gaussian: float) -> None:
    """tests/auditing_test.py there; the corners and the best threshold are our own, derived twice."""
    inside, outside = quantiles(mu)
    assert len(hull(inside, outside)) == corners
    found, by = over_hull(inside, outside, delta=1e-6, significance=0.05)
    assert found == pytest.approx(want, abs=1e-5)
    assert (by.right, by.made - by.right) == best
    sharper, _ = over_hull(inside, outside, delta=1e-6, significance=0.05, refutes=gaussian_refuted)
    assert sharper == pytest.approx(gaussian, abs=1e-5)


@pytest.mark.fast
def test_a_bound_is_where_refuting_ends() -> None:
    found = Guesses(20_000, 3376, 2807)
    end = one_run(found, delta=1e-6, significance=1e-3)
    assert refuted(found, end - 1e-4, 1e-6, 1e-3)
    assert not refuted(found, end + 1e-4, 1e-6, 1e-3)


@pytest.mark.fast
def test_the_best_and_the_worst_scores_are_guessed() -> None:
    inside, outside = np.array([9.0, 8.0, 1.0]), np.array([7.0, 2.0, 0.0])
    assert guesses(inside, outside, most=3, least=0) == Guesses(6, 3, 2)
    assert guesses(inside, outside, most=2, least=2) == Guesses(6, 4, 3)
    with pytest.raises(ValueError, match=r"5 \+ 2 guesses of 6"):
        guesses(inside, outside, most=5, least=2)
    with pytest.raises(ValueError, match="right <= made"):
        Guesses(5, 3, 4)


@pytest.mark.fast
def test_one_run_with_numbers_fixed_before_stays_below_the_truth() -> None:
    rng = np.random.default_rng(3)
    some = [guesses(*drawn(500, MU, rng), most=25, least=25) for _ in range(60)]
    bounds = [one_run(found, delta=1e-5, significance=0.05) for found in some]
    assert np.mean(bounds) == pytest.approx(2.0, abs=0.25)  # 2.07 when it was measured before, by an implementation of its own
    assert max(bounds) < 6.573


def cosines(canaries: np.ndarray, release: np.ndarray) -> np.ndarray:
    return canaries @ release / (np.linalg.norm(canaries, axis=1) * np.linalg.norm(release))


@pytest.mark.fast
@pytest.mark.parametrize(("clients", "size", "noise", "low", "high"), [(200, 5000, 1.0, 1.2, 1.6), (200, 5000, 0.5, 2.3, 2.75)])
def test_client_canaries_estimate_mu(clients: int, size: int, noise: float, low: float, high: float) -> None:
    rng = np.random.default_rng(4)
    canaries = rng.normal(size=(clients, size))
    canaries /= np.linalg.norm(canaries, axis=1, keepdims=True)
    release = canaries.sum(0) + noise / MU * rng.normal(size=size)
    found = canary_estimate(cosines(canaries, release), entries=size)
    assert low < found.mu < high


@pytest.mark.fast
def test_client_canaries_that_were_left_out_have_a_mu_of_about_zero() -> None:
    rng = np.random.default_rng(5)
    found = canary_estimate(cosines(rng.normal(size=(100, 2000)), rng.normal(size=2000)), entries=2000)
    assert abs(found.mu) < 4 * found.error
    assert found.error == pytest.approx(0.1, rel=0.3)  # of 100 standard normal numbers


@pytest.mark.fast
@pytest.mark.parametrize("noise", [0.3, 1.0])
def test_the_error_of_the_estimate_is_its_spread(noise: float) -> None:
    rng, size, rounds = np.random.default_rng(6), 800, 3
    found = []
    for _ in range(60):
        canaries = rng.normal(size=(20, size))
        canaries /= np.linalg.norm(canaries, axis=1, keepdims=True)
        releases = np.concatenate([canaries.sum(0) + noise * rng.normal(size=size) for _ in range(rounds)])
        found.append(canary_estimate(cosines(np.tile(canaries, rounds), releases), entries=rounds * size, releases=rounds))
    each = [one.mu for one in found]
    assert np.std(each) == pytest.approx(np.mean([one.error for one in found]), rel=0.35)
    low = rounds**0.5 / noise / (1 + 20 / (noise**2 * size)) ** 0.5  # what the canaries themselves add to the noise
    assert np.mean(each) == pytest.approx(low, rel=0.05)
