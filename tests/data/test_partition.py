import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.data.deal import deal, level
from fedpeft.data.partition import Dirichlet, Quantity, Shards, Split, describe, histogram, iid, natural, partition

pytestmark = pytest.mark.fast
DRAWN = ["iid", "dirichlet", "shards", "quantity"]


def owners(split: Split) -> list[list[int]]:
    return [rows.tolist() for rows in split.clients]


def labels_of(rows: int, classes: int) -> torch.Tensor:
    return torch.arange(rows) * 7 % classes


@settings(deadline=None, max_examples=60)
@given(
    scheme=st.sampled_from(DRAWN),
    clients=st.integers(1, 12),
    per_client=st.integers(3, 9),
    extra=st.integers(0, 5),
    classes=st.integers(1, 6),
    alpha=st.floats(1e-4, 1e4),
    min_examples=st.integers(1, 3),
    seed=st.integers(0, 2**40),
)
def test_every_row_has_one_client_and_every_client_enough_rows(scheme, clients, per_client, extra, classes, alpha, min_examples, seed):
    labels = labels_of(clients * per_client + extra, classes)
    split = partition(labels, None, clients=clients, scheme=scheme, alpha=alpha, shards=2, min_examples=min_examples, seed=seed)
    assert sorted(row for rows in owners(split) for row in rows) == list(range(len(labels)))
    assert all(rows == sorted(rows) and len(rows) >= min_examples for rows in owners(split))
    assert split.names == tuple(map(str, range(clients)))
    again = partition(labels, None, clients=clients, scheme=scheme, alpha=alpha, shards=2, min_examples=min_examples, seed=seed)
    assert owners(again) == owners(split)
    assert again.note == split.note


@pytest.mark.parametrize("scheme", DRAWN)
def test_another_seed_deals_otherwise(scheme):
    first, second = (partition(labels_of(120, 6), None, clients=8, scheme=scheme, seed=seed) for seed in (0, 1))
    assert owners(first) != owners(second)


def test_iid_sizes_are_equal_up_to_one():
    split = iid(labels_of(11, 3), None, 4, min_examples=2, seed=0)
    assert sorted(map(len, split.clients)) == [2, 3, 3, 3]


def test_a_small_alpha_gives_few_labels_and_a_large_one_all():
    labels = labels_of(3000, 10)
    few, many = (Dirichlet(alpha)(labels, None, 10, min_examples=1, seed=3) for alpha in (0.01, 1000.0))
    assert describe(few, labels, 10)["labels_per_client"] < 3
    assert describe(many, labels, 10)["labels_per_client"] == 10
    assert histogram(many, labels, 10).min() >= 20  # 30 on average, each share within a few percent


def test_dirichlet_favours_no_client():
    # 10 classes of 6 rows for 20 clients: 3 rows each. Rounding every cut down would leave the first client 0.5 per class short.
    labels = labels_of(60, 10)
    means = torch.stack([histogram(Dirichlet(1.0)(labels, None, 20, min_examples=1, seed=s), labels, 10).sum(1) for s in range(200)])
    first, last = means[:, 0].double().mean(), means[:, -1].double().mean()
    assert abs(first - 3) < 0.5
    assert abs(last - 3) < 0.5


def test_quantity_skews_sizes_and_not_labels():
    labels = labels_of(4000, 4)
    counts = histogram(Quantity(0.5)(labels, None, 4, min_examples=100, seed=0), labels, 4)
    assert counts.sum(1).max() > 2 * counts.sum(1).min()
    assert ((counts / counts.sum(1, keepdim=True)) - 0.25).abs().max() < 0.12


def test_two_shards_hold_at_most_two_labels_when_shards_do_not_cross_labels():
    labels = labels_of(40, 4)  # 10 a label, 8 shards of 5
    counts = histogram(Shards(2)(labels, None, 4, min_examples=2, seed=1), labels, 4)
    assert counts.sum(1).tolist() == [10, 10, 10, 10]
    assert set(counts.flatten().tolist()) <= {0, 5, 10}


def test_more_shards_than_rows_are_refused():
    with pytest.raises(ValueError, match=r"data.partition.shards=5 for clients=3 makes 15 shards of 9 rows"):
        partition(labels_of(9, 3), None, clients=3, scheme="shards", shards=5, seed=0)


