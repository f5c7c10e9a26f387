"""The gap of a round against dense sums of the clients' products, in float64."""

import math
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from fedpeft import exactness
from fedpeft.config import app_folder, build
from fedpeft.exactness import Gap, Meter
from fedpeft.lowrank import LowRank, pair, product
from fedpeft.messages import Broadcast, Update
from fedpeft.strategy import Federation, Phase
from fedpeft.tensors import is_a, is_own, targets
from strategies.fed_sb import fed_sb
from strategies.fedavg import FedAvg
from strategies.fedex import fedex
from strategies.fedopt import FedOpt
from strategies.fedsa import fedsa_lora
from strategies.fedsvd import fedsvd
from strategies.ffa import ffa_lora
from strategies.flexlora import flexlora
from strategies.flora import flora
from strategies.florist import florist
from strategies.hetlora import hetlora
from strategies.ravan import ravan
from strategies.rolora import rolora
from strategies.scaffold import scaffold
from strategies.slora import slora

pytestmark = pytest.mark.fast
RUN = Federation(rounds=4, clients=4, cohort=3, optimizer="sgd")
MIXED = Federation(rounds=4, clients=4, cohort=3, ranks=(1, 3, 2, 3))
EXACT = {
    "ffa": ffa_lora, "rolora": rolora, "fedsvd": fedsvd, "fedex": fedex, "flora": lambda: flora(RUN), "ravan": ravan,
    "fed_sb": lambda: fed_sb(RUN), "flora of unequal ranks": lambda: flora(MIXED), "florist of all energy": lambda: florist(RUN, 1.0),
}  # fmt: skip
INEXACT = {
    "fedavg": FedAvg, "fedopt": FedOpt, "flexlora": lambda: flexlora(RUN), "flexlora of unequal ranks": lambda: flexlora(MIXED),
    "florist": lambda: florist(RUN, 0.6), "fedex cut": lambda: fedex(1), "scaffold": lambda: scaffold(RUN),
    "hetlora of unequal ranks": lambda: hetlora(MIXED, penalty=0.0, weights="examples"), "slora without": lambda: slora(RUN, share=0.0),
}  # fmt: skip


def measured(run: Any, updates: list[Update]) -> Gap:
    """Takes the updates through a meter, as the server does."""
    strategy, state, round = run.strategy, run.state, run.round
    same = strategy.phase(round).adapter == strategy.phase(round + 1).adapter
    meter = Meter(strategy.phase(round), strategy.broadcast(state, round, None), same_adapter=same)
    run.take(list(meter.watch(iter(updates), lambda client: strategy.broadcast(state, round, client))))
    return meter.read(strategy.broadcast(run.state, round + 1, None))


