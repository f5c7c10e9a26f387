import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_products import close, drawn

from fedpeft.lowrank import LowRank, cosine, cut, distance, fresh, nearest, pad, pair, product, rank_of, total, unpair

pytestmark = pytest.mark.fast


def same(one: LowRank, other: LowRank) -> bool:
    return torch.equal(one.B, other.B) and torch.equal(one.A, other.A)


sides = st.integers(1, 9)
seeds = st.integers(0, 10**6)


# svd, truncate


@settings(deadline=None)
@given(m=sides, n=sides, width=sides, seed=seeds)
def test_the_svd_is_the_dense_one_below_and_past_full_rank(m, n, width, seed):
    whole = drawn(m, width, n, seed)
    u, s, vt = whole.svd()
    q = min(m, n, width)
    assert u.shape == (m, q)
    assert vt.shape == (q, n)
    assert u.dtype is s.dtype is vt.dtype is torch.float64
    assert close(s, torch.linalg.svdvals(whole.dense())[:q])
    assert close(whole.singular_values(), s)
    assert close((u * s) @ vt, whole.dense())
    assert close(u.T @ u, torch.eye(q, dtype=torch.float64))
    assert close(vt @ vt.T, torch.eye(q, dtype=torch.float64))
    assert (u.gather(0, u.abs().argmax(0, keepdim=True)) > 0).all()


@pytest.mark.parametrize("width", [3, 4, 5, 6, 9])  # min(m, n) = 5 is where the route changes
def test_both_routes_give_the_same_triplets(width):
    whole = drawn(7, width, 5)
    u, s, vt = whole.svd()
    du, ds, dvt = torch.linalg.svd(whole.dense(), full_matrices=False)
    sign = (u * du[:, : len(s)]).sum(0).sign()
    assert close(s, ds[: len(s)])
    assert close(u, du[:, : len(s)] * sign, 1e-11)
    assert close(vt, dvt[: len(s)] * sign[:, None], 1e-11)


@settings(deadline=None)
@given(m=sides, n=sides, width=sides, rank=sides, seed=seeds)
def test_the_error_of_a_truncation_is_the_tail_of_the_dense_svd(m, n, width, rank, seed):
    whole = drawn(m, width, n, seed)
    short = whole.truncate(rank)
    u, s, vt = torch.linalg.svd(whole.dense(), full_matrices=False)
    assert short.B.shape == (m, rank)
    assert short.A.shape == (rank, n)  # also where the product has a lower rank: shapes must not depend on data
    assert abs((whole.dense() - short.dense()).norm() - s[rank:].square().sum().sqrt()) <= 1e-11 * (1 + s[0])
    assert close(short.dense(), (u[:, :rank] * s[:rank]) @ vt[:rank], 1e-10)


@settings(deadline=None)
@given(m=sides, n=sides, width=sides, rank=sides, seed=seeds)
def test_the_singular_values_lie_in_b_and_a_is_orthonormal(m, n, width, rank, seed):
    short = drawn(m, width, n, seed).truncate(rank)
    kept = min(m, n, width, rank)
    gram_a, gram_b = short.A @ short.A.T, short.B.T @ short.B
    eye = torch.diag((torch.arange(rank) < kept).double())
    s = torch.linalg.svdvals(drawn(m, width, n, seed).dense())[:kept]
    assert close(gram_a, eye)
    assert close(gram_b, torch.diag(torch.cat([s.square(), torch.zeros(rank - kept, dtype=torch.float64)])), 1e-10)


def test_a_product_of_lower_rank_is_padded_with_zeros():
    short = drawn(4, 2, 3).truncate(5)
    assert torch.equal(short.B[:, 2:], torch.zeros(4, 3, dtype=torch.float64))
    assert torch.equal(short.A[2:], torch.zeros(3, 3, dtype=torch.float64))
    assert close(short.dense(), drawn(4, 2, 3).dense())


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("width", [3, 6])
def test_signs_do_not_depend_on_those_of_the_factors(seed, width):
    whole, turn = drawn(6, width, 5, seed), torch.diag((-1.0) ** torch.arange(width)).double()
    turned = LowRank(whole.B @ turn, turn @ whole.A)  # the same product
    one, other = whole.truncate(3), turned.truncate(3)
    assert close(one.B, other.B)
    assert close(one.A, other.A)
    largest = one.B.gather(0, one.B.abs().argmax(0, keepdim=True))
    assert (largest > 0).all()


