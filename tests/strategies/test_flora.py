import pytest
import torch

from fedpeft.messages import Update
from fedpeft.strategy import Federation
from strategies.flora import flora

pytestmark = pytest.mark.fast
RUN = Federation(rounds=4, clients=4, cohort=3, seed=7)
LAYERS = {"layer.0.query": (7, 11), "layer.0.value": (12, 5), "layer.1.query": (6, 6)}


def stacked(run) -> dict[str, torch.Tensor]:
    return {layer: sum(chunk[layer].dense() for chunk in run.state.base_delta if layer in chunk) for layer in LAYERS}


def test_the_base_moves_by_the_weighted_mean_of_the_products(federation, distance, mean_of_products):
    run = federation(flora(RUN))
    updates, trained = run.play((0, 1, 3))  # of weight 1, 2 and 4
    run.take(updates)
    assert distance(stacked(run), mean_of_products(updates, trained)) <= 1e-14


def test_the_base_keeps_what_every_round_added(federation, distance, mean_of_products):
    run, want = federation(flora(RUN)), {layer: torch.zeros(shape, dtype=torch.float64) for layer, shape in LAYERS.items()}
    for _ in range(5):
        updates, trained = run.play((0, 1, 3))
        want = {layer: want[layer] + moved for layer, moved in mean_of_products(updates, trained).items()}
        run.take(updates)
    assert distance(stacked(run), want) <= 1e-14


def test_the_base_never_holds_more_ranks_than_a_layer_has(federation):
    run = federation(flora(RUN))
    for round in range(8):
        run.take(run.play()[0])
        for layer, (m, n) in LAYERS.items():
            held = sum(chunk[layer].rank for chunk in run.state.base_delta if layer in chunk)
            assert held <= min(m, n, 9 * (round + 1))


def test_every_round_starts_from_a_zero_product_and_another_a(federation):
    run, seen, largest = federation(flora(RUN)), [], 0.0
    for _ in range(4):
        run.take(run.play()[0])
        for layer, (_, n) in LAYERS.items():
            a, b = run.state.tensors[f"{layer}.A"], run.state.tensors[f"{layer}.B"]
            assert torch.equal(b, torch.zeros_like(b))
            assert a.abs().max() <= n**-0.5
            largest = max(largest, float(a.abs().max()) * n**0.5)
            seen.append(a.flatten()[:9])
    assert largest > 0.95  # as LoRA draws it: uniform up to 1 / sqrt(n)
    assert all((one - other).abs().max() > 1e-3 for i, one in enumerate(seen) for other in seen[:i])


def test_the_fresh_a_follows_from_the_seed_and_not_from_what_clients_sent(federation):
    runs = [federation(flora(Federation(seed=seed))) for seed in (7, 7, 8)]
    runs[0].take(runs[0].play()[0])
    runs[1].take(runs[1].play((2,), seed=99)[0])
    runs[2].take(runs[2].play()[0])
    one, same, other = (run.state.tensors["layer.0.query.A"] for run in runs)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_a_client_of_lower_rank_trains_the_first_rows_of_the_same_a(federation):
    mixed = flora(Federation(clients=4, ranks=(1, 3, 2, 3)))
    run = federation(mixed).advance(1)
    whole = mixed.broadcast(run.state, 1, None)
    for client, rank in enumerate((1, 3, 2, 3)):
        sent = mixed.broadcast(run.state, 1, client)
        assert torch.equal(sent.tensors["layer.0.value.A"], whole.tensors["layer.0.value.A"][:rank])
        assert sent.base_delta == whole.base_delta


def test_clients_of_any_rank_and_any_weight_are_stacked_exactly(federation, distance, mean_of_products):
    run = federation(flora(Federation(clients=4, ranks=(1, 3, 2, 3)))).advance(1)
    before = stacked(run)
    updates, trained = run.play((0, 1, 2))
    updates = [Update(u.client, u.tensors, weight) for u, weight in zip(updates, (50.0, 1.0, 7.0), strict=True)]
    ideal = mean_of_products(updates, trained)
    run.take(updates)
    assert distance(stacked(run), {layer: before[layer] + ideal[layer] for layer in LAYERS}) <= 1e-14


def test_an_adapter_that_is_no_plain_product_is_refused():
    pair = {"q.A": torch.zeros(2, 3), "q.B": torch.zeros(4, 2)}
    for more, message in (({"q.magnitude": torch.ones(4)}, "DoRA"), ({"q.R": torch.zeros(2, 2)}, "core")):
        with pytest.raises(ValueError, match=rf"{message}.*adapter=lora"):
            flora(RUN).init({"main": pair | more})
    with pytest.raises(ValueError, match=r"low-rank pairs.*adapter=lora"):
        flora(RUN).init({"main": {"head.weight": torch.zeros(2, 3)}})
