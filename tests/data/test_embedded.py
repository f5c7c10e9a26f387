import pytest
import torch
from sklearn.datasets import load_digits

from fedpeft.data.embedded import TurnedDigits

pytestmark = pytest.mark.fast


def test_the_digits_are_900_upright_600_turned_and_297_to_test():
    data = TurnedDigits().read(seed=0)
    assert (len(data.public), len(data.train), len(data.test)) == (900, 600, 297)
    assert data.train.inputs.shape == (600, 1, 8, 8)
    assert data.train.inputs.dtype == torch.float32
    assert (data.task, data.classes) == ("image", tuple("0123456789"))
    assert 0 == data.train.inputs.min() < data.train.inputs.max() == 1


def test_turning_the_clients_images_back_gives_each_digit_once():
    data = TurnedDigits().read(seed=0)
    turned = torch.cat([data.train.inputs, data.test.inputs])
    images = torch.cat([data.public.inputs, torch.rot90(turned, k=-1, dims=(2, 3))]).reshape(-1, 64) * 16
    labels = torch.cat([data.public.labels, data.train.labels, data.test.labels])
    pixels, digits = load_digits(return_X_y=True)
    ours = sorted([*image, label] for image, label in zip(images.tolist(), labels.tolist(), strict=True))
    assert ours == sorted([*image, label] for image, label in zip(pixels.tolist(), digits.tolist(), strict=True))


def test_the_split_is_the_seeds():
    first, again, other = (TurnedDigits().read(seed).test.labels for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_split_seed_fixes_the_split_for_all_runs():
    first, other = (TurnedDigits(split_seed=5).read(seed).test.labels for seed in (0, 1))
    assert torch.equal(first, other)
    assert torch.equal(first, TurnedDigits().read(5).test.labels)
