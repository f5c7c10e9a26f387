"""Broadcast and Update as Flower records: one flat byte array and a JSON header, so that any dtype and any rank fits.

A tensor that the receiver already holds (same digest as in the broadcast it answered last) is named but not sent.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedpeft import seeds
from fedpeft.codecs.base import Codec, Layout, Payload, Spec, header, layout, parse
from fedpeft.codecs.raw import Raw, raw_bytes
from fedpeft.lowrank import LowRank
from fedpeft.messages import Broadcast, Update
from fedpeft.tensors import Names, Tensors, everything, only

BASE = "base_delta/"
SAME = "="  # a header: the layout is that of the shared tensors as they were sent
Scalar = int | float | str | bool


@dataclass(frozen=True)
class Packed:
    """A broadcast on the wire: its payload, the digests its receiver then holds, and one digest of the whole."""

    payload: Payload
    digests: frozenset[str]
    digest: str
    facts: Mapping[str, int] = field(default_factory=dict)  # that stand beside it in the message


class Packer:
    """Packs a broadcast once for all clients that hold the same; one per round."""

    def __init__(self) -> None:
        self._tensors: dict[int, tuple[Broadcast, dict[str, tuple[Spec, str, bytes]], str]] = {}
        self._packed: dict[tuple[int, frozenset[str]], Packed] = {}

    def pack(self, broadcast: Broadcast, held: frozenset[str] = frozenset()) -> Packed:
        """The broadcast without the tensors whose digests are in `held`."""
        _, rows, whole = self._rows(broadcast)
        missed = held & {digest for _, digest, _ in rows.values()}
        key = (id(broadcast), missed)
        if key not in self._packed:
            head = [[s.name, str(s.dtype).removeprefix("torch."), list(s.shape), d, d not in held] for s, d, _ in rows.values()]
            data = b"".join(raw for _, digest, raw in rows.values() if digest not in held)
            digests = frozenset(digest for _, digest, _ in rows.values())
            self._packed[key] = Packed(Payload(json.dumps(head, separators=(",", ":")), data), digests, whole)
        return self._packed[key]

    def store(self, broadcast: Broadcast) -> tuple[str, dict[str, torch.Tensor]]:
        """(digest of the whole, digest -> tensor): what a receiver of it holds."""
        _, rows, whole = self._rows(broadcast)
        tensors = _flat(broadcast)
        return whole, {digest: tensors[name] for name, (_, digest, _) in rows.items()}

    def _rows(self, broadcast: Broadcast) -> tuple[Broadcast, dict[str, tuple[Spec, str, bytes]], str]:
        if id(broadcast) not in self._tensors:  # the broadcast is kept too, so that its id stays its own
            tensors = _flat(broadcast)
            rows = {}
            for spec in layout(tensors):
                raw = raw_bytes(tensors[spec.name])
                rows[spec.name] = (spec, _digest(raw, str((spec.dtype, spec.shape))), raw)
            whole = _digest("".join(name + digest for name, (_, digest, _) in rows.items()).encode())
            self._tensors[id(broadcast)] = (broadcast, rows, whole)
        return self._tensors[id(broadcast)]


def digested(starts: Iterable[Tensors]) -> dict[str, torch.Tensor]:
    """Digest -> tensor of what a client makes for itself from config, seed and base, and need not be sent."""
    return {digest: tensor for tensors in starts for digest, tensor in Packer().store(Broadcast(tensors))[1].items()}


def unpack_broadcast(payload: Payload, held: Mapping[str, torch.Tensor], store: MutableMapping[str, torch.Tensor]) -> Broadcast:
    """The broadcast; what it names is put into `store` under its digest, sharing memory with what is held already.

    `LookupError` if it leaves out a tensor that is not in `held`: the sender then sends the whole.
    """
    rows = _rows(payload.header)
    new = Raw().decode(payload.data, tuple(spec for spec, _, was_sent in rows if was_sent))
    tensors: Tensors = {}
    for spec, digest, was_sent in rows:
        if not was_sent and digest not in held:
            raise LookupError(f"{spec.name} was not sent and is not held here")
        tensors[spec.name] = held[digest] if digest in held else new[spec.name]
        store[digest] = tensors[spec.name]
    return _nested(tensors)


def pack_changes(changes: Sequence[bytes]) -> Payload:
    """Encoded changes of one model, oldest first; names and shapes are those of the model."""
    return Payload(json.dumps([len(change) for change in changes]), b"".join(changes))


def unpack_changes(payload: Payload) -> list[bytes]:
    """The inverse; `ValueError` unless header and data fit one another."""
    sizes = _json(payload.header)
    if not isinstance(sizes, list) or any(type(size) is not int or size < 0 for size in sizes) or sum(sizes) != len(payload.data):
        raise ValueError(f"the changes' header {payload.header[:80]} does not describe {len(payload.data)} bytes")
    ends = list(accumulate(sizes))
    return [payload.data[end - size : end] for end, size in zip(ends, sizes, strict=True)]


def changed(model: Broadcast, change: bytes, codec: Codec, seed: int) -> Broadcast:
    """The model after one change of the way down: the same bits at server and client."""
    return Broadcast(restored(codec.decode(change, layout(model.tensors), seed=seed), model.tensors))


def draw_down(run: int, version: int) -> int:
    """The seed of a change's codec, in the run with seed `run`."""
    return seeds.seed(run, round=version, purpose="downlink")


