"""Epsilon is the number in the table, a bound in every corner, and what is solved for keeps its target."""

import logging
import math
import warnings

import dp_accounting
import pytest
from dp_accounting.pld import PLDAccountant

from fedpeft.privacy.accountant import (
    COARSE,
    Event,
    count_for,
    delta_of,
    epsilon,
    gaussian_delta,
    gaussian_epsilon,
    noise_for,
    rate_for,
)

# q, sigma, releases, delta: opacus RDP, opacus PRV, RDP and PLD of dp-accounting, of the design notes' section 3
TABLE = [
    (0.01, 1.0, 1000, 1e-5, 2.1014, 1.8384, 2.1014, 1.8282),
    (0.01, 1.0, 5000, 1e-5, 4.5890, 4.2121, 4.5890, 4.2019),
    (0.01, 0.6, 1000, 1e-5, 8.6659, 7.4442, 8.6804, 7.4336),
    (0.05, 1.0, 200, 1e-5, 5.3676, 4.7762, 5.3679, 4.7659),
    (0.004, 0.8, 1500, 1e-5, 2.0640, 1.4960, 2.0640, 1.4858),
    (0.1, 2.0, 100, 1e-5, 2.5806, 2.3476, 2.5806, 2.3374),
    (1.0, 5.0, 50, 1e-5, 7.0774, 6.5833, 7.0774, 6.5730),
    (1.0, 1.0, 1, 1e-5, 4.7285, 4.3874, 4.7285, 4.3772),
    (1.0, 10.0, 100, 1e-5, 4.7285, 4.3874, 4.7285, 4.3772),
    (0.1, 1.0, 100, 1e-3, 5.6405, 4.7949, 5.6551, 4.7844),
    (0.25, 4.0, 200, 1e-4, 3.7633, 3.4185, 3.7634, 3.4082),
    (0.02, 1.0, 20, 1e-5, 1.4222, 0.9074, 1.4222, 0.8972),
]
# epsilon, q, releases, delta: the noise that dp-accounting's own search over PLD finds
CALIBRATED = [
    (1, 0.01, 1000, 1e-5, 1.4156),
    (3, 0.01, 1000, 1e-5, 0.8145),
    (8, 0.01, 1000, 1e-5, 0.5863),
    (8, 0.1, 100, 1e-4, 0.8617),
    (1, 0.004, 1500, 1e-5, 0.9183),
    (10, 1.0, 50, 1e-5, 3.5349),
]
ROW = pytest.mark.parametrize(("q", "sigma", "count", "delta", "opacus_rdp", "opacus_prv", "rdp", "pld"), TABLE)


@ROW
def test_pld_and_rdp_are_the_table(q, sigma, count, delta, opacus_rdp, opacus_prv, rdp, pld) -> None:
    events = [Event(sigma, q, count)]
    assert epsilon(events, delta) == pytest.approx(pld, abs=1e-3)
    assert epsilon(events, delta, accountant="rdp") == pytest.approx(rdp, abs=1e-3)
    assert epsilon(events, delta) <= epsilon(events, delta, step=COARSE) <= epsilon(events, delta) + 2.2e-3


@ROW
def test_opacus_agrees(q, sigma, count, delta, opacus_rdp, opacus_prv, rdp, pld) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from opacus.accountants import PRVAccountant, RDPAccountant

        for kind, low, known, ours in ((RDPAccountant, -0.02, opacus_rdp, "rdp"), (PRVAccountant, 0.0, opacus_prv, "pld")):
            theirs = kind()
            theirs.history = [(sigma, q, count)]
            assert theirs.get_epsilon(delta) == pytest.approx(known, abs=1e-3)
            assert low < known - epsilon([Event(sigma, q, count)], delta, accountant=ours) < 0.02


