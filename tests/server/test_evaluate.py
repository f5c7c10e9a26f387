import pytest

from server.evaluate import Measured, is_personal, personal
from server.exchange import Traffic
from strategies.fedavg import FedAvg
from strategies.fedopt import FedOpt
from strategies.fedsa import fedsa_lora
from strategies.ffa import ffa_lora

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(("build", "personal"), [(FedAvg, False), (ffa_lora, False), (FedOpt, False), (fedsa_lora, True)])
def test_a_method_is_personal_if_clients_keep_what_the_global_model_lacks(build, personal, start):
    strategy = build()
    assert is_personal(strategy, strategy.init({"main": start}), 0) is personal


def test_personal_scores_are_weighted_by_examples(clients, joined, start):
    """Client k has k + 1 examples, a loss of k and an accuracy of k / 10."""
    strategy, traffic = fedsa_lora(), Traffic()
    found = personal(strategy, strategy.init({"main": start}), 1, range(3), joined(clients(strategy), 3), traffic)
    assert found == Measured(pytest.approx(8 / 6), pytest.approx(0.8 / 6), "personal", pytest.approx(0.8 / 6))
    assert traffic.down > 0


def test_clients_that_do_not_answer_do_not_count(clients, joined, start, failing_client):
    strategy, traffic = fedsa_lora(), Traffic()
    exchange = joined(clients(strategy, odd={0: failing_client, 2: failing_client}), 3)
    assert personal(strategy, strategy.init({"main": start}), 1, range(3), exchange, traffic) == Measured(1.0, 0.1, "personal", 0.1)
    assert [fault.client for fault in traffic.faults] == [0, 2]


def test_no_answer_at_all_is_no_measure(clients, joined, start, failing_client):
    strategy = fedsa_lora()
    assert (
        personal(strategy, strategy.init({"main": start}), 1, [0], joined(clients(strategy, odd={0: failing_client}), 1), Traffic()) is None
    )
