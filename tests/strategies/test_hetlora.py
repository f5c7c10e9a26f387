import pytest
import torch

from fedpeft.aggregate import weighted_mean
from fedpeft.lowrank import cut, rank_of
from fedpeft.messages import Broadcast, Update
from fedpeft.strategy import Federation
from strategies.fedavg import FedAvg
from strategies.hetlora import State, hetlora

pytestmark = pytest.mark.fast
RUN = Federation(rounds=4, clients=4, cohort=3)
MIXED = Federation(rounds=4, clients=4, cohort=3, ranks=(1, 3, 2, 3))
LAYERS = ("layer.0.query", "layer.0.value", "layer.1.query")


def rows(*each: list[float]) -> torch.Tensor:
    return torch.tensor(each, dtype=torch.float64)


def model(a: torch.Tensor, b: torch.Tensor, **more: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"q.A": a, "q.B": b} | {f"head.{name}": tensor for name, tensor in more.items()}


def aggregated(strategy, start, updates, ranks=None) -> State:
    return strategy.aggregate(State(Broadcast(start), ranks or {}), 0, updates, weighted_mean)


# A server of rank 2 on a layer of 2 x 3, and two clients, of rank 1 and 2. Norms of the products: 2 and 10.
START = model(rows([1, 1, 1], [1, 1, 1]), rows([5, 5], [5, 5]), bias=torch.zeros(1, dtype=torch.float64))
LOW = model(rows([0, 2, 0]), rows([1], [0]), bias=rows([6])[0])
HIGH = model(rows([3, 0, 0], [0, 0, 4]), rows([2, 0], [0, 2]), bias=rows([0])[0])
SMALL = Federation(clients=2, ranks=(1, 2))


def test_low_ranks_are_padded_with_zeros_and_count_by_their_examples():
    made = aggregated(hetlora(SMALL, weights="examples"), START, [Update(0, LOW, 3.0), Update(1, HIGH, 1.0)]).model.tensors
    assert torch.equal(made["q.A"], rows([0.75, 1.5, 0], [0, 0, 1]))
    assert torch.equal(made["q.B"], rows([1.25, 0], [0, 0.5]))
    assert torch.equal(made["head.bias"], rows([4.5])[0])


def test_clients_count_by_the_norm_of_their_product():
    """||B A|| is 2 and sqrt(6^2 + 8^2) = 10, whatever their examples."""
    made = aggregated(hetlora(SMALL), START, [Update(0, LOW, 300.0), Update(1, HIGH, 1.0)]).model.tensors
    assert torch.allclose(made["q.A"], rows([2.5, 1 / 3, 0], [0, 0, 10 / 3]), rtol=0, atol=1e-14)
    assert torch.allclose(made["q.B"], rows([11 / 6, 0], [0, 5 / 3]), rtol=0, atol=1e-14)
    assert torch.allclose(made["head.bias"], rows([1.0])[0], rtol=0, atol=1e-14)


def test_the_norm_of_a_client_is_that_of_all_its_layers():
    """3 and 4 in two layers are 5."""
    one = {"q.A": rows([3.0]), "q.B": rows([1.0]), "v.A": rows([2.0]), "v.B": rows([2.0])}
    two = {"q.A": rows([0.0]), "q.B": rows([1.0]), "v.A": rows([5.0]), "v.B": rows([3.0])}
    start = {name: torch.ones_like(tensor) for name, tensor in one.items()}
    made = aggregated(hetlora(Federation(clients=2)), start, [Update(0, one, 1.0), Update(1, two, 1.0)]).model.tensors
    assert made["q.A"].item() == pytest.approx(5 * 3 / 20, abs=1e-14)
    assert made["v.B"].item() == pytest.approx((5 * 2 + 15 * 3) / 20, abs=1e-14)


@pytest.mark.parametrize(("weights", "low", "high"), [("examples", 3.0, 1.0), ("norm", 2.0, 10.0)])
def test_rankwise_each_row_is_the_mean_over_the_clients_that_have_it(weights, low, high):
    updates = [Update(0, LOW, 3.0), Update(1, HIGH, 1.0)]
    made = aggregated(hetlora(SMALL, weights=weights, rankwise=True), START, updates).model.tensors
    whole = low + high
    assert torch.allclose(made["q.A"], rows([3 * high / whole, 2 * low / whole, 0], [0, 0, 4]), rtol=0, atol=1e-14)
    assert torch.allclose(made["q.B"], rows([(low + 2 * high) / whole, 0], [0, 2]), rtol=0, atol=1e-14)
    assert torch.allclose(made["head.bias"], rows([6 * low / whole])[0], rtol=0, atol=1e-14)


