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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_lattice_shows_through_a_sum(dtype: torch.dtype) -> None:
    """Pairs of one transform with a coarse radius lie on circles that a released sum betrays: x^2 + y^2 = -2 log of a multiple of 2^-31."""
    drawn = Secret().normal(2 * PIECE * 8).to(dtype).double()
    for gap in (PIECE // 2, 1):
        x, y = drawn[:-gap], drawn[gap:]
        k = torch.exp(-(x * x + y * y) / 2) * 2.0**31
        small = k[k < 2000.0 * 2**10]
        off = (small - small.round()).abs()
        assert len(small) > 100
        assert abs(float(off.mean()) - 0.25) < 6 * 0.15 / len(small) ** 0.5  # evenly spread: on no circle
