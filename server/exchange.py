"""Exchange: one message per client over a `Grid`, and the replies in client order: updates, or faults with their reason."""

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedpeft.codecs.base import Codec
from fedpeft.config import ConfigError
from fedpeft.messages import MOST_EXAMPLES, Broadcast, Update
from fedpeft.passport import Passport, read_passport
from fedpeft.records import Packed, Packer, draw_up, from_records, pack_changes, to_records, unpack_update
from fedpeft.tensors import Names, Tensors, everything, nbytes
from server.stream import Stream

LONGEST = 600  # letters of a fault's reason
QUERY_SECONDS = 600.0  # a client may load its model and data before it answers the first message


@dataclass(frozen=True)
class Fault:
    """A client that gave no update this round, and why."""

    client: int
    reason: str


@dataclass(eq=False)
class Traffic:
    """Bytes of payloads (header and data) of one round, and what went wrong."""

    up: int = 0
    down: int = 0
    raw_up: int = 0  # what the same tensors would take as they are
    raw_down: int = 0
    entropy_up: float | None = None  # bytes that what was decoded needs at the least; None: its codec has no such bound
    clients: dict[int, tuple[int, int]] = field(default_factory=dict)  # client -> (up, down)
    faults: list[Fault] = field(default_factory=list)

    def count(self, client: int, *, up: int = 0, down: int = 0) -> None:
        """Adds one message's payload."""
        self.up, self.down = self.up + up, self.down + down
        before = self.clients.get(client, (0, 0))
        self.clients[client] = (before[0] + up, before[1] + down)

    def bound(self, codec: Codec, decoded: Tensors) -> None:
        """Adds the entropy of one update, where `codec` has one."""
        entropy: Callable[[Tensors], float] | None = getattr(codec, "entropy", None)
        if entropy is not None:
            self.entropy_up = (self.entropy_up or 0.0) + entropy(decoded) / 8

    def fault(self, client: int, reason: str) -> None:
        """Notes a fault; the reason may come from a client, so it is cut to a length a ledger can hold."""
        self.faults.append(Fault(client, reason if len(reason) <= LONGEST else reason[:LONGEST] + " ..."))


