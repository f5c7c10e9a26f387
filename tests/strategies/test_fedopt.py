import pytest
import torch

from fedpeft.aggregate import weighted_mean
from fedpeft.messages import Broadcast, Update
from strategies.fedopt import FedOpt, State
from strategies.ffa import ffa_lora

pytestmark = pytest.mark.fast


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def two_steps(strategy: FedOpt, changes: tuple[float, float], start: float = 10.0) -> list[float]:
    """The model after each of two rounds in which two clients of weights 1 and 3 moved by `change` on average."""
    state, seen = strategy.init({"main": {"q.A": double(start)}}), []
    for round, change in enumerate(changes):
        now = state.model.tensors["q.A"]
        updates = [Update(0, {"q.A": now + change - 3}, 1.0), Update(1, {"q.A": now + change + 1}, 3.0)]
        state = strategy.aggregate(state, round, updates, weighted_mean)
        seen.append(state.model.tensors["q.A"].item())
    return seen


def test_momentum_adds_the_change_before_at_beta1():
    first, second = two_steps(FedOpt("momentum", lr=0.5, beta1=0.9), (2.0, -1.0))
    assert first == pytest.approx(10 + 0.5 * 2, abs=1e-12)
    assert second == pytest.approx(11 + 0.5 * (0.9 * 2 - 1), abs=1e-12)


def test_adam_has_no_bias_correction_and_v_starts_at_tau_squared():
    """By hand, with beta1 = beta2 = 0.5 and tau = 1: m = 1, v = 0.5 + 2 = 2.5; then m = 0.5 - 0.5 = 0, v = 1.25 + 0.5 = 1.75."""
    first, second = two_steps(FedOpt("adam", lr=0.1, beta1=0.5, beta2=0.5, tau=1.0), (2.0, -1.0))
    assert first == pytest.approx(10 + 0.1 * 1 / (2.5**0.5 + 1), abs=1e-12)
    assert second == pytest.approx(first, abs=1e-12)


def test_adam_takes_two_steps_by_hand():
    first, second = two_steps(FedOpt("adam", lr=0.1, beta1=0.9, beta2=0.99, tau=0.1), (2.0, 1.0))
    m1, v1 = 0.1 * 2, 0.99 * 0.01 + 0.01 * 4
    m2, v2 = 0.9 * m1 + 0.1 * 1, 0.99 * v1 + 0.01 * 1
    assert first == pytest.approx(10 + 0.1 * m1 / (v1**0.5 + 0.1), abs=1e-12)
    assert second == pytest.approx(first + 0.1 * m2 / (v2**0.5 + 0.1), abs=1e-12)


def test_yogi_moves_v_towards_the_square_by_a_share_of_the_square():
    first, second = two_steps(FedOpt("yogi", lr=0.1, beta1=0.9, beta2=0.75, tau=1.0), (2.0, 0.5))
    m1, v1 = 0.1 * 2, 1 + 0.25 * 4  # 1 is less than 4: up by a quarter of 4
    m2, v2 = 0.9 * m1 + 0.1 * 0.5, 2 - 0.25 * 0.25  # 2 is more than 0.25: down by a quarter of 0.25
    assert first == pytest.approx(10 + 0.1 * m1 / (v1**0.5 + 1), abs=1e-12)
    assert second == pytest.approx(first + 0.1 * m2 / (v2**0.5 + 1), abs=1e-12)


@pytest.mark.parametrize("optimizer", ["momentum", "adam", "yogi"])
def test_no_change_is_no_step(optimizer):
    assert two_steps(FedOpt(optimizer), (0.0, 0.0)) == [10.0, 10.0]


def test_momentum_of_rate_one_without_memory_is_fedavg():
    assert two_steps(FedOpt("momentum", lr=1.0, beta1=0.0), (2.0, -1.0)) == [12.0, 11.0]


@pytest.mark.parametrize("optimizer", ["adam", "yogi"])
def test_a_step_is_at_most_the_rate_for_a_change_that_stays(optimizer):
    strategy = FedOpt(optimizer, lr=0.5)
    state = strategy.init({"main": {"q.A": double(0.0, 0.0)}})
    for round in range(300):
        now = state.model.tensors["q.A"]
        state = strategy.aggregate(state, round, [Update(0, {"q.A": now + double(1000.0, -1e-5)}, 1.0)], weighted_mean)
        step = state.model.tensors["q.A"] - now
    assert abs(step[0]) == pytest.approx(0.5, rel=0.05)  # m and sqrt(v) are both the change: the scale is gone
    assert abs(step[1]) < 0.01 * 0.5  # tau keeps a tensor that hardly moves from being blown up


def test_tensors_that_are_not_shared_have_no_moments_and_stay():
    strategy = FedOpt(phase=ffa_lora().phase)
    state = strategy.init({"main": {"q.A": double(1.0), "q.B": double(2.0)}})
    new = strategy.aggregate(state, 0, [Update(0, {"q.B": double(3.0)}, 1.0)], weighted_mean)
    assert torch.equal(new.model.tensors["q.A"], double(1.0))
    assert set(new.m) == set(new.v) == {"q.B"}


def test_moments_of_a_tensor_that_rests_a_round_are_kept():
    strategy = FedOpt("momentum", lr=1.0, beta1=0.5)
    state = strategy.init({"main": {"q.A": double(0.0), "q.B": double(0.0)}})
    for round, moving in enumerate(("q.A", "q.B", "q.A")):
        now = state.model.tensors[moving]
        state = strategy.aggregate(state, round, [Update(0, {moving: now + 4}, 1.0)], weighted_mean)
    assert state.model.tensors["q.A"].item() == 4 + (0.5 * 4 + 4)
    assert state.model.tensors["q.B"].item() == 4


def test_its_state_begins_without_moments_and_all_clients_get_the_model():
    strategy = FedOpt()
    state = strategy.init({"main": {"q.A": double(1.0)}})
    assert isinstance(state, State)
    assert isinstance(state.model, Broadcast)
    assert (state.m, state.v) == ({}, {})
    assert {id(strategy.broadcast(state, 0, client)) for client in (None, 0, 5)} == {id(state.model)}


@pytest.mark.parametrize("field", ["lr", "beta1", "beta2", "tau"])
@pytest.mark.parametrize("value", [-0.1, float("nan")])
def test_bad_settings_are_named(field, value):
    with pytest.raises(ValueError, match=rf"strategy\.{field}={value}"):
        FedOpt(**{field: value})


def test_tau_of_zero_is_refused_since_what_nobody_moved_would_be_divided_by_it():
    with pytest.raises(ValueError, match=r"strategy\.tau=0\.0: needed is more than 0"):
        FedOpt(tau=0.0)


def test_an_optimizer_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match=r"strategy\.optimizer=sgd: needed is momentum, adam or yogi"):
        FedOpt("sgd")
