"""What was reserved is spent, whatever happens after; what would be too much is refused before it happens."""

import json
import os
from pathlib import Path

import pytest

from clients.lanes import Lanes
from fedpeft.privacy.accountant import Event, epsilon
from fedpeft.privacy.spending import BudgetSpent, Spending

pytestmark = pytest.mark.fast
ROUND = (Event(1.0, 0.1, 10),)


def test_rounds_compose_and_a_reopened_file_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "client" / "privacy.jsonl"
    for round in range(4):
        spent = Spending(path).reserve(ROUND, budget=8.0, delta=1e-5, facts={"round": round})
        assert spent == pytest.approx(epsilon([Event(1.0, 0.1, 10 * (round + 1))], 1e-5, step=1e-3), abs=1e-9)
    assert [line["round"] for line in Spending(path).lines()] == [0, 1, 2, 3]
    assert Spending(path).spent(1e-5) == pytest.approx(spent, abs=1e-9)


def test_a_release_beyond_the_budget_is_refused_and_leaves_no_line(tmp_path: Path) -> None:
    spending = Spending(tmp_path / "privacy.jsonl")
    budget = epsilon([Event(1.0, 0.1, 20)], 1e-5)  # two rounds exactly, on the fine grid
    spending.reserve(ROUND, budget=budget, delta=1e-5)
    spending.reserve(ROUND, budget=budget, delta=1e-5)
    with pytest.raises(BudgetSpent, match=r"epsilon 3\.\d+ of 3\.\d+ at delta 1e-05, another round would make it"):
        spending.reserve(ROUND, budget=budget, delta=1e-5)
    assert len(spending.lines()) == 2


def test_a_line_is_on_the_disk_before_reserve_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, synced = tmp_path / "privacy.jsonl", []
    real = os.fsync

    def watched(handle: int) -> None:
        synced.append(path.read_text() if path.exists() else "")
        real(handle)

    monkeypatch.setattr(os, "fsync", watched)
    Spending(path).reserve(ROUND, budget=8.0, delta=1e-5)
    assert synced
    assert json.loads(synced[0])["events"] == [{"sigma": 1.0, "rate": 0.1, "count": 10}]


def test_a_line_that_a_crash_cut_short_is_dropped_and_the_next_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "privacy.jsonl"
    spending = Spending(path)
    spending.reserve(ROUND, budget=8.0, delta=1e-5)
    with path.open("a") as file:
        file.write('{"events": [{"sig')
    assert len(spending.lines()) == 1
    spending.reserve(ROUND, budget=8.0, delta=1e-5)
    assert len(spending.lines()) == 2


def test_a_damaged_line_stops_everything(tmp_path: Path) -> None:
    path = tmp_path / "privacy.jsonl"
    Spending(path).reserve(ROUND, budget=8.0, delta=1e-5)
    path.write_text("{broken\n" + path.read_text())
    with pytest.raises(OSError, match="what was spent is not known, so nothing more is released"):
        Spending(path).reserve(ROUND, budget=8.0, delta=1e-5)


def test_each_client_composes_its_own_rounds_and_the_largest_counts(tmp_path: Path) -> None:
    spending, one = Spending(tmp_path / "privacy.jsonl"), (Event(2.0),)
    for clients in ([0, 1], [0, 2], [0]):
        spending.reserve(one, budget=8.0, delta=1e-5, clients=clients)
    assert spending.spent(1e-5) == pytest.approx(epsilon([Event(2.0, 1.0, 3)], 1e-5), abs=1e-6)  # client 0
    budget = epsilon([Event(2.0, 1.0, 2)], 1e-5) + 1e-6
    spending.check(one, budget=budget, delta=1e-5, clients=[1, 2])
    with pytest.raises(BudgetSpent):
        spending.check(one, budget=budget, delta=1e-5, clients=[0, 1])


def test_an_empty_cohort_costs_nobody_anything(tmp_path: Path) -> None:
    spending = Spending(tmp_path / "privacy.jsonl")
    assert spending.reserve((Event(2.0),), budget=8.0, delta=1e-5, clients=[]) == 0.0
    assert spending.spent(1e-5) == 0.0


def test_two_processes_take_turns(tmp_path: Path) -> None:
    """Else both would pass one check, or cut off each other's line."""
    path = tmp_path / "privacy.jsonl"
    budget = epsilon([Event(1.0, 0.1, 40)], 1e-5) + 1e-6  # four rounds

    def work(order: int) -> int:
        try:
            Spending(path).reserve(ROUND, budget=budget, delta=1e-5)
        except BudgetSpent:
            return 0
        return 1

    with Lanes(lambda lane: work, 2) as lanes:
        done = [answer for _, answer in lanes.map(range(8))]
    assert sum(done) == 4
    assert len(Spending(path).lines()) == 4
