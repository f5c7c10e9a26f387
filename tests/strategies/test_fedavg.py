from functools import partial

import pytest
import torch

from fedpeft.aggregate import weighted_mean
from fedpeft.messages import Broadcast, Update
from fedpeft.strategy import Federation
from strategies.fedavg import FedAvg
from strategies.fedex import fedex
from strategies.fedprox import fedprox
from strategies.fedrot import fedrot
from strategies.fedsa import fedsa_lora
from strategies.fedsvd import fedsvd
from strategies.ffa import ffa_lora
from strategies.flexlora import flexlora
from strategies.flora import flora
from strategies.florist import florist
from strategies.lora_fair import lora_fair
from strategies.rolora import rolora

pytestmark = pytest.mark.fast


def test_the_mean_of_what_clients_send_replaces_what_the_server_had():
    strategy = FedAvg()
    state = strategy.init({"main": {"q.A": torch.tensor([[0.0, 0.0]]), "head.bias": torch.tensor([7.0])}})
    updates = [
        Update(0, {"q.A": torch.tensor([[1.0, 2.0]]), "head.bias": torch.tensor([0.0])}, 1.0),
        Update(1, {"q.A": torch.tensor([[5.0, 6.0]]), "head.bias": torch.tensor([4.0])}, 3.0),
    ]
    new = strategy.aggregate(state, 0, updates, weighted_mean)
    assert new.tensors["q.A"].tolist() == [[4.0, 5.0]]  # (1 + 3 * 5) / 4, (2 + 3 * 6) / 4
    assert new.tensors["head.bias"].tolist() == [3.0]


def test_a_layer_that_nobody_sent_stays_as_it_was():
    strategy = FedAvg()
    state = strategy.init({"main": {"q.A": torch.zeros(1), "v.A": torch.ones(1)}})
    new = strategy.aggregate(state, 0, [Update(0, {"q.A": torch.ones(1)}, 2.0)], weighted_mean)
    assert new.tensors["v.A"] is state.tensors["v.A"]


def test_base_deltas_are_carried_along():
    state = Broadcast({"q.A": torch.zeros(1)}, ({},))
    assert FedAvg().aggregate(state, 0, [Update(0, {"q.A": torch.ones(1)}, 2.0)], weighted_mean).base_delta is state.base_delta


def test_all_clients_get_one_object_so_that_it_is_packed_once():
    strategy = FedAvg()
    state = strategy.init({"main": {"q.A": torch.zeros(1)}})
    assert {id(strategy.broadcast(state, 0, client)) for client in (None, 0, 1, 99)} == {id(state)}


@pytest.mark.parametrize("round", [0, 3])
def test_its_error_for_lora_is_the_cross_covariance_of_the_factors(round, federation, mean_of_products, products):
    """sum p_k B_k A_k - Bm Am = sum p_k (B_k - Bm)(A_k - Am): algorithms 0.1(a); of rank (K - 1) r at most."""
    run = federation(FedAvg()).advance(round)
    updates, trained = run.play((0, 1, 2))
    ideal = mean_of_products(updates, trained)
    run.take(updates)
    new = run.strategy.broadcast(run.state, round + 1, None)
    whole = sum(update.weight for update in updates)
    for layer, want in ideal.items():
        mean_b, mean_a = new.tensors[f"{layer}.B"], new.tensors[f"{layer}.A"]
        covariance = sum(
            update.weight / whole * (trained[update.client][f"{layer}.B"] - mean_b) @ (trained[update.client][f"{layer}.A"] - mean_a)
            for update in updates
        )
        error = want - products(new)[layer]
        assert error.norm() > 0.1 * want.norm()  # random factors: a stress figure
        assert (error - covariance).norm() <= 1e-13 * want.norm()


def test_two_clients_of_rank_r_leave_an_error_of_rank_r(federation, mean_of_products, products):
    run = federation(FedAvg())
    updates, trained = run.play((0, 1))
    ideal = mean_of_products(updates, trained)
    run.take(updates)
    error = ideal["layer.0.query"] - products(run.strategy.broadcast(run.state, 1, None))["layer.0.query"]
    s = torch.linalg.svdvals(error)
    assert s[2] > 1e-3
    assert s[3] <= 1e-12


def test_an_adapter_without_low_rank_pairs_is_welcome_unless_the_method_needs_them():
    head_only = {"head.weight": torch.zeros(2, 3)}
    assert FedAvg().init({"main": head_only}).tensors is head_only
    assert fedprox().init({"main": head_only}).tensors is head_only
    with pytest.raises(ValueError, match="choose adapter=lora"):
        ffa_lora().init({"main": head_only})


LOW_RANK = {
    "fedex": fedex, "fedrot": fedrot, "fedsa": fedsa_lora, "fedsvd": fedsvd, "ffa": ffa_lora, "lora_fair": lora_fair, "rolora": rolora,
} | {name: partial(made, Federation()) for name, made in (("flexlora", flexlora), ("flora", flora), ("florist", florist))}  # fmt: skip


@pytest.mark.parametrize("name", LOW_RANK)
@pytest.mark.parametrize("core", ["q.R", "q.H"])
def test_strategies_of_products_refuse_a_core_between_the_factors(name, core):
    """B A without the R of LoRA-SB between them would be another change of the weight."""
    adapter = {"q.A": torch.zeros(2, 3), "q.B": torch.zeros(4, 2)}
    LOW_RANK[name]().init({"main": adapter})
    with pytest.raises(ValueError, match=r"core between B and A.*adapter=lora"):
        LOW_RANK[name]().init({"main": adapter | {core: torch.zeros(1, 2, 2)}})
