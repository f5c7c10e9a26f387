"""ClientApp: query, train, evaluate. One `Site` serves all clients of a process; in simulation that is every client there is."""

import shlex
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from torch import Tensor

from clients.evaluate import evaluate
from clients.memory import Memory, Reply
from clients.train import at_round, train
from fedpeft import seeds
from fedpeft.codecs.base import Codec, Payload
from fedpeft.config import ConfigError, build, load
from fedpeft.messages import Broadcast
from fedpeft.records import from_records, pack_update, to_records, unpack_broadcast
from fedpeft.setting import Setting, open_setting
from fedpeft.strategy import Strategy


@dataclass(eq=False)
class Site:
    """What the clients of this process share, and what each of them holds."""

    setting: Setting
    strategy: Strategy[Any]
    codec: Codec
    memory: Memory
    holds: bool = True  # this process answers a client's next message too, so the server need not send again what is held
    _held: dict[int, dict[str, Tensor]] = field(default_factory=dict)  # client -> digest -> tensor of the broadcast it answered last
    _known: WeakValueDictionary[str, Tensor] = field(default_factory=WeakValueDictionary)  # the same tensors once for all clients

    def answer(self, client: int, kind: str, content: RecordDict) -> RecordDict:
        """The content of the reply to one message."""
        handlers: dict[str, Callable[[int, RecordDict], RecordDict]] = {
            "query": self.query, "train": self.train, "evaluate": self.evaluate
        }  # fmt: skip
        return handlers[kind](client, content)

    def query(self, client: int, content: RecordDict) -> RecordDict:
        """Which client this node is: node ids are random, client indices are not."""
        return to_records(Payload("[]", b""), {"client": client})

    def train(self, client: int, content: RecordDict) -> RecordDict:
        """One round of `client`; a broadcast answered before gets the same bytes again."""
        facts = content.config_records["facts"]
        round, digest = _whole(facts["round"]), str(facts["digest"])
        reply = self.memory.answered(client, round, digest)
        if reply is None:
            broadcast = self._open(client, content)
            if broadcast is None:
                return to_records(Payload("[]", b""), {"resend": True})
            reply = self._work(client, round, digest, broadcast)
        return to_records(reply.payload, {"client": client, "holds": self.holds and client in self._held}, reply.facts)

    def evaluate(self, client: int, content: RecordDict) -> RecordDict:
        """How the client's own model (the broadcast under what it keeps) does on a test set that resembles its data."""
        facts = content.config_records["facts"]
        round = _whole(facts["round"])
        broadcast = unpack_broadcast(from_records(content), {}, {})
        kept = self.memory.recall(client, self.strategy.phase(round).adapter, round)
        weights = self.setting.resembling(client) if self.setting.dataset.task != "language" else None
        found = evaluate(
            self.setting.adapted, broadcast, kept, self.setting.test, weights=weights, batch=self.setting.config.evaluate.batch
        )
        metrics = {"loss": found.loss, "accuracy": found.accuracy, "weight": float(len(self.setting.split.clients[client]))}
        return to_records(Payload("[]", b""), {"client": client}, metrics)

    def _open(self, client: int, content: RecordDict) -> Broadcast | None:
        """The broadcast of a message; None if it leaves out what is not held here any more."""
        store: dict[str, Tensor] = {}
        try:
            broadcast = unpack_broadcast(from_records(content), self._held.get(client, {}), store)
        except LookupError:
            return None
        if self.holds:
            self._held[client] = {digest: self._known.setdefault(digest, tensor) for digest, tensor in store.items()}
        return broadcast

    def _work(self, client: int, round: int, digest: str, broadcast: Broadcast) -> Reply:
        setting, config, phase = self.setting, self.setting.config, self.strategy.phase(round)
        kept = self.memory.recall(client, phase.adapter, round)
        update, keeps = train(
            setting.adapted, phase, broadcast, kept, setting.train, setting.split.clients[client],
            at_round(config.train, round, config.rounds),
            client=client, round=round, rng=seeds.generator(config.seed, round=round, client=client, purpose="batches"),
        )  # fmt: skip
        reply = Reply(pack_update(update, broadcast, self.codec), {"weight": update.weight, **update.metrics})
        self.memory.store(client, phase.adapter, round, digest, keeps, reply)
        return reply


def serve(site: Site, clients: Mapping[int, int]) -> Callable[[Sequence[Message]], Iterator[Message]]:
    """Answers messages in this process, one at a time; `clients` maps node ids to client indices.

    An exception in one client becomes an error reply, as Flower makes it; `OSError` ends the run.
    """

    def answers(messages: Sequence[Message]) -> Iterator[Message]:
        for message in messages:
            client = clients[message.metadata.dst_node_id]
            try:
                yield Message(site.answer(client, message.metadata.message_type, message.content), reply_to=message)
            except OSError:  # in simulation the clients' disk is ours: a memory that cannot be kept would change the result
                raise
            except Exception as fault:  # whatever happens in a client is that client's fault alone
                yield Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, str(fault) or repr(fault)), reply_to=message)

    return answers


def _whole(value: Any) -> int:
    if type(value) is not int:
        raise ValueError(f"the message's round is {value!r}, needed is a whole number; it does not come from fedpeft")
    return value


@lru_cache(maxsize=1)
def _site(overrides: str, run: int) -> Site:
    """The site of this process for one run of Flower's own engine, whose processes come and go: nothing is held between messages."""
    config = load(shlex.split(overrides))
    folder = Path(config.run.dir) if config.run.dir else Path(tempfile.gettempdir()) / f"fedpeft-{run}"
    return Site(open_setting(config), build(config.strategy), build(config.codec), Memory(folder / "memory"), holds=False)


def _answer(message: Message, context: Context) -> Message:
    try:
        client = int(context.node_config["partition-id"])
    except KeyError:
        raise ConfigError('this node has no client index; start it with --node-config "partition-id=N"') from None
    site = _site(str(context.run_config["overrides"]), context.run_id)
    if client >= site.setting.config.clients:
        raise ConfigError(
            f"this node is client {client}, the run has clients={site.setting.config.clients}; raise clients or start fewer nodes"
        )
    return Message(site.answer(client, message.metadata.message_type, message.content), reply_to=message)


app = ClientApp()


@app.query()
def query(message: Message, context: Context) -> Message:
    """Which client this node is."""
    return _answer(message, context)


@app.train()
def fit(message: Message, context: Context) -> Message:
    """One round of one client."""
    return _answer(message, context)


@app.evaluate()
def measure(message: Message, context: Context) -> Message:
    """Local metrics of one client."""
    return _answer(message, context)
