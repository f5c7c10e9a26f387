"""The compressed way down: one public model, its changes, and who needs which."""

from pathlib import Path

import pytest
import torch

from experiments.simulate import simulate
from fedpeft.codecs.base import layout
from fedpeft.codecs.raw import Raw
from fedpeft.ledger import Ledger
from fedpeft.lowrank import LowRank
from fedpeft.messages import Broadcast
from fedpeft.records import changed, draw_down, pack_changes, unpack_changes
from server.stream import Stream

fast = pytest.mark.fast


class Tenths:
    """Differences to the nearest tenth, a byte each."""

    lossless = False

    def encode(self, tensors, *, seed=0):
        return Raw().encode(
            {n: (t * 10).round().clamp(-127, 127).to(torch.int8) if t.is_floating_point() else t for n, t in tensors.items()}
        )

    def decode(self, data, specs, *, seed=0):
        small = tuple(type(s)(s.name, torch.int8 if s.dtype.is_floating_point else s.dtype, s.shape) for s in specs)
        kinds = {s.name: s.dtype for s in specs}
        return {n: t.to(kinds[n]) / 10 if kinds[n].is_floating_point else t for n, t in Raw().decode(data, small).items()}


def model(value: float) -> Broadcast:
    return Broadcast({"q.A": torch.full((2, 30), value), "seen": torch.tensor([int(value * 100)])})


def to_all(broadcast: Broadcast) -> dict[int, Broadcast]:
    return dict.fromkeys(range(3), broadcast)


@fast
def test_the_first_model_goes_down_as_it_is():
    stream, first = Stream(Tenths(), 0), model(0.123)
    assert stream.advance(to_all(first)) is first
    assert stream.since(None) is None


@fast
def test_what_a_change_left_out_lies_in_the_next():
    stream = Stream(Tenths(), 0)
    stream.advance(to_all(model(0.0)))
    public = [float(stream.advance(to_all(model(value))).tensors["q.A"][0, 0]) for value in (0.04, 0.08, 0.12, 0.16)]
    assert public == pytest.approx([0.0, 0.1, 0.1, 0.2])  # the difference is from what clients hold, so errors never add up
    assert stream.public.tensors["seen"].tolist() == [16]  # whole numbers go as they are


@fast
def test_changes_since_a_version_lead_a_client_to_the_same_bits():
    stream, codec = Stream(Tenths(), 7), Tenths()
    held = stream.advance(to_all(model(0.0)))
    for value in (0.31, 0.52):
        stream.advance(to_all(model(value)))
    changes = unpack_changes(pack_changes(stream.since(0) or []))
    assert len(changes) == 2
    for version, change in enumerate(changes, 1):
        held = changed(held, change, codec, draw_down(7, version))
    assert all(torch.equal(held.tensors[name], tensor) for name, tensor in stream.public.tensors.items())
    assert len(stream.since(1) or []) == 1
    assert stream.since(2) == []  # nothing new


@fast
def test_many_changes_or_unknown_versions_are_sent_the_whole():
    stream = Stream(Tenths(), 0)
    for value in range(6):
        stream.advance(to_all(model(value / 10)))
    assert stream.since(4) is not None
    assert stream.since(0) is None  # five changes of 68 bytes are no shorter than the model's 248
    stream.resume(9, model(1.0))
    assert stream.since(5) is None
    assert stream.since(9) == []


@fast
def test_a_round_that_is_drawn_again_makes_no_second_change():
    stream, same = Stream(Tenths(), 0), model(0.5)
    stream.advance(to_all(model(0.0)))
    assert stream.advance(to_all(same)) is stream.advance(to_all(same))
    assert stream.version == 1


@fast
def test_another_adapters_model_begins_anew():
    stream = Stream(Tenths(), 0)
    stream.advance(to_all(model(0.0)))
    other = Broadcast({"q.A": torch.ones(5, 30)})
    assert stream.advance(to_all(other)) is other
    assert stream.since(0) is None
    assert layout(stream.public.tensors) == layout(other.tensors)


@fast
def test_what_has_no_one_model_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"ranks differ.*downlink=raw"):
        Stream(Tenths(), 0).advance({0: model(0.0), 1: model(0.0)})
    moved = Broadcast({}, ({"q": LowRank(torch.ones(2, 1), torch.ones(1, 2))},))
    with pytest.raises(ValueError, match=r"adds to the base.*downlink=raw"):
        Stream(Tenths(), 0).advance({0: moved})


@fast
@pytest.mark.parametrize("text", ["{}", "[3, -3]", "[1.5]", "[true]", "[4]", "nonsense", '["2"]'])
def test_changes_that_do_not_fit_their_header_are_a_value_error(text):
    payload = pack_changes([b"abc"])
    with pytest.raises(ValueError, match=r"changes|JSON"):
        unpack_changes(type(payload)(text, payload.data))


RUN = ["clients=6", "cohort=3", "rounds=6", "train.steps=2", "model.epochs=1", "evaluate.head_only=false", "evaluate.every=1",
       "engine.lanes=1", "downlink=half"]  # fmt: skip


@pytest.mark.slow
def test_a_run_with_a_lossy_way_down_costs_less_and_goes_on_to_the_same_bytes_after_a_stop(tmp_path: Path) -> None:
    whole = simulate([*RUN, f"run.dir={tmp_path / 'whole'}"])
    raw = simulate([*RUN[:-1], f"run.dir={tmp_path / 'raw'}"])
    assert whole.outcome.bytes_down < 0.85 * raw.outcome.bytes_down
    assert whole.outcome.bytes_up == raw.outcome.bytes_up

    def stop(what: str, config: object, entry: dict[str, object]) -> None:
        if entry["round"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate([*RUN, f"run.dir={tmp_path / 'stopped'}"], watch=stop)
    simulate([], resume=tmp_path / "stopped")
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    entries = Ledger(tmp_path / "whole" / "ledger.jsonl").entries()
    assert not any(entry["faults"] for entry in entries)
    last = entries[-1]["bytes_by_client"]
    assert isinstance(last, dict)
    assert len(last) == 3
    assert sum(down for _, down in last.values()) == entries[-1]["bytes_down"]
