"""Terms keep their budget, and settings that hide nobody are refused."""

import pytest

from fedpeft.config import ConfigError, build, load
from fedpeft.privacy.accountant import Event, epsilon
from fedpeft.privacy.statement import Spent, statement
from fedpeft.privacy.unit import Client, Example, client_terms, example_terms, sum_noise

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("examples", [17, 143, 1008])
def test_an_examples_noise_keeps_the_budget_to_the_last_round(examples: int) -> None:
    terms = example_terms(Example(epsilon=4.0), examples=examples, batch=16, steps=5, rounds=10)
    assert terms.rate == min(1.0, 16 / examples)
    spent = epsilon([Event(terms.sigma, terms.rate, 50)], terms.delta)
    assert 3.5 < spent <= 4.0  # not far below: for 17 examples the size is rounded by nothing, for 1008 by under a percent


def test_a_budget_counts_gradient_rounds_too() -> None:
    terms = example_terms(Example(epsilon=4.0, query_noise_multiplier=5.0), examples=100, batch=10, steps=5, rounds=10, queries=2)
    (query,) = terms.events(query=True)
    assert query == Event(5.0, 1.0, 1)
    assert epsilon([Event(5.0, 1.0, 2), Event(terms.sigma, 0.1, 40)], terms.delta) <= 4.0
    plain = example_terms(Example(epsilon=4.0), examples=100, batch=10, steps=5, rounds=8)
    assert terms.sigma > plain.sigma


def test_given_noise_is_taken_as_it_is_and_the_budget_stays_a_stop() -> None:
    terms = example_terms(Example(epsilon=float("inf"), noise_multiplier=0.7), examples=50, batch=10, steps=1, rounds=1)
    assert (terms.sigma, terms.budget) == (0.7, float("inf"))
    assert example_terms(Example(epsilon=2.0, noise_multiplier=0.7), examples=50, batch=10, steps=1, rounds=1).budget == 2.0


def test_delta_is_small_against_one_in_n() -> None:
    assert Example().delta_for(100) == 1e-5
    assert Example().delta_for(1_000_000) == 1e-7
    with pytest.raises(ValueError, match="more than 1/100"):
        Example(delta=0.02).delta_for(100)


def test_only_a_secret_cohort_is_credited() -> None:
    public = client_terms(Client(), clients=100, cohort=10, rounds=50, turns=9)
    assert public.rate == 1.0
    assert epsilon([Event(public.sigma, 1.0, 9)], public.delta) <= 8.0
    secret = client_terms(Client(adversary="outsider", sampling="poisson"), clients=100, cohort=10, rounds=50, turns=9)
    assert secret.rate == 0.1
    assert epsilon([Event(secret.sigma, 0.1, 50)], secret.delta) <= 8.0
    unknown = client_terms(Client(sampling="poisson"), clients=100, cohort=10, rounds=50, turns=9)
    assert epsilon([Event(unknown.sigma, 1.0, 50)], unknown.delta) <= 8.0  # any client may be in every round


def test_sum_and_count_together_cost_one_release() -> None:
    unit = Client(quantile=0.5, count_noise=5.0)
    noise = sum_noise(unit, 1.5, 100)
    assert noise**-2 + (2 * 5.0) ** -2 == pytest.approx(1.5**-2)
    assert sum_noise(unit, 1.5, 100) > 1.5
    assert sum_noise(Client(), 1.5, 100) == 1.5
    with pytest.raises(ValueError, match=r"privacy.count_noise above 0.75"):
        sum_noise(Client(quantile=0.5, count_noise=0.7), 1.5, 100)


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["privacy=example", "privacy.epsilon=0"], "positive number"),
        (["privacy=example", "privacy.epsilon=-1"], "positive number"),
        (["privacy=example", "privacy.epsilon=inf"], "say nothing"),
        (["privacy=example", "privacy.noise_multiplier=0"], "nobody is hidden"),
        (["privacy=example", "privacy.clip=0"], "positive number"),
        (["privacy=example", "privacy.clip=1e-45"], "from 1e-06 to 1e"),
        (["privacy=client", "privacy.query_clip=1e-9"], "from 1e-06 to 1e"),
        (["privacy=example", "privacy.delta=1"], "probability"),
        (["privacy=example", "privacy.noise=seed"], "needed is os or seeded-insecure"),
        (["privacy=example", "privacy.adversary=outsider"], "no credit for rounds"),
        (["privacy=example", "privacy.backend=ghost"], "needed is auto"),
        (["privacy=client", "privacy.adversary=outsider"], "secret coin"),
        (["privacy=client", "privacy.sampling=shuffled"], "needed is fixed or poisson"),
        (["privacy=client", "privacy.quantile=1.5"], "share"),
        (["privacy=client", "privacy.query_clip=-1"], "positive number"),
    ],
)
def test_a_setting_that_means_nothing_is_refused(words: list[str], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        build(load(words).privacy)


def test_the_published_way_of_counting_has_its_delta_and_says_so() -> None:
    unit = build(load(["privacy=as-published"]).privacy)
    terms = example_terms(unit, examples=320, batch=32, steps=5, rounds=6, queries=1)
    assert terms.delta == 0.1
    assert terms.events(query=True) == ()  # gradients of the start for free
    assert statement(unit, spent=Spent(3.0, 0.1), sizes=[320], cohort=1, batch=32)[0].startswith("NOT A VALID CLAIM")
    honest = build(load(["privacy=honest"]).privacy)
    assert (honest.epsilon, honest.clip) == (unit.epsilon, unit.clip)
    assert example_terms(honest, examples=320, batch=32, steps=5, rounds=6).sigma > terms.sigma
    with pytest.raises(ValueError, match="leave it null"):
        Example(published=True, delta=1e-5)


def test_a_statement_says_unit_relation_delta_sampling_adversary_and_what_is_not_covered() -> None:
    said = " ".join(statement(Example(), spent=Spent(7.5, 1e-5), sizes=[50, 200], cohort=2, batch=10))
    for words in (
        "epsilon 7.500 at delta 1e-05",
        "add or remove one example of one client",
        "rate 0.05 to 0.2",
        "the server too",
        "Not covered",
    ):
        assert words in said
    said = " ".join(statement(Example(), spent=Spent(7.5, 1e-5, heard=True), sizes=[50, 200], cohort=2, batch=10))
    for words in ("largest that one of 2 clients said of itself", "as far as the server heard", "over each client's own number"):
        assert words in said
    assert "200" not in said  # the server's copy of the split is none of the clients'
    said = " ".join(statement(Client(), spent=Spent(7.5, 1e-5), sizes=[50] * 100, cohort=10, batch=10))
    for words in ("add or remove one client", "one of 100 clients", "no credit is taken", "Trusted: the server", "Not covered"):
        assert words in said
    said = " ".join(statement(Client(adversary="outsider", sampling="poisson"), spent=Spent(1, 1e-5), sizes=[5] * 9, cohort=1, batch=1))
    assert "takes credit for that" in said
