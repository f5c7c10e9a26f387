import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from clients.memory import Memory, Reply
from fedpeft import checkpoint
from fedpeft.codecs.base import Payload

pytestmark = pytest.mark.fast


def reply(value: int = 0) -> Reply:
    return Reply(Payload(f'[["q.A","float32",[{value}]]]', bytes([value, 0, 255])), {"weight": 3.0, "loss": 0.1 + value})


def kept(value: float) -> dict[str, torch.Tensor]:
    return {"q.B": torch.full((2, 2), value), "head.weight": torch.tensor(value, dtype=torch.bfloat16)}


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) and one[n].dtype == other[n].dtype for n in one)


@pytest.fixture
def memory(tmp_path) -> Memory:
    return Memory(tmp_path / "memory")


def files(memory: Memory) -> list[str]:
    return (
        sorted(str(path.relative_to(memory.folder)) for path in memory.folder.rglob("*") if path.is_file())
        if memory.folder.exists()
        else []
    )


# State


def test_a_client_that_was_never_there_keeps_nothing(memory):
    assert memory.recall(3, "main", 5) == {}
    assert memory.answered(3, 5, "digest") is None
    assert files(memory) == []


def test_what_was_kept_comes_back_in_every_later_round(memory):
    memory.store(3, "main", 0, "d0", kept(1.0), reply())
    assert same(memory.recall(3, "main", 1), kept(1.0))
    assert same(memory.recall(3, "main", 99), kept(1.0))
    assert memory.recall(3, "main", 0) == {}  # as of before the round
    assert memory.recall(4, "main", 1) == {}  # another client's is its own
    assert same(Memory(memory.folder).recall(3, "main", 1), kept(1.0))  # and after a restart


def test_the_newest_state_before_a_round_is_the_one(memory):
    for round in (0, 4, 9):
        memory.store(3, "main", round, f"d{round}", kept(float(round)), reply())
    assert same(memory.recall(3, "main", 10), kept(9.0))
    assert same(memory.recall(3, "main", 9), kept(4.0))
    assert same(memory.recall(3, "main", 5), kept(4.0))


def test_one_adapters_memory_is_not_anothers(memory):
    memory.store(0, "sparse", 0, "d0", kept(1.0), reply())
    assert memory.recall(0, "main", 1) == {}
    memory.store(0, "main", 1, "d1", {"q.B": torch.zeros(3)}, reply())
    assert same(memory.recall(0, "main", 2), {"q.B": torch.zeros(3)})
    assert same(memory.recall(0, "sparse", 2), kept(1.0))  # carried along
    memory.store(0, "sparse", 2, "d2", kept(5.0), reply())
    assert same(memory.recall(0, "main", 3), {"q.B": torch.zeros(3)})
    assert same(memory.recall(0, "sparse", 3), kept(5.0))


def test_a_tensor_that_is_kept_no_more_is_forgotten(memory):
    memory.store(0, "main", 0, "d0", kept(1.0), reply())
    memory.store(0, "main", 1, "d1", {"q.B": torch.zeros(1)}, reply())
    assert same(memory.recall(0, "main", 2), {"q.B": torch.zeros(1)})
    memory.store(0, "main", 2, "d2", {}, reply())
    assert memory.recall(0, "main", 3) == {}


def test_any_tensor_can_be_kept(memory):
    whole = torch.arange(6.0).reshape(2, 3)
    odd = {
        "mine/q.A": whole, "same": whole, "row": whole[0], "turned": whole.T, "one": whole[:1, 0], "wide": torch.ones(1).expand(4),
        "none": torch.zeros(0, 3),
        "scalar": torch.tensor(7), "flag": torch.tensor([True]), "reply": torch.ones(2), "parameter": torch.nn.Parameter(torch.ones(1)),
    }  # fmt: skip
    memory.store(0, "main", 0, "d0", odd, reply())
    assert same(memory.recall(0, "main", 1), odd)
    assert not memory.recall(0, "main", 1)["parameter"].requires_grad


# Replies


