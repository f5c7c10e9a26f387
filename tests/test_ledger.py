import json

import pytest

from fedpeft.ledger import Ledger, write_text

pytestmark = pytest.mark.fast


@pytest.fixture
def ledger(tmp_path) -> Ledger:
    return Ledger(tmp_path / "ledger.jsonl")


def test_a_ledger_that_was_never_written_has_no_entries(ledger):
    assert ledger.entries() == []
    ledger.rewind(0)
    assert ledger.entries() == []


def test_entries_come_back_in_order_one_line_each(ledger):
    entries = [
        {"round": k, "clients": [1, 2], "faults": [{"client": 3, "reason": "é\nnewline"}], "loss": 0.1 + 0.2, "measure": None}
        for k in range(3)
    ]
    for entry in entries:
        ledger.append(entry)
    assert ledger.entries() == entries
    assert len(ledger.path.read_text().splitlines()) == 3


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_could_not_be_measured_is_null(ledger, value):
    ledger.append({"round": 0, "loss": value, "accuracy": 0.5})
    assert ledger.entries() == [{"round": 0, "loss": None, "accuracy": 0.5}]
    json.loads(ledger.path.read_text(), parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))


def test_a_line_is_in_the_file_as_soon_as_append_returns(ledger):
    ledger.append({"round": 0})
    assert ledger.path.read_bytes() == b'{"round": 0}\n'


def test_a_line_cut_short_by_a_crash_is_no_entry_wherever_it_was_cut(ledger):
    for round in range(2):
        ledger.append({"round": round, "loss": 0.5})
    whole = ledger.path.read_bytes()
    first = whole.index(b"\n") + 1
    for size in range(len(whole)):
        ledger.path.write_bytes(whole[:size])
        assert [entry["round"] for entry in ledger.entries()] == ([0] if size >= first else [])


def test_rewinding_drops_a_round_and_all_later_ones_and_the_cut_line(ledger):
    for round in range(4):
        ledger.append({"round": round, "loss": 0.1 + 0.2})
    with ledger.path.open("a") as file:
        file.write('{"round": 4, "lo')
    before = ledger.path.read_text().splitlines()
    ledger.rewind(2)
    assert ledger.path.read_text().splitlines() == before[:2]  # to the letter
    ledger.append({"round": 2})
    assert [entry["round"] for entry in ledger.entries()] == [0, 1, 2]
    ledger.rewind(0)
    assert ledger.entries() == []


def test_rewinding_past_the_end_keeps_everything(ledger):
    ledger.append({"round": 0})
    ledger.rewind(9)
    assert ledger.entries() == [{"round": 0}]


def test_text_replaces_the_file_as_a_whole_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "manifest.json"
    write_text(path, "old")
    write_text(path, "new é")
    assert path.read_text() == "new é"
    assert list(tmp_path.iterdir()) == [path]
