from itertools import pairwise

import numpy as np
import pytest
import torch

from fedpeft.codecs.base import CodecError, layout
from fedpeft.codecs.mask import Mask

pytestmark = pytest.mark.fast


def test_both_ends_draw_the_same_mask_and_no_position_is_sent():
    x = {"a": torch.arange(1.0, 61.0), "b": torch.arange(61.0, 101.0).reshape(4, 10)}
    data = Mask(0.2).encode(x, seed=9)
    got = Mask(0.2).decode(data, layout(x), seed=9)
    sent = {name: tensor != 0 for name, tensor in got.items()}
    assert sum(int(mask.sum()) for mask in sent.values()) == 20
    assert all(torch.equal(got[name][mask], x[name][mask]) for name, mask in sent.items())
    assert len(data) == 15 + 20 * 4


def test_another_seed_is_another_mask_and_an_error_at_the_other_end():
    x = {"a": torch.ones(1000)}
    masks = [tuple(Mask(0.1).mask(1000, seed)[0].tolist()) for seed in range(50)]
    assert len(set(masks)) == 50
    with pytest.raises(CodecError, match="with seed 2"):
        Mask(0.1).decode(Mask(0.1).encode(x, seed=1), layout(x), seed=2)


@pytest.mark.parametrize("entries", [1, 2, 7, 23, 100])
@pytest.mark.parametrize("density", [0.1, 0.3, 0.7, 1.0])
def test_every_entry_of_a_run_has_the_same_chance(entries, density):
    seeds = 3000
    counts, want = np.zeros(entries), np.zeros(entries)
    for seed in range(seeds):
        places, lengths = Mask(density).mask(entries, seed)
        assert len(places) == max(1, int(round(density * entries, 9)))
        assert (np.diff(places) > 0).all()
        counts[places] += 1
    starts = np.cumsum([0, *lengths])
    for a, b in pairwise(starts):
        want[a:b] = 1 / (b - a)
    assert starts[-1] == entries
    assert (np.abs(counts / seeds - want) <= 4.5 * np.sqrt(want * (1 - want) / seeds)).all()


def test_unbiased_values_have_the_update_as_their_mean():
    x = {"w": torch.tensor([1.0, -2.0, 3.0, 0.5, 10.0, -0.25, 4.0])}
    seeds = 2000
    got = torch.stack(
        [Mask(0.3, unbiased=True).decode(Mask(0.3, unbiased=True).encode(x, seed=s), layout(x), seed=s)["w"] for s in range(seeds)]
    ).double()
    assert ((got.mean(0) - x["w"]).abs() <= 4.5 * got.std(0) / seeds**0.5).all()


def test_the_mask_of_a_seed_is_the_same_for_ever():
    """It is the wire's: the other end may have another version of numpy."""
    assert Mask(0.3).mask(20, 2**62 + 1)[0].tolist() == [2, 4, 6, 12, 15, 17]


@pytest.mark.parametrize(("field", "value"), [("density", 0), ("values", "int8")])
def test_a_setting_that_cannot_be_is_refused_by_its_name(field, value):
    with pytest.raises(ValueError, match=rf"^{field}={value}"):
        Mask(**{field: value})