def test_the_same_broadcast_gets_the_same_bytes(memory):
    memory.store(0, "main", 2, "digest", kept(1.0), reply(7))
    back = memory.answered(0, 2, "digest")
    assert (back.payload.header, back.payload.data, back.facts) == (reply(7).payload.header, reply(7).payload.data, reply(7).facts)
    assert memory.answered(0, 2, "another") is None
    assert memory.answered(0, 3, "digest") is None
    assert memory.answered(1, 2, "digest") is None


def test_a_reply_without_data_stays_without(memory):
    memory.store(0, "main", 0, "d", {}, Reply(Payload("[]", b""), {"weight": 1.0}))
    assert memory.answered(0, 0, "d").payload == Payload("[]", b"")


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), 0.1 + 0.2])
def test_metrics_come_back_to_the_last_bit(memory, loss):
    memory.store(0, "main", 0, "d", {}, Reply(Payload("[]", b"x"), {"weight": 1.0, "loss": loss}))
    assert str(memory.answered(0, 0, "d").facts["loss"]) == str(loss)


# Two versions, so that the server may go back


def test_the_version_before_is_kept_until_the_next_round_and_no_older_one(memory):
    for round in range(4):
        memory.store(0, "main", round, f"d{round}", kept(float(round)), reply(round))
    assert files(memory) == ["000000/000002-d2.safetensors", "000000/000003-d3.safetensors"]
    assert memory.answered(0, 2, "d2").payload == reply(2).payload
    assert memory.answered(0, 1, "d1") is None


def test_a_server_that_goes_back_a_round_finds_every_client_where_it_was(memory):
    """It resumes before round 1; the client has answered round 1 already."""
    memory.store(0, "main", 0, "d0", kept(0.0), reply(0))
    memory.store(0, "main", 1, "d1", kept(1.0), reply(1))
    assert memory.answered(0, 1, "d1").payload == reply(1).payload  # the same broadcast: nothing is trained again
    assert memory.answered(0, 1, "other") is None  # another broadcast is trained
    assert same(memory.recall(0, "main", 1), kept(0.0))  # from where the client was
    memory.store(0, "main", 1, "other", kept(7.0), reply(7))
    assert files(memory) == ["000000/000000-d0.safetensors", "000000/000001-other.safetensors"]
    assert same(memory.recall(0, "main", 2), kept(7.0))


def test_a_server_that_goes_back_two_rounds_finds_both_replies(memory):
    for round in range(2):
        memory.store(0, "main", round, f"d{round}", kept(float(round)), reply(round))
    assert [memory.answered(0, round, f"d{round}").payload for round in range(2)] == [reply(0).payload, reply(1).payload]


def test_a_server_that_goes_back_further_than_memory_reaches_is_told_so(memory):
    for round in (1, 3, 5):
        memory.store(7, "main", round, f"d{round}", kept(round), reply())
    assert same(memory.recall(7, "main", 4), kept(3))
    with pytest.raises(OSError, match=r"client 7 keeps rounds 3 and later, what it kept before round 2 is forgotten"):
        memory.recall(7, "main", 2)


def test_a_run_that_begins_anew_in_the_same_place_forgets_what_was_after(memory):
    for round in (3, 4):
        memory.store(0, "main", round, f"d{round}", kept(float(round)), reply(round))
    memory.store(0, "main", 1, "new", kept(9.0), reply(9))
    assert files(memory) == ["000000/000001-new.safetensors"]
    assert same(memory.recall(0, "main", 5), kept(9.0))


# What is written, and when


def test_nothing_is_written_where_nothing_stays_and_replies_are_not_kept(tmp_path):
    memory = Memory(tmp_path / "memory", replies=False)
    memory.store(0, "main", 0, "d0", {}, reply())
    assert files(memory) == []
    assert not memory.folder.exists()
    assert memory.answered(0, 0, "d0") is None


def test_what_is_kept_is_written_even_where_replies_are_not(tmp_path):
    memory = Memory(tmp_path / "memory", replies=False)
    memory.store(0, "main", 0, "d0", kept(1.0), reply(5))
    assert same(memory.recall(0, "main", 1), kept(1.0))
    assert memory.answered(0, 0, "d0").payload == reply(5).payload  # or its state would move twice
    memory.store(0, "main", 1, "d1", {}, reply())  # forgetting is a change too
    assert memory.recall(0, "main", 2) == {}


