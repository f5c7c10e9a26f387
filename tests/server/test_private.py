"""The noised mean: no client moves it by more than the clip over the expected number, and what it costs is written down first."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats

from fedpeft.aggregate import weighted_mean
from fedpeft.cohort import Cohort
from fedpeft.messages import Broadcast, Update
from fedpeft.privacy.accountant import Event, epsilon
from fedpeft.privacy.spending import BudgetSpent, Spending
from fedpeft.privacy.unit import Client
from fedpeft.strategy import Phase, always
from fedpeft.tensors import Tensors, everything
from server.private import Hidden
from server.rounds import Exhausted, run
from strategies.fedavg import FedAvg
from strategies.ffa import ffa_lora

pytestmark = pytest.mark.fast
QUIET = Client(epsilon=float("inf"), noise_multiplier=1e-9, clip=1.0, noise="seeded-insecure")
START = {"q.A": torch.ones(2, 5, dtype=torch.float64), "q.B": torch.zeros(4, 2, dtype=torch.float64)}


def hidden(folder: Path, unit: Client = QUIET, *, clients: int = 20, cohort: int = 4, rounds: int = 3) -> Hidden:
    return Hidden(unit, clients, cohort, rounds, 0, Spending(folder / "privacy.jsonl"))


def update(client: int, size: float, dtype: torch.dtype = torch.float64) -> Update:
    rng = torch.Generator().manual_seed(client)
    change = {name: torch.randn(tensor.shape, generator=rng, dtype=dtype) for name, tensor in START.items()}
    whole = sum(float(part.square().sum()) for part in change.values()) ** 0.5
    return Update(client, {name: START[name].to(dtype) + size / whole * part for name, part in change.items()}, 1.0)


def released(folder: Path, updates: list[Update], unit: Client = QUIET, *, cohort: int = 4, round: int = 0) -> Tensors:
    made = hidden(folder, unit, cohort=cohort)
    return made.mean(round, Broadcast(START), [one.client for one in updates], everything)(iter(updates))


def apart(one: Tensors, other: Tensors) -> float:
    return sum(float((one[name] - other[name]).double().square().sum()) for name in one) ** 0.5


def test_short_changes_give_the_sum_over_the_expected_number_of_clients(tmp_path: Path) -> None:
    some = [update(client, 0.5) for client in range(3)]  # three answers where four are expected: no rescaling
    got = released(tmp_path, some)
    for name, start in START.items():
        want = start + sum(one.tensors[name] - start for one in some) / 4
        assert float((got[name] - want).abs().max()) < 1e-6


@pytest.mark.parametrize("size", [1e-6, 0.3, 1.0, 50.0, 1e12])
def test_one_client_more_moves_the_mean_by_no_more_than_its_clip(tmp_path: Path, size: float) -> None:
    some = [update(client, 2.0) for client in range(3)]
    without, with_it = released(tmp_path / "a", some), released(tmp_path / "b", [*some, update(9, size)])
    assert apart(without, with_it) <= min(size, 1.0) / 4 * (1 + 1e-5)


def test_a_change_that_is_no_number_counts_as_none(tmp_path: Path) -> None:
    broken = update(9, 0.1)
    broken.tensors["q.B"][0, 0] = float("nan")
    some = [update(client, 0.5) for client in range(3)]
    assert apart(released(tmp_path / "a", some), released(tmp_path / "b", [*some, broken])) == 0.0


def test_an_empty_cohort_is_a_round_of_noise(tmp_path: Path) -> None:
    unit = Client(epsilon=float("inf"), noise_multiplier=2.0, clip=0.5)
    made = released(tmp_path, [], unit, cohort=10)
    assert 0 < apart(made, START) < 2.0 * 0.5 / 10 * 30


def test_noise_has_the_multiplier_times_the_clip_on_the_sum_and_comes_anew(tmp_path: Path) -> None:
    big = {"q.A": torch.zeros(300, 400)}
    unit = Client(epsilon=float("inf"), noise_multiplier=1.5, clip=0.2)
    drawn = []
    for attempt in range(2):
        made = hidden(tmp_path / str(attempt), unit, cohort=5)
        mean = made.mean(0, Broadcast(big), [], everything)(iter(()))
        drawn.append(mean["q.A"].double().flatten() * 5 / (1.5 * 0.2))
    low, high = stats.chi2.ppf([5e-7, 1 - 5e-7], 120_000)
    assert all(low < float(one.square().sum()) < high for one in drawn)
    assert abs(float((drawn[0] * drawn[1]).mean())) < 6 / 120_000**0.5


def test_a_release_is_written_down_before_its_noise_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, seen = hidden(tmp_path), []
    monkeypatch.setattr("server.private.add_noise", lambda *_: seen.append(len(made.spending.lines())))
    mean = made.mean(0, Broadcast(START), [3, 1], everything)
    assert made.spending.lines() == []  # what is drawn again has cost nothing
    mean(iter([update(1, 0.5)]))
    assert seen == [1]
    (line,) = made.spending.lines()
    assert (line["round"], line["clients"], line["clip"]) == (0, [1, 3], 1.0)  # who was asked counts, whether it answered or not


def test_a_round_that_cannot_be_paid_is_refused_before_any_client_is_asked(tmp_path: Path) -> None:
    two = epsilon([Event(2.0, 1.0, 2)], 1e-5) + 1e-6
    made = hidden(tmp_path, Client(epsilon=two, noise_multiplier=2.0))
    for round in range(2):
        made.mean(round, Broadcast(START), [0, 1], everything)(iter([update(0, 1.0)]))
    made.mean(2, Broadcast(START), [2, 3], everything)  # others have their budget yet
    with pytest.raises(BudgetSpent, match="another round would make it"):
        made.mean(2, Broadcast(START), [0, 2], everything)


def test_the_outsider_accounting_counts_every_round_at_the_rate_of_the_coin(tmp_path: Path) -> None:
    unit = Client(epsilon=8.0, noise_multiplier=1.0, adversary="outsider", sampling="poisson")
    made = hidden(tmp_path, unit, clients=40, cohort=4)
    for round in range(3):
        made.mean(round, Broadcast(START), [round], everything)(iter([update(round, 1.0)]))
    assert made.spent.epsilon == pytest.approx(epsilon([Event(1.0, 0.1, 3)], made.terms.delta, step=1e-3), abs=1e-9)
    assert all("clients" not in line for line in made.spending.lines())  # the cohort is secret


def test_secret_cohorts_have_the_rate_differ_every_time_and_may_be_empty(tmp_path: Path) -> None:
    made = hidden(tmp_path, Client(sampling="poisson"), clients=50, cohort=2)
    sizes = [len(made.draw(0, 0).clients) for _ in range(3000)]
    assert abs(sum(sizes) / 3000 - 2.0) < 5 * (50 * 0.04 * 0.96 / 3000) ** 0.5
    assert 0 in sizes
    assert len({made.draw(0, 0).clients for _ in range(20)}) > 10


def test_seeded_cohorts_and_noise_are_the_same_again(tmp_path: Path) -> None:
    unit = Client(sampling="poisson", noise="seeded-insecure", epsilon=float("inf"), noise_multiplier=1.0)
    cohorts = [hidden(tmp_path, unit).draw(1, 0).clients for _ in range(2)]
    assert cohorts[0] == cohorts[1]
    assert hidden(tmp_path, unit).draw(2, 0).clients != cohorts[0] or hidden(tmp_path, unit).draw(3, 0).clients != cohorts[0]
    one, other = (released(tmp_path / name, [update(0, 1.0)], unit) for name in "ab")
    assert apart(one, other) == 0.0


def test_the_clip_follows_the_quantile_of_the_norms(tmp_path: Path) -> None:
    unit = replace(QUIET, quantile=0.5, count_noise=1e-6, noise_multiplier=1e-7, clip=0.1)
    made = hidden(tmp_path, unit, clients=21, cohort=21, rounds=60)
    sizes = [0.5 + 0.1 * client for client in range(21)]  # the median is 1.5
    for round in range(60):
        made.mean(round, Broadcast(START), range(21), everything)(iter([update(client, size) for client, size in enumerate(sizes)]))
    assert made.clip(60) == pytest.approx(1.5, rel=0.1)
    assert made.clip(0) == 0.1
    again = hidden(tmp_path, unit, clients=21, cohort=21, rounds=60)
    assert [again.clip(round) for round in (0, 7, 60)] == [made.clip(round) for round in (0, 7, 60)]


def test_one_client_more_moves_the_count_by_one_half(tmp_path: Path) -> None:
    """Else the count's noise, which is reckoned against one half, would hide it too little."""
    unit = replace(QUIET, quantile=0.5, count_noise=1e-6, noise_multiplier=1e-7, clip_rate=1.0)
    clips = []
    for name, some in (("none", []), ("short", [update(0, 0.5)]), ("long", [update(0, 5.0)])):
        made = hidden(tmp_path / name, unit, cohort=4)
        made.mean(0, Broadcast(START), [0], everything)(iter(some))
        clips.append(math.log(made.clip(1)))
    assert clips == pytest.approx([0.0, -0.5 / 4, 0.5 / 4], abs=1e-4)


