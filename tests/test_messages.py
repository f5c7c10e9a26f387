import pytest
import torch

from fedpeft.messages import Broadcast, Update, checked
from fedpeft.tensors import everything, is_a, not_a

pytestmark = pytest.mark.fast
SENT = Broadcast({
    "q.A": torch.zeros(2, 3), "q.B": torch.zeros(4, 2), "head.weight": torch.zeros(2, 4), "step": torch.zeros((), dtype=torch.int64),
    "control/q.A": torch.zeros(2, 3),
})  # fmt: skip
GOOD = {name: tensor + 1 for name, tensor in SENT.tensors.items() if "/" not in name}


def update(tensors=None, weight=5.0):
    return Update(3, GOOD if tensors is None else tensors, weight)


def refused(tensors=None, weight=5.0, *, shares=everything, equal=True):
    with pytest.raises(ValueError, match="client 3") as fault:
        checked(update(tensors, weight), SENT, shares, equal=equal)
    return str(fault.value)


def test_a_good_update_comes_back_itself():
    good = update()
    assert checked(good, SENT, everything, equal=True) is good
    assert checked(good, SENT, everything, equal=False) is good


def test_only_what_the_phase_shares_is_asked_for():
    shared = {"q.A": GOOD["q.A"]}
    assert checked(update(shared), SENT, is_a, equal=True).tensors is shared
    assert "unasked head.weight, q.B, step" in refused(shares=is_a)


def test_a_tensor_of_the_strategy_may_come_and_need_not():
    own = GOOD | {"control/q.A": torch.ones(2, 3)}
    assert checked(update(own), SENT, everything, equal=True)
    assert checked(update(GOOD), SENT, everything, equal=True)
    assert "unasked control/q.A" in refused(own, shares=lambda name: name != "control/q.A")
    assert "unasked control/q.A" in refused({n: t for n, t in own.items() if not_a(n) or "/" in n}, shares=not_a)


def test_a_tensor_that_no_strategy_sent_is_refused_so_that_no_client_adds_to_the_base():
    for name in ("sketch/q", "base_delta/00000/q.A"):
        assert f"sent {name}, which no strategy sent it" in refused(GOOD | {name: torch.ones(7)})


def test_a_tensor_of_the_strategy_that_was_sent_has_the_shape_it_was_sent_in():
    assert "control/q.A is (9,)" in refused(GOOD | {"control/q.A": torch.ones(9)})


def test_missing_and_unasked_tensors_are_named_and_long_lists_cut():
    missing = refused({name: tensor for name, tensor in GOOD.items() if name != "q.B"})
    assert "missing q.B, unasked none" in missing
    assert "same strategy, adapter and model" in missing
    assert "missing none, unasked more0, more1, more2 and 6 more" in refused(GOOD | {f"more{i}": torch.zeros(1) for i in range(9)})
    assert "and 1 more" in refused({})


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), float("-inf"), -1.0])
def test_a_weight_that_is_no_number_of_examples_is_refused(weight):
    assert f"weight {weight}" in refused(weight=weight)


@pytest.mark.parametrize("weight", [0.0, 1e300])
def test_a_weight_that_would_spoil_the_mean_of_everyone_is_refused(weight):
    """All of weight 0 have no mean, and the sum of two huge weights is infinite: one client must not end the run."""
    assert "weight" in refused(weight=weight)


@pytest.mark.parametrize("shape", [(2, 4), (3, 3), (3,), (1, 2, 3), (6,), ()])
def test_a_tensor_that_is_larger_or_of_another_dimension_is_refused(shape):
    for equal in (True, False):
        said = refused(GOOD | {"q.A": torch.zeros(shape)}, equal=equal)
        assert "q.A" in said
        assert "sent was (2, 3)" in said


def test_a_smaller_rank_is_welcome_only_where_shapes_may_differ():
    pruned = GOOD | {"q.A": torch.zeros(1, 3), "q.B": torch.zeros(4, 1)}
    assert checked(update(pruned), SENT, everything, equal=False)
    assert "q.A is (1, 3)" in refused(pruned, equal=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int32])
def test_another_dtype_is_refused(dtype):
    for equal in (True, False):
        assert str(dtype) in refused(GOOD | {"q.A": torch.zeros(2, 3, dtype=dtype)}, equal=equal)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["q.A", "head.weight", "control/q.A"])
def test_a_value_that_is_not_finite_is_refused_with_what_to_do(name, value):
    spoiled = torch.zeros(SENT.tensors[name].shape)
    spoiled[0, -1] = value
    said = refused(GOOD | {name: spoiled})
    assert f"{name} is not finite" in said
    assert "train.lr" in said


def test_messages_cannot_be_changed_by_assignment():
    with pytest.raises(AttributeError):
        SENT.tensors = {}
    with pytest.raises(AttributeError):
        update().weight = 9.0
