import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.lowrank import LowRank, pair, total

pytestmark = pytest.mark.fast


def product(m: int, rank: int, n: int, seed: int = 0) -> LowRank:
    rng = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(m, rank, generator=rng, dtype=torch.float64), torch.randn(rank, n, generator=rng, dtype=torch.float64))


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-12) -> bool:
    return bool((a - b).norm() <= tolerance * (1 + b.norm()))


sides = st.integers(1, 9)


@settings(deadline=None)
@given(m=sides, n=sides, width=sides, rank=sides, seed=st.integers(0, 10**6))
def test_the_error_of_a_truncation_is_the_tail_of_the_dense_svd(m, n, width, rank, seed):
    whole = product(m, width, n, seed)
    cut = whole.truncate(rank)
    u, s, vt = torch.linalg.svd(whole.dense(), full_matrices=False)
    assert cut.B.shape == (m, rank)
    assert cut.A.shape == (rank, n)  # also where the product has a lower rank: shapes must not depend on data
    assert abs((whole.dense() - cut.dense()).norm() - s[rank:].square().sum().sqrt()) <= 1e-11 * (1 + s[0])
    assert close(cut.dense(), (u[:, :rank] * s[:rank]) @ vt[:rank], 1e-10)


@settings(deadline=None)
@given(m=sides, n=sides, width=sides, rank=sides, seed=st.integers(0, 10**6))
def test_the_singular_values_lie_in_b_and_a_is_orthonormal(m, n, width, rank, seed):
    cut = product(m, width, n, seed).truncate(rank)
    kept = min(m, n, width, rank)
    gram_a, gram_b = cut.A @ cut.A.T, cut.B.T @ cut.B
    eye = torch.diag((torch.arange(rank) < kept).double())
    s = torch.linalg.svdvals(product(m, width, n, seed).dense())[:kept]
    assert close(gram_a, eye)
    assert close(gram_b, torch.diag(torch.cat([s.square(), torch.zeros(rank - kept, dtype=torch.float64)])), 1e-10)


def test_a_product_of_lower_rank_is_padded_with_zeros():
    cut = product(4, 2, 3).truncate(5)
    assert torch.equal(cut.B[:, 3:], torch.zeros(4, 2, dtype=torch.float64))
    assert torch.equal(cut.A[3:], torch.zeros(2, 3, dtype=torch.float64))
    assert close(cut.dense(), product(4, 2, 3).dense())


@pytest.mark.parametrize("seed", range(5))
def test_signs_do_not_depend_on_those_of_the_factors(seed):
    whole, turn = product(6, 3, 5, seed), torch.diag(torch.tensor([-1.0, 1.0, -1.0], dtype=torch.float64))
    turned = LowRank(whole.B @ turn, turn @ whole.A)  # the same product
    one, other = whole.truncate(3), turned.truncate(3)
    assert close(one.B, other.B)
    assert close(one.A, other.A)
    largest = one.B.gather(0, one.B.abs().argmax(0, keepdim=True))
    assert (largest > 0).all()


def test_equal_inputs_give_equal_bits():
    one, other = product(6, 4, 5).truncate(2), product(6, 4, 5).truncate(2)
    assert torch.equal(one.B, other.B)
    assert torch.equal(one.A, other.A)


def test_a_product_of_zeros_is_truncated_to_zeros():
    cut = LowRank(torch.zeros(4, 2), torch.randn(2, 3)).truncate(2)
    assert torch.equal(cut.dense(), torch.zeros(4, 3))
    assert torch.isfinite(cut.A).all()


def test_a_truncation_in_half_precision_is_as_good_as_one_in_float64():
    whole = product(8, 3, 6)
    half = LowRank(whole.B.bfloat16(), whole.A.bfloat16())
    exact = LowRank(half.B.double(), half.A.double()).truncate(2)
    cut = half.truncate(2)
    assert cut.B.dtype is torch.bfloat16
    assert torch.equal(cut.B, exact.B.bfloat16())
    assert torch.equal(cut.A, exact.A.bfloat16())


@settings(deadline=None)
@given(m=sides, n=sides, widths=st.lists(sides, min_size=1, max_size=6), seed=st.integers(0, 10**6))
def test_the_total_is_the_sum_also_past_full_rank(m, n, widths, seed):
    parts = [(0.3 * index - 0.5, product(m, width, n, seed + index)) for index, width in enumerate(widths)]
    whole = total(iter(parts))
    assert whole.rank == (sum(widths) if sum(widths) <= min(m, n) else min(m, n))
    assert close(whole.dense(), sum(weight * part.dense() for weight, part in parts), 1e-11)


def test_a_total_weighs_one_side_only():
    part = LowRank(torch.ones(2, 1), torch.ones(1, 3))
    assert torch.equal(total([(0.25, part)]).dense(), torch.full((2, 3), 0.25))


@settings(deadline=None)
@given(m=sides, n=sides, r=sides, q=sides, seed=st.integers(0, 10**6))
def test_inner_products_and_norms_by_grams_are_those_of_the_dense_products(m, n, r, q, seed):
    one, other = product(m, r, n, seed), product(m, q, n, seed + 1)
    dense = float((one.dense() * other.dense()).sum())
    assert abs(one.inner(other) - dense) <= 1e-11 * (1 + one.norm() * other.norm())
    assert abs(one.norm() - float(one.dense().norm())) <= 1e-11 * (1 + one.norm())
    assert one.rank == r


def test_the_norm_of_products_that_cancel_is_not_the_root_of_a_negative_number():
    part = product(5, 2, 4)
    assert total([(1.0, part), (-1.0, part)]).norm() <= 1e-6


def test_the_pair_of_a_layer_is_b_times_a():
    tensors = {"q.A": torch.tensor([[1.0, 2.0]]), "q.B": torch.tensor([[3.0], [4.0], [5.0]]), "v.A": torch.zeros(1, 2)}
    assert pair(tensors, "q").dense().tolist() == [[3, 6], [4, 8], [5, 10]]
