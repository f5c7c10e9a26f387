import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.codecs import largest as module
from fedpeft.codecs.largest import check, kept, largest, share, shares

pytestmark = pytest.mark.fast


def by_sorting(vector: np.ndarray, count: int) -> list[int]:
    """The first `count` of a stable sort by falling magnitude."""
    return sorted(np.argsort(-np.abs(vector.astype(np.float64)), kind="stable")[:count].tolist())


KINDS = ("normal", "few values", "zeros but few", "one value", "heavy", "subnormal")


def drawn(kind: str, entries: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    normal = rng.standard_normal(entries)
    made = {
        "normal": normal,
        "few values": np.round(normal),
        "zeros but few": normal * (rng.random(entries) < 0.01),
        "one value": np.where(normal < 0, -1.0, 1.0),
        "heavy": normal**9,
        "subnormal": normal * 1e-43,
    }
    return made[kind].astype(np.float32)


@settings(deadline=None, max_examples=200)
@given(
    kind=st.sampled_from(KINDS),
    entries=st.integers(0, 300),
    seed=st.integers(0, 10**6),
    part=st.floats(0, 1),
)
def test_the_largest_are_those_of_a_stable_sort(kind, entries, seed, part):
    vector = drawn(kind, entries, seed)
    count = round(part * entries)
    assert largest(vector, count).tolist() == by_sorting(vector, count)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", [0.001, 0.05, 0.5, 0.999])
def test_the_largest_of_many_chunks_are_those_of_a_stable_sort(kind, part, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 1000)
    monkeypatch.setattr(module, "SAMPLE", 500)
    vector = drawn(kind, 20_500, 3)
    assert largest(vector, int(part * 20_500)).tolist() == by_sorting(vector, int(part * 20_500))


def test_a_sample_that_misleads_changes_nothing(monkeypatch):
    monkeypatch.setattr(module, "SAMPLE", 10)
    vector = np.full(1000, 0.1, np.float32)
    vector[::100] = 50.0  # all that the sample sees
    vector[3] = 1.0
    assert largest(vector, 300).tolist() == by_sorting(vector, 300)


def test_each_tensor_or_all_together():
    vector = np.array([1, 2, 3, 4, 10, 20, 30, 40], np.float32)
    assert kept(vector, [4, 0, 4], 0.5, "global").tolist() == [4, 5, 6, 7]
    assert kept(vector, [4, 0, 4], 0.5, "tensor").tolist() == [2, 3, 6, 7]
    assert kept(vector[:0], [], 0.5, "tensor").tolist() == kept(vector[:0], [0], 0.5, "global").tolist() == []


@pytest.mark.parametrize(
    ("density", "entries", "want"), [(0.29, 100, 29), (0.05, 19, 1), (0.05, 40, 2), (0.57, 100, 57), (1, 7, 7), (1e-9, 10, 1), (0.1, 0, 0)]
)
def test_a_share_is_that_of_the_decimal(density, entries, want):
    assert share(density, entries) == want


def test_shares_add_up():
    assert shares([100, 3, 0], 0.1, "tensor") == 11
    assert shares([100, 3, 0], 0.1, "global") == 10


@pytest.mark.parametrize("density", [0, -0.1, 1.1, float("nan")])
def test_a_density_that_is_no_share_is_refused(density):
    with pytest.raises(ValueError, match=r"^density="):
        check(density)


def test_a_scope_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match=r"^scope=layer"):
        check(0.1, "layer")