@pytest.mark.parametrize("width", [4, 5, 12])
def test_equal_inputs_give_equal_bits(width):
    for one, other in zip(drawn(6, width, 5).svd(), drawn(6, width, 5).svd(), strict=True):
        assert torch.equal(one, other)
    assert same(drawn(6, width, 5).truncate(2), drawn(6, width, 5).truncate(2))
    parts = [(0.2, drawn(6, width, 5, 1)), (-0.4, drawn(6, 2, 5, 2))]
    assert same(total(parts).truncate(3), total(parts).truncate(3))


@pytest.mark.parametrize("width", [1, 2, 4])
def test_a_product_of_zeros_is_truncated_to_zeros(width):
    for nothing in (LowRank(torch.zeros(4, width), torch.randn(width, 3)), LowRank(torch.zeros(4, width), torch.zeros(width, 3))):
        for rank in (1, 2, 5):
            short = nothing.truncate(rank)
            assert short.B.shape == (4, rank)
            assert torch.equal(short.dense(), torch.zeros(4, 3))
            assert torch.isfinite(short.A).all()
        assert nothing.energy_rank(0.9) == 1


def test_a_product_of_width_zero_is_a_zero_product():
    nothing = LowRank(torch.zeros(4, 0), torch.zeros(0, 3))
    assert [tuple(t.shape) for t in nothing.svd()] == [(4, 0), (0,), (0, 3)]
    assert torch.equal(nothing.truncate(2).dense(), torch.zeros(4, 3))
    assert nothing.norm() == 0
    assert nothing.energy_rank(0.5) == 1
    assert total([(1.0, nothing), (0.5, nothing)]).rank == 0


def test_a_truncation_in_half_precision_is_as_good_as_one_in_float64():
    whole = drawn(8, 3, 6)
    half = LowRank(whole.B.bfloat16(), whole.A.bfloat16())
    exact = LowRank(half.B.double(), half.A.double()).truncate(2)
    short = half.truncate(2)
    assert short.B.dtype is torch.bfloat16
    assert torch.equal(short.B, exact.B.bfloat16())
    assert torch.equal(short.A, exact.A.bfloat16())


def test_a_rank_below_one_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        drawn(3, 2, 3).truncate(0)


def test_the_energy_rank_is_the_smallest_that_holds_the_share():
    whole = LowRank(torch.eye(5, 4).double() * torch.tensor([4.0, 2, 1, 0]), torch.eye(4, 6).double())  # energies 16, 4, 1, 0
    assert [whole.energy_rank(share) for share in (0.1, 0.76, 0.77, 0.95, 0.96, 1.0)] == [1, 1, 2, 2, 3, 3]
    for share in (0.0, 1.1, math.nan):
        with pytest.raises(ValueError, match="share"):
            whole.energy_rank(share)


def test_the_transpose_is_that_of_the_product():
    whole = drawn(4, 2, 3)
    assert whole.T.shape == (3, 4)
    assert close(whole.T.dense(), whole.dense().T)


# total


@settings(deadline=None)
@given(m=sides, n=sides, widths=st.lists(sides, min_size=1, max_size=6), seed=seeds)
def test_the_total_is_the_sum_also_past_full_rank(m, n, widths, seed):
    parts = [(0.3 * index - 0.5, drawn(m, width, n, seed + index)) for index, width in enumerate(widths)]
    whole = total(iter(parts))
    assert whole.rank == (sum(widths) if sum(widths) <= min(m, n) else min(m, n))
    assert close(whole.dense(), sum(weight * part.dense() for weight, part in parts))