def test_a_round_of_gradients_has_a_clip_of_its_own(tmp_path: Path) -> None:
    unit = replace(QUIET, query_clip=7.0)
    made = hidden(tmp_path, unit)
    mean = made.mean(0, Broadcast(START), [0], everything, query=True)(iter([update(0, 100.0)]))
    assert apart(mean, START) == pytest.approx(7.0 / 4, rel=1e-5)


def test_only_what_is_shared_is_released(tmp_path: Path) -> None:
    made = hidden(tmp_path)
    only_b = Update(0, {"q.B": START["q.B"] + 1.0}, 1.0)
    assert made.mean(0, Broadcast(START | {"x/print": torch.zeros(3)}), [0], lambda name: not name.endswith(".A"))(
        iter([only_b])
    ).keys() == {"q.B"}


def test_rounds_end_when_the_budget_does_and_say_what_was_spent(clients, joined, start, tmp_path: Path) -> None:
    budget = epsilon([Event(3.0, 1.0, 2)], 1e-5) + 1e-6
    made = hidden(tmp_path, Client(epsilon=budget, noise_multiplier=3.0, clip=10.0), clients=3, cohort=3)
    strategy = FedAvg()
    steps = run(
        strategy, strategy.init({"main": start}), joined(clients(strategy), 3), made.draw, None, first=0, rounds=5, hidden=made,  # type: ignore[arg-type]  # nobody asks it
    )  # fmt: skip
    seen: list[Any] = []
    with pytest.raises(Exhausted, match="the privacy budget is spent"):
        seen.extend(steps)
    assert [done.spent.epsilon for done in seen] == sorted(done.spent.epsilon for done in seen)
    assert len(seen) == 2
    assert seen[-1].spent.epsilon <= budget + 1e-3
    assert math.isnan(seen[0].loss)  # no client's loss stands anywhere
    assert seen[0].gap.error is None


