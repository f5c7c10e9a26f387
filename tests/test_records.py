import json

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as Proto
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.codecs.base import DTYPES, Payload
from fedpeft.codecs.raw import Half, Raw, raw_bytes
from fedpeft.lowrank import LowRank
from fedpeft.messages import Broadcast, Update
from fedpeft.records import Packer, difference, from_records, pack_update, restored, to_records, unpack_broadcast, unpack_update

pytestmark = pytest.mark.fast


def some(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)


EVERY = {name: some(dtype, 2, 3) for name, dtype in DTYPES.items()} | {
    "empty": torch.zeros(0, 4), "scalar": torch.tensor(1.5), "flag": torch.tensor(True),
    "slice": torch.arange(12.0).reshape(3, 4).T[1:], "one": torch.arange(6.0)[::2][:1],
    "control/q.A": some(torch.float32, 2, 3), "é/ü": torch.tensor([float("nan"), float("inf"), -0.0]),
}  # fmt: skip
CHUNKS = tuple(
    {
        "q": LowRank(some(torch.float64, 3, r), some(torch.float64, r, 4)),
        "layer.0.v": LowRank(some(torch.float32, 2, r), some(torch.float32, r, 2)),
    }
    for r in (2, 5)
)


def bits(tensors) -> dict:
    return {n: (t.dtype, tuple(t.shape), raw_bytes(t)) for n, t in tensors.items()}


def over_the_wire(records: RecordDict) -> RecordDict:
    return recorddict_from_proto(Proto.FromString(recorddict_to_proto(records).SerializeToString()))


def opened(payload: Payload, held=None):
    store: dict[str, torch.Tensor] = {}
    return unpack_broadcast(payload, held or {}, store), store


@pytest.mark.parametrize("carried", [lambda records: records, over_the_wire], ids=["records", "protobuf"])
def test_a_broadcast_comes_back_with_the_same_bits(carried):
    packed = Packer().pack(Broadcast(EVERY, CHUNKS))
    back, _ = opened(from_records(carried(to_records(packed.payload, {"round": 3, "digest": packed.digest}))))
    assert bits(back.tensors) == bits(EVERY)
    assert [{t: p.rank for t, p in chunk.items()} for chunk in back.base_delta] == [{"layer.0.v": 2, "q": 2}, {"layer.0.v": 5, "q": 5}]
    for got, want in zip(back.base_delta, CHUNKS, strict=True):
        assert all(bits({"B": got[t].B, "A": got[t].A}) == bits({"B": want[t].B, "A": want[t].A}) for t in want)


@pytest.mark.parametrize("carried", [lambda records: records, over_the_wire], ids=["records", "protobuf"])
def test_an_update_comes_back_with_the_same_bits(carried):
    sent = Broadcast({name: torch.zeros_like(tensor) for name, tensor in EVERY.items()})
    records = carried(to_records(pack_update(Update(5, EVERY, 7.0), sent, Raw())[0], {"client": 5}, {"weight": 7.0, "loss": 0.25}))
    back = unpack_update(from_records(records), dict(records.metric_records["metrics"]), 5, sent, Raw())
    assert bits(back.tensors) == bits(EVERY)
    assert (back.client, back.weight, back.metrics) == (5, 7.0, {"loss": 0.25})


def test_chunks_keep_their_order_past_ten():
    chunks = tuple({"q": LowRank(torch.full((1, 1), float(k)), torch.ones(1, 1))} for k in range(12))
    back, _ = opened(Packer().pack(Broadcast({}, chunks)).payload)
    assert [chunk["q"].B.item() for chunk in back.base_delta] == list(range(12))


def test_an_empty_broadcast_goes_through():
    back, store = opened(Packer().pack(Broadcast({})).payload)
    assert (back.tensors, back.base_delta, store) == ({}, (), {})


def test_what_was_unpacked_does_not_change_with_the_payload_and_can_be_written():
    back, _ = opened(Packer().pack(Broadcast({"q.A": torch.ones(2)})).payload)
    back.tensors["q.A"].mul_(2)
    assert back.tensors["q.A"].tolist() == [2, 2]


# What is held is not sent