def test_a_write_that_fails_leaves_what_was_there(memory, monkeypatch):
    memory.store(0, "main", 0, "d0", kept(1.0), reply(1))

    def full(tensors, path, metadata):
        path.write_bytes(b"half of")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        memory.store(0, "main", 1, "d1", kept(2.0), reply(2))
    assert same(memory.recall(0, "main", 2), kept(1.0))
    assert memory.answered(0, 1, "d1") is None


def test_a_process_killed_before_it_forgot_the_oldest_version_goes_on(memory):
    for round in range(3):
        memory.store(0, "main", round, f"d{round}", kept(float(round)), reply(round))
    stale = memory.folder / "000000" / "000000-d0.safetensors"
    shutil.copy(memory.folder / "000000" / "000001-d1.safetensors", stale)
    assert same(memory.recall(0, "main", 3), kept(2.0))
    memory.store(0, "main", 3, "d3", kept(3.0), reply(3))
    assert not stale.exists()


def test_a_partial_file_of_a_killed_process_is_ignored_and_then_cleaned(memory):
    memory.store(0, "main", 0, "d0", kept(1.0), reply())
    partial = memory.folder / "000000" / "000001-d1.99999.partial"
    partial.write_bytes(b"half of a file")
    assert same(memory.recall(0, "main", 5), kept(1.0))
    assert memory.answered(0, 1, "d1") is None
    memory.store(0, "main", 1, "d1", kept(2.0), reply(2))
    assert same(memory.recall(0, "main", 5), kept(2.0))
    assert not partial.exists()


# Files that cannot be read


def spoiled(memory: Memory, data: bytes) -> str:
    memory.store(0, "main", 0, "d0", kept(1.0), reply())
    path = memory.folder / "000000" / "000000-d0.safetensors"
    path.write_bytes(data)
    with pytest.raises(OSError, match="memory cannot be read") as fault:
        memory.recall(0, "main", 1)
    with pytest.raises(OSError, match="memory cannot be read"):
        memory.answered(0, 0, "d0")
    return str(fault.value)


@pytest.mark.parametrize("data", [b"", b"x", b"\0" * 100, b"\xff" * 100])
def test_a_file_of_garbage_is_named_with_what_to_do(memory, data):
    said = spoiled(memory, data)
    assert "000000-d0.safetensors" in said
    assert "delete the file to go on from the version before" in said


def test_a_file_of_another_program_is_named_too(memory, tmp_path):
    for metadata in (None, {"other": "1"}, {"reply": "{"}, {"reply": "[]"}):
        save_file({"main/q.B": torch.zeros(1)}, tmp_path / "other.safetensors", metadata=metadata)
        spoiled(memory, (tmp_path / "other.safetensors").read_bytes())


def test_a_truncated_file_is_refused(memory):
    memory.store(0, "main", 0, "d0", {"q.B": torch.ones(1)}, reply())
    path = memory.folder / "000000" / "000000-d0.safetensors"
    whole = path.read_bytes()
    for size in range(0, len(whole), 7):
        path.write_bytes(whole[:size])
        with pytest.raises(OSError, match="memory cannot be read"):
            memory.recall(0, "main", 1)


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_a_flipped_bit_does_not_go_unseen(memory, at, bit):
    memory.store(0, "main", 0, "d0", kept(1.0), reply())
    path = memory.folder / "000000" / "000000-d0.safetensors"
    whole = bytearray(path.read_bytes())
    whole[at % len(whole)] ^= 1 << bit
    path.write_bytes(whole)
    with pytest.raises(OSError, match="memory cannot be read"):
        memory.recall(0, "main", 1)
    path.unlink()


def test_the_reply_lies_in_the_same_file_as_the_state(memory):
    """One atomic step: there is no moment at which one is new and the other old."""
    memory.store(0, "main", 0, "d0", kept(1.0), reply())
    assert files(memory) == ["000000/000000-d0.safetensors"]
