"""Canaries see how much noise a client-private mean has, and leave alone everything that the clients do."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedpeft import seeds
from fedpeft.messages import Broadcast, Update
from fedpeft.privacy.mechanism import add_noise, clip_each
from fedpeft.privacy.noise import SeededInsecure
from fedpeft.privacy.spending import Spending
from fedpeft.privacy.unit import Client
from fedpeft.tensors import Tensors, everything, is_a, is_b
from server.canaries import FEWEST, MOST, Canaries
from server.private import Hidden

pytestmark = pytest.mark.fast
UNIT = Client(epsilon=float("inf"), noise_multiplier=1.5, clip=0.3, noise="seeded-insecure")
START = {"q.A": torch.ones(30, 40), "q.B": torch.zeros(50, 30)}


def hidden(folder: Path, canaries: Canaries | None, unit: Client = UNIT) -> Hidden:
    return Hidden(unit, 20, 4, 9, 0, Spending(folder / "privacy.jsonl"), canaries)


def update(client: int) -> Update:
    rng = torch.Generator().manual_seed(client)
    return Update(client, {name: tensor + torch.randn(tensor.shape, generator=rng) for name, tensor in START.items()}, 1.0)


def seen(folder: Path, unit: Client = UNIT, *, many: int | None = 100, rounds: int = 9, **more: Any) -> Canaries:
    """Canaries that were in some rounds of three clients."""
    made = Canaries(0, many)
    server = hidden(folder, made, unit)
    for round in range(rounds):
        server.mean(round, Broadcast(START), range(3), everything, **more)(update(client) for client in range(3))
    return made


def half(sums: Tensors, std: float, source: Any) -> None:
    add_noise(sums, std / 2, source)


def no_clip(each: Tensors, clip: float) -> torch.Tensor:
    return clip_each({name: part.clone() for name, part in each.items()}, clip)


def never_forgets() -> Callable[[Tensors, float, Any], None]:
    """Noise on all that was summed so far."""
    kept: Tensors = {}

    def again(sums: Tensors, std: float, source: Any) -> None:
        for name, total in sums.items():
            kept[name] = total.add_(kept.get(name, 0)).clone()
        add_noise(sums, std, source)

    return again


@pytest.mark.parametrize("unit", [UNIT, replace(UNIT, quantile=0.5, count_noise=4.0)], ids=["clip", "adapted clip"])
def test_the_estimate_is_what_the_noise_is(unit: Client, tmp_path: Path) -> None:
    found = seen(tmp_path, unit)
    assert found.claimed == pytest.approx(3 / 1.5 if unit.quantile is None else 3 * (1.5**-2 - 8.0**-2) ** 0.5)
    assert found.estimate.error < 0.15
    assert abs(found.estimate.mu - found.claimed) < 3 * found.estimate.error
    assert (found.rounds, found.entries) == (9, 9 * 2700)


@pytest.mark.parametrize(("part", "plant"), [("add_noise", half), ("clip_each", no_clip), ("add_noise", never_forgets())])
def test_faults_show(part: str, plant: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"server.private.{part}", plant)
    found = seen(tmp_path)
    assert found.estimate.mu - found.claimed > 6 * found.estimate.error


def test_rounds_of_other_tensors_and_of_gradients_add_up(tmp_path: Path) -> None:
    made = Canaries(0, 60)
    server = hidden(tmp_path, made, replace(UNIT, query_clip=40.0))
    for round, (shares, query) in enumerate([(everything, True), (is_a, False), (is_b, False), (is_a, False), (is_b, False)]):
        server.mean(round, Broadcast(START), [], shares, query=query)(iter(()))
    assert (made.rounds, made.entries) == (5, 2700 + 2 * 1200 + 2 * 1500)
    assert abs(made.estimate.mu - 5**0.5 / 1.5) < 3 * made.estimate.error


def test_without_canaries_the_mean_is_its_formula_bit_for_bit_and_with_them_it_has_their_sum_beside(tmp_path: Path) -> None:
    some = [update(client) for client in range(3)]
    bare = hidden(tmp_path / "bare", None).mean(2, Broadcast(START), range(3), everything)(iter(some))
    sums = {name: torch.zeros(tensor.shape, dtype=torch.float64) for name, tensor in START.items()}
    for one in some:
        change = {name: (one.tensors[name].double() - start.double())[None] for name, start in START.items()}
        clip_each(change, 0.3)
        for name, part in change.items():
            sums[name] += part[0]
    add_noise(sums, 1.5 * 0.3, SeededInsecure(seeds.generator(0, round=2, purpose="private noise")))
    assert all(torch.equal(bare[name], (START[name].double() + sums[name] / 4).float()) for name in START)
    audited = hidden(tmp_path / "audited", Canaries(0, 10)).mean(2, Broadcast(START), range(3), everything)(iter(some))
    beside = sum(float((audited[name] - bare[name]).double().square().sum()) for name in START) ** 0.5
    assert beside == pytest.approx(0.3 * 10**0.5 / 4, rel=0.1)  # ten directions, nearly orthogonal
    one, other = ((tmp_path / name / "privacy.jsonl").read_text() for name in ("bare", "audited"))
    assert one == other


def test_canaries_do_not_move_the_clip(tmp_path: Path) -> None:
    unit, clips = replace(UNIT, quantile=0.5, count_noise=4.0), []
    for canaries in (None, Canaries(0, 100)):
        server = hidden(tmp_path / str(canaries is None), canaries, unit)
        for round in range(3):
            server.mean(round, Broadcast(START), range(3), everything)(update(client) for client in range(3))
        clips.append(server.clip(3))
    assert clips[0] == clips[1] != 0.3


@pytest.mark.parametrize(("noise", "want"), [(1.5, 108), (0.5, 27), (0.1, FEWEST), (9.0, 108)])
def test_there_are_as_many_as_stay_small_beside_the_noise(noise: float, want: int, tmp_path: Path) -> None:
    assert seen(tmp_path, replace(UNIT, noise_multiplier=noise), many=None, rounds=1).many == want <= MOST


def test_without_a_round_there_is_no_estimate() -> None:
    with pytest.raises(ValueError, match="no round was released"):
        _ = Canaries(0).estimate
