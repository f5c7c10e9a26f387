import pytest
import torch

from fedpeft.codecs.base import layout
from fedpeft.codecs.sign import Sign

pytestmark = pytest.mark.fast


def test_an_entry_becomes_its_sign_times_the_mean_magnitude_of_its_tensor():
    tensors = {"a": torch.tensor([[1.0, -3.0], [2.0, -2.0]]), "b": torch.tensor([0.0, -0.5]), "c": torch.zeros(0)}
    got = Sign().decode(Sign().encode(tensors), layout(tensors))
    assert {name: t.tolist() for name, t in got.items()} == {"a": [[2, -2], [2, -2]], "b": [0.25, -0.25], "c": []}


@pytest.mark.parametrize(("entries", "want"), [(0, 0), (1, 1), (8, 1), (9, 2)])
def test_an_entry_costs_a_bit(entries, want):
    assert len(Sign().encode({"w": torch.ones(entries)})) == 15 + 4 + want