def draw_up(run: int, round: int, client: int) -> int:
    """The seed of an update's codec."""
    return seeds.seed(run, round=round, client=client, purpose="uplink")


def pack_update(
    update: Update, sent: Broadcast, codec: Codec, *, seed: int = 0, owed: Tensors | None = None, shares: Names | None = None
) -> tuple[Payload, Tensors]:  # fmt: skip
    """The update's tensors through `codec`, and what the receiver will lack: differences from what was sent if it is lossy, else values.

    `owed` is what was left out before (error feedback, Seide et al., Interspeech 2014): it is added to the differences of the same shape.
    With None nothing is added and what is lacking is not worked out. `seed` must be known to the receiver too. Where the layout is that of
    what was sent and satisfies `shares`, which both ends know, the header says only so.
    """
    if codec.lossless:
        return Payload(_said(layout(update.tensors), sent, shares), codec.encode(update.tensors, seed=seed)), {}
    steps = difference(update.tensors, sent.tensors)
    for name, more in (owed or {}).items():
        if name in steps and _moves(name, more, sent.tensors) and steps[name].shape == more.shape:
            steps[name] = steps[name] + more
    data = codec.encode(steps, seed=seed)
    payload = Payload(_said(layout(steps), sent, shares), data)
    if owed is None:
        return payload, {}
    said = codec.decode(data, layout(steps), seed=seed)
    return payload, {name: step - said[name] for name, step in steps.items() if _moves(name, step, sent.tensors)}


def unpack_update(
    payload: Payload, facts: Mapping[str, float], client: int, sent: Broadcast, codec: Codec, *, seed: int = 0, shares: Names = everything,
    seen: Callable[[Tensors], None] = lambda decoded: None,
) -> Update:  # fmt: skip
    """The update of `client`; `seen` is shown what the codec gave: of a lossy one differences, whose zeros are gone from the update.

    The bytes are hostile: `ValueError` unless header and data fit one another and what was sent.
    """
    specs: Layout = layout(only(sent.tensors, shares)) if payload.header == SAME else parse(_json(payload.header))
    for spec in () if codec.lossless else specs:  # before anything is decoded: a lossy codec's few bytes can stand for many entries
        like = sent.tensors.get(spec.name)
        if like is None:
            raise ValueError(f"its layout names {spec.name}, which was not sent to it")
        if len(spec.shape) != like.dim() or any(a > b for a, b in zip(spec.shape, like.shape, strict=True)):
            raise ValueError(f"its layout says {spec.name} is {spec.shape}, sent was {tuple(like.shape)}")
    tensors = codec.decode(payload.data, specs, seed=seed)
    metrics = {name: value for name, value in facts.items() if name != "weight"}
    values = tensors if codec.lossless else restored(tensors, sent.tensors)
    made = Update(client, values, float(facts["weight"]), metrics)
    seen(tensors)
    return made