def test_who_fails_does_not_decide_whom_the_sum_is_over(clients, joined, start, tmp_path: Path) -> None:
    """A round that nobody answers is one of noise, never drawn again: coins of which only some results count are no coins."""
    made = hidden(tmp_path, Client(epsilon=float("inf"), noise_multiplier=1.0, clip=0.1), clients=3, cohort=3)
    strategy, drawn = FedAvg(), []

    def draw(round: int, attempt: int) -> Cohort:
        drawn.append(attempt)
        return made.draw(round, attempt)

    def fails(*_: Any) -> Any:
        raise ArithmeticError("no")

    (done,) = run(
        strategy, strategy.init({"main": start}), joined(clients(strategy, odd=dict.fromkeys(range(3), fails)), 3), draw, None,  # type: ignore[arg-type]  # nobody asks it
        first=0, rounds=1, hidden=made,
    )  # fmt: skip
    assert (done.answers, drawn) == (0, [0])
    assert not torch.equal(strategy.broadcast(done.state, 1, None).tensors["q.B"], start["q.B"])


def test_a_poisson_round_without_clients_is_no_fault(clients, joined, start, tmp_path: Path) -> None:
    unit = Client(epsilon=float("inf"), noise_multiplier=1.0, clip=0.1, sampling="poisson")
    made = hidden(tmp_path, unit, clients=3, cohort=1)
    strategy = ffa_lora()
    (done,) = run(
        strategy, strategy.init({"main": start}), joined(clients(strategy), 3), lambda round, attempt: Cohort((), 1 / 3), None,  # type: ignore[arg-type]  # nobody asks it
        first=0, rounds=1, hidden=made,
    )  # fmt: skip
    assert done.answers == 0
    moved = strategy.broadcast(done.state, 1, None).tensors
    assert torch.equal(moved["q.A"], start["q.A"])  # frozen: neither trained nor noised
    assert not torch.equal(moved["q.B"], start["q.B"])
    assert json.loads((tmp_path / "privacy.jsonl").read_text())["clients"] == []


def test_every_strategy_that_takes_a_mean_alone_takes_this_one(clients, joined, start, tmp_path: Path) -> None:
    for many, strategy in enumerate((FedAvg(), ffa_lora(), FedAvg(always(Phase())))):
        made = hidden(tmp_path / str(many), replace(QUIET, clip=1e6), clients=3, cohort=3)
        ends = []
        for mean in (made, None):
            (done,) = run(
                strategy, strategy.init({"main": start}), joined(clients(strategy), 3), made.draw, weighted_mean,
                first=0, rounds=1, weights="uniform", hidden=mean,
            )  # fmt: skip
            ends.append(strategy.broadcast(done.state, 1, None).tensors)
        for name in ends[0]:
            torch.testing.assert_close(ends[0][name], ends[1][name], rtol=0, atol=1e-2)  # noise of 1e-9 x 1e6