@pytest.mark.parametrize("rankwise", [False, True])
def test_clients_of_equal_rank_and_norm_make_fedit(rankwise, federation, distance):
    one, other = federation(hetlora(RUN, penalty=0.0, rankwise=rankwise)), federation(FedAvg())
    updates, _ = one.play((0, 1, 2))
    for update in updates:
        for layer in LAYERS:
            b, a = update.tensors[f"{layer}.B"], update.tensors[f"{layer}.A"]
            update.tensors[f"{layer}.B"] = b / (b @ a).norm()
    one.take(updates)
    other.take([Update(u.client, u.tensors, 1.0) for u in updates])
    assert distance(one.model(), other.model()) <= 1e-13


@pytest.mark.parametrize("rankwise", [False, True])
def test_a_client_whose_product_is_zero_counts_as_nothing_beside_others(rankwise):
    zero = model(rows([9, 9, 9], [9, 9, 9]), torch.zeros(2, 2, dtype=torch.float64), bias=rows([9])[0])
    tiny = {name: 1e-3 * tensor for name, tensor in HIGH.items()}
    made = aggregated(hetlora(SMALL, rankwise=rankwise), START, [Update(0, zero, 1e6), Update(1, tiny, 1.0)]).model.tensors
    assert all(torch.allclose(made[name], tensor, rtol=0, atol=1e-9) for name, tensor in tiny.items())


def test_clients_that_all_have_a_zero_product_count_by_their_examples():
    zeros = [model(rows([k, k, k]), torch.zeros(2, 1, dtype=torch.float64), bias=rows([4 * k])[0]) for k in (0.0, 1.0)]
    made = aggregated(hetlora(SMALL), START, [Update(0, zeros[0], 1.0), Update(0, zeros[1], 3.0)]).model.tensors
    assert made["head.bias"].item() == pytest.approx(3, abs=1e-14)


@pytest.mark.parametrize("rankwise", [False, True])
def test_rows_that_no_client_of_a_round_was_sent_stay(rankwise):
    """Zeros in both factors would never learn again, though another client has that rank."""
    made = aggregated(hetlora(SMALL, rankwise=rankwise), START, [Update(0, LOW, 1.0)]).model.tensors
    assert torch.equal(made["q.A"], torch.cat([LOW["q.A"], START["q.A"][1:]]))
    assert torch.equal(made["q.B"], torch.cat([LOW["q.B"], START["q.B"][:, 1:]], 1))


def test_a_row_that_all_its_clients_pruned_is_gone():
    made = aggregated(hetlora(Federation(clients=2)), START, [Update(0, LOW, 1.0)]).model.tensors
    assert float(made["q.A"][1:].abs().max()) == float(made["q.B"][:, 1:].abs().max()) == 0


def test_each_client_gets_the_first_rows_of_its_rank(federation):
    run = federation(hetlora(MIXED)).advance(1)
    whole = run.strategy.broadcast(run.state, 1, None).tensors
    for client in (1, 2, 3):
        sent = run.strategy.broadcast(run.state, 1, client).tensors
        want = cut(whole, rank_of(sent))
        assert all(torch.equal(sent[name], tensor) for name, tensor in want.items())


def test_a_client_that_pruned_itself_gets_that_rank_from_then_on(federation):
    run = federation(hetlora(MIXED, penalty=0.0))
    updates, _ = run.play((1, 2, 3))
    run.take([Update(1, cut(updates[0].tensors, 2), 1.0), *updates[1:]])
    assert run.state.ranks == {1: 2}
    assert [rank_of(run.strategy.broadcast(run.state, 1, client).tensors) for client in (0, 1, 2, 3, None)] == [1, 2, 2, 3, 3]
    run.take(run.play((2, 3))[0])  # without client 1
    assert run.state.ranks == {1: 2}
    run.take([Update(1, cut(run.play((1,))[0][0].tensors, 1), 1.0)])
    assert run.state.ranks == {1: 1}


def test_a_device_of_more_ranks_than_the_server_has_not_pruned_itself(federation):
    run = federation(hetlora(Federation(clients=4, ranks=(8, 3, 2, 3)), penalty=0.0)).advance(2)
    assert run.state.ranks == {}
    assert rank_of(run.strategy.broadcast(run.state, 2, 0).tensors) == 3