def test_what_is_held_is_not_sent_again():
    first = {"q.A": some(torch.float32, 4, 8), "q.B": torch.zeros(8, 4)}
    one = Packer().pack(Broadcast(first))
    _, held = opened(one.payload)
    assert set(held) == one.digests
    second = Packer().pack(Broadcast(first | {"q.B": torch.ones(8, 4)}), one.digests)
    assert len(second.payload.data) == 8 * 4 * 4  # B alone
    back, store = opened(second.payload, held)
    assert torch.equal(back.tensors["q.A"], first["q.A"])
    assert torch.equal(back.tensors["q.B"], torch.ones(8, 4))
    assert set(store) == second.digests
    assert back.tensors["q.A"] is held[next(d for d in held if d in second.digests)]  # shared, not copied


def test_an_unchanged_broadcast_costs_no_data():
    broadcast = Broadcast(EVERY, CHUNKS)
    whole = Packer().pack(broadcast)
    _, held = opened(whole.payload)
    again = Packer().pack(broadcast, whole.digests)
    assert again.payload.data == b""
    assert again.digest == whole.digest
    assert bits(opened(again.payload, held)[0].tensors) == bits(EVERY)


def test_an_old_chunk_stays_and_the_new_one_is_sent():
    one = Packer().pack(Broadcast({}, CHUNKS[:1]))
    two = Packer().pack(Broadcast({}, CHUNKS), one.digests)
    new = [tensor for pair in CHUNKS[1].values() for tensor in (pair.B, pair.A)]
    assert len(two.payload.data) == sum(tensor.nbytes for tensor in new)
    assert len(opened(two.payload, opened(one.payload)[1])[0].base_delta) == 2


def test_who_lacks_what_was_left_out_learns_so():
    one = Packer().pack(Broadcast({"q.A": some(torch.float32, 4, 8)}))
    with pytest.raises(LookupError, match=r"q\.A"):
        opened(Packer().pack(Broadcast({"q.A": some(torch.float32, 4, 8)}), one.digests).payload)


def test_equal_bytes_of_another_dtype_or_shape_are_not_what_is_held():
    zeros = Packer().pack(Broadcast({"q.B": torch.zeros(2, 3)}))
    _, held = opened(zeros.payload)
    for other in (torch.zeros(2, 3, dtype=torch.int32), torch.zeros(3, 2), torch.zeros(6), torch.zeros(2, 3, dtype=torch.float16)):
        back, _ = opened(Packer().pack(Broadcast({"q.B": other}), zeros.digests).payload, held)
        assert bits(back.tensors) == bits({"q.B": other})


def test_a_broadcast_is_packed_once_for_all_who_hold_the_same():
    packer, broadcast = Packer(), Broadcast({"q.A": torch.ones(2)})
    whole = packer.pack(broadcast)
    assert packer.pack(broadcast) is whole
    assert packer.pack(broadcast, frozenset({"something else"})) is whole
    nothing = packer.pack(broadcast, whole.digests)
    assert nothing is packer.pack(broadcast, whole.digests | {"something else"})
    assert nothing.payload.data == b""


def test_the_digest_is_of_names_and_contents_and_not_of_what_was_left_out():
    def digest(tensors, held=frozenset()):
        return Packer().pack(Broadcast(tensors), held).digest

    a = {"q.A": torch.ones(2), "q.B": torch.zeros(2)}
    assert digest(a) == digest(dict(reversed(a.items()))) == digest(a, Packer().pack(Broadcast(a)).digests)
    others = [
        a | {"q.A": torch.zeros(2)},
        {"q.A": a["q.B"], "q.B": a["q.A"]},
        {"q.A": a["q.A"]},
        a | {"q.A": torch.ones(2, dtype=torch.float64)},
    ]
    assert len({digest(a), *map(digest, others)}) == 5


# Codecs


