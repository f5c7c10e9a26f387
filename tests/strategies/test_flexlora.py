import pytest
import torch

from fedpeft.messages import Update
from fedpeft.strategy import Federation
from strategies.fedavg import FedAvg
from strategies.flexlora import flexlora

pytestmark = pytest.mark.fast
RUN = Federation(rounds=4, clients=4, cohort=3)
MIXED = Federation(rounds=4, clients=4, cohort=3, ranks=(1, 3, 2, 3))
LAYERS = ("layer.0.query", "layer.0.value", "layer.1.query")


def tail(dense: torch.Tensor, rank: int) -> float:
    return float(torch.linalg.svdvals(dense)[rank:].square().sum().sqrt())


@pytest.mark.parametrize("run", [RUN, MIXED], ids=["equal", "mixed"])
@pytest.mark.parametrize("clients", [(1,), (0, 2), (0, 1, 2, 3)])
def test_its_error_is_the_tail_of_the_mean_of_products(run, clients, federation, mean_of_products, products):
    paper = federation(flexlora(run)).advance(1)
    updates, trained = paper.play(clients)
    updates = [Update(u.client, u.tensors, weight) for u, weight in zip(updates, (5.0, 1.0, 30.0, 2.5), strict=False)]
    true = mean_of_products(updates, trained)
    paper.take(updates)
    made = products(paper.state)
    for layer in LAYERS:
        assert float((made[layer] - true[layer]).norm()) == pytest.approx(tail(true[layer], 3), abs=1e-12)


def test_a_client_gets_the_best_approximation_of_its_rank(federation, mean_of_products, products):
    run = federation(flexlora(MIXED))
    updates, trained = run.play((0, 1, 2, 3))
    true = mean_of_products(updates, trained)
    run.take(updates)
    for client, rank in enumerate(MIXED.ranks):
        mine = products(run.strategy.broadcast(run.state, 1, client))
        for layer in LAYERS:
            assert torch.linalg.matrix_rank(mine[layer]) == rank
            assert float((mine[layer] - true[layer]).norm()) == pytest.approx(tail(true[layer], rank), abs=1e-12)


def test_singular_values_lie_in_b_and_a_is_orthonormal(federation, mean_of_products):
    run = federation(flexlora(RUN))
    updates, trained = run.play((0, 1, 2))
    true = mean_of_products(updates, trained)
    run.take(updates)
    for layer in LAYERS:
        b, a = run.state.tensors[f"{layer}.B"], run.state.tensors[f"{layer}.A"]
        squares = torch.linalg.svdvals(true[layer])[:3].square()
        assert torch.allclose(a @ a.T, torch.eye(3, dtype=a.dtype), rtol=0, atol=1e-13)
        assert torch.allclose(b.T @ b, torch.diag(squares), rtol=0, atol=1e-12 * float(squares[0]))


def test_it_is_exact_while_the_ranks_add_up_to_the_servers(federation, distance, mean_of_products, products):
    run = federation(flexlora(MIXED)).advance(1)
    updates, trained = run.play((0, 2))  # of rank 1 and 2, the server's is 3
    true = mean_of_products(updates, trained)
    run.take(updates)
    assert distance(products(run.state), true) <= 1e-13


def test_it_comes_nearer_than_the_product_of_means(federation, distance, mean_of_products, products):
    """Both have rank r, and this one is the best of that rank."""
    flex, plain = federation(flexlora(RUN)), federation(FedAvg())
    for run in (flex, plain):
        updates, trained = run.play((0, 1, 2))
        true = mean_of_products(updates, trained)
        run.take(updates)
    assert distance(products(flex.state), true) < distance(products(plain.state), true)


@pytest.mark.parametrize("clients", [(0,), (2,)])
def test_ranks_that_no_client_of_a_round_has_can_still_learn_in_the_next(clients, federation, distance, mean_of_products, products):
    """A row of A and a column of B that are both zero would have no gradient ever again."""
    run = federation(flexlora(MIXED)).advance(1)
    updates, trained = run.play(clients)
    true = mean_of_products(updates, trained)
    run.take(updates)
    assert distance(products(run.state), true) <= 1e-13
    for layer in LAYERS:
        a = run.strategy.broadcast(run.state, 2, 1).tensors[f"{layer}.A"]
        assert torch.allclose(a @ a.T, torch.eye(3, dtype=a.dtype), rtol=0, atol=1e-13)


def test_the_head_is_the_weighted_mean(federation):
    run = federation(flexlora(MIXED))
    updates, trained = run.play((0, 1))
    run.take(updates)
    want = (trained[0]["head.classifier.bias"] + 2 * trained[1]["head.classifier.bias"]) / 3
    assert torch.allclose(run.state.tensors["head.classifier.bias"], want, rtol=0, atol=1e-15)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_language_model_has_no_head_and_needs_none(kind, federation):
    run = federation(flexlora(RUN), kind=kind).advance(2)
    assert {name[-2:] for name in run.state.tensors} == {".A", ".B"}
