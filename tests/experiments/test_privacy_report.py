"""`fedpeft privacy report` of a run whose clients keep their ledgers elsewhere: what the server heard, and no more."""

import json
from pathlib import Path

import pytest

from experiments.privacy_report import show, spent
from fedpeft.config import ConfigError, load
from fedpeft.privacy.statement import Spent
from server.folder import create

pytestmark = pytest.mark.fast
WORDS = ["privacy=example", "clients=3", "cohort=3"]


def deployed(folder: Path, *said: tuple[float | None, float | None]) -> Path:
    """The server's folder of a run over gRPC."""
    made = create(folder / "run", load(WORDS), WORDS)
    for round, (epsilon, delta) in enumerate(said):
        made.ledger.append({"round": round, "epsilon": epsilon, "delta": delta})
    return made.path


def test_it_says_what_the_server_heard_and_that_it_may_be_less_than_was_spent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = deployed(tmp_path, (1.0, 1e-6), (2.25, 1e-5))
    assert spent(run)[1:] == ([], Spent(2.25, 1e-5, heard=True))
    show(run, as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert (found["epsilon"], found["clients"]) == (2.25, [])
    assert "epsilon 2.250 at delta 1e-05" in found["statement"][0]
    assert "the largest that one of 3 clients said of itself" in found["statement"][0]
    assert found["statement"][1].startswith("Known: as far as the server heard")


def test_a_run_of_which_nothing_was_heard_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="released nothing yet, as far as its server heard"):
        spent(deployed(tmp_path, (None, None)))