@pytest.mark.fast
def test_a_gaussian_over_everybody_is_exact() -> None:
    assert gaussian_epsilon(1, 1e-5) == pytest.approx(4.3772, abs=5e-5)
    assert gaussian_epsilon(math.sqrt(2), 1e-5) == pytest.approx(6.573, abs=5e-4)
    assert epsilon([Event(5.0, 1.0, 50)], 1e-5) == pytest.approx(gaussian_epsilon(math.sqrt(2), 1e-5), rel=1e-9)
    assert gaussian_delta(1, 0) == pytest.approx(math.erf(0.5 / math.sqrt(2)), rel=1e-12)  # total variation
    for mu, delta in ((0.01, 1e-5), (0.3, 1e-10), (1, 1e-5), (10, 1e-3), (1000, 1e-5)):
        found = gaussian_epsilon(mu, delta)
        assert delta * (1 - 1e-6) < gaussian_delta(mu, found) <= delta
    assert gaussian_delta(0, 0) == gaussian_epsilon(0, 1e-5) == gaussian_epsilon(1e-9, 1e-5) == 0
    assert gaussian_delta(math.inf, 5) == 1
    assert gaussian_epsilon(math.inf, 1e-5) == math.inf


@pytest.mark.fast
def test_the_exact_answer_is_what_pld_closes_in_on_from_above() -> None:
    theirs = PLDAccountant(value_discretization_interval=1e-3)
    theirs.compose(dp_accounting.GaussianDpEvent(1.5), 3)
    assert 0 <= theirs.get_epsilon(1e-5) - epsilon([Event(1.5, 1.0, 3)], 1e-5) < 1e-3


@pytest.mark.fast
def test_epsilon_rises_with_count_and_rate_and_falls_with_noise_and_delta() -> None:
    def cost(sigma: float = 1.0, rate: float = 0.02, count: int = 200, delta: float = 1e-5) -> float:
        return epsilon([Event(sigma, rate, count)], delta, step=COARSE)

    for field, rising in (
        ("count", (1, 2, 10, 100, 1000, 10_000)), ("rate", (1e-4, 1e-3, 0.02, 0.3, 0.99, 1.0)),
        ("sigma", (20.0, 5.0, 1.0, 0.6, 0.4)), ("delta", (1e-2, 1e-4, 1e-6, 1e-9)),
    ):  # fmt: skip
        found = [cost(**{field: value}) for value in rising]
        assert found == sorted(found), field
        assert len(set(found)) == len(found), field


@pytest.mark.fast
def test_events_compose_in_any_order_and_ten_of_one_are_one_of_ten() -> None:
    events = [Event(1.0, 0.05, 7), Event(3.0, 1.0, 2), Event(0.8, 0.01, 30), Event(1.0, 0.05, 3)]
    whole = epsilon(events, 1e-5, step=COARSE)
    assert epsilon(events[::-1], 1e-5, step=COARSE) == whole
    assert epsilon([Event(1.0, 0.05, 1)] * 10 + events[1:3], 1e-5, step=COARSE) == whole
    assert epsilon([*events, Event(0.0, 0.0, 5), Event(0.0, 0.5, 0)], 1e-5, step=COARSE) == whole
    assert max(epsilon([event], 1e-5, step=COARSE) for event in events) < whole
    assert whole < sum(epsilon([event], 1e-5, step=COARSE) for event in events)


@pytest.mark.fast
def test_two_gaussians_of_different_noise_are_one_whose_mu_adds_in_squares() -> None:
    one = gaussian_epsilon(math.sqrt(1 / 1.5**2 + 1 / 4**2), 1e-6)
    assert epsilon([Event(1.5), Event(4.0)], 1e-6) == pytest.approx(one, rel=1e-9)
    nothing = Event(1000.0, 1e-4, 1)  # sends both through PLD
    assert 0 <= epsilon([Event(1.5), Event(4.0), nothing], 1e-6, step=COARSE) - one < 1e-3


