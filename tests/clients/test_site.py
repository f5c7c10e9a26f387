"""A site answers for its clients: the same broadcast gives the same bytes, and one client's fault is its own."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from flwr.app import Message

from clients.engine import Engine
from clients.faults import Told
from clients.memory import Memory
from clients.site import Site, serve
from fedpeft.config import Options, build, load
from fedpeft.lowrank import cut, rank_of
from fedpeft.messages import Broadcast
from fedpeft.records import Packer, from_records, to_records, unpack_update
from fedpeft.setting import Setting, open_setting, strategy_of
from fedpeft.simulation import InProcessGrid
from server.exchange import Traffic, connect

SMALL = ["clients=4", "cohort=2", "train.steps=1", "model.epochs=1", "rounds=2"]


@pytest.fixture(scope="module")
def setting() -> Setting:
    return open_setting(load(SMALL))


def site(setting: Setting, folder: Path, *, strategy: str = "fedavg", replies: bool = True) -> Site:
    config = load([*SMALL, f"strategy={strategy}"])
    return Site(setting, strategy_of(config), build(config.codec), Memory(folder, replies=replies))


def message(setting: Setting, round: int = 0) -> tuple[Broadcast, object]:
    broadcast = Broadcast(setting.adapted.read())
    packed = Packer().pack(broadcast)
    return broadcast, to_records(packed.payload, {"round": round, "digest": packed.digest})


def test_the_same_broadcast_again_returns_the_same_bytes_and_trains_nothing(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, content = message(setting)
    here = site(setting, tmp_path, strategy="fedsa")
    first = here.answer(1, "train", content)
    monkeypatch.setattr(Engine, "train", lambda *_, **__: pytest.fail("it trained again"))
    for again in (here, site(setting, tmp_path, strategy="fedsa")):  # the same process, and one that was restarted
        second = again.answer(1, "train", content)
        assert second["payload"]["data"].data == first["payload"]["data"].data
        assert second["metrics"] == first["metrics"]


def test_a_client_that_keeps_nothing_writes_nothing_in_simulation(setting: Setting, tmp_path: Path) -> None:
    _, content = message(setting)
    site(setting, tmp_path, replies=False).answer(0, "train", content)
    assert list(tmp_path.rglob("*")) == []


def test_clients_share_the_memory_of_what_they_were_sent(setting: Setting, tmp_path: Path) -> None:
    _, content = message(setting)
    here = site(setting, tmp_path, replies=False)
    here.answer(0, "train", content)
    here.answer(1, "train", content)
    assert all(tensor is here.held.of(1)[digest] for digest, tensor in here.held.of(0).items())


def test_one_client_whose_loss_is_nan_is_a_fault_and_the_round_goes_on(setting: Setting, tmp_path: Path) -> None:
    here = site(setting, tmp_path)
    rows = setting.split.clients[2]
    pixels = setting.train.pixels[rows].clone()
    setting.train.pixels[rows] = float("nan")
    try:
        grid = InProcessGrid(serve(here, {InProcessGrid.FIRST + client: client for client in range(4)}), 4)
        traffic, start = Traffic(), Broadcast(setting.adapted.read())
        updates = list(connect(grid, here.codec, 4).train(0, dict.fromkeys(range(4), start), traffic))
    finally:
        setting.train.pixels[rows] = pixels
    assert [update.client for update in updates] == [0, 1, 3]
    assert [fault.client for fault in traffic.faults] == [2]
    assert "the loss became nan" in traffic.faults[0].reason


def test_the_test_set_is_weighted_to_resemble_the_clients_labels(setting: Setting) -> None:
    weights = setting.resembling(1)
    labels, own = setting.dataset.test.labels, setting.dataset.train.labels[setting.split.clients[1]]
    for label in range(10):
        share = float((own == label).float().mean()) if (labels == label).any() else 0.0
        assert float(weights[labels == label].sum()) == pytest.approx(share)


def test_a_message_that_is_not_ours_becomes_an_error_reply(setting: Setting, tmp_path: Path) -> None:
    broken = Message(to_records(Packer().pack(Broadcast({})).payload, {"round": "soon", "digest": ""}), 2, "train")
    (reply,) = serve(site(setting, tmp_path), {2: 0})([broken])
    assert reply.has_error()
    assert "needed is a whole number" in str(reply.error.reason)


def test_training_order_of_clients_changes_nothing(setting: Setting, tmp_path: Path) -> None:
    _, content = message(setting)
    one, two = site(setting, tmp_path / "one"), site(setting, tmp_path / "two")
    forward = {client: one.answer(client, "train", content)["payload"]["data"].data for client in (0, 1, 2)}
    backward = {client: two.answer(client, "train", content)["payload"]["data"].data for client in (2, 1, 0)}
    assert forward == backward


def test_a_client_that_no_test_example_resembles_is_a_fault_of_its_own(setting: Setting, tmp_path: Path, monkeypatch) -> None:
    here = site(setting, tmp_path, strategy="fedsa")
    judged = Setting.judged

    def none_for_two(self: Setting, client: int):
        if client == 2:
            raise ValueError("no test example has a label that this client holds; give the data more test rows")
        return judged(self, client)

    monkeypatch.setattr(Setting, "judged", none_for_two)
    grid = InProcessGrid(serve(here, {InProcessGrid.FIRST + client: client for client in range(4)}), 4)
    traffic = Traffic()
    found = dict(connect(grid, here.codec, 4).evaluate(1, dict.fromkeys(range(4), Broadcast(setting.adapted.read())), traffic))
    assert sorted(found) == [0, 1, 3]
    assert [(fault.client, "no test example has a label" in fault.reason) for fault in traffic.faults] == [(2, True)]


@pytest.mark.parametrize("stacked", [True, False])
def test_a_client_that_pruned_itself_goes_on_at_its_rank_and_other_strategies_refuse_it(
    stacked: bool, setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setting, "config", replace(setting.config, engine=Options(stacked=stacked)))
    whole = Broadcast(setting.adapted.read())
    sent = Broadcast(cut(whole.tensors, 3))
    packed = Packer().pack(sent)
    content = to_records(packed.payload, {"round": 1, "digest": packed.digest})
    here = site(setting, tmp_path / "hetlora", strategy="hetlora")
    update = unpack_update(from_records(here.answer(1, "train", content)), {"weight": 1.0}, 1, sent, here.codec)
    assert rank_of(update.tensors) in (2, 3)
    with pytest.raises(Told, match="training failed") as found:
        site(setting, tmp_path / "fedavg").answer(1, "train", content)
    assert re.search(r"is \(3, \d+\)( torch.float32)?, the adapter here has \(8, ", str(found.value.__cause__))


@pytest.mark.parametrize("round", [-1, 3, 10**18])
def test_a_round_that_the_run_does_not_have_is_refused(setting: Setting, tmp_path: Path, round: int) -> None:
    _, content = message(setting, round)
    with pytest.raises(ValueError, match=rf"the message's round is {round}, this run has rounds 0 to 1"):
        site(setting, tmp_path).answer(0, "train", content)
