"""Drills come out as declared, and one that does not is told."""

import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from experiments import cli
from experiments.drill import simulation as simulated
from experiments.drill import table
from experiments.drill.declared import DEPLOYED, DRILLS
from experiments.drill.event import CLIENTS, Drill, Event, Ran, Runner, play
from experiments.drill.simulation import Simulation
from fedpeft.config import ConfigError, app_folder

BY_NAME = {one.name: one for one in DRILLS}
IN_ONE_PROCESS = [one.name for one in DRILLS if one.event.kind != "server"]


@pytest.fixture(scope="module")
def simulation(tmp_path_factory: pytest.TempPathFactory) -> Simulation:
    return Simulation(tmp_path_factory.mktemp("drills"))


@pytest.mark.parametrize("name", IN_ONE_PROCESS)
def test_a_drill_comes_out_as_declared(name: str, simulation: Simulation, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(simulated, "time", SimpleNamespace(monotonic=time.monotonic, sleep=waits.append))  # subprocess sleeps, too
    made = play(BY_NAME[name], simulation)
    assert made.wrong == (), made.happened
    assert [0 <= wait <= 2 for wait in waits] == [True] * (name in ("silent", "late"))  # 0: a busy machine had used the time up


@pytest.mark.slow
@pytest.mark.parametrize("name", [one.name for one in DRILLS if one.event.kind == "server"])
def test_a_killed_server_goes_on_to_the_same_adapter(name: str, simulation: Simulation) -> None:
    made = play(BY_NAME[name], simulation)
    assert made.wrong == (), made.happened


def test_what_happens_without_an_event_is_no_outcome_of_one(simulation: Simulation) -> None:
    for name, words in (("nan", "faults at"), ("too few", "it did not end"), ("restarted", "0 bytes more")):
        made = play(replace(BY_NAME[name], event=replace(BY_NAME[name].event, rounds=(9,))), simulation)
        assert any(words in text for text in made.wrong), made.wrong


def entries(*answers: int, faults: dict[int, tuple[int, str]] | None = None, down: int = 10) -> list[dict[str, object]]:
    return [
        {"round": r, "answers": count, "bytes_down": down,
         "faults": [{"client": (faults or {})[r][0], "reason": (faults or {})[r][1]}] if r in (faults or {}) else []}
        for r, count in enumerate(answers)
    ]  # fmt: skip


WHOLE = Ran(None, entries(4, 4, 4, 4), "whole")
WITHOUT = Ran(None, entries(4, 3, 4, 4, faults={1: (1, "it raised")}), "without")


def made_up(odd: Ran) -> Runner:
    """A runner whose odd event comes to `odd`."""

    class MadeUp:
        def run(self, event: Event, overrides: tuple[str, ...] = ()) -> Ran:
            return {"none": WHOLE, "raises": WITHOUT}.get(event.kind, odd)

    return MadeUp()


LEFT_OUT = Drill("one", "something", Event("nan"), "not finite")
UNHURT = Drill("two", "something", Event("twice"))
ENDS = Drill("three", "something", Event("server"), stopped="signal 9", count=True, resent=True)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("one", "ran", "words"),
    [
        (LEFT_OUT, Ran(None, entries(4, 3, 4, 4, faults={1: (1, "it is not finite")}), "without"), None),
        (LEFT_OUT, Ran(None, entries(4, 3, 4, 4), "without"), "faults at (round, client) []"),
        (LEFT_OUT, Ran(None, entries(4, 3, 4, 4, faults={1: (2, "it is not finite")}), "without"), "faults at (round, client) [(1, 2)]"),
        (LEFT_OUT, Ran(None, entries(4, 3, 4, 4, faults={1: (1, "it fell over")}), "without"), "another reason: it fell over"),
        (LEFT_OUT, Ran(None, entries(4, 3, 3, 4, faults={1: (1, "not finite")}), "without"), "answers [4, 3, 3, 4]"),
        (LEFT_OUT, Ran(None, entries(4, 3, 4, 4, faults={1: (1, "not finite")}), "whole"), "another adapter"),
        (UNHURT, WHOLE, None),
        (UNHURT, replace(WHOLE, end="other"), "another adapter"),
        (UNHURT, replace(WHOLE, stopped="the disk is full"), "it ended: the disk is full"),
        (UNHURT, Ran(None, entries(4, 4, 4, 4, down=11), "whole"), "4 bytes more went down"),
        (ENDS, Ran("signal 9", entries(4, 4, 4, 4, down=11), "whole"), None),
        (ENDS, Ran("signal 9", entries(4, 4, 4, 4), "whole"), "0 bytes more went down"),
        (ENDS, Ran("exit code 1", entries(4, 4, 4, 4, down=11), "whole"), "it ended otherwise: exit code 1"),
        (ENDS, Ran(None, entries(4, 4, 4, 4, down=11), "whole"), "it did not end"),
    ],
)
def test_each_way_to_differ_from_what_was_declared_is_told(one: Drill, ran: Ran, words: str | None) -> None:
    assert play(one, made_up(ran)).wrong == (() if words is None else (words,))


@pytest.mark.fast
def test_a_drill_that_differs_gives_exit_code_1_and_says_so_in_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "DRILLS", (LEFT_OUT, UNHURT))
    monkeypatch.setattr(table, "Simulation", lambda folder: made_up(WHOLE))
    lines: list[str] = []
    assert table.drill([], lines.append, markdown=True) == 1
    assert "differs: faults at (round, client) []" in lines[2]
    assert lines[3].endswith("| as declared |")
    assert table.drill(["two"], lines.append, markdown=True) == 0
    assert {line.count("|") for line in lines} == {7}
    lines.clear()
    assert table.drill([], lines.append) == 1
    assert [line.split()[0] for line in lines[::2]] == ["differs", "ok"]
    assert "differs: faults at (round, client) []" in lines[1]


@pytest.mark.fast
def test_a_name_that_is_no_drill_is_told_those_there_are() -> None:
    with pytest.raises(ConfigError, match="flood: there is no such drill; there are raises, killed"):
        table.drill(["flood"])


@pytest.mark.parametrize("grpc", [False, True])
def test_the_command_lists_what_there_is(grpc: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["fedpeft", "drill", "--list", *(["--grpc"] if grpc else [])])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"{one.name:<13} {one.done}: {one.declared}" for one in (DEPLOYED if grpc else DRILLS)]


def test_the_command_prints_a_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["fedpeft", "drill", "nan", "--markdown"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0
    assert capsys.readouterr().out.splitlines()[2].startswith("| nan | An update holds a NaN | the client is a fault (not finite)")


@pytest.mark.fast
def test_the_document_holds_every_drill_as_it_is_declared_today() -> None:
    page = Path(app_folder() / "docs" / "drills.md").read_text()
    simulated, deployed = page.split("## On real processes")
    for part, drills in ((simulated, DRILLS), (deployed, DEPLOYED)):
        for one in drills:
            assert f"| {one.name} | {one.done} | {one.declared} | " in part, one.name
    assert "differs:" not in page


@pytest.mark.fast
def test_a_drill_is_of_a_round_and_of_clients_that_there_are() -> None:
    for drills in (DRILLS, DEPLOYED):
        assert len({one.name for one in drills}) == len(drills)
    for one in (*DRILLS, *DEPLOYED):
        assert set(one.event.clients) < set(range(CLIENTS))
        assert 0 not in one.event.rounds  # a round before it is needed: for what is held, kept and stale