def dense(run: Any, updates: list[Update]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(the mean of the clients' products, what base and adapter gained over the base before) of every layer; ends the round."""
    before, weight = run.strategy.broadcast(run.state, run.round, None), sum(update.weight for update in updates)
    layers = [layer for layer in targets(before.tensors) if not is_own(layer)]
    true = dict.fromkeys(layers, torch.zeros(()))
    for update in updates:
        tensors = run.strategy.broadcast(run.state, run.round, update.client).tensors | update.tensors
        true = {layer: true[layer] + update.weight / weight * product(tensors, layer).dense() for layer in layers}
    run.take(updates)
    after = run.strategy.broadcast(run.state, run.round, None)
    made = {layer: product(after.tensors, layer).dense() for layer in layers}
    for sign, sent in ((1, after), (-1, before)):
        for chunk in sent.base_delta:
            made = {layer: change + sign * chunk[layer].dense() if layer in chunk else change for layer, change in made.items()}
    return true, made


def flat(changes: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([change.flatten() for change in changes.values()])


def assert_gap(gap: Gap, true: dict[str, torch.Tensor], made: dict[str, torch.Tensor], within: float = 1e-12) -> None:
    assert gap.error == pytest.approx(float((flat(made) - flat(true)).norm() / flat(true).norm()), rel=1e-9, abs=within)
    assert gap.cosine == pytest.approx(float(torch.cosine_similarity(flat(made), flat(true), dim=0)), abs=within)
    assert gap.layers.keys() == true.keys()
    for layer, both in gap.layers.items():
        assert both is not None
        assert both[0] == pytest.approx(float((made[layer] - true[layer]).norm() / true[layer].norm()), rel=1e-9, abs=within)
        assert both[1] == pytest.approx(float(torch.cosine_similarity(made[layer].flatten(), true[layer].flatten(), dim=0)), abs=within)


@pytest.mark.parametrize("round", [0, 1, 2, 3])
@pytest.mark.parametrize("name", EXACT | INEXACT)
def test_the_gap_is_the_one_between_dense_matrices(name, round, federation):
    """Base deltas grow from round to round, and are folded when their ranks pass a layer's."""
    strategy = (EXACT | INEXACT)[name]()
    one, other = federation(strategy).advance(round), federation(strategy).advance(round)
    updates, _ = one.play((0, 1, 2, 3))
    gap = measured(one, updates)
    assert_gap(gap, *dense(other, updates))
    assert gap.dropped == 0.0
    if name in EXACT:
        assert gap.error <= 1e-12
        assert gap.cosine == pytest.approx(1.0, abs=1e-12)
    else:
        assert gap.error > 1e-3


def test_base_deltas_of_the_rounds_before_do_not_count(federation):
    """After eight rounds of FLoRA they have been folded: none of the chunks before is there any more."""
    run = federation(flora(RUN)).advance(1)
    before = run.state.base_delta
    run.advance(7)
    assert {id(part.B) for chunk in before for part in chunk.values()}.isdisjoint(
        id(part.B) for chunk in run.state.base_delta for part in chunk.values()
    )
    assert measured(run, run.play()[0]).error <= 1e-12


def test_fedavg_is_off_by_the_cross_covariance_of_the_factors(federation):
    run = federation(FedAvg()).advance(1)
    updates, _ = run.play()
    shares = [update.weight / sum(each.weight for each in updates) for update in updates]
    far = size = 0.0
    for layer in targets(updates[0].tensors):
        pairs = [pair(update.tensors, layer) for update in updates]
        B, A = (sum(p * getattr(one, part) for p, one in zip(shares, pairs, strict=True)) for part in "BA")
        far += float(sum(p * (one.B - B) @ (one.A - A) for p, one in zip(shares, pairs, strict=True)).square().sum())
        size += float(sum(p * one.dense() for p, one in zip(shares, pairs, strict=True)).square().sum())
    assert measured(run, updates).error == pytest.approx((far / size) ** 0.5, rel=1e-10)


def test_flexlora_is_off_by_the_singular_values_it_cuts(federation):
    run = federation(flexlora(RUN))
    updates, trained = run.play()
    whole = sum(update.weight for update in updates)
    cut = size = 0.0
    for layer in targets(updates[0].tensors):
        values = torch.linalg.svdvals(sum(u.weight / whole * pair(trained[u.client], layer).dense() for u in updates))
        cut, size = cut + float(values[3:].square().sum()), size + float(values.square().sum())
    gap = measured(run, updates)
    assert gap.error == pytest.approx((cut / size) ** 0.5, rel=1e-9)
    assert gap.cosine == pytest.approx((1 - cut / size) ** 0.5, rel=1e-9)


def test_clients_count_by_their_weights_and_not_by_their_scale(federation):
    gaps = []
    for scale in (1.0, 1e-3, 7.0):
        run = federation(FedAvg()).advance(1)
        gaps.append(measured(run, [Update(u.client, u.tensors, scale * u.weight) for u in run.play()[0]]))
    run = federation(FedAvg()).advance(1)
    even = measured(run, run.play(weight=1.0)[0])
    assert gaps[1].error == pytest.approx(gaps[0].error, rel=1e-12)
    assert gaps[2].error == pytest.approx(gaps[0].error, rel=1e-12)
    assert even.error != pytest.approx(gaps[0].error, rel=1e-3)


# Where there is none


@pytest.mark.parametrize(
    ("strategy", "round"),
    [(fedsa_lora(), 0), (fedsa_lora(), 2)],
)
def test_there_is_none_where_a_factor_is_not_shared(strategy, round, federation, start):
    run = federation(strategy).advance(round)
    assert measured(run, run.play()[0]) == Gap(None, None, 0.0, dict.fromkeys(targets(start)))


def test_layers_that_are_shared_are_measured_beside_layers_that_are_not(federation):
    def mine(name):
        return "value" in name and is_a(name)

    run = federation(FedAvg(lambda round: Phase(shares=lambda name: not mine(name), keeps=mine))).advance(1)
    updates, trained = run.play()
    gap = measured(run, updates)
    assert gap.layers["layer.0.value"] is None
    query = {layer: both for layer, both in gap.layers.items() if "query" in layer}
    assert all(both is not None and both[0] > 1e-3 for both in query.values())
    whole, far, size = sum(update.weight for update in updates), 0.0, 0.0
    for layer in query:
        true = sum(update.weight / whole * pair(trained[update.client], layer).dense() for update in updates)
        far += float((pair(run.state.tensors, layer).dense() - true).square().sum())
        size += float(true.square().sum())
    assert gap.error == pytest.approx((far / size) ** 0.5, rel=1e-10)


@pytest.mark.parametrize(
    ("strategy", "rounds"),
    [
        (fed_sb(RUN, "gradient"), (0, 1)),  # rounds of gradients; the second is also the last of its adapter
        (fed_sb(RUN, "sign", step=0.1), (0,)),
        (slora(RUN, sparse_rounds=2), (0, 1)),  # sparse values are no product, and then LoRA begins
    ],
    ids=["gradient", "sign", "slora"],
)
def test_there_is_none_in_rounds_of_gradients_and_where_another_adapter_begins(strategy, rounds, federation):
    run = federation(strategy)
    for _ in rounds:
        assert measured(run, run.play()[0]) == Gap(None, None)
    assert measured(run, run.play()[0]).error is not None


def test_there_is_none_without_updates(federation):
    run = federation(FedAvg())
    sent = run.strategy.broadcast(run.state, 0, None)
    meter = Meter(run.phase, sent)
    assert list(meter.watch([], lambda client: sent)) == []
    assert meter.read(sent) == Gap(None, None, 0.0, dict.fromkeys(targets(sent.tensors)))


def test_clients_that_did_not_move_from_zero_agree(federation):
    gap = measured(run := federation(FedAvg()), run.play(by=0.0)[0])
    assert (gap.error, gap.cosine) == (0.0, 1.0)
    assert set(gap.layers.values()) == {(0.0, 1.0)}


# What passes through


def test_updates_pass_as_the_same_objects_one_at_a_time_and_the_time_is_counted(federation):
    run = federation(FedAvg())
    updates, _ = run.play()
    sent = run.strategy.broadcast(run.state, 0, None)
    taken = []

    def stream():
        for update in updates:
            taken.append(update.client)
            yield update

    meter = Meter(run.phase, sent)
    passing = meter.watch(stream(), lambda client: sent)
    for k, update in enumerate(updates):
        assert next(passing) is update
        assert taken == [0, 1, 2][: k + 1]
    assert next(passing, None) is None
    assert meter.seconds > 0


def test_what_is_measured_is_what_the_ledger_keeps():
    gap = Gap(0.1, 0.9, 0.01, {"q": (0.1, 0.9), "v": None})
    assert gap.entry() == {"error": 0.1, "cosine": 0.9, "dropped": 0.01, "layers": {"q": (0.1, 0.9), "v": None}}


# Many ranks


def layer(m: int, n: int, ranks: list[int], *, spectrum: tuple[float, ...] = (), seed: int = 0) -> list[Update]:
    """Updates of one layer (m, n): products of falling singular values in random directions, or under a `spectrum` one product again."""
    rng = torch.Generator().manual_seed(seed)
    made = []
    for client, rank in enumerate(ranks):
        if spectrum and client:
            B, A = made[0].tensors["q.B"], made[0].tensors["q.A"]
        else:
            b, a = (torch.linalg.qr(torch.randn(size, rank, generator=rng, dtype=torch.float64))[0] for size in (m, n))
            values = torch.tensor(spectrum, dtype=torch.float64) if spectrum else 0.3 ** torch.arange(rank, dtype=torch.float64)
            B, A = b * values, a.T
        made.append(Update(client, {"q.A": A, "q.B": B}, 1.0 + (0 if spectrum else client)))
    return made


def folded(updates: list[Update], after: Broadcast) -> tuple[Gap, float]:
    """The gap of a round that ended in `after`, and the error between dense matrices."""
    sent = Broadcast({name: torch.zeros_like(t) for name, t in updates[0].tensors.items()})
    meter = Meter(Phase(), sent)
    assert len(list(meter.watch(updates, lambda client: sent))) == len(updates)
    whole = sum(update.weight for update in updates)
    true = sum(update.weight / whole * pair(update.tensors, "q").dense() for update in updates)
    made = pair(after.tensors, "q").dense() + sum(chunk["q"].dense() for chunk in after.base_delta)
    return meter.read(after), float((made - true).norm() / true.norm())


def ends(m: int, n: int) -> Broadcast:
    (one,) = layer(m, n, [2], seed=9)
    return Broadcast(one.tensors)


@pytest.mark.parametrize("clients", [1, 2, 3, 60])
@pytest.mark.parametrize(("m", "n"), [(7, 11), (30, 8), (8, 8)])
def test_a_layer_that_is_no_larger_than_the_bound_is_exact_with_any_number_of_clients(m, n, clients, monkeypatch):
    monkeypatch.setattr(exactness, "BOUND", 8)
    gap, true = folded(layer(m, n, [3, 2, 1, 4] * (clients // 4) + [3] * (clients % 4)), ends(m, n))
    assert gap.error == pytest.approx(true, rel=1e-12)
    assert gap.dropped == 0.0


@pytest.mark.parametrize("bound", [12, 16, 24])
def test_in_a_larger_layer_the_error_is_off_by_what_was_dropped_at_most(bound, monkeypatch):
    monkeypatch.setattr(exactness, "BOUND", bound)
    gap, true = folded(layer(30, 40, [3, 2, 5, 1] * 3), ends(30, 40))
    assert 0 < gap.dropped < 1
    assert (gap.error - gap.dropped) / (1 + gap.dropped) <= true <= (gap.error + gap.dropped) / (1 - gap.dropped)


def test_tails_that_are_cut_in_the_same_direction_again_and_again_add_up(monkeypatch):
    """Ten equal products of six ranks, of which four are kept each time: the mean itself seems wrong, and `dropped` says by how much."""
    monkeypatch.setattr(exactness, "BOUND", 8)
    updates = layer(30, 40, [6] * 10, spectrum=(9.0, 8.0, 7.0, 6.0, 2.0, 1.0))
    gap, true = folded(updates, Broadcast(updates[0].tensors))
    assert true < 1e-12
    assert gap.error > 0.05
    assert gap.error <= gap.dropped * (1 + 1e-9)
    assert gap.dropped < 3 * gap.error


def test_up_to_the_bound_nothing_is_dropped_in_a_larger_layer(monkeypatch):
    monkeypatch.setattr(exactness, "BOUND", 8)
    gap, true = folded(layer(30, 40, [3, 2, 2, 1]), ends(30, 40))
    assert gap.error == pytest.approx(true, rel=1e-12)
    assert gap.dropped == 0.0


@pytest.mark.parametrize("ranks", [[9], [9, 9], [2, 12, 3]])
def test_a_client_of_more_ranks_than_the_bound_is_measured_too(ranks, monkeypatch):
    monkeypatch.setattr(exactness, "BOUND", 8)
    gap, true = folded(layer(30, 40, ranks), ends(30, 40))
    slack = 1e-12
    assert (gap.error - gap.dropped) / (1 + gap.dropped) - slack <= true <= (gap.error + gap.dropped) / (1 - gap.dropped) + slack


def test_a_difference_of_equal_products_does_not_drown_in_their_size():
    """By random vectors, not by Grams: those leave 1e-8 of the norm."""
    (one,) = layer(600, 700, [4])
    B, A = one.tensors["q.B"], one.tensors["q.A"]
    turn = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    gap, _ = folded([one], Broadcast({"q.B": 0.5 * B @ turn, "q.A": turn.T @ A}, ({"q": LowRank(0.5 * B, A)},)))
    assert gap.error < 1e-13
    assert not math.isnan(gap.cosine)


def test_every_preset_of_a_strategy_is_measured_or_says_why_not(federation):
    """In no round anything but numbers or None, and the same layers as the adapter's."""
    for preset in (app_folder() / "experiments" / "conf" / "strategy").glob("*.yaml"):
        run = federation(build(OmegaConf.to_container(OmegaConf.load(preset)), run=RUN))
        for _ in range(2):
            gap = measured(run, run.play()[0])
            assert gap.error is None or 0 <= gap.error < 10
            assert not any(is_own(each) for each in gap.layers)
