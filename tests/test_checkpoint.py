import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from fedpeft import checkpoint
from fedpeft.checkpoint import Checkpoint, classes_in, found, freeze, read, save, thaw
from fedpeft.codecs.raw import raw_bytes
from fedpeft.config import build
from fedpeft.lowrank import LowRank
from fedpeft.messages import Broadcast
from fedpeft.strategy import Federation

pytestmark = pytest.mark.fast
STRATEGIES = sorted((Path(__file__).parents[1] / "experiments" / "conf" / "strategy").glob("*.yaml"))
KNOWN = (Broadcast, LowRank)


@dataclass(frozen=True)
class Other:
    """A state that no strategy of the run has."""

    model: Broadcast
    rank: int = 3


def a_state() -> Broadcast:
    chunk = {"q": LowRank(torch.randn(3, 1), torch.randn(1, 2, dtype=torch.float64))}
    return Broadcast({"q.A": torch.randn(2, 3), "n": torch.arange(3), "e": torch.zeros(0, 4)}, (chunk, {}))


def bits(value: object) -> tuple:
    """All there is in a state, tensors as bytes."""
    tensors, skeleton = freeze(value)
    raw = {n: (t.dtype, tuple(t.shape), raw_bytes(t)) for n, t in tensors.items()}
    return raw, json.dumps(skeleton)


def known(value: object) -> dict[str, type]:
    return {f"{cls.__module__}.{cls.__name__}": cls for cls in classes_in(value)}


# State <-> tensors and JSON


VALUES = {
    "none": None, "flag": True, "number": -3, "float": 0.1, "text": "é|\n", "nan": float("inf"),
    "tensor": torch.ones(2, dtype=torch.bfloat16),
    "scalar": torch.tensor(7), "empty": {}, "no tuple": (), "nested": ({"a": (1, {"b": torch.zeros(1)})},), "ranks": {0: 4, 12: 2},
    "broadcast": a_state(), "others": (Other(a_state()), Other(a_state(), 5)),
}  # fmt: skip


@pytest.mark.parametrize("name", VALUES)
def test_a_value_comes_back_from_tensors_and_json(name):
    value = VALUES[name]
    tensors, skeleton = freeze(value)
    back = thaw(tensors, json.loads(json.dumps(skeleton)), known(value))
    assert bits(back) == bits(value)
    assert type(back) is type(value)


def test_whole_numbers_stay_keys_and_tuples_stay_tuples():
    assert thaw(*freeze({3: (1, 2), "3": (3,)}), {}) == {3: (1, 2), "3": (3,)}


leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5) | st.integers(0, 9).map(torch.tensor)
names = st.text("ab|/.\\'\"0", max_size=4) | st.integers(0, 3)
states = st.recursive(leaves, lambda s: st.dictionaries(names, s, max_size=4) | st.lists(s, max_size=4).map(tuple), max_leaves=15)


@settings(deadline=None, max_examples=100)
@given(state=states)
@example(state={1: torch.tensor(1), "1": torch.tensor(2)})
@example(state={"a|b": torch.tensor(1), "a": {"b": torch.tensor(2)}})
@example(state={"a'|'b": torch.tensor(1), "a": {"b": torch.tensor(2)}})
def test_no_two_tensors_of_a_state_share_a_name(state):
    tensors, skeleton = freeze(state)
    assert str(bits(thaw(tensors, json.loads(json.dumps(skeleton)), {}))) == str(bits(state))

    def count(value: object) -> int:
        if isinstance(value, torch.Tensor):
            return 1
        return sum(map(count, value.values() if isinstance(value, dict) else value)) if isinstance(value, dict | tuple) else 0

    assert len(tensors) == count(state)


@pytest.mark.parametrize("value", [[1], {1, 2}, object(), {"a": ({"b": [torch.ones(1)]},)}, 1j, Broadcast])
def test_what_a_state_is_not_made_of_is_refused_with_its_place(value):
    with pytest.raises(TypeError, match="a state is made of tensors, numbers"):
        freeze(value)
    with pytest.raises(TypeError, match=r"a list at .*a.*0.*b"):
        freeze({"a": ({"b": [1]},)})


@pytest.mark.parametrize("path", STRATEGIES, ids=lambda path: path.stem)
def test_every_strategys_state_comes_back_with_the_same_bits(path, tmp_path, federation):
    run = federation(build(OmegaConf.to_container(OmegaConf.load(path)), run=Federation(rounds=4, optimizer="sgd")))
    classes = classes_in(run.state) | set(KNOWN)  # what the server knows when it resumes: the classes of a beginning
    for round in range(3):
        run.take(run.play()[0])
        back = read(save(Checkpoint(round + 1, run.state, {"up": round}), tmp_path, keep=1), classes)
        assert (back.round, back.facts) == (round + 1, {"up": round})
        assert bits(back.state) == bits(run.state)
        assert type(back.state) is type(run.state)


# The file


@pytest.fixture
def saved(tmp_path) -> Path:
    return save(Checkpoint(3, Broadcast({"q.A": torch.ones(2)}), {"up": 10}), tmp_path, keep=2)


def refused(path: Path, classes=KNOWN) -> str:
    with pytest.raises(ValueError, match=path.name) as fault:
        read(path, classes)
    return str(fault.value)


