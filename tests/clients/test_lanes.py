"""Lanes give the answers of one process, share its memory, and end when they should."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from clients.lanes import Lanes
from clients.memory import Memory
from clients.site import Site, lane_on_gpu
from fedpeft.config import build, load
from fedpeft.messages import Broadcast
from fedpeft.records import Packer, to_records
from fedpeft.setting import open_setting, strategy_of


def test_every_order_is_answered_once_whatever_the_number_of_lanes() -> None:
    for count in (1, 2, 5):
        with Lanes(lambda lane: lambda order: (order**2, os.getpid()), count) as lanes:
            for _ in range(2):
                answers = dict(lanes.map(range(7)))
                assert [answers[at][0] for at in range(7)] == [at**2 for at in range(7)]
                assert (os.getpid() in {pid for _, pid in answers.values()}) == (count == 1)
    assert not multiprocessing.active_children()


def test_what_the_disk_says_reaches_the_parent_as_it_was() -> None:
    def full(order: int) -> None:
        raise OSError(28, "No space left on device", "there")

    with Lanes(lambda lane: full, 2) as lanes, pytest.raises(OSError, match="No space left") as caught:
        list(lanes.map([1, 2]))
    assert (caught.value.errno, caught.value.filename) == (28, "there")


def test_a_mistake_in_a_lane_is_one_sentence() -> None:
    def wrong(order: int) -> None:
        raise KeyError("head")

    with Lanes(lambda lane: wrong, 2) as lanes, pytest.raises(OSError, match="a lane failed: KeyError: 'head'"):
        list(lanes.map([1, 2]))


def test_orders_that_nobody_waits_for_answer_no_later_one() -> None:
    with Lanes(lambda lane: lambda order: f"answer to {order}", 2) as lanes:
        first = lanes.map("abcd")
        next(first)
        first.close()
        assert dict(lanes.map("xy")) == {0: "answer to x", 1: "answer to y"}


def test_leaving_in_the_middle_of_work_does_not_wait_for_it() -> None:
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert time.monotonic() - began < 30
    assert not multiprocessing.active_children()


def interrupted() -> None:
    with Lanes(lambda lane: lambda order: time.sleep(60 * order), 3) as lanes:
        for _ in lanes.map([0, 1, 1]):
            raise KeyboardInterrupt


def test_a_lane_that_dies_is_said() -> None:
    def die(order: int) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with (
        Lanes(lambda lane: die, 2) as lanes,
        pytest.raises(OSError, match=r"exit code -9, killed, perhaps for want of memory: set engine\.lanes=1"),
    ):
        list(lanes.map([1, 2]))


@pytest.mark.slow
def test_lanes_that_open_the_run_for_themselves_give_the_same_bytes(tmp_path: Path) -> None:
    """What several GPUs would do, on the processor."""
    overrides = ["clients=4", "cohort=4", "train.steps=2", "model.epochs=1", "rounds=2", "evaluate.head_only=false", "engine.lanes=2"]
    config = load(overrides)
    setting = open_setting(config)
    facts = {"fixed": 32, "tokens": 2048, "wave": 2}
    known = {"lanes": 2, "adapters": {"main": facts}}
    site = Site(setting, strategy_of(config), build(config.codec), Memory(tmp_path / "one", replies=False), known=known)
    packed = Packer().pack(Broadcast(setting.adapted.read()))
    content = to_records(packed.payload, {"round": 0, "digest": packed.digest})
    asked = [(client, "train", content) for client in range(4)]
    seen = []
    for lanes in (
        Lanes(lambda lane: site.work, 1),
        Lanes(lambda lane: site.work, 2),
        Lanes(partial(lane_on_gpu, overrides, tmp_path / "two", known), 2, fresh=True),
    ):
        with lanes:
            seen.append({client: made["payload"]["data"].data for client, _, made in site.answers(asked, lanes.map)})
    assert seen[0] == seen[1] == seen[2]
    alone = Site(
        setting,
        site.strategy,
        site.codec,
        Memory(tmp_path / "three", replies=False),
        known={"lanes": 1, "adapters": {"main": {**facts, "wave": 1}}},
    )
    for client, _, made in alone.answers(asked, lambda orders: enumerate(map(alone.work, orders))):  # another layout: rounding alone
        one, other = (np.frombuffer(data, dtype=np.float32) for data in (made["payload"]["data"].data, seen[0][client]))
        assert 0 < len(one) == len(other)
        assert float(np.abs(one - other).max()) < 1e-4


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux to end children with their parent")
def test_lanes_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    program = f"""
import os, time
from clients.lanes import Lanes
def work(order):
    open({str(tmp_path)!r} + f"/{{os.getpid()}}", "w").close()
    time.sleep(60)
with Lanes(lambda lane: work, 2) as lanes:
    list(lanes.map([1, 2]))
"""
    parent = subprocess.Popen([sys.executable, "-c", program], cwd=Path(__file__).parents[2])
    until = time.monotonic() + 60
    while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < until:
        time.sleep(0.05)
    pids = [int(path.name) for path in tmp_path.iterdir()]
    assert len(pids) == 2
    parent.kill()
    parent.wait()
    while any(running(pid) for pid in pids):
        assert time.monotonic() < until, "a lane outlived its parent"
        time.sleep(0.05)


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
