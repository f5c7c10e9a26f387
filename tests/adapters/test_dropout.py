"""Masks by key: the right share, unlike from sample to sample, layer to layer and place to place, and blind to neighbours and padding."""

import pytest
import torch

from fedpeft.adapters.dropout import KeyedDropout, Keys, factors

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("rate", [0.05, 0.5, 0.9])
def test_the_rate_is_kept_and_the_mean_preserved(rate: float) -> None:
    made = factors(torch.randint(2**31, (50,), dtype=torch.int32), 3, torch.empty(50, 20, 100), rate)
    share = float((made == 0).float().mean())
    assert abs(share - rate) < 5 * (rate * (1 - rate) / made.numel()) ** 0.5
    assert made.unique().tolist() == [0.0, pytest.approx(1 / (1 - rate))]


def test_masks_of_samples_layers_and_places_are_independent() -> None:
    keys, x = torch.arange(40, dtype=torch.int32), torch.empty(40, 30, 64)
    one, other = ((factors(keys, layer, x, 0.5) != 0).double() - 0.5 for layer in (0, 1))
    for first, second in ((one, other), (one[1:], one[:-1]), (one[:, 1:], one[:, :-1]), (one[:, :, 1:], one[:, :, :-1])):
        assert abs(float((first * second).mean())) < 4 * 0.25 / first.numel() ** 0.5


def test_a_samples_mask_knows_no_neighbour_and_no_padding() -> None:
    keys = torch.tensor([5, 9, 11], dtype=torch.int32)
    long = factors(keys, 2, torch.empty(3, 8, 16), 0.3)
    assert torch.equal(long[1:2, :5], factors(keys[1:2], 2, torch.empty(1, 5, 16), 0.3))


def test_nothing_is_dropped_without_keys() -> None:
    keys, x = Keys(0.5), torch.randn(3, 4)
    drop = KeyedDropout(keys, 0)
    assert drop(x) is x
    keys.present = torch.tensor([1, 2, 3], dtype=torch.int32)
    assert (drop(x) == 0).any()