@dataclass(eq=False)
class Exchange:
    """Knows which node is which client, and what each client holds of what it was sent."""

    grid: Grid
    codec: Codec
    nodes: Mapping[int, int]  # client -> node id
    deadline: float | None = None  # seconds from a broadcast to its last reply
    seed: int = 0  # the run's, for codecs that draw
    stream: Stream | None = None  # of the way down, where it is compressed
    starts: frozenset[str] = frozenset()  # digests of what every client can make for itself; one that cannot asks for it, once
    passports: Mapping[int, Passport] = field(default_factory=dict)  # what each client said of itself
    _versions: dict[int, int] = field(default_factory=dict)  # client -> version of the public model it answered last
    _held: dict[int, frozenset[str]] = field(default_factory=dict)  # client -> digests of the broadcast it answered last

    def prepared(self, out: Mapping[int, Broadcast]) -> dict[int, Broadcast]:
        """What the clients will start from: `out`, or the public model where the way down is lossy."""
        if self.stream is None or not out:
            return dict(out)
        return dict.fromkeys(out, self.stream.advance(out))

    def train(
        self, round: int, out: Mapping[int, Broadcast], traffic: Traffic, shares: Names = everything
    ) -> Iterator[Update]:  # fmt: skip
        """The updates of the clients in `out`, in client order, decoded one at a time; everything else is a fault in `traffic`."""
        for client, content in self._replies("train", round, out, traffic):
            try:
                payload = from_records(content)
                _check_round(content, round)
                facts = {name: float(value) for name, value in content.metric_records["metrics"].items() if isinstance(value, int | float)}
                update = unpack_update(
                    payload, facts, client, out[client], self.codec, seed=draw_up(self.seed, round, client), shares=shares,
                    seen=partial(traffic.bound, self.codec),
                )  # fmt: skip
            except (ValueError, KeyError) as fault:
                traffic.fault(client, f"its reply cannot be read: {fault}")
                continue
            traffic.raw_up += nbytes(update.tensors)
            yield update

    def evaluate(self, round: int, out: Mapping[int, Broadcast], traffic: Traffic) -> Iterator[tuple[int, dict[str, float]]]:
        """The local metrics of the clients in `out`, in client order."""
        for client, content in self._replies("evaluate", round, out, traffic):
            try:
                _check_round(content, round)
            except ValueError as fault:
                traffic.fault(client, str(fault))
                continue
            metrics = {name: float(value) for name, value in _metrics(content).items() if isinstance(value, int | float)}
            loss, accuracy, weight = (metrics.get(name, math.nan) for name in ("loss", "accuracy", "weight"))
            if math.isfinite(loss) and 0 <= accuracy <= 1 and 0 < weight <= MOST_EXAMPLES:
                yield client, metrics
            else:
                traffic.fault(client, f"its metrics cannot be: loss {loss}, accuracy {accuracy}, weight {weight}")

    def _replies(self, kind: str, round: int, out: Mapping[int, Broadcast], traffic: Traffic) -> Iterator[tuple[int, RecordDict]]:
        """Good replies in client order, each as soon as its turn comes: where replies come in order none waits in memory."""
        packer = Packer()
        turns, ready = deque(sorted(out)), dict[int, RecordDict | None]()
        asked = sorted(out)
        until = None if self.deadline is None else time.monotonic() + self.deadline
        for attempt in range(2):  # a client that lacks what it was to hold is sent the whole, once
            # An evaluation is counted apart: it neither saves nor costs training a byte.
            held = {client: self._held.get(client, self.starts) if kind == "train" else frozenset() for client in asked}
            packed = {client: packer.pack(out[client], held[client]) for client in asked}
            if kind == "train" and self.stream is not None:
                packed = {client: self._streamed(client, one) for client, one in packed.items()}
            for client, sending in packed.items():
                traffic.count(client, down=len(sending.payload))
                if attempt == 0:
                    traffic.raw_down += _raw(out[client])
            asked = []
            for client, content in self._send(kind, round, packed, until, traffic):
                facts: Mapping[str, object] = {} if content is None else content.config_records.get("facts", {})
                traffic.count(client, up=0 if content is None else _size(content))
                if facts.get("resend") and attempt == 0:
                    self._held[client] = frozenset()
                    self._versions.pop(client, None)
                    asked.append(client)
                    continue
                if facts.get("resend"):
                    traffic.fault(client, "it asks again for a broadcast that was sent whole")
                    content = None
                if content is not None and kind == "train" and facts.get("holds"):
                    self._held[client] = packed[client].digests
                    if self.stream is not None:
                        self._versions[client] = self.stream.version
                ready[client] = content
                while turns and turns[0] in ready:
                    one = turns.popleft()
                    if (answer := ready.pop(one)) is not None:
                        yield one, answer
            asked.sort()

    def _streamed(self, client: int, whole: Packed) -> Packed:
        """The changes since what `client` holds, in place of the whole, if it holds a version they begin at and they are shorter."""
        assert self.stream is not None
        since = self._versions.get(client)
        changes = self.stream.since(since)
        if changes is not None and sum(map(len, changes)) >= len(whole.payload.data):  # most of the model never moves, and is held
            changes = None
        facts = {"version": self.stream.version, "since": -1 if changes is None or since is None else since}
        return replace(whole, payload=whole.payload if changes is None else pack_changes(changes), facts=facts)

    def _send(
        self, kind: str, round: int, packed: Mapping[int, Packed], until: float | None, traffic: Traffic
    ) -> Iterator[tuple[int, RecordDict | None]]:  # fmt: skip
        once: dict[tuple[object, ...], RecordDict] = {}
        messages = []
        for client, one in packed.items():
            key = (one.digest, one.payload.header, *one.facts.values())
            if key not in once:
                once[key] = to_records(one.payload, {"round": round, "digest": one.digest, **one.facts})
            messages.append(Message(once[key], self.nodes[client], kind, group_id=str(round)))
        return _gathered(self.grid, messages, self.nodes, self.deadline, traffic, until=until)