def test_a_lossless_codec_sends_values_and_a_lossy_one_differences():
    start = {"q.A": torch.tensor([1000.0, 1.0]), "step": torch.tensor([3])}
    end = {"q.A": torch.tensor([1000.01, 1.5]), "step": torch.tensor([4])}
    sent = Broadcast(start)
    exact = unpack_update(pack_update(Update(0, end, 1.0), sent, Raw())[0], {"weight": 1.0}, 0, sent, Raw())
    assert bits(exact.tensors) == bits(end)
    lossy = unpack_update(pack_update(Update(0, end, 1.0), sent, Half("bf16"))[0], {"weight": 1.0}, 0, sent, Half("bf16"))
    moved = (end["q.A"] - start["q.A"]).bfloat16().float()
    assert torch.equal(lossy.tensors["q.A"], start["q.A"] + moved)  # off by 2^-8 of 0.01, not of 1000
    assert torch.equal(lossy.tensors["step"], end["step"])
    for name, tensor in (
        ("new", torch.ones(1)),
        ("q.A", torch.ones(3)),
        ("q.A", torch.ones(1, 2)),
    ):  # a few bytes may stand for many entries
        with pytest.raises(ValueError, match=f"its layout (names|says) {name}"):
            unpack_update(pack_update(Update(0, {name: tensor}, 1.0), sent, Half("bf16"))[0], {"weight": 1.0}, 0, sent, Half("bf16"))


def test_a_tensor_of_another_shape_than_was_sent_goes_as_it_is():
    start, end = {"q.A": torch.ones(3, 2)}, {"q.A": torch.full((2, 2), 5.0)}
    assert torch.equal(difference(end, start)["q.A"], end["q.A"])
    assert torch.equal(restored(difference(end, start), start)["q.A"], end["q.A"])
    assert torch.equal(restored(difference({"q.A": torch.full((3, 2), 5.0)}, start), start)["q.A"], torch.full((3, 2), 5.0))


# Hostile bytes


def row(name="q.A", dtype="float32", shape=(2,), digest="d", sent=True):
    return [name, dtype, list(shape), digest, sent]


@pytest.mark.parametrize(
    ("header", "data"),
    [
        ([row()], b"\0" * 7), ([row()], b"\0" * 9), ([row()], b""), ([], b"\0"),
        ([row(), row()], b"\0" * 16), ([row(dtype="float31")], b"\0" * 8), ([row(dtype="complex64")], b"\0" * 16),
        ([row(shape=(-2,))], b""), ([row(shape=(-2, -1))], b"\0" * 8), ([row(shape=(2.0,))], b"\0" * 8),
        ([row(shape=(True, 2))], b"\0" * 8),
        ([row(shape=(1 << 41,))], b""), ([row(shape=(1 << 40,))], b"\0" * 8), ([row(shape=(0, 10**30))], b""),
        ([row(shape=(0, 1 << 41))], b""),
        ([row(shape=[1 << 20] * 3)], b"\0" * 8), ([row(shape=[1] * 100_000)], b"\0" * 4), ([row(shape="2")], b"\0" * 8),
        ([row()[:4]], b"\0" * 8), ([[*row(), 1]], b"\0" * 8), ([None], b""), ({}, b""), ("text", b""), (None, b""), (3, b""),
        ([[[], [], [], [], []]], b""),
        ([row(name=7)], b"\0" * 8), ([row(name="base_delta/00000/q.B")], b"\0" * 8), ([row(name="base_delta/00000/q.A")], b"\0" * 8),
        ([row(name="base_delta/q.B"), row(name="base_delta/q.A")], b"\0" * 16), ([row(name="base_delta/00000/q")], b"\0" * 8),
    ],
)  # fmt: skip
def test_a_broadcast_that_does_not_fit_itself_is_a_value_error(header, data):
    with pytest.raises(ValueError):  # noqa: PT011  each says something else
        opened(Payload(json.dumps(header), data))


@pytest.mark.parametrize("text", ["", "[", "]", "nul", "[" * 100_000, "9" * 5000, "[1,]", "\0", '{"a":'])
def test_a_header_that_is_not_json_is_a_value_error(text):
    for read in (lambda p: opened(p), lambda p: unpack_update(p, {"weight": 1.0}, 0, Broadcast({}), Raw())):
        with pytest.raises(ValueError, match=r"JSON|header|digits"):
            read(Payload(text, b""))


