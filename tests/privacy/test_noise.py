"""Noise is normal, and nobody's to draw again."""

import pytest
import torch
from scipy import stats

from clients.lanes import Lanes
from fedpeft.privacy.noise import PIECE, Secret

pytestmark = pytest.mark.fast


def test_a_million_draws_are_standard_normal_and_uncorrelated() -> None:
    drawn = Secret().normal(1_000_001).double()
    assert len(drawn) == 1_000_001
    assert torch.isfinite(drawn).all()
    assert stats.kstest(drawn.numpy(), "norm").pvalue > 1e-6  # fails for one honest stream in a million
    for lag in (1, PIECE // 2, PIECE):
        assert abs(float((drawn[lag:] * drawn[:-lag]).mean())) < 6e-3
    assert float(drawn.abs().max()) > 4


def test_two_streams_and_two_draws_differ() -> None:
    one, other = Secret(), Secret()
    first = one.normal(64)
    assert not torch.equal(first, other.normal(64))
    assert not torch.equal(first, one.normal(64))


def test_two_processes_draw_other_noise_from_a_stream_made_before_they_parted() -> None:
    stream = Secret()
    stream.normal(8)
    with Lanes(lambda lane: lambda order: stream.normal(64).tolist(), 2) as lanes:
        drawn = [answer for _, answer in lanes.map([1, 2])]
    assert drawn[0] != drawn[1]


@pytest.mark.parametrize("size", [0, 1, 2, 7])
def test_any_number_of_draws(size: int) -> None:
    assert Secret().normal(size).shape == (size,)
