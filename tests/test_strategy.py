import doctest
from dataclasses import FrozenInstanceError, fields

import pytest

import fedpeft.strategy
from fedpeft.strategy import Phase, Strategy, always

pytestmark = pytest.mark.fast


def test_the_example_of_the_contract_runs_as_it_is_printed():
    result = doctest.testmod(fedpeft.strategy)
    assert result.attempted > 5
    assert result.failed == 0


def test_a_phase_trains_and_shares_everything_and_keeps_nothing_unless_told():
    phase = Phase()
    assert phase.trains("head.weight")
    assert phase.shares("q.A")
    assert not phase.keeps("q.B")
    assert (phase.adapter, phase.work, phase.loss, phase.finish) == ("main", "train", None, None)


def test_a_phase_is_a_value():
    with pytest.raises(FrozenInstanceError):
        Phase().adapter = "other"
    assert Phase() == Phase()


def test_always_is_the_same_phase_in_every_round():
    phase = Phase(work="gradient")
    assert {id(always(phase)(round)) for round in (0, 1, 99)} == {id(phase)}


def test_the_contract_has_at_most_six_members():
    assert len([name for name in vars(Strategy) if not name.startswith("_")]) == 6
    assert len(fields(Phase)) == 9