WIDE = {"q.A": rows([1, 0], [0, 3], [4, 0]), "q.B": rows([1, 2, 2], [1, 1, 0])}  # ranks 2 and 3 of 3: ||B|| = 3, ||A|| = 5


def scaled(by: float, rank: int = 2) -> dict[str, torch.Tensor]:
    """WIDE with everything beyond the first `rank` ranks of B times `by`."""
    b = WIDE["q.B"].clone()
    b[:, rank:] *= by
    return {"q.A": WIDE["q.A"], "q.B": b}


def test_its_term_is_the_product_of_the_tails_norms():
    loss = hetlora(RUN, penalty=0.5, gamma=0.4).phase(0).loss  # keeps floor(1.2) = 1 of 3
    assert float(loss(WIDE, WIDE)) == pytest.approx(0.5 * 3 * 5, abs=1e-14)
    assert float(loss(WIDE | {name.replace("q", "v"): t for name, t in WIDE.items()}, WIDE)) == pytest.approx(0.5 * 2 * 15, abs=1e-13)


def test_its_term_has_a_gradient_where_b_is_zero():
    now = {"q.A": WIDE["q.A"].clone().requires_grad_(), "q.B": torch.zeros(2, 3, dtype=torch.float64).requires_grad_()}
    hetlora(RUN).phase(0).loss(now, now).backward()
    assert all(bool(tensor.grad.isfinite().all()) for tensor in now.values())


def test_a_client_prunes_itself_if_its_tail_became_smaller():
    finish = hetlora(RUN, gamma=0.7).phase(0).finish  # keeps floor(2.1) = 2 of 3
    pruned = finish(scaled(0.9), WIDE, 5)
    assert torch.equal(pruned["q.A"], WIDE["q.A"][:2])
    assert torch.equal(pruned["q.B"], WIDE["q.B"][:, :2])
    for by in (1.0, 1.1):
        assert finish(scaled(by), WIDE, 5)["q.A"].shape == (3, 2)


def test_pruning_goes_on_round_by_round_down_to_one():
    finish, now, seen = hetlora(RUN, gamma=0.99).phase(0).finish, WIDE, []
    for _ in range(4):
        now = finish({"q.A": now["q.A"], "q.B": 0.5 * now["q.B"]}, now, 5)
        seen.append(rank_of(now))
    assert seen == [2, 1, 1, 1]


@pytest.mark.parametrize(("gamma", "rank"), [(0.99, 1), (0.3, 2)])
def test_a_rank_that_no_client_can_give_up_is_not_held_down(gamma, rank):
    """floor(gamma r) may be zero, one rank always stays."""
    loss = hetlora(RUN, penalty=1.0, gamma=gamma).phase(0).loss
    now = {name: tensor.clone().requires_grad_() for name, tensor in cut(WIDE, rank).items()}
    loss(now, now).backward()
    assert float(now["q.A"].grad[0].abs().max()) == float(now["q.B"].grad[:, 0].abs().max()) == 0


def test_penalty_zero_trains_as_fedit_does():
    phase = hetlora(RUN, penalty=0.0).phase(0)
    assert phase.loss is None
    assert phase.finish is None


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_language_model_has_no_head_and_needs_none(kind, federation):
    run = federation(hetlora(MIXED), kind=kind).advance(2)
    assert {name[-2:] for name in run.state.model.tensors} == {".A", ".B"}


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ({"penalty": -1.0}, r"strategy\.penalty=-1\.0"),
        ({"penalty": float("nan")}, r"strategy\.penalty=nan"),
        ({"gamma": 0.0}, r"strategy\.gamma=0\.0"),
        ({"gamma": 1.0}, r"strategy\.gamma=1\.0"),
        ({"weights": "rank"}, r"strategy\.weights=rank"),
    ],
)
def test_bad_settings_are_named(more, field):
    with pytest.raises(ValueError, match=field):
        hetlora(RUN, **more)


def test_an_adapter_that_is_no_plain_product_is_refused():
    with pytest.raises(ValueError, match=r"core.*adapter=lora"):
        hetlora(RUN).init({"main": WIDE | {"q.R": torch.zeros(3, 3)}})
    with pytest.raises(ValueError, match=r"low-rank pairs.*adapter=lora"):
        hetlora(RUN).init({"main": {"head.weight": torch.zeros(2, 3)}})
