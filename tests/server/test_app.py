"""What a round's line in the ledger holds of the clients' connections."""

from collections.abc import Iterator
from itertools import count
from pathlib import Path

from clients.memory import Memory
from clients.site import serve, site_of
from fedpeft.config import load
from fedpeft.setting import open_setting
from fedpeft.simulation import InProcessGrid
from server.app import federate
from server.folder import create
from server.sockets import Crossed, Crossing, unknown

WORDS = ["clients=2", "cohort=2", "rounds=2", "model.epochs=0", "train.steps=1", "evaluate.every=10", "evaluate.head_only=false"]


def lines(folder: Path, crossing: Crossing) -> Iterator[tuple[object, object]]:
    """(up, down) at the socket, of each round."""
    config = load([*WORDS, "engine.lanes=1", "engine.wave=1"])
    setting = open_setting(config)
    site = site_of(setting, Memory(folder / "memory"))
    grid = InProcessGrid(serve(site, {InProcessGrid.FIRST + client: client for client in range(2)}), 2)
    for entry in federate(config, setting, grid, create(folder, config, WORDS), crossing=crossing):
        yield entry["socket_up"], entry["socket_down"]


def test_a_round_has_what_crossed_while_it_went_on(tmp_path: Path) -> None:
    asked = count()
    told = (Crossed(number, 10 * number) for number in asked)  # 0 before the rounds, then in turn: in a round, after it
    assert list(lines(tmp_path, lambda: next(told))) == [(1, 10), (3, 30)]
    assert next(asked) == 5


def test_where_nothing_is_measured_nothing_is_said(tmp_path: Path) -> None:
    assert list(lines(tmp_path, unknown)) == [(None, None)] * 2