def test_a_class_the_reader_does_not_name_is_not_built(tmp_path):
    path = save(Checkpoint(1, Other(a_state()), {}), tmp_path, keep=1)
    with pytest.raises(ValueError, match=r"holds a .*Other, this run's strategy does not; resume with the config"):
        read(path, KNOWN)
    assert read(path, (*KNOWN, Other)).state.rank == 3


def test_tensors_that_share_memory_are_saved_each_on_its_own(tmp_path):
    whole = torch.arange(6.0).reshape(2, 3)
    state = {
        "whole": whole,
        "same": whole,
        "row": whole[1],
        "turned": whole.T,
        "wide": torch.ones(1).expand(4),
        "none": whole[:0],
        "one": whole[:1, 0],
    }
    back = read(save(Checkpoint(0, state, {}), tmp_path, keep=1), ()).state
    assert bits(back) == bits(state)


def test_parameters_with_gradients_are_saved_as_plain_tensors(tmp_path):
    back = read(save(Checkpoint(0, {"a": torch.nn.Parameter(torch.ones(2))}, {}), tmp_path, keep=1), ()).state
    assert not back["a"].requires_grad


def test_facts_of_every_kind_survive(tmp_path):
    facts = {"up": 2**60, "seconds": 0.1 + 0.2, "loss": float("nan"), "measure": "global", "none": None}
    assert str(read(save(Checkpoint(0, {}, facts), tmp_path, keep=1), ()).facts) == str(facts)


def test_the_newest_are_kept(tmp_path):
    for round in (1, 2, 9, 10, 11):
        save(Checkpoint(round, {}, {}), tmp_path, keep=2)
    assert [path.name for path in found(tmp_path)] == ["round-000010.safetensors", "round-000011.safetensors"]
    assert [read(path, ()).round for path in found(tmp_path)] == [10, 11]
    save(Checkpoint(12, {}, {}), tmp_path, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["round-000012.safetensors"]


def test_a_round_saved_twice_is_the_later_one(tmp_path):
    save(Checkpoint(1, {"a": 1}, {}), tmp_path, keep=2)
    save(Checkpoint(1, {"a": 2}, {}), tmp_path, keep=2)
    assert [read(path, ()).state for path in found(tmp_path)] == [{"a": 2}]


def test_a_partial_file_of_a_killed_process_is_ignored_and_then_cleaned(tmp_path, saved):
    partial = tmp_path / "round-000004.999999.partial"
    partial.write_bytes(saved.read_bytes()[:100])
    assert found(tmp_path) == [saved]
    save(Checkpoint(4, {}, {}), tmp_path, keep=2)
    assert not partial.exists()
    assert len(found(tmp_path)) == 2


def test_no_checkpoints_are_found_where_there_is_no_folder(tmp_path):
    assert found(tmp_path / "none") == []


def test_a_file_that_cannot_be_written_leaves_the_one_before(tmp_path, saved, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        save(Checkpoint(4, {}, {}), tmp_path, keep=1)
    assert found(tmp_path) == [saved]
    assert read(saved, KNOWN).round == 3


def test_a_truncated_file_is_refused_at_every_length(saved):
    whole = saved.read_bytes()
    for size in range(len(whole)):
        saved.write_bytes(whole[:size])
        said = refused(saved)
        assert str(saved) in said
        assert "delete it to resume from the one before" in said


@pytest.mark.parametrize("more", [b"\0", b"\0" * 64])
def test_a_file_with_more_than_was_written_is_refused(saved, more):
    saved.write_bytes(saved.read_bytes() + more)
    refused(saved)


def test_one_flipped_bit_in_every_byte_is_refused(saved):
    whole = saved.read_bytes()
    for at in range(len(whole)):
        saved.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        refused(saved)


def test_another_dtype_or_shape_of_the_same_bytes_is_refused(saved):
    whole = saved.read_bytes()
    for old, new in ((b'"F32"', b'"I32"'), (b"[2]", b"[2,1]")):
        assert whole.count(old) == 1
        size = int.from_bytes(whole[:8], "little") + len(new) - len(old)
        saved.write_bytes(size.to_bytes(8, "little") + whole[8:].replace(old, new))
        refused(saved)


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_any_flipped_bit_is_refused_and_the_remedy_named(tmp_path, at, bit):
    path = save(Checkpoint(3, a_state(), {"up": 10}), tmp_path, keep=1)
    whole = bytearray(path.read_bytes())
    whole[at % len(whole)] ^= 1 << bit
    path.write_bytes(whole)
    said = refused(path)
    assert "corrupt" in said
    assert "delete it to resume from the one before" in said


def test_a_file_that_is_not_there_or_not_ours_is_refused(tmp_path):
    from safetensors.torch import save_file

    refused(tmp_path / "round-000001.safetensors")
    save_file({"t0": torch.ones(1)}, tmp_path / "round-000002.safetensors")
    refused(tmp_path / "round-000002.safetensors")
    save_file({"t0": torch.ones(1)}, tmp_path / "round-000003.safetensors", metadata={"format": checkpoint.FORMAT})
    refused(tmp_path / "round-000003.safetensors")
