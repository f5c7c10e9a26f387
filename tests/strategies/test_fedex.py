import pytest
import torch

from strategies.fedavg import FedAvg
from strategies.fedex import fedex

pytestmark = pytest.mark.fast
LAYERS = {"layer.0.query": (7, 11), "layer.0.value": (12, 5), "layer.1.query": (6, 6)}


def shares(updates) -> list[float]:
    return [update.weight / sum(each.weight for each in updates) for update in updates]


@pytest.mark.parametrize("clients", [(0, 1), (0, 1, 3)])
def test_the_base_gets_what_the_product_of_means_misses(clients, federation, distance, mean_of_products, products):
    run = federation(fedex())
    updates, trained = run.play(clients)
    true = mean_of_products(updates, trained)
    run.take(updates)
    made = products(run.state)
    (chunk,) = run.state.base_delta
    residual = {layer: chunk[layer].dense() for layer in LAYERS}
    assert distance(residual, {layer: true[layer] - made[layer] for layer in LAYERS}) <= 1e-13
    for layer in LAYERS:  # identity 0.1a: the weighted cross-covariance of B and A
        middle = run.state.tensors
        cross = sum(
            p * (u.tensors[f"{layer}.B"] - middle[f"{layer}.B"]) @ (u.tensors[f"{layer}.A"] - middle[f"{layer}.A"])
            for p, u in zip(shares(updates), updates, strict=True)
        )
        assert torch.allclose(residual[layer], cross, rtol=0, atol=1e-13)


@pytest.mark.parametrize("clients", [(0, 1), (0, 1, 2)])
def test_the_residual_has_a_rank_of_r_for_each_client_but_one_and_is_sent_at_that_width(clients, federation):
    run = federation(fedex())
    run.take(run.play(clients)[0])
    for layer, (m, n) in LAYERS.items():
        part = run.state.base_delta[0][layer]
        most = min(3 * (len(clients) - 1), m, n)
        assert torch.linalg.matrix_rank(part.dense()) == most
        assert part.rank == most


def test_a_client_alone_leaves_nothing_for_the_base(federation):
    run = federation(fedex()).advance(1)
    before = run.state.base_delta
    run.take(run.play((2,))[0])
    assert run.state.base_delta == before


@pytest.mark.parametrize("factor", [".A", ".B"])
def test_there_is_no_residual_where_clients_agree_in_one_factor(factor, federation):
    run = federation(fedex())
    updates, _ = run.play((0, 1, 2))
    for update in updates[1:]:
        update.tensors.update({name: tensor for name, tensor in updates[0].tensors.items() if name.endswith(factor)})
    run.take(updates)
    assert all(float(part.dense().abs().max()) <= 1e-14 for part in run.state.base_delta[0].values())


def test_the_factors_are_fedits_to_the_bit(federation):
    one, other = federation(fedex()), federation(FedAvg())
    for _ in range(3):
        for run in (one, other):
            run.take(run.play((0, 1, 2))[0])
    assert all(torch.equal(one.state.tensors[name], tensor) for name, tensor in other.state.tensors.items())


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_a_cut_residual_is_the_best_of_its_rank(rank, federation):
    whole, cut = federation(fedex()).advance(1), federation(fedex(residual=rank)).advance(1)
    for layer in LAYERS:
        true, kept = whole.state.base_delta[0][layer].dense(), cut.state.base_delta[0][layer]
        tail = float(torch.linalg.svdvals(true)[rank:].square().sum().sqrt())
        assert kept.rank == rank
        assert float((kept.dense() - true).norm()) == pytest.approx(tail, abs=1e-12)


def test_the_base_never_holds_more_ranks_than_a_layer_has(federation):
    run = federation(fedex()).advance(8)
    for layer, (m, n) in LAYERS.items():
        assert sum(chunk[layer].rank for chunk in run.state.base_delta if layer in chunk) <= min(m, n)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_language_model_has_no_head_and_needs_none(kind, federation):
    run = federation(fedex(), kind=kind).advance(2)
    assert {name[-2:] for name in run.state.tensors} == {".A", ".B"}


@pytest.mark.parametrize("rank", [0, -1])
def test_a_residual_of_no_rank_is_refused(rank):
    with pytest.raises(ValueError, match=rf"strategy\.residual={rank}: .*at least 1, or null"):
        fedex(residual=rank)