def connect(
    grid: Grid, codec: Codec, clients: int, *, deadline: float | None = None, patience: float = QUERY_SECONDS, seed: int = 0,
    stream: Stream | None = None, starts: frozenset[str] = frozenset(), needs: Callable[[int], Passport] | None = None,
) -> Exchange:  # fmt: skip
    """Waits until nodes for all `clients` are there, asks each which client it is and what it stands on, and gives the exchange.

    `needs` is the passport that a client must match; None asks for none. Raises `ConfigError` if two nodes are the same client, if a
    client is missing, and if one does not fit.
    """
    until, said = time.monotonic() + patience, -1
    while len(ids := sorted(grid.get_node_ids())) < clients:
        if len(ids) != said:
            logging.getLogger("fedpeft").warning(
                "%d of %d nodes are connected; waiting up to %.0f s for the others", len(ids), clients, patience
            )
            said = len(ids)
        if time.monotonic() > until:
            raise ConfigError(f"{len(ids)} nodes are connected, clients={clients} are needed; start more nodes or lower clients")
        time.sleep(0.5)
    nodes: dict[int, int] = {}
    said_of: dict[int, Mapping[str, object]] = {}
    traffic = Traffic()
    messages = [Message(RecordDict(), node, "query", group_id="query") for node in ids]
    for node, content in _gathered(grid, messages, {node: node for node in ids}, patience, traffic):
        if content is None:
            continue
        facts: Mapping[str, object] = content.config_records.get("facts", {})
        client = facts.get("client")
        if type(client) is not int:
            raise ConfigError(f"node {node} says it is client {client!r}, needed is a whole number; does it run fedpeft?")
        if client in nodes:
            raise ConfigError(f"two nodes say they are client {client}; give each node its own partition-id")
        nodes[client], said_of[client] = node, facts
    if missing := [client for client in range(clients) if client not in nodes]:
        why = f" (first fault: {traffic.faults[0].reason})" if traffic.faults else ""
        raise ConfigError(f"client {missing[0]} and {len(missing) - 1} more did not answer the first message{why}")
    shown = {} if needs is None else _fitting({client: said_of[client] for client in range(clients)}, needs)
    return Exchange(grid, codec, {client: nodes[client] for client in range(clients)}, deadline, seed, stream, starts, shown)


def _fitting(said: Mapping[int, Mapping[str, object]], needs: Callable[[int], Passport]) -> dict[int, Passport]:
    """The clients' passports. Raises `ConfigError` with all differences of the first that does not fit, and the names of the others."""
    shown: dict[int, Passport] = {}
    faults: dict[int, list[str]] = {}
    for client, facts in said.items():
        try:
            shown[client] = read_passport(facts)
            found = needs(client).differences(shown[client], whose=f"client {client}")
        except ValueError as fault:
            found = [str(fault)]
        if found:
            faults[client] = found
    if faults:
        first, *others = faults
        rest = f"\nnor do clients: {', '.join(map(str, others[:10]))}{' and more' if others[10:] else ''}" if others else ""
        raise ConfigError("\n".join([f"client {first} does not fit this run:", *faults[first]]) + rest)
    return shown


def _raw(broadcast: Broadcast) -> int:
    """Bytes of all of its tensors as they are."""
    products = sum(part.B.nbytes + part.A.nbytes for chunk in broadcast.base_delta for part in chunk.values())
    return nbytes(broadcast.tensors) + products


def _check_round(content: RecordDict, round: int) -> None:
    """Raises `ValueError` for a reply to another round's broadcast: its differences are from another start."""
    facts: Mapping[str, object] = content.config_records.get("facts", {})
    if (said := facts.get("round")) != round:
        raise ValueError(f"its reply is of round {said!r}, this is round {round}")


def _metrics(content: RecordDict) -> Mapping[str, object]:
    return content.metric_records.get("metrics", {})


def _size(content: RecordDict) -> int:
    """Bytes of a reply's payload, whatever becomes of it."""
    try:
        return len(from_records(content))
    except ValueError:
        return 0


def _gathered(
    grid: Grid, messages: list[Message], nodes: Mapping[int, int], timeout: float | None, traffic: Traffic, *, until: float | None = None,
) -> Iterator[tuple[int, RecordDict | None]]:  # fmt: skip
    """(client, content) of every reply, None where it is an error or never comes: a fault. `nodes` maps clients to node ids.

    Waits `timeout` seconds, or what is left of them before `until`, on the clock of `time.monotonic`.
    """
    if not messages:
        return
    clients = {node: client for client, node in nodes.items()}
    waiting = {message.metadata.dst_node_id for message in messages}
    sent: dict[str, int] = {}
    left = timeout if until is None else until - time.monotonic()
    for reply in grid.send_and_receive(messages, timeout=left) if left is None or left > 0 else ():
        sent = sent or {message.metadata.message_id: message.metadata.dst_node_id for message in messages}
        # By message, not by source: the error of a dead node comes from the server's own id, and a late reply is to an earlier message.
        node = sent.get(reply.metadata.reply_to_message_id)
        if node is None or node not in waiting:
            continue
        waiting.discard(node)
        if reply.has_error():
            traffic.fault(clients[node], reply.error.reason or f"error {reply.error.code}")
        yield clients[node], None if reply.has_error() else reply.content
    for node in sorted(waiting):
        traffic.fault(clients[node], f"no answer within {timeout:.0f} s" if timeout else "no answer")
        yield clients[node], None
