import weakref
from collections.abc import Iterator

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.aggregate import median, trimmed_mean, weighted, weighted_mean
from fedpeft.messages import Update

pytestmark = pytest.mark.fast
EVERY = {"weighted": weighted_mean, "trimmed": trimmed_mean(0.2), "median": median()}


def update(client: int, value: float, weight: float = 1.0, name: str = "q.A") -> Update:
    return Update(client, {name: torch.tensor([value], dtype=torch.float64)}, weight)


def test_the_weighted_mean_counts_examples():
    made = weighted_mean(iter([update(0, 1.0, weight=1), update(1, 5.0, weight=3)]))
    assert made["q.A"].tolist() == [4.0]  # (1 * 1 + 3 * 5) / 4
    assert weighted() is weighted_mean


@pytest.mark.parametrize(("mean", "low"), [(weighted_mean, 6.0), (median(), 5.0), (trimmed_mean(0.0), 5.0)])
def test_a_tensor_is_averaged_over_the_clients_that_sent_it(mean, low):
    deep = Update(0, {"low": torch.tensor([4.0]), "high": torch.tensor([10.0])}, 2.0)
    flat = Update(1, {"low": torch.tensor([6.0])}, 6.0)
    third = Update(2, {"low": torch.tensor([8.0 if mean is weighted_mean else 5.0])}, 2.0)
    made = mean([deep, flat, third])
    assert made["low"].tolist() == [low]  # weighted: (8 + 36 + 16) / 10; the others: of 4, 6, 5
    assert made["high"].tolist() == [10.0]


weights = st.floats(0.5, 1e6)
values = st.lists(st.floats(-1e3, 1e3, width=32), min_size=4, max_size=4)


@settings(deadline=None)
@given(rows=st.lists(st.tuples(values, weights), min_size=1, max_size=9), seed=st.integers(0, 99))
def test_the_weighted_mean_is_that_of_a_slow_sum_for_any_order_and_scale(rows, seed):
    updates = [Update(k, {"q.A": torch.tensor(v).reshape(2, 2)}, w) for k, (v, w) in enumerate(rows)]
    made = weighted_mean(updates)["q.A"]
    whole = sum(w for _, w in rows)
    slow = [sum(w * v[i] for v, w in rows) / whole for i in range(4)]
    assert np.allclose(made.flatten().tolist(), slow, rtol=1e-6, atol=1e-6)
    shuffled = [updates[i] for i in np.random.default_rng(seed).permutation(len(updates))]
    scaled = [Update(u.client, u.tensors, 7 * u.weight) for u in shuffled]
    assert torch.allclose(weighted_mean(scaled)["q.A"], made, rtol=1e-6, atol=1e-4)


@settings(deadline=None)
@given(rows=st.lists(values, min_size=1, max_size=12), trim=st.floats(0, 0.49))
def test_the_trimmed_mean_is_scipys(rows, trim):
    updates = [Update(k, {"q.A": torch.tensor(v, dtype=torch.float64)}, float(k + 1)) for k, v in enumerate(rows)]
    assert np.allclose(trimmed_mean(trim)(updates)["q.A"].numpy(), scipy.stats.trim_mean(np.array(rows), trim, axis=0), atol=1e-10)


@settings(deadline=None)
@given(rows=st.lists(values, min_size=1, max_size=12))
def test_the_median_is_numpys(rows):
    updates = [Update(k, {"q.A": torch.tensor(v, dtype=torch.float64)}, float(k + 1)) for k, v in enumerate(rows)]
    assert np.allclose(median()(updates)["q.A"].numpy(), np.median(np.array(rows), axis=0), atol=1e-10)


@pytest.mark.parametrize("bad", [1, 2])
def test_the_median_ignores_fewer_than_half(bad):
    updates = [update(k, 1e30 if k < bad else 2.0) for k in range(5)]
    assert median()(updates)["q.A"].tolist() == [2.0]
    assert trimmed_mean(0.4)(updates)["q.A"].tolist() == [2.0]


@pytest.mark.parametrize("trim", [-0.1, 0.51, float("nan")])
def test_a_share_to_trim_that_cannot_be_is_refused(trim):
    with pytest.raises(ValueError, match=r"mean\.trim"):
        trimmed_mean(trim)


@pytest.mark.parametrize("mean", EVERY.values(), ids=EVERY.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_mean_of_equal_tensors_has_their_bits_and_dtype(mean, dtype):
    same = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    made = mean([Update(k, {"q.A": same}, w) for k, w in enumerate((1.0, 3.0, 7.0))])["q.A"]
    assert made.dtype is dtype
    assert torch.equal(made, same)


@pytest.mark.parametrize("mean", EVERY.values(), ids=EVERY.keys())
def test_sums_are_made_in_float64(mean):
    updates = [Update(k, {"q.A": torch.tensor([v])}, 1.0) for k, v in enumerate((1e8, 1e8 + 8, 1e8 + 8, 1e8 + 8, 1e8 + 8))]
    made = mean(updates)["q.A"].double().item()
    exact = 1e8 + (6.4 if mean is weighted_mean else 8)
    assert abs(made - exact) <= 4  # half a unit in the last place of float32 there; a float32 sum of five is off by 16 and more


@pytest.mark.parametrize("mean", EVERY.values(), ids=EVERY.keys())
def test_no_update_is_an_error_that_teaches(mean):
    with pytest.raises(ValueError, match="did every client fail"):
        mean(iter([]))


@pytest.mark.parametrize("mean", EVERY.values(), ids=EVERY.keys())
def test_the_updates_are_left_as_they_were(mean):
    updates = [update(k, float(k), k + 1.0) for k in range(3)]
    mean(updates)
    assert [u.tensors["q.A"].item() for u in updates] == [0, 1, 2]


def test_weights_that_are_all_zero_have_no_mean():
    with pytest.raises(ValueError, match="carries weight"):
        weighted_mean([update(0, 1.0, weight=0), update(1, 2.0, weight=0)])
    assert weighted_mean([update(0, 1.0, weight=0), update(1, 2.0, weight=2)])["q.A"].tolist() == [2.0]


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), 1.7e308])
def test_a_weight_that_is_no_number_does_not_become_a_model_in_silence(weight):
    with pytest.raises(ValueError, match="weight"):
        weighted_mean([update(0, 1.0, weight), update(1, 2.0, weight)])


def test_the_mean_holds_one_update_at_a_time():
    alive: weakref.WeakSet[Update] = weakref.WeakSet()
    arrays: list[weakref.ref[torch.Tensor]] = []
    before_next = []

    def arriving() -> Iterator[Update]:
        for client in range(6):
            before_next.append((len(alive), sum(array() is not None for array in arrays)))
            one = update(client, float(client))
            alive.add(one)
            arrays.append(weakref.ref(one.tensors["q.A"]))
            yield one
            del one

    assert weighted_mean(arriving())["q.A"].tolist() == [2.5]
    assert before_next == [(0, 0), *[(1, 1)] * 5]  # the one before is let go when the next comes, whatever their number
