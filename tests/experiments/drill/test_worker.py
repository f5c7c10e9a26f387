"""The drills' worker does wrong what its event says, once, and then answers as any worker."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from clients.forward import plain
from clients.launch import SiteFile
from clients.worker import Worker
from experiments.drill.event import Event, Kind
from experiments.drill.spoiled import MANY
from experiments.drill.worker import HELD, Odd
from fedpeft.codecs.base import Payload
from fedpeft.config import load
from fedpeft.messages import Broadcast, checked
from fedpeft.records import Packer, draw_up, to_records, unpack_update
from fedpeft.setting import Setting, codec_of, open_setting
from fedpeft.tensors import everything

SMALL = ["clients=4", "cohort=2", "train.steps=1", "model.epochs=1", "rounds=2", "engine.wave=1", "engine.lanes=1"]


@pytest.fixture(scope="module")
def setting() -> Setting:
    return open_setting(load(SMALL))


@pytest.fixture(scope="module")
def message(setting: Setting) -> tuple[dict[str, Any], bytes]:
    packed = Packer().pack(Broadcast(setting.adapted.read()))
    head, payload = plain(to_records(packed.payload, {"round": 0, "digest": packed.digest}))
    return head | {"kind": "train", "run": 7, "overrides": " ".join(SMALL)}, payload


@pytest.fixture(scope="module")
def usual(message: tuple[dict[str, Any], bytes], tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], bytes]:
    return Worker(SiteFile(1, tmp_path_factory.mktemp("usual"), insecure=True)).answer(*message)


def odd(folder: Path, kind: Kind) -> Odd:
    return Odd(SiteFile(1, folder, insecure=True), event=Event(kind, (0,)))


@pytest.mark.parametrize(
    ("kind", "fault"), [("truncated", "payload holds"), ("nan", "not finite"), ("rank", "sent was"), ("oversized", "payload holds")]
)
def test_what_it_sends_is_what_the_drill_says_and_then_an_update(
    kind: Kind, fault: str, setting: Setting, message: tuple[dict[str, Any], bytes], usual: tuple[dict[str, Any], bytes], tmp_path: Path
) -> None:
    here = odd(tmp_path, kind)
    said, data = here.answer(*message)
    sent = Broadcast(setting.adapted.read())
    seed, codec = draw_up(0, 0, 1), codec_of(setting.config)[0]
    with pytest.raises(ValueError, match=fault):
        checked(
            unpack_update(Payload(said["facts"]["header"], data), said["metrics"], 1, sent, codec, seed=seed), sent, everything, equal=True
        )
    assert len(data) - len(usual[1]) >= (MANY if kind == "oversized" else -len(usual[1]))
    assert here.answer(*message)[1] == usual[1]


def test_an_answer_that_is_lost_is_given_again(
    message: tuple[dict[str, Any], bytes], usual: tuple[dict[str, Any], bytes], tmp_path: Path
) -> None:
    here = odd(tmp_path, "lost")
    with pytest.raises(OSError, match="lost on its way"):
        here.answer(*message)
    assert here.answer(*message)[1] == usual[1]


def test_what_raises_is_a_fault(message: tuple[dict[str, Any], bytes], tmp_path: Path) -> None:
    assert odd(tmp_path, "raises").answer(*message) == ({"fault": "the GPU is out of memory"}, b"")


def test_it_is_in_mid_fit_until_the_file_is_taken_away(
    message: tuple[dict[str, Any], bytes], usual: tuple[dict[str, Any], bytes], tmp_path: Path
) -> None:
    here, made = odd(tmp_path, "late"), list[bytes]()
    working = threading.Thread(target=lambda: made.append(here.answer(*message)[1]))
    working.start()
    until = time.monotonic() + 60
    while not (tmp_path / HELD).exists():
        assert time.monotonic() < until
    assert not made
    (tmp_path / HELD).unlink()
    working.join(120)
    assert made == [usual[1]]