def test_levelling_takes_the_largest_clients_most_frequent_class():
    # Client 0 has labels 7 7 7 3 3, client 1 has 3 3 3, client 2 has nothing: both moves come from client 0, class 7, its last rows.
    owner = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1]).numpy()
    labels = torch.tensor([7, 7, 7, 3, 3, 3, 3, 3]).numpy()
    assert level(owner, labels, 3, least=2).tolist() == [0, 0, 2, 0, 2, 1, 1, 1]
    assert level(owner, labels, 3, least=1).tolist() == [0, 0, 2, 0, 0, 1, 1, 1]
    assert owner.tolist() == [0, 0, 0, 0, 0, 1, 1, 1]


def test_a_hopeless_draw_ends_after_twenty_redraws_and_says_what_moved():
    drawn = []

    def all_to_the_first(draw):
        drawn.append(draw.random())
        return torch.zeros(6, dtype=torch.int64).numpy()

    owner, how = deal(all_to_the_first, torch.zeros(6, dtype=torch.int64).numpy(), clients=3, least=2, seed=0)
    assert len(drawn) == 21
    assert sorted(owner.tolist()) == [0, 0, 1, 1, 2, 2]
    assert how == "redraws: 20, examples moved so that every client has at least 2: 4"


def test_few_images_over_many_clients_end_quickly():
    start = time.perf_counter()
    split = partition(labels_of(600, 10), None, clients=100, scheme="dirichlet", alpha=0.5, min_examples=4, seed=0)
    assert time.perf_counter() - start < 1
    assert min(map(len, split.clients)) == 4
    assert "redraws: 20, examples moved so that every client has at least 4: " in split.note


@pytest.mark.parametrize("scheme", [*DRAWN, "natural"])
def test_a_thousand_clients_take_under_two_seconds(scheme):
    labels = labels_of(100_000, 150)
    groups = tuple(str(i % 1500) for i in range(100_000))
    start = time.perf_counter()
    split = partition(labels, groups, clients=1000, scheme=scheme, alpha=0.1, min_examples=20, seed=0)
    histogram(split, labels, 150)
    assert time.perf_counter() - start < 2


def test_natural_takes_the_largest_owners_and_counts_what_is_left_out():
    groups = ("b", "a", "c", "a", "b", "d", "a", "c")
    split = natural(torch.zeros(8, dtype=torch.int64), groups, 2, min_examples=2, seed=0)
    assert split.names == ("a", "b")  # b before c: equal sizes, by name
    assert owners(split) == [[1, 3, 6], [0, 4]]
    assert split.note == "one client per owner, the 2 largest of 4; 3 rows of the others are left out"


def test_natural_says_how_many_owners_are_large_enough():
    with pytest.raises(ValueError, match=r"clients=3: 2 of 3 owners have at least data.min_examples=2 rows; use clients=2 or fewer"):
        partition(torch.zeros(5, dtype=torch.int64), ("a", "a", "b", "b", "c"), clients=3, scheme="natural", seed=0)


def test_natural_without_owners_is_refused():
    with pytest.raises(ValueError, match=r"data.group=COLUMN"):
        partition(torch.zeros(5, dtype=torch.int64), None, clients=1, scheme="natural", seed=0)


def test_too_few_rows_are_refused():
    with pytest.raises(ValueError, match=r"9 training rows cannot give clients=5 at least data.min_examples=2 each, needed are 10"):
        partition(labels_of(9, 3), None, clients=5, scheme="iid", seed=0)


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf"), 1e300])
def test_an_impossible_alpha_is_refused(alpha):
    with pytest.raises(ValueError, match=r"data.partition.alpha="):
        partition(labels_of(20, 2), None, clients=2, alpha=alpha, seed=0)


@pytest.mark.parametrize(
    ("wrong", "message"), [({"scheme": "random"}, "scheme=random"), ({"clients": 0}, "clients=0"), ({"min_examples": 0}, "=0")]
)
def test_a_wrong_choice_is_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        partition(labels_of(20, 2), None, **{"clients": 2, "seed": 0} | wrong)


def test_a_split_is_described_in_numbers():
    labels = torch.tensor([0, 1, 1, 2, 0, 1])
    split = Split((torch.tensor([0, 1, 2]), torch.tensor([3]), torch.tensor([4, 5])), "by hand", ("0", "1", "2"))
    assert histogram(split, labels, 3).tolist() == [[1, 2, 0], [0, 0, 1], [1, 1, 0]]
    assert describe(split, labels, 3) == {
        "clients": 3,
        "rows": 6,
        "smallest": 1,
        "median": 2.0,
        "largest": 3,
        "labels_per_client": pytest.approx(5 / 3),
        "note": "by hand",
    }


def test_language_counts_as_one_class():
    split = Split((torch.tensor([0]), torch.tensor([1, 2])), "by hand", ("0", "1"))
    assert histogram(split, torch.zeros(3, dtype=torch.int64), 0).tolist() == [[1], [2]]
