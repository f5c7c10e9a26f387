"""Base deltas: chunks of products that grow until they fill a layer, and are folded then."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_products import close, drawn

from fedpeft.lowrank import appended

pytestmark = pytest.mark.fast


seeds = st.integers(0, 10**6)


def dense(chunks, layer):
    return sum(chunk[layer].dense() for chunk in chunks if layer in chunk)


@settings(deadline=None, max_examples=50)
@given(m=st.integers(2, 7), n=st.integers(2, 7), ranks=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=8), seed=seeds)
def test_appended_chunks_keep_their_sum_and_their_bound(m, n, ranks, seed):
    sizes = {"q": (m, n), "v": (n, m + 1)}
    chunks, sums = (), {layer: torch.zeros(size, dtype=torch.float64) for layer, size in sizes.items()}
    for turn, widths in enumerate(ranks):
        wide = zip(sizes.items(), widths, strict=True)
        new = {layer: drawn(a, width, b, seed + turn) for (layer, (a, b)), width in wide if width}  # 0: the layer is not in it
        chunks = appended(chunks, new)
        for layer, part in new.items():
            sums[layer] += part.dense()
        assert all(chunks)
        for layer, (a, b) in sizes.items():
            assert close(dense(chunks, layer) + torch.zeros(a, b), sums[layer])
            assert sum(chunk[layer].rank for chunk in chunks if layer in chunk) <= min(a, b)


def test_a_chunk_that_fits_is_appended_and_one_that_does_not_is_folded():
    q1, q2, q3, v = drawn(3, 1, 5, 1), drawn(3, 2, 5, 2), drawn(3, 1, 5, 3), drawn(8, 2, 8, 4)
    first = appended((), {"q": q1, "v": v})
    second = appended(first, {"q": q2})  # exactly min(m, n): still stacked
    assert [sorted(chunk) for chunk in second] == [["q", "v"], ["q"]]
    assert second[0]["q"] is q1
    third = appended(second, {"q": q3})
    assert [sorted(chunk) for chunk in third] == [["v"], ["q"]]  # the second, left empty, is gone
    assert third[0]["v"] is v
    assert third[1]["q"].rank == 3
    assert close(third[1]["q"].dense(), q1.dense() + q2.dense() + q3.dense())
    assert [sorted(chunk) for chunk in first] == [["q", "v"]]
    assert [sorted(chunk) for chunk in second] == [["q", "v"], ["q"]]  # what was sent is never edited
    assert appended(third, {}) == third
