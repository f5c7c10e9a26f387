"""What a run says of itself while it goes on, and at its end."""

import pytest

from experiments.progress import Progress, crossed, payloads

pytestmark = pytest.mark.fast
ROUND = {"bytes_up": 100, "bytes_raw_up": 2000, "bytes_down": 400, "bytes_raw_down": 800, "entropy_up": 80}


def test_payloads_are_held_against_raw_and_against_their_entropy():
    assert payloads([ROUND, ROUND | {"bytes_up": 300}]) == [
        ("payloads up", "400 B (0.1 x raw, 2.5 x entropy)"),
        ("payloads down", "800 B (0.5 x raw)"),
    ]


def test_what_has_no_bound_or_was_not_sent_is_held_against_nothing():
    assert payloads([ROUND | {"entropy_up": None, "bytes_down": 0, "bytes_raw_down": 0}]) == [
        ("payloads up", "100 B (0.05 x raw)"),
        ("payloads down", "0 B"),
    ]
    assert payloads([]) == [("payloads up", "0 B"), ("payloads down", "0 B")]


def test_a_ledger_from_before_there_were_such_figures_is_read():
    assert payloads([{"bytes_up": 5, "bytes_down": 6}]) == [("payloads up", "5 B"), ("payloads down", "6 B")]


def test_what_crossed_the_socket_is_held_against_the_payloads_of_the_rounds_that_were_measured():
    measured, not_measured = ROUND | {"socket_up": 150, "socket_down": 500}, ROUND | {"socket_up": None, "socket_down": None}
    assert crossed([measured, measured]) == [
        ("at the socket up", "300 B (1.5 x payload)"),
        ("at the socket down", "1.0 kB (1.25 x payload)"),
    ]
    assert crossed([measured, not_measured])[0] == ("at the socket up", "150 B (1.5 x payload, 1 of 2 rounds)")


def test_what_was_not_measured_at_the_socket_is_no_number():
    assert crossed([ROUND | {"socket_up": None, "socket_down": None}]) == [
        ("at the socket up", "not measured"),
        ("at the socket down", "not measured"),
    ]
    assert crossed([ROUND]) == crossed([]) == [("at the socket up", "not measured"), ("at the socket down", "not measured")]


def test_a_part_of_a_run_says_that_it_begins_or_what_of_it_is_there(capsys: pytest.CaptureFixture[str]):
    progress = Progress(silent=False)
    progress.begin("run", 0, 4)
    progress.begin("run", 4, 4)
    progress.begin("head-only baseline", 0, 4)
    Progress(silent=True).begin("head-only baseline", 0, 4)
    assert capsys.readouterr().out.splitlines() == ["run: 4 of 4 rounds are there", "head-only baseline: 4 rounds"]
