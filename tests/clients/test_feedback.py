"""Error feedback: what a lossy codec leaves out of a client's update is added to its next, over rounds and restarts."""

import logging
from pathlib import Path

import pytest
import torch

from clients.memory import Memory
from clients.site import OWED, site_of
from experiments.simulate import simulate
from fedpeft.codecs.raw import Raw
from fedpeft.codecs.ternary import Ternary
from fedpeft.config import ConfigError, load
from fedpeft.messages import Broadcast, Update
from fedpeft.records import Packer, pack_update, to_records, unpack_update
from fedpeft.setting import codec_of, open_setting

SMALL = ["clients=4", "cohort=2", "train.steps=1", "model.epochs=1", "rounds=3", "codec=ternary", "evaluate.head_only=false"]


def values(seed: int) -> dict[str, torch.Tensor]:
    return {"q.A": torch.randn(4, 30, generator=torch.Generator().manual_seed(seed)), "seen": torch.tensor([seed])}


@pytest.mark.fast
def test_what_was_said_and_what_is_owed_add_up_to_the_change_and_the_debt():
    sent, end, owed = Broadcast(values(0)), values(1), {"q.A": values(2)["q.A"]}
    payload, left = pack_update(Update(3, end, 1.0), sent, Ternary(0.1), owed=owed)
    said = unpack_update(payload, {"weight": 1.0}, 3, sent, Ternary(0.1)).tensors
    whole = end["q.A"] - sent.tensors["q.A"] + owed["q.A"]
    assert torch.allclose(said["q.A"] - sent.tensors["q.A"] + left["q.A"], whole, atol=1e-6)
    assert set(left) == {"q.A"}  # whole numbers are sent as they are
    assert torch.equal(said["seen"], end["seen"])


@pytest.mark.fast
def test_what_is_said_over_many_rounds_stays_near_all_that_was_meant():
    """The debt is bounded: without feedback the same codec says a fixed part of every change and never the rest."""
    sent, step, codec = Broadcast({"q.A": torch.zeros(4, 30)}), values(1)["q.A"], Ternary(0.1)
    sums = {True: torch.zeros(4, 30), False: torch.zeros(4, 30)}
    owed: dict[str, torch.Tensor] = {}
    for _ in range(60):
        payload, owed = pack_update(Update(0, {"q.A": step}, 1.0), sent, codec, owed=owed)
        sums[True] += unpack_update(payload, {"weight": 1.0}, 0, sent, codec).tensors["q.A"]
        payload, _ = pack_update(Update(0, {"q.A": step}, 1.0), sent, codec)
        sums[False] += unpack_update(payload, {"weight": 1.0}, 0, sent, codec).tensors["q.A"]
    far = {fed: float((total - 60 * step).norm() / (60 * step).norm()) for fed, total in sums.items()}
    assert far[True] < 0.25 * far[False]


@pytest.mark.fast
@pytest.mark.parametrize("owed", [{"q.A": torch.ones(2, 30)}, {"v.A": torch.ones(4, 30)}])
def test_a_debt_of_another_shape_or_name_is_left_alone(owed):
    sent, end = Broadcast(values(0)), values(1)
    payload, _ = pack_update(Update(0, end, 1.0), sent, Ternary(0.1), owed=owed)
    assert payload == pack_update(Update(0, end, 1.0), sent, Ternary(0.1), owed={})[0]


@pytest.mark.fast
def test_a_lossless_codec_owes_nothing():
    assert pack_update(Update(0, values(1), 1.0), Broadcast(values(0)), Raw(), owed={"q.A": torch.ones(4, 30)})[1] == {}


@pytest.mark.fast
@pytest.mark.parametrize("words", [["codec=mask", "codec.unbiased=true"], ["codec=ternary", "codec.alpha=2.5"]])
def test_a_codec_whose_debt_would_grow_without_end_is_refused_with_feedback(words):
    with pytest.raises(ConfigError, match="set feedback=false"):
        codec_of(load(words))
    assert codec_of(load([*words, "feedback=false"]))[1] is False


def test_a_debt_is_kept_with_the_reply_and_survives_a_restart(tmp_path: Path) -> None:
    setting = open_setting(load(SMALL))
    packed = Packer().pack(Broadcast(setting.adapted.read()))

    def reply(folder: Path, round: int) -> bytes:
        site = site_of(setting, Memory(tmp_path / folder))
        made = site.answer(1, "train", to_records(packed.payload, {"round": round, "digest": packed.digest}))
        data: bytes = made["payload"]["data"].data
        return data

    first = reply(Path("one"), 0)
    kept = Memory(tmp_path / "one").recall(1, "main", 1)
    assert {name for name in kept if name.startswith(OWED)} == {OWED + name for name in setting.adapted.parameters}
    assert reply(Path("one"), 0) == first  # the same broadcast again: the same bytes, nothing owed twice
    with_debt, without = reply(Path("one"), 1), reply(Path("another"), 1)
    assert with_debt != without
    assert reply(Path("one"), 1) == with_debt


def test_a_strategy_that_makes_factors_anew_owes_nothing_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    setting = open_setting(load([*SMALL, "strategy=flora"]))
    with caplog.at_level(logging.WARNING, logger="fedpeft"):
        site = site_of(setting, Memory(tmp_path))
    assert "strategy=flora makes factors anew" in caplog.text
    packed = Packer().pack(Broadcast(setting.adapted.read()))
    site.answer(1, "train", to_records(packed.payload, {"round": 0, "digest": packed.digest}))
    assert Memory(tmp_path).recall(1, "main", 1) == {}


@pytest.mark.slow
def test_a_run_with_debts_goes_on_to_the_same_bytes_after_a_stop(tmp_path: Path) -> None:
    simulate([*SMALL, f"run.dir={tmp_path / 'whole'}"])

    def stop(what: str, config: object, entry: dict[str, object]) -> None:
        if entry["round"] == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate([*SMALL, f"run.dir={tmp_path / 'stopped'}"], watch=stop)
    simulate([], resume=tmp_path / "stopped")
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