@pytest.mark.fast
def test_other_noise_in_other_events_is_what_dp_accounting_composes() -> None:
    events = [Event(1.0, 0.05, 20), Event(2.0, 1.0, 3), Event(0.7, 0.01, 50)]
    theirs = PLDAccountant(value_discretization_interval=1e-3)
    for event in events:
        theirs.compose(dp_accounting.PoissonSampledDpEvent(event.rate, dp_accounting.GaussianDpEvent(event.sigma)), event.count)
    assert epsilon(events, 1e-5, step=COARSE) == pytest.approx(theirs.get_epsilon(1e-5), abs=1e-4)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("sigma", "rate", "count"),
    [(20.0, 1e-3, 10**6), (10.0, 1e-5, 10**5), (50.0, 1e-3, 1000), (100.0, 0.01, 10**4), (1.0, 1e-3, 10**7), (0.3, 0.01, 10**4),
     (0.1, 0.1, 10), (0.05, 0.5, 10), (1.0, 0.999, 100), (0.5, 0.5, 1)],
)  # fmt: skip
def test_pld_is_below_rdp_where_losses_are_tiny_or_huge_against_the_step(sigma: float, rate: float, count: int) -> None:
    events = [Event(sigma, rate, count)]
    assert 0 < epsilon(events, 1e-5, step=COARSE) <= epsilon(events, 1e-5, accountant="rdp")


@pytest.mark.fast
@pytest.mark.parametrize(
    "events",
    [[Event(1e-5), Event(1.0, 0.1, 10)], [Event(1e-9, 0.5)], [Event(1e100, 0.1, 10)], [Event(1e300, 1.0, 10**9)], [Event(1.0, 1e-300, 5)],
     [Event(1e6, 1e-9)], [Event(1.0, 1e-6, 10**9)], [Event(0.5, 1.0, 10**9)]],
)  # fmt: skip
def test_the_ends_of_float64_give_bounds_and_no_errors(events: list[Event]) -> None:
    found = epsilon(events, 1e-5, step=COARSE)
    assert 0 <= found < math.inf
    assert found >= max(epsilon([event], 1e-5, accountant="rdp", step=COARSE) for event in events) / 2 or found < 1


@pytest.mark.fast
def test_no_release_costs_nothing_and_one_without_noise_everything() -> None:
    for accountant in ("pld", "rdp"):
        assert epsilon([], 1e-5, accountant=accountant) == epsilon([Event(1.0, 0.5, 0)], 1e-5, accountant=accountant) == 0.0
        assert epsilon([Event(0.0)], 1e-5, accountant=accountant) == epsilon([Event(0.0, 0.1)], 1e-5, accountant=accountant) == math.inf
        assert epsilon([Event(1e-200)], 1e-5, accountant=accountant) == math.inf
    assert delta_of([], 1.0) == 0.0
    assert delta_of([Event(2.0), Event(0.0)], 1.0) == 1.0


@pytest.mark.fast
def test_delta_is_the_inverse_of_epsilon() -> None:
    assert delta_of([Event(1.0)], epsilon([Event(1.0)], 1e-5)) == pytest.approx(1e-5, rel=1e-6)
    events = [Event(1.0, 0.05, 20)]
    assert delta_of(events, epsilon(events, 1e-5)) == pytest.approx(1e-5, rel=1e-6)
    assert delta_of(events, 0.5) > delta_of(events, 1.0) > 0