@pytest.mark.parametrize(("m", "n"), [(5, 8), (8, 5), (5, 5)])
@pytest.mark.parametrize("last", [1, 2, 3])  # stacked rank 4, 5, 6 with min(m, n) = 5
def test_the_total_changes_its_route_past_the_smaller_side(m, n, last):
    parts = [(0.7, drawn(m, 1, n, 1)), (-0.2, drawn(m, 2, n, 2)), (0.5, drawn(m, last, n, 3))]
    whole = total(parts)
    dense = sum(weight * part.dense() for weight, part in parts)
    eye = torch.eye(5, dtype=torch.float64)
    folded = torch.equal(whole.A, eye) if n <= m else torch.equal(whole.B, eye)
    assert folded == (3 + last > 5)
    assert close(whole.dense(), dense)
    u, s, vt = torch.linalg.svd(dense, full_matrices=False)
    assert close(whole.truncate(2).dense(), (u[:, :2] * s[:2]) @ vt[:2])
    assert close(whole.singular_values(), s[: whole.rank])


def test_a_total_past_full_rank_holds_one_product_at_a_time():
    alive = 0

    class Counted(LowRank):
        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    def parts():
        nonlocal alive
        for seed in range(50):
            alive += 1
            assert alive <= 3  # the one made, the one still named by the loop, and the first
            one = drawn(4, 3, 5, seed)
            yield 0.1, Counted(one.B, one.A)

    assert close(total(parts()).dense(), sum(0.1 * drawn(4, 3, 5, seed).dense() for seed in range(50)))


def test_a_total_in_float32_is_summed_in_float64():
    parts = [(weight, LowRank(p.B.float(), p.A.float())) for weight, p in ((1.0, drawn(6, 4, 5, 1)), (-0.999, drawn(6, 4, 5, 1)))]
    exact = total((weight, LowRank(p.B.double(), p.A.double())) for weight, p in parts)
    whole = total(iter(parts))
    assert whole.B.dtype is whole.A.dtype is torch.float32
    assert torch.equal(whole.B, exact.B.float())
    assert torch.equal(whole.A, exact.A.float())


def test_a_total_of_two_dtypes_has_the_wider():
    one = drawn(4, 1, 3)
    assert (
        total([(1.0, LowRank(one.B.bfloat16(), one.A.bfloat16())), (1.0, LowRank(one.B.float(), one.A.float()))]).B.dtype is torch.float32
    )


def test_a_total_leaves_its_parts_as_they_are():
    part = drawn(3, 2, 3)
    before = LowRank(part.B.clone(), part.A.clone())
    total([(2.0, part)]).B.zero_()
    total([(2.0, part)] * 4).A.zero_()
    assert same(part, before)


def test_a_total_weighs_one_side_only():
    part = LowRank(torch.ones(2, 1), torch.ones(1, 3))
    assert torch.equal(total([(0.25, part)]).dense(), torch.full((2, 3), 0.25))


def test_a_total_of_nothing_or_of_two_layers_is_refused():
    with pytest.raises(ValueError, match="no product to add"):
        total(iter(()))
    with pytest.raises(ValueError, match=r"\(4, 3\), the first was \(3, 4\)"):
        total([(1.0, drawn(3, 1, 4)), (1.0, drawn(4, 1, 3))])


# inner, norm, distance, cosine


@settings(deadline=None)
@given(m=sides, n=sides, r=sides, q=sides, seed=seeds)
def test_inner_products_norms_and_distances_are_those_of_the_dense_products(m, n, r, q, seed):
    one, other = drawn(m, r, n, seed), drawn(m, q, n, seed + 1)
    dense = float((one.dense() * other.dense()).sum())
    scale = one.norm() * other.norm()
    assert abs(one.inner(other) - dense) <= 1e-11 * (1 + scale)
    assert abs(one.norm() - float(one.dense().norm())) <= 1e-11 * (1 + one.norm())
    assert abs(distance(one, other) - float((one.dense() - other.dense()).norm())) <= 1e-12 * (1 + one.norm() + other.norm())
    assert abs(cosine(one, other) - dense / scale) <= 1e-10
    assert one.rank == r


