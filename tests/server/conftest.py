"""Clients of a few lines behind the in-process grid: no model, no data, and each can be told to misbehave."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Error, Message, RecordDict
from torch import Tensor

from fedpeft.codecs.base import Codec, Payload
from fedpeft.codecs.raw import Raw
from fedpeft.messages import Broadcast, Update
from fedpeft.records import from_records, pack_update, to_records, unpack_broadcast
from fedpeft.simulation import InProcessGrid
from fedpeft.strategy import Strategy
from fedpeft.tensors import Tensors, only
from server.exchange import Exchange, connect

FIRST = InProcessGrid.FIRST
Odd = Callable[["Clients", Message, int], Message]  # what a client does instead of answering well


def adapter() -> Tensors:
    """One layer of rank 2 and a head."""
    rng = torch.Generator().manual_seed(0)
    return {"q.A": torch.randn(2, 5, generator=rng), "q.B": torch.zeros(4, 2), "head.bias": torch.zeros(3)}


@dataclass
class Clients:
    """Answers messages as `serve` of a grid. Client k ends at its start plus 1 / (k + 2), and has k + 1 examples."""

    strategy: Strategy[Any]
    codec: Codec = field(default_factory=Raw)
    odd: dict[int, Odd] = field(default_factory=dict)
    order: Callable[[Sequence[Message]], Sequence[Message]] = list
    holds: bool = True
    indices: Callable[[int], Any] = lambda node: node - FIRST  # node id -> the client it says it is
    says: Callable[[int], dict[str, Any]] = lambda client: {}  # of itself, to the first message
    held: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    starts: dict[str, Tensor] = field(default_factory=dict)  # by digest: what each makes for itself
    down: list[tuple[int, Payload]] = field(default_factory=list)  # (client, payload) as they came in
    up: list[tuple[int, Payload]] = field(default_factory=list)

    def __call__(self, messages: Sequence[Message]) -> Iterator[Message]:
        for message in self.order(messages):
            client = self.indices(message.metadata.dst_node_id)
            if message.metadata.message_type == "query":
                yield Message(RecordDict({"facts": ConfigRecord({"client": client, **self.says(client)})}), reply_to=message)
                continue
            self.down.append((client, from_records(message.content)))
            try:
                reply = self.odd.get(client, Clients.answer)(self, message, client)
            except ArithmeticError as fault:
                reply = Message(Error(1, str(fault)), reply_to=message)
            if not reply.has_error() and "payload" in reply.content.array_records:
                self.up.append((client, from_records(reply.content)))
            yield reply

    def open(self, message: Message, client: int) -> Broadcast | None:
        """The broadcast, with what is held here; None if that is not enough."""
        store: dict[str, Tensor] = {}
        try:
            broadcast = unpack_broadcast(from_records(message.content), self.starts | self.held.get(client, {}), store)
        except LookupError:
            return None
        self.held[client] = store if self.holds else {}
        return broadcast

    def answer(self, message: Message, client: int, change: Callable[[Tensors], Tensors] = dict, **metrics: float) -> Message:
        """A good answer, its tensors put through `change`."""
        round = message.content.config_records["facts"]["round"]
        start = self.open(message, client)
        if start is None:
            return Message(to_records(Payload("[]", b""), {"resend": True}), reply_to=message)
        phase = self.strategy.phase(int(round))
        end = {name: tensor + 1 / (client + 2) if phase.trains(name) else tensor for name, tensor in start.tensors.items()}
        update = Update(client, change(only(end, phase.shares)), client + 1.0)
        facts = {"weight": client + 1.0, "loss": float(client), "accuracy": client / 10} | metrics
        payload = pack_update(update, start, self.codec)[0]
        return Message(to_records(payload, {"holds": self.holds, "round": round}, facts), reply_to=message)


@pytest.fixture
def clients() -> type[Clients]:
    return Clients


@pytest.fixture
def joined() -> Callable[..., Exchange]:
    """The exchange with `serve` over the in-process grid."""

    def join(serve: Clients, count: int, **how: Any) -> Exchange:
        return connect(InProcessGrid(serve, count), serve.codec, count, **how)

    return join


@pytest.fixture
def start() -> Tensors:
    return adapter()


def _round(message: Message) -> int:
    round = message.content.config_records["facts"]["round"]
    assert isinstance(round, int)
    return round


def failing(clients: Clients, message: Message, client: int) -> Message:
    """An exception at the client."""
    raise ArithmeticError(f"client {client} ran out of memory")


def spoiling(value: float) -> Odd:
    """One entry is `value`."""

    def change(tensors: Tensors) -> Tensors:
        name = min(tensors)
        spoiled = tensors[name].clone()
        spoiled.view(-1)[0] = value
        return tensors | {name: spoiled}

    return lambda clients, message, client: clients.answer(message, client, change)


def changing(change: Callable[[Tensors], Tensors]) -> Odd:
    return lambda clients, message, client: clients.answer(message, client, change)


def raw_reply(header: str, data: bytes, **metrics: float) -> Odd:
    """These very bytes."""
    return lambda clients, message, client: Message(
        to_records(Payload(header, data), {"holds": True, "round": _round(message)}, {"weight": 1.0, **metrics}), reply_to=message
    )


def bare_reply(records: Callable[[], RecordDict]) -> Odd:
    """A message that is not of fedpeft, or lacks a part."""
    return lambda clients, message, client: Message(records(), reply_to=message)


# By name: the answer, and words of the fault it becomes. The first can be read, and are refused where an update is checked.
CHECKED: dict[str, tuple[Odd, str]] = {
    "a NaN": (spoiling(float("nan")), "not finite"),
    "an infinity": (spoiling(float("inf")), "not finite"),
    "a missing tensor": (changing(lambda tensors: {n: t for n, t in tensors.items() if n != "head.bias"}), "missing head.bias"),
    "an unasked tensor": (changing(lambda tensors: tensors | {"more": torch.zeros(1)}), "unasked more"),
    "another shape": (changing(lambda tensors: tensors | {"head.bias": torch.zeros(2)}), "head.bias is (2,)"),
    "another dtype": (changing(lambda tensors: tensors | {"head.bias": torch.zeros(3, dtype=torch.float64)}), "float64"),
    "no tensors": (changing(lambda tensors: {}), "missing"),
    "a weight of NaN": (lambda c, message, k: c.answer(message, k, weight=float("nan")), "weight nan"),
    "no examples": (lambda c, message, k: c.answer(message, k, weight=0.0), "weight 0.0"),
    "a weight that drowns all": (lambda c, message, k: c.answer(message, k, weight=1e300), "weight 1e+300"),
}
UNREADABLE: dict[str, tuple[Odd, str]] = {
    "an exception": (failing, "ran out of memory"),
    "a header of garbage": (raw_reply("{]", b""), "not JSON"),
    "a header of another kind": (raw_reply('{"a": 1}', b""), "needed is a list"),
    "a header of terabytes": (raw_reply('[["q.A", "float32", [1099511627776]]]', b"\0" * 8), "payload holds 8"),
    "data of garbage": (raw_reply('[["q.A", "float32", [2, 5]]]', b"\7" * 39), "payload holds 39"),
    "a side past 64 bits": (raw_reply('[["q.A", "float32", [0, 1000000000000000000000]]]', b""), "size that can be"),
    "no payload": (bare_reply(RecordDict), "does not come from fedpeft"),
    "no metrics": (lambda c, m, k: Message(to_records(Payload("[]", b""), {"round": _round(m)}), reply_to=m), "metrics"),
    "no weight": (lambda c, m, k: Message(to_records(Payload("[]", b""), {"round": _round(m)}, {"loss": 1.0}), reply_to=m), "weight"),
}


@pytest.fixture(params=[*CHECKED, *UNREADABLE])
def odd(request: pytest.FixtureRequest) -> tuple[Odd, str]:
    """A way to misbehave, and words of the fault it becomes."""
    return (CHECKED | UNREADABLE)[request.param]


@pytest.fixture(params=list(UNREADABLE))
def unreadable(request: pytest.FixtureRequest) -> tuple[Odd, str]:
    """A reply that is no update, and words of the fault it becomes."""
    return UNREADABLE[request.param]


@pytest.fixture
def failing_client() -> Odd:
    return failing