def _said(specs: Layout, sent: Broadcast, shares: Names | None) -> str:
    return SAME if shares is not None and specs == layout(only(sent.tensors, shares)) else header(specs)


def difference(tensors: Tensors, start: Tensors) -> Tensors:
    """What changed. A tensor the server did not send in this shape goes as it is: both sides see that from the shapes."""
    return {name: t - start[name] if _moves(name, t, start) else t for name, t in tensors.items()}


def restored(steps: Tensors, start: Tensors) -> Tensors:
    """The inverse of `difference`."""
    return {name: t + start[name] if _moves(name, t, start) else t for name, t in steps.items()}


def to_records(payload: Payload, facts: Mapping[str, Scalar], metrics: Mapping[str, float] | None = None) -> RecordDict:
    """A Flower message's content."""
    array = Array("uint8", (len(payload.data),), "fedpeft.payload", payload.data)
    records = RecordDict({"payload": ArrayRecord({"data": array}), "facts": ConfigRecord({"header": payload.header, **facts})})
    if metrics is not None:
        records["metrics"] = MetricRecord(dict(metrics))
    return records


def from_records(records: RecordDict) -> Payload:
    """The payload of a message; `ValueError` if it has none."""
    try:
        array, text = records.array_records["payload"]["data"], records.config_records["facts"]["header"]
    except KeyError as missing:
        raise ValueError(f"the message has no {missing}; it does not come from fedpeft") from None
    if not isinstance(text, str):
        raise ValueError("the message's header is not text; it does not come from fedpeft")
    return Payload(text, array.data)


def _flat(broadcast: Broadcast) -> Tensors:
    if any(name.startswith(BASE) for name in broadcast.tensors):
        raise ValueError(f"a tensor's name begins with {BASE}, which is kept for products added to the base")
    extra: Tensors = {}
    for index, chunk in enumerate(broadcast.base_delta):
        for target, product in chunk.items():
            extra |= {f"{BASE}{index:05d}/{target}.B": product.B, f"{BASE}{index:05d}/{target}.A": product.A}
    return broadcast.tensors | extra


def _nested(tensors: Tensors) -> Broadcast:
    chunks: dict[str, dict[str, LowRank]] = {}
    names = {name for name in tensors if name.startswith(BASE)}
    pairs = sorted({name[:-2] for name in names})
    if names != {pair + part for pair in pairs for part in (".A", ".B")} or any("/" not in pair.removeprefix(BASE) for pair in pairs):
        raise ValueError(f"the broadcast holds {', '.join(sorted(names))[:200]}; needed are pairs {BASE}<chunk>/<layer>.A and .B")
    for pair in pairs:
        index, target = pair.removeprefix(BASE).split("/", 1)
        chunks.setdefault(index, {})[target] = LowRank(tensors[pair + ".B"], tensors[pair + ".A"])
    return Broadcast({n: t for n, t in tensors.items() if not n.startswith(BASE)}, tuple(chunks.values()))


def _moves(name: str, tensor: torch.Tensor, start: Tensors) -> bool:
    return name in start and start[name].shape == tensor.shape and tensor.is_floating_point()


def _digest(*parts: bytes | str) -> str:
    made = hashlib.blake2b(digest_size=12)
    for part in parts:
        made.update(part if isinstance(part, bytes) else part.encode())
    return made.hexdigest()


def _rows(text: str) -> list[tuple[Spec, str, bool]]:
    rows = _json(text)
    if not isinstance(rows, list) or any(not isinstance(row, list) or len(row) != 5 for row in rows):
        raise ValueError("the broadcast's header is not a list of [name, dtype, shape, digest, sent]")
    return [(spec, str(row[3]), row[4] is True) for spec, row in zip(parse([row[:3] for row in rows]), rows, strict=True)]


def _json(text: str) -> object:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as fault:
        raise ValueError(f"the header is not JSON: {fault}") from None