def test_float32_factors_are_multiplied_in_float64():
    one = LowRank(drawn(40, 3, 30).B.float(), drawn(40, 3, 30).A.float())
    wide = LowRank(one.B.double(), one.A.double())
    assert one.norm() == wide.norm()
    assert one.inner(one.T.T) == wide.inner(wide)
    assert torch.equal(one.singular_values(), wide.singular_values())


@pytest.mark.parametrize("width", [2, 6])  # stacked 4 and 12, below and past full rank
def test_a_distance_does_not_cancel_where_grams_do(width):
    one = drawn(12, width, 9)
    turn = torch.linalg.qr(drawn(width, width, 1).B)[0]
    turned = LowRank(one.B @ turn, turn.T @ one.A)  # equal but for rounding
    assert distance(one, turned) <= 1e-14 * one.norm()
    near = LowRank(one.B * (1 + 1e-10), one.A)
    assert abs(distance(one, near) / (1e-10 * one.norm()) - 1) <= 1e-4


def test_a_distance_between_two_layers_is_refused():
    with pytest.raises(ValueError, match="one layer"):
        distance(drawn(3, 1, 4), drawn(4, 1, 3))


def test_the_norm_of_products_that_cancel_is_not_the_root_of_a_negative_number():
    part = drawn(5, 2, 4)
    assert total([(1.0, part), (-1.0, part)]).norm() <= 1e-6


def test_the_cosine_is_one_with_itself_and_not_a_number_with_zero():
    one = drawn(5, 2, 4)
    assert 1 - 1e-15 <= cosine(one, one) <= 1
    assert abs(cosine(one, LowRank(-3 * one.B, one.A)) + 1) <= 1e-15
    assert math.isnan(cosine(one, LowRank(one.B * 0, one.A)))


# layers of Tensors


def test_the_pair_of_a_layer_is_b_times_a_and_unpair_gives_it_back():
    tensors = {"q.A": torch.tensor([[1.0, 2.0]]), "q.B": torch.tensor([[3.0], [4.0], [5.0]]), "v.A": torch.zeros(1, 2)}
    assert pair(tensors, "q").dense().tolist() == [[3, 6], [4, 8], [5, 10]]
    assert same(product(tensors, "q"), pair(tensors, "q"))
    assert {name: id(tensor) for name, tensor in unpair("q", pair(tensors, "q")).items()} == {
        name: id(tensor) for name, tensor in tensors.items() if name.startswith("q")
    }


def test_the_product_of_a_layer_has_its_core_inside():
    one, core = drawn(4, 2, 3), drawn(2, 2, 2, 1).dense()
    made = product(unpair("q", one) | {"q.R": core}, "q")
    assert made.rank == 2
    assert close(made.dense(), one.B @ core @ one.A)
    narrow = product({name: tensor.float() for name, tensor in (unpair("q", one) | {"q.R": core}).items()}, "q")
    assert narrow.B.dtype is torch.float32


def test_the_product_of_a_layer_with_heads_is_the_sum_over_heads():
    one, heads = drawn(5, 6, 7), torch.stack([drawn(2, 2, 2, seed).dense() for seed in range(3)])
    made = product(unpair("q", one) | {"q.H": heads}, "q")
    dense = sum(one.B[:, 2 * i : 2 * i + 2] @ heads[i] @ one.A[2 * i : 2 * i + 2] for i in range(3))
    assert close(made.dense(), dense)
    assert close(made.dense(), one.B @ torch.block_diag(*heads) @ one.A)


@pytest.mark.parametrize("core", [{"q.R": torch.zeros(3, 3)}, {"q.H": torch.zeros(3, 2, 1)}, {"q.H": torch.zeros(3, 2, 2)}])
def test_a_core_of_another_rank_is_refused(core):
    with pytest.raises(ValueError, match="q: the core is"):
        product(unpair("q", drawn(4, 2, 3)) | core, "q")


