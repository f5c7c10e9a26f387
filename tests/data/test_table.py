import pytest
import torch

from fedpeft.data.table import Table, held_out, limited

pytestmark = pytest.mark.fast


def texts(count: int) -> Table:
    return Table(tuple(f"text {i}" for i in range(count)), torch.arange(count), tuple("ab"[i % 2] for i in range(count)))


def test_rows_keeps_text_label_and_owner_together():
    part = texts(4).rows(torch.tensor([3, 0]))
    assert part.inputs == ("text 3", "text 0")
    assert part.labels.tolist() == [3, 0]
    assert part.groups == ("b", "a")
    assert len(part) == 2


def test_rows_of_pairs_and_of_images():
    pairs = Table((("a", "b"), ("c", "d")), torch.zeros(2, dtype=torch.int64))
    assert pairs.rows(torch.tensor([1])).inputs == (("c", "d"),)
    images = Table(torch.arange(8.0).reshape(2, 1, 2, 2), torch.zeros(2, dtype=torch.int64))
    assert images.rows(torch.tensor([1])).inputs.flatten().tolist() == [4, 5, 6, 7]
    assert images.rows(torch.tensor([1])).groups is None


def test_a_table_of_unequal_columns_is_refused():
    with pytest.raises(ValueError, match="'inputs': 1, 'labels': 2"):
        Table(("one",), torch.zeros(2, dtype=torch.int64))


def test_held_out_rows_are_the_share_and_the_rest():
    rest, part = held_out(texts(10), 0.3, seed=0, key="test_share")
    assert (len(rest), len(part)) == (7, 3)
    assert sorted(rest.labels.tolist() + part.labels.tolist()) == list(range(10))
    assert part.labels.tolist() == sorted(part.labels.tolist())
    assert part.labels.tolist() == held_out(texts(10), 0.3, seed=0, key="test_share")[1].labels.tolist()
    assert any(part.labels.tolist() != held_out(texts(10), 0.3, seed=s, key="test_share")[1].labels.tolist() for s in range(1, 4))


def test_neither_half_is_empty():
    for share in (0.01, 0.99):
        assert all(len(table) for table in held_out(texts(2), share, seed=0, key="test_share"))


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, float("nan")])
def test_an_impossible_share_is_refused(share):
    with pytest.raises(ValueError, match=r"data.test_share="):
        held_out(texts(10), share, seed=0, key="test_share")


def test_one_row_cannot_be_split():
    with pytest.raises(ValueError, match="1 row cannot be split in two"):
        held_out(texts(1), 0.5, seed=0, key="test_share")


def test_a_limit_keeps_that_many_rows_in_file_order():
    kept = limited(texts(10), 4, seed=0, part="train").labels.tolist()
    assert len(kept) == 4
    assert kept == sorted(kept)
    assert len(limited(texts(10), 40, seed=0, part="train")) == 10
    assert len(limited(texts(10), None, seed=0, part="train")) == 10
    with pytest.raises(ValueError, match=r"data.limit=0"):
        limited(texts(10), 0, seed=0, part="train")
