import pytest
import torch

from fedpeft.strategy import Federation
from strategies.flora import flora
from strategies.florist import florist

pytestmark = pytest.mark.fast
RUN = Federation(rounds=4, clients=4, cohort=3)
LAYERS = {"layer.0.query": (7, 11), "layer.0.value": (12, 5), "layer.1.query": (6, 6)}


def stacked(run) -> dict[str, torch.Tensor]:
    return {layer: sum(chunk[layer].dense() for chunk in run.state.base_delta if layer in chunk) for layer in LAYERS}


@pytest.mark.parametrize("energy", [0.3, 0.8, 0.99, 0.9999])
@pytest.mark.parametrize("clients", [(3,), (0, 1), (0, 1, 2, 3)])
def test_a_layer_keeps_the_fewest_singular_values_that_hold_the_energy(energy, clients, federation, mean_of_products):
    run = federation(florist(RUN, energy))
    updates, trained = run.play(clients)
    run.take(updates)
    for layer, true in mean_of_products(updates, trained).items():
        squares = torch.linalg.svdvals(true).square()
        kept = run.state.base_delta[0][layer].rank
        assert squares[:kept].sum() >= energy * squares.sum()
        assert kept == 1 or squares[: kept - 1].sum() < energy * squares.sum()
        missed = (run.state.base_delta[0][layer].dense() - true).norm()
        assert missed <= (1 - energy) ** 0.5 * true.norm()
        assert float(missed) == pytest.approx(float(squares[kept:].sum().sqrt()), abs=1e-12)  # no product of that rank comes nearer


def test_the_rank_follows_the_layer(federation):
    run = federation(florist(RUN, 0.999))
    updates, _ = run.play((0, 1))
    for update in updates:
        update.tensors["layer.0.query.B"][:, 1:] = 0
        update.tensors["layer.0.query.A"][0] = torch.arange(11)
    run.take(updates)
    ranks = {layer: both.rank for layer, both in run.state.base_delta[0].items()}
    assert ranks["layer.0.query"] == 1
    assert min(ranks["layer.0.value"], ranks["layer.1.query"]) > 3


@pytest.mark.parametrize("ranks", [None, (1, 3, 2, 3)])
def test_all_of_the_energy_is_flora(ranks, federation, distance):
    run = Federation(clients=4, seed=3, ranks=ranks)
    one, other = federation(florist(run, 1.0)), federation(flora(run))
    for _ in range(4):
        for each in (one, other):
            each.take(each.play((0, 1, 2))[0])
        assert distance(stacked(one), stacked(other)) <= 1e-13
        assert all(torch.equal(one.state.tensors[name], tensor) for name, tensor in other.state.tensors.items())


def test_less_energy_is_less_traffic_and_more_error(federation, distance):
    whole = federation(flora(RUN)).advance(1)
    sizes, errors = [], []
    for energy in (0.5, 0.9, 0.999):
        run = federation(florist(RUN, energy)).advance(1)
        sizes.append(sum(both.rank for both in run.state.base_delta[0].values()))
        errors.append(distance(stacked(run), stacked(whole)))
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[2]
    assert errors == sorted(errors, reverse=True)


def test_the_base_never_holds_more_ranks_than_a_layer_has(federation):
    run = federation(florist(RUN, 0.9)).advance(8)
    for layer, (m, n) in LAYERS.items():
        assert sum(chunk[layer].rank for chunk in run.state.base_delta if layer in chunk) <= min(m, n)


def test_clients_that_did_not_move_add_a_zero_product(federation):
    run = federation(florist(RUN))
    run.take(run.play(by=0.0)[0])
    assert all(float(dense.abs().max()) == 0 for dense in stacked(run).values())


@pytest.mark.parametrize("energy", [0.0, -0.5, 1.5, float("nan")])
def test_a_share_of_the_energy_that_is_none_is_refused(energy):
    with pytest.raises(ValueError, match=r"strategy\.energy=.*a share in \(0, 1\]"):
        florist(RUN, energy)