def test_a_cut_is_the_first_columns_and_rows_and_a_pad_the_way_back():
    wide, small, head = drawn(4, 3, 5), drawn(3, 1, 4, 1), torch.ones(2)
    tensors = unpair("q", wide) | unpair("v", small) | {"head.weight": head}
    short = cut(tensors, 2)
    assert close(pair(short, "q").dense(), wide.B[:, :2] @ wide.A[:2])
    assert same(pair(short, "v"), small)  # its rank is lower already
    assert short["head.weight"] is head
    assert [rank_of(t) for t in (tensors, short, unpair("v", small), {"head.weight": head})] == [3, 2, 1, 0]
    back = pad(short, tensors)
    assert {name: t.shape for name, t in back.items()} == {name: t.shape for name, t in tensors.items()}
    assert torch.equal(back["q.A"][2], torch.zeros(5, dtype=torch.float64))
    assert torch.equal(back["q.B"][:, 2], torch.zeros(4, dtype=torch.float64))
    assert torch.equal(pair(back, "q").dense(), pair(short, "q").dense())
    assert back["head.weight"] is head
    assert tensors["q.A"].shape == (3, 5)


def test_one_factor_alone_can_be_cut_and_padded():
    b = {"q.B": drawn(4, 3, 5).B}
    assert rank_of(b) == 3
    assert pad(cut(b, 1), b)["q.B"].shape == (4, 3)


@pytest.mark.parametrize("core", [{"q.R": torch.zeros(2, 2)}, {"q.H": torch.zeros(2, 1, 1)}])
def test_adapters_with_a_core_cannot_be_cut_nor_padded(core):
    tensors = unpair("q", drawn(4, 2, 3)) | core
    with pytest.raises(ValueError, match="cannot be cut"):
        cut(tensors, 1)
    with pytest.raises(ValueError, match="cannot be padded"):
        pad(tensors, unpair("q", drawn(4, 3, 3)))
    assert same(pair(pad(tensors, tensors), "q"), pair(tensors, "q"))


def test_a_pad_to_another_layer_or_a_lower_rank_is_refused():
    tensors = unpair("q", drawn(4, 2, 3))
    for like in ({}, unpair("q", drawn(4, 1, 3)), unpair("q", drawn(5, 2, 4))):
        with pytest.raises(ValueError, match=r"q\.[AB] is"):
            pad(tensors, like)
    with pytest.raises(ValueError, match="at least 1"):
        cut(tensors, -1)


# starts


def test_the_nearest_pair_of_a_dense_matrix_is_its_truncated_svd(monkeypatch):
    whole = drawn(30, 3, 20)
    noisy = whole.dense() + 1e-6 * drawn(30, 20, 20, 1).dense()
    exact = nearest(noisy, 3)
    monkeypatch.setattr("fedpeft.lowrank.WHOLE", 0)  # the randomized route
    quick = nearest(noisy, 3)
    u, s, vt = torch.linalg.svd(noisy, full_matrices=False)
    best = LowRank(u[:, :3] * s[:3], vt[:3])
    assert distance(exact, best) <= 1e-12 * best.norm()
    assert distance(quick, best) <= 1e-12 * best.norm()
    assert distance(nearest(noisy.T, 3), best.T) <= 1e-12 * best.norm()


def test_fresh_factors_are_a_zero_product_drawn_from_the_seed():
    tensors = unpair("q", drawn(4, 2, 9)) | {"head.bias": torch.ones(3)}
    made = fresh(tensors, 0, 1)
    assert sorted(made) == ["q.A", "q.B"]
    assert torch.equal(pair(made, "q").dense(), torch.zeros(4, 9, dtype=torch.float64))
    assert made["q.A"].abs().max() <= 1 / 3
    assert made["q.A"].unique().numel() == 18
    assert same(pair(fresh(tensors, 0, 1), "q"), pair(made, "q"))
    assert not torch.equal(fresh(tensors, 0, 2)["q.A"], made["q.A"])