@pytest.mark.fast
def test_the_warnings_of_dp_accounting_reach_nobody(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    epsilon([Event(1.0, 0.11, 100)], 1e-3, accountant="rdp")  # a rate where fractional orders fail to converge
    assert capfd.readouterr().err == ""
    assert caplog.records == []
    assert logging.getLogger("absl").filters == []


@pytest.mark.parametrize(("target", "q", "count", "delta", "sigma"), CALIBRATED)
def test_the_noise_for_a_target_is_the_known_one_and_never_overshoots(target, q, count, delta, sigma) -> None:
    found = noise_for(target, delta, lambda noise: [Event(noise, q, count)])
    assert found == pytest.approx(sigma, abs=2e-3)
    assert epsilon([Event(found, q, count)], delta) <= target


@pytest.mark.parametrize(("target", "q", "count"), [(2.0, 0.1, 1000), (0.5, 0.01, 1000), (10.0, 1.0, 50)])
def test_less_noise_than_the_one_found_exceeds(target: float, q: float, count: int) -> None:
    found = noise_for(target, 1e-5, lambda noise: [Event(noise, q, count)])
    assert epsilon([Event(found, q, count)], 1e-5) <= target < epsilon([Event(found * 0.999, q, count)], 1e-5)


@pytest.mark.fast
def test_noise_beside_other_releases() -> None:
    found = noise_for(5.0, 1e-5, lambda sigma: [Event(sigma, 1.0, 10), Event(2.0)])
    assert 1 / found**2 * 10 + 1 / 4 == pytest.approx(1 / noise_for(5.0, 1e-5, lambda sigma: [Event(sigma)]) ** 2, rel=2e-3)
    with pytest.raises(ValueError, match=r"epsilon=4 .* no noise reaches it; with .* still cost 4\.377\. What is released beside"):
        noise_for(4, 1e-5, lambda sigma: [Event(sigma), Event(1.0)])


@pytest.mark.parametrize(
    ("target", "sigma", "rate"), [(3.0, 2.0, 0.01), (2.0, 1.0, 0.1), (8.0, 1.0, 1.0), (1.0, 5.0, 1.0), (1.0, 0.6, 0.01), (4.0, 0.0, 0.5)]
)
def test_one_release_more_than_the_count_exceeds(target: float, sigma: float, rate: float) -> None:
    found = count_for(target, 1e-5, sigma, rate)
    assert epsilon([Event(sigma, rate, found)], 1e-5) <= target < epsilon([Event(sigma, rate, found + 1)], 1e-5)


@pytest.mark.fast
def test_a_count_has_an_end() -> None:
    assert count_for(5, 1e-5, 1e5, 1.0) == count_for(5, 1e-5, 1.0, 0.0) == 10**6


@pytest.mark.parametrize(("target", "sigma", "count"), [(1.0, 5.0, 100)])
def test_a_larger_rate_than_the_one_found_exceeds(target: float, sigma: float, count: int) -> None:
    found = rate_for(target, 1e-5, sigma, count)
    assert epsilon([Event(sigma, found, count)], 1e-5) <= target < epsilon([Event(sigma, found * 1.001, count)], 1e-5)
    assert count <= count_for(target, 1e-5, sigma, found) <= count * 1.01


@pytest.mark.fast
def test_the_ends_of_a_rate() -> None:
    assert rate_for(8, 1e-5, 1.0, 1) == 1.0
    assert rate_for(8, 1e-5, 0.0, 1) == 0.0


@pytest.mark.fast
@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: Event(-1.0), "sigma=-1.0: needed is a finite number of at least 0"),
        (lambda: Event(math.nan), "sigma=nan: needed"),
        (lambda: Event(math.inf), "sigma=inf: needed is a finite"),
        (lambda: Event(1.0, 1.5), "rate=1.5: needed is a number from 0 to 1"),
        (lambda: Event(1.0, math.nan), "rate=nan: needed"),
        (lambda: Event(1.0, 0.5, -1), "count=-1: needed is a whole number"),
        (lambda: Event(1.0, 0.5, 2.5), "count=2.5: needed is a whole number"),
        (lambda: epsilon([], 0.0), "delta=0.0: needed is a number from 1e-12 to below 1"),
        (lambda: epsilon([], 1.0), "delta=1.0: needed"),
        (lambda: epsilon([], math.nan), "delta=nan: needed"),
        (lambda: epsilon([], 1e-5, accountant="gdp"), "accountant='gdp': needed is pld or rdp; GDP is no bound"),
        (lambda: epsilon([], 1e-5, step=0.0), "step=0.0: needed is a positive number"),
        (lambda: delta_of([], -1.0), "epsilon=-1.0: needed"),
        (lambda: noise_for(0.0, 1e-5, lambda sigma: [Event(sigma)]), "epsilon=0.0: needed is a positive number"),
        (lambda: noise_for(1.0, 0.0, lambda sigma: [Event(sigma)]), "delta=0.0: needed"),
        (lambda: count_for(math.inf, 1e-5, 1.0, 0.5), "epsilon=inf: needed"),
        (lambda: count_for(1.0, 1e-5, -1.0, 0.5), "sigma=-1.0: needed"),
        (lambda: rate_for(1.0, 1e-5, 1.0, -3), "count=-3: needed"),
        (lambda: gaussian_delta(-1.0, 0.0), "mu=-1.0, epsilon=0.0: needed"),
        (lambda: gaussian_epsilon(1.0, 1.0), "delta=1.0: needed"),
    ],
)
def test_bad_input_is_said(call, said: str) -> None:
    with pytest.raises(ValueError, match=said.replace(".", r"\.")):
        call()