@pytest.mark.parametrize("codec", [Raw(), Half("fp16"), Half("bf16")])
@pytest.mark.parametrize("shape", [(1 << 40,), (1 << 40, 0, 5), (0, 10**30), (3, 1 << 39)])
def test_a_layout_of_terabytes_allocates_nothing(codec, shape):
    layout = [["q.A", "float64", list(shape)]] * 1
    try:
        back = unpack_update(Payload(json.dumps(layout), b"\0" * 64), {"weight": 1.0}, 0, Broadcast({}), codec)
    except ValueError:
        return
    raise AssertionError(f"{ {n: t.shape for n, t in back.tensors.items()} } came out of 64 bytes")


junk = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**12), 10**12)
    | st.floats()
    | st.sampled_from([*DTYPES, "q.A", "base_delta/00000/q.B", ""]),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=12,
)
sides = st.lists(st.integers(0, 4) | st.sampled_from([-1, 1 << 33, 1 << 62, 1 << 64]), max_size=4)
near = st.lists(
    st.tuples(st.sampled_from(["q.A", "q.B", "base_delta/00000/q.B", "base_delta/00000/q.A"]), st.sampled_from(list(DTYPES)), sides).map(
        list
    ),
    max_size=3,
)


@settings(deadline=None, max_examples=150)
@given(header=junk | near, data=st.binary(max_size=200), codec=st.sampled_from([Raw(), Half("fp16"), Half("bf16")]))
def test_any_update_is_read_or_a_value_error(header, data, codec):
    sent = Broadcast({"q.A": torch.ones(2, 2), "q.B": torch.ones(2, dtype=torch.int64)})
    try:
        back = unpack_update(Payload(json.dumps(header), data), {"weight": 2.0}, 1, sent, codec)
    except ValueError:
        return
    assert len(back.tensors) == len(header)
    assert sum(t.numel() for t in back.tensors.values()) <= 8 * len(data) + 1


@settings(deadline=None, max_examples=150)
@given(header=junk | near.map(lambda rows: [[*row, "d", True] for row in rows]), data=st.binary(max_size=200))
def test_any_broadcast_is_read_or_a_value_error(header, data):
    try:
        opened(Payload(json.dumps(header), data), {"e": torch.ones(1)})
    except ValueError:
        return
    except LookupError:  # only for a row that says it was left out
        assert any(isinstance(one, list) and one[-1:] != [True] for one in header)


@settings(deadline=None, max_examples=150)
@given(cut=st.integers(0, 10_000), end=st.sampled_from(["header", "data"]))
def test_a_truncated_broadcast_is_a_value_error(cut, end):
    whole = Packer().pack(Broadcast(EVERY, CHUNKS)).payload
    at = cut % len(getattr(whole, end))
    cut_off = Payload(whole.header[:at], whole.data) if end == "header" else Payload(whole.header, whole.data[:at])
    with pytest.raises(ValueError):  # noqa: PT011  the header or the length
        opened(cut_off)


@pytest.mark.parametrize(
    "records",
    [
        RecordDict(),
        RecordDict({"payload": ArrayRecord(), "facts": ConfigRecord({"header": "[]"})}),
        RecordDict({"payload": ConfigRecord({"data": b""}), "facts": ConfigRecord({"header": "[]"})}),
        RecordDict({"facts": ConfigRecord({"header": "[]"})}),
    ],
)
def test_a_message_of_someone_else_is_a_value_error(records):
    with pytest.raises(ValueError, match="does not come from fedpeft"):
        from_records(records)


def test_a_header_that_is_no_text_is_a_value_error():
    records = to_records(Payload("[]", b""), {})
    records.config_records["facts"]["header"] = 5
    with pytest.raises(ValueError, match="not text"):
        from_records(records)


def test_the_length_of_a_payload_counts_header_and_data():
    assert len(Payload('["é"]', b"123")) == 6 + 3
    packed = Packer().pack(Broadcast({"q.A": torch.zeros(2, 3)}))
    assert len(packed.payload) == len(packed.payload.header) + 24


def test_no_tensor_may_pass_for_a_product_added_to_the_base():
    with pytest.raises(ValueError, match="base_delta/"):
        Packer().pack(Broadcast({"base_delta/00000/q.A": torch.ones(2, 3)}))
