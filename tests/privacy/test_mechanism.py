"""Clipping bounds every contribution, whatever it is; noise has its deviation and is nobody else's."""

import pytest
import torch
from scipy import stats

from fedpeft.privacy.mechanism import add_noise, clip_each
from fedpeft.privacy.noise import Secret, SeededInsecure
from fedpeft.tensors import Tensors

pytestmark = pytest.mark.fast


def contributions(kind: str, dtype: torch.dtype = torch.float32) -> Tensors:
    rng = torch.Generator().manual_seed(0)
    made = {"q.A": torch.randn(6, 3, 4, generator=rng), "head.bias": torch.randn(6, 5, generator=rng)}
    special = {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf"), "huge": 1e30, "tiny": 1e-30, "zero": 0.0}
    if kind in special:
        made["q.A"][2, 1, 1] = special[kind]
        if kind == "zero":
            made["q.A"][2], made["head.bias"][2] = 0.0, 0.0
    return {name: tensor.to(dtype) for name, tensor in made.items()}


def norms(each: Tensors) -> torch.Tensor:
    return torch.cat([part.double().flatten(1) for part in each.values()], 1).norm(dim=1)


@pytest.mark.parametrize("kind", ["plain", "nan", "inf", "-inf", "huge", "tiny", "zero"])
@pytest.mark.parametrize("clip", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_contribution_is_longer_than_the_clip(kind: str, clip: float, dtype: torch.dtype) -> None:
    each, before = contributions(kind, dtype), contributions(kind, dtype)
    found = clip_each(each, clip)
    assert bool((norms(each) <= clip * (1 + 1e-6)).all())
    for row in range(6):
        if row == 2 and kind in ("nan", "inf", "-inf"):
            assert found[row] == float("inf")
            assert float(norms(each)[row]) == 0.0
        elif float(norms(before)[row]) <= clip * (1 - 1e-6):  # what is short enough stays as it is
            assert all(torch.allclose(each[name][row], before[name][row], rtol=1e-5) for name in each)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_in_half_precision_makes_no_contribution_longer_than_the_clip(dtype: torch.dtype) -> None:
    for step in range(200):
        each, clip = contributions("plain", dtype), 1.0 + step / 100
        clip_each(each, clip)
        assert float(norms(each).max()) <= clip


def test_all_tensors_of_a_contribution_are_scaled_alike() -> None:
    each, before = contributions("plain"), contributions("plain")
    clip_each(each, 0.5)
    ratios = torch.cat([(each[name] / before[name]).flatten(1) for name in each], 1)
    assert float((ratios - ratios[:, :1]).abs().max()) < 1e-6


def test_one_contribution_more_moves_the_sum_by_no_more_than_the_clip() -> None:
    for seed in range(200):
        rng = torch.Generator().manual_seed(seed)
        size = 10.0 ** float(torch.randint(-6, 20, (), generator=rng))
        each = {
            "q.A": torch.randn(5, 7, generator=rng, dtype=torch.float64),
            "q.B": torch.randn(5, 2, 3, generator=rng, dtype=torch.float64),
        }
        for part in each.values():
            part[4] *= size
        clip_each(each, 0.7)
        sums = [{name: part[:many].sum(0) for name, part in each.items()} for many in (4, 5)]
        apart = sum(float((sums[0][name] - sums[1][name]).square().sum()) for name in each) ** 0.5
        assert apart <= 0.7 * (1 + 1e-9)


def test_noise_has_the_deviation_that_was_asked_for() -> None:
    sums = {"a.A": torch.zeros(300, 400), "a.B": torch.zeros(80_001)}
    add_noise(sums, 2.5, Secret())
    drawn = torch.cat([sums["a.A"].flatten(), sums["a.B"]]).double() / 2.5
    low, high = stats.chi2.ppf([5e-7, 1 - 5e-7], len(drawn))
    assert low < float(drawn.square().sum()) < high
    assert stats.kstest(drawn.numpy(), "norm").pvalue > 1e-6
    half = len(drawn) // 2
    assert abs(float((drawn[:half] * drawn[half : 2 * half]).mean())) < 6 / half**0.5  # no number of one tensor is another's


def test_noise_goes_into_views_and_none_is_drawn_without_deviation() -> None:
    whole = torch.zeros(2, 4, 4)
    add_noise({"q.A": whole[1, :2, :3]}, 1.0, SeededInsecure(torch.Generator().manual_seed(0)))
    assert int((whole != 0).sum()) == 6
    assert torch.equal(whole[0], torch.zeros(4, 4))
    add_noise({"q.A": whole}, 0.0, None)  # type: ignore[arg-type]  # nobody is asked


def test_the_run_s_seed_tells_nothing_of_secret_noise() -> None:
    drawn = []
    for _ in range(2):
        torch.manual_seed(0)
        sums = {"q.A": torch.zeros(64)}
        add_noise(sums, 1.0, Secret())
        drawn.append(sums["q.A"])
    assert not torch.equal(*drawn)


def test_uniform_draws_lie_in_the_unit_interval_evenly() -> None:
    drawn = Secret().uniform(200_000)
    assert drawn.dtype == torch.float64
    assert float(drawn.min()) >= 0
    assert float(drawn.max()) < 1
    assert stats.kstest(drawn.numpy(), "uniform").pvalue > 1e-6
    assert len(Secret().uniform(0)) == 0
