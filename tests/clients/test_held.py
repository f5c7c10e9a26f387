"""What a client makes for itself, or was sent before, is not sent; who lacks it is sent it, and ends where the others end."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from clients.memory import Memory
from clients.site import serve, site_of
from fedpeft.codecs.raw import Raw
from fedpeft.config import load
from fedpeft.messages import Broadcast, Update
from fedpeft.records import Packer, digested
from fedpeft.setting import Setting, open_setting, strategy_of
from fedpeft.simulation import InProcessGrid
from fedpeft.tensors import Tensors, nbytes
from server.exchange import Exchange, Traffic, connect

SMALL = ["clients=2", "cohort=2", "train.steps=1", "model.epochs=1", "rounds=2"]


@pytest.fixture(params=["fed_sb", "ffa"])
def setting(request: pytest.FixtureRequest) -> Iterator[Setting]:
    made = open_setting(load([*SMALL, f"strategy={request.param}"]))
    yield made
    made.off()


def begun(setting: Setting) -> tuple[Broadcast, dict[str, Tensor]]:
    """The model before round 0, and what every client makes for itself."""
    starts = setting.starts()
    strategy = strategy_of(setting.config)
    return strategy.broadcast(strategy.init(starts), 0, None), digested(starts.values())


def joined(setting: Setting, folder: Path, *, announced: bool, made: bool = True, holds: bool = True) -> Exchange:
    """Real clients; `announced`: the server leaves out what they make for themselves, `made`: they do."""
    _, starts = begun(setting)
    site = site_of(setting, Memory(folder, replies=False), holds=holds)
    site.held = replace(site.held, starts=starts if made else {})
    nodes = {InProcessGrid.FIRST + client: client for client in range(2)}
    return connect(InProcessGrid(serve(site, nodes), 2), Raw(), 2, starts=frozenset(starts if announced else ()))


def asked(setting: Setting, exchange: Exchange, round: int, model: Broadcast) -> tuple[list[Update], Traffic]:
    traffic = Traffic()
    updates = list(exchange.train(round, dict.fromkeys(range(2), model), traffic, strategy_of(setting.config).phase(round).shares))
    assert traffic.faults == []
    return updates, traffic


def moved(model: Broadcast, updates: list[Update]) -> Broadcast:
    return Broadcast(model.tensors | updates[0].tensors)


def alike(one: list[Update], two: list[Update]) -> bool:
    def values(updates: list[Update]) -> list[Tensors]:
        return [update.tensors for update in updates]

    return all(a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a) for a, b in zip(values(one), values(two), strict=True))


@pytest.mark.parametrize("holds", [True, False])
def test_frozen_factors_never_travel(setting: Setting, tmp_path: Path, holds: bool) -> None:
    """Round 0 carries names alone, and Fed-SB's fingerprint; round 1 what round 0 moved."""
    model, starts = begun(setting)
    exchange, plain = joined(setting, tmp_path / "a", announced=True, holds=holds), joined(setting, tmp_path / "b", announced=False)
    first = Packer().pack(model, frozenset(starts)).payload
    assert len(first.data) == sum(tensor.nbytes for name, tensor in model.tensors.items() if "/" in name) <= 16
    updates, traffic = asked(setting, exchange, 0, model)
    usual, _ = asked(setting, plain, 0, model)
    assert traffic.down == 2 * len(first)
    assert alike(updates, usual)
    after = moved(model, updates)
    again, later = asked(setting, exchange, 1, after)
    assert alike(again, asked(setting, plain, 1, after)[0])
    moving = nbytes(updates[0].tensors) + (0 if holds else len(first.data))
    assert len(Packer().pack(after, frozenset(starts)).payload.data) == nbytes(updates[0].tensors) + len(first.data)
    assert 2 * moving < later.down < 2 * (moving + 1.1 * len(first.header))


def test_a_client_that_cannot_make_them_is_sent_them_once(setting: Setting, tmp_path: Path) -> None:
    model, starts = begun(setting)
    exchange, plain = joined(setting, tmp_path / "a", announced=True, made=False), joined(setting, tmp_path / "b", announced=False)
    updates, traffic = asked(setting, exchange, 0, model)
    usual, once = asked(setting, plain, 0, model)
    assert alike(updates, usual)
    assert traffic.down == 2 * len(Packer().pack(model, frozenset(starts)).payload) + once.down
    after = moved(model, updates)
    assert asked(setting, exchange, 1, after)[1].down == asked(setting, plain, 1, after)[1].down
