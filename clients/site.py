"""Site: what answers query, train and evaluate for all clients of a process; in simulation that is every client there is."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from flwr.app import Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from torch import Tensor

from clients.budget import Budget
from clients.engine import Engine
from clients.faults import Fault, Told, fault_of
from clients.held import Held
from clients.lanes import Lanes, usual
from clients.memory import Memory, Reply
from clients.plan import waves
from clients.train import Job, at_round, rates
from fedpeft import seeds
from fedpeft.adapters.base import Adapted
from fedpeft.codecs.base import Codec, Payload
from fedpeft.codecs.raw import Raw
from fedpeft.config import load
from fedpeft.messages import Broadcast
from fedpeft.passport import size_class
from fedpeft.privacy.spending import BudgetSpent
from fedpeft.privacy.unit import Example
from fedpeft.records import (
    Packer,
    digested,
    draw_up,
    from_records,
    pack_update,
    to_records,
    unpack_broadcast,
)
from fedpeft.setting import Setting, codec_of, downlink_of, open_setting, privacy_of, strategy_of
from fedpeft.strategy import Phase, Strategy
from fedpeft.tensors import Tensors


@dataclass(frozen=True)
class Ask:
    """One client's message as its lane gets it. Plain values: it may cross a process."""

    client: int
    kind: str  # train or evaluate
    round: int
    digest: str  # of the broadcast


@dataclass(frozen=True)
class Order:
    """The messages of one wave, and the broadcasts they name: digest -> (header, bytes)."""

    asks: Sequence[Ask]
    broadcasts: Mapping[str, tuple[str, bytes]]


log = logging.getLogger("fedpeft")
OWED = "owed/"  # names in a client's memory: what a codec left out
Answer = Reply | Fault  # of one client: a reply, or what went wrong with it alone


@dataclass(eq=False)
class Site:
    """What the clients of this process share, and what each of them holds."""

    setting: Setting
    strategy: Strategy[Any]
    codec: Codec
    memory: Memory
    feedback: bool = False  # what a lossy codec leaves out of an update is added to the next
    held: Held = field(default_factory=lambda: Held(Raw(), 0))
    budget: Budget | None = None  # of single examples, where the run hides them
    known: Mapping[str, Any] = field(default_factory=dict)  # what the run measured before: lanes, and facts of each adapter
    _present: tuple[Adapted, Engine] | None = None

    def engine(self, adapter: str) -> Engine:
        """What trains and scores with the adapter of that name."""
        adapted = self.setting.on(adapter)
        if self._present is None or self._present[0] is not adapted:
            config, setting = self.setting.config, self.setting
            known = self.known.get("adapters", {}).get(adapter, {})
            made = Engine(
                adapted, setting.train, config.engine, groups=setting.split.clients, batch=config.train.batch, lanes=self.lanes,
                known=known, folder=self.memory.folder.parent, backend="auto" if self.budget is None else self.budget.unit.backend,
            )  # fmt: skip
            self._present = (adapted, made)
        return self._present[1]

    def examined(self, adapter: str, broadcast: Broadcast) -> Tensor:
        """(2, test examples) float64: loss and hit of the model of `broadcast`, whose tensors are of the adapter of that name."""
        return self.engine(adapter).examined(broadcast, self.setting.test, batch=self.setting.config.evaluate.batch)

    @property
    def ready(self) -> Engine | None:
        """The engine in use. Lanes share what lies ready when they begin, so those of another engine must end."""
        return None if self._present is None else self._present[1]

    def prepare(self, round: int = 0) -> Mapping[str, Any]:
        """Measures, and makes what lanes are to share before there are any; gives what was measured. That of `round` is left ready."""
        last = self.strategy.phase(round).adapter
        names = [name for name in self.setting.names if name != last] + [last]
        made = {name: self.engine(name).facts for name in names}
        if self.budget is not None:
            for client in range(self.setting.config.clients):
                self.budget.terms(client)  # lanes share what was found
        if any(self.strategy.phase(round).keeps(name) for name in self.setting.on(last).parameters):
            self.engine(last).prepare(self.setting.test)
        return {"lanes": float(self.lanes), "adapters": made}

    @property
    def lanes(self) -> int:
        """Processes that are worth having for one round; as many as the run began with, for the waves follow from it."""
        config = self.setting.config
        return int(self.known.get("lanes", 0)) or min(config.engine.lanes or usual(self.setting.base.device), config.cohort)

    def answer(self, client: int, kind: str, content: RecordDict) -> RecordDict:
        """The content of the reply to one message. Raises `Told` with what the server may hear of a fault; its cause stays here."""
        if kind == "query":
            return self.query(client)
        ((_, _, made),) = self.answers([(client, kind, content)], lambda orders: enumerate(map(self.work, orders)))
        if isinstance(made, Fault):
            raise Told(made.said) from ValueError(made.reason)
        return made

    def query(self, client: int) -> RecordDict:
        """Which client this node is (node ids are random, client indices are not), what it stands on, and how large its data are, about.

        Where single examples are hidden, how many a client has is public: `fedpeft/privacy/statement.py` says so beside every epsilon.
        Where clients are, the server is trusted, and is sent the very number with every update.
        """
        own = replace(self.setting.passport(client), examples=size_class(len(self.setting.split.clients[client])))
        return to_records(Payload("[]", b""), {"client": client, **own.facts()})

    def answers(
        self, messages: Sequence[tuple[int, str, RecordDict]], each: Callable[[Sequence[Order]], Iterator[tuple[int, list[Answer]]]]
    ) -> Iterator[tuple[int, str, RecordDict | Fault]]:
        """(client, kind, content of its reply, or its fault) for every (client, kind, content); `each` has the orders worked off."""
        good: dict[tuple[str, int], list[tuple[Ask, Broadcast]]] = {}
        opened: dict[str, Broadcast] = {}  # each broadcast once, however many clients it was sent to
        for client, kind, content in messages:
            try:
                ask = _ask(client, kind, content, self.setting.config.rounds)
                payload, said = from_records(content), content.config_records["facts"]
                broadcast = unpack_broadcast(payload, {}, {}) if kind == "evaluate" else self.held.open(client, payload, said)
            except Exception as fault:  # a message that cannot be read is that client's fault alone; its words are of what was sent
                yield client, kind, fault_of(fault, "its message cannot be read", told=isinstance(fault, ValueError | KeyError))
                continue
            if broadcast is None:
                yield client, kind, to_records(Payload("[]", b""), {"resend": True})
            else:
                good.setdefault((kind, ask.round), []).append((ask, opened.setdefault(ask.digest, broadcast)))
        for (kind, _), asked in good.items():
            orders = self._orders([ask for ask, _ in asked], {ask.digest: broadcast for ask, broadcast in asked})
            for position, replies in each(orders):
                for ask, reply in zip(orders[position].asks, replies, strict=True):
                    facts = {"client": ask.client, "round": ask.round} | ({"holds": ask.client in self.held} if kind == "train" else {})
                    yield ask.client, kind, reply if isinstance(reply, Fault) else to_records(reply.payload, facts, reply.facts)

    def work(self, order: Order) -> list[Answer]:
        """Answers the messages of one wave. What goes wrong with one client is its answer; `OSError` ends the run."""
        same: dict[str, Tensor] = {}  # what broadcasts have in common is one object: clients of one `base_delta` make one wave
        broadcasts = {digest: unpack_broadcast(Payload(*packed), same, same) for digest, packed in order.broadcasts.items()}
        if order.asks[0].kind == "evaluate":
            return self._evaluated(order.asks, broadcasts)
        replies: dict[int, Answer] = {}
        for ask in order.asks:
            if found := self.memory.answered(ask.client, ask.round, ask.digest):
                replies[ask.client] = found
        if len(replies) < len(order.asks):  # all of the wave again: another one rounds otherwise. What was answered stays answered.
            asks = order.asks if self.budget is None else [ask for ask in order.asks if ask.client not in replies]  # and is spent once
            for ask, made in self._trained(asks, broadcasts):
                replies.setdefault(ask.client, made)
        return [replies[ask.client] for ask in order.asks]

    def _trained(self, asks: Sequence[Ask], broadcasts: Mapping[str, Broadcast]) -> Iterator[tuple[Ask, Answer]]:
        phase = self.strategy.phase(asks[0].round)
        engine = self.engine(phase.adapter)
        jobs, spent, able = [], dict[int, Mapping[str, float]](), list[Ask]()
        for ask in asks:
            try:
                spent[ask.client] = {} if self.budget is None else self.budget.reserve(ask.client, ask.round, phase)
            except BudgetSpent as fault:
                yield ask, fault_of(fault, "", told=True)
                continue
            able.append(ask)
            jobs.append(self._job(ask, broadcasts[ask.digest], phase))
        for ask, job, done in zip(able, jobs, engine.train(phase, jobs, round=asks[0].round), strict=True):
            if isinstance(done, ValueError):
                yield ask, self._fault(done, "training failed")
                continue
            update, keeps = done
            owed = self._owed(ask, phase) if self.feedback and phase.carries else None
            seed = draw_up(self.setting.config.seed, ask.round, ask.client)
            try:
                payload, left = pack_update(update, job.broadcast, self.codec, seed=seed, owed=owed, shares=phase.shares)
            except ValueError as fault:
                yield ask, self._fault(fault, "its update cannot be sent")
                continue
            reply = Reply(payload, {"weight": update.weight, **update.metrics, **spent[ask.client]})
            if self.memory.answered(ask.client, ask.round, ask.digest) is None:
                kept = keeps | {OWED + name: tensor for name, tensor in ((owed or {}) | left).items()}
                self.memory.store(ask.client, phase.adapter, ask.round, ask.digest, kept, reply)
            yield ask, reply

    def _fault(self, cause: Exception, what: str) -> Fault:
        """Of hidden examples no word is told, for one of them may have caused it."""
        return fault_of(cause, what, told=self.budget is None and isinstance(cause, Told))

    def _evaluated(self, asks: Sequence[Ask], broadcasts: Mapping[str, Broadcast]) -> list[Answer]:
        """How clients' own models (the broadcast under what each keeps) do on test sets that resemble their data."""
        if self.budget is not None:
            why = Told("privacy=example: an accuracy on labels like its own would tell of its examples without noise")
            return [fault_of(why, "", told=True)] * len(asks)
        phase = self.strategy.phase(asks[0].round)
        engine = self.engine(phase.adapter)
        jobs, weights, answers = [], [], dict[int, Answer]()
        for ask in asks:
            try:
                rows, weight = self.setting.judged(ask.client)
            except ValueError as fault:
                answers[ask.client] = self._fault(fault, "no test example resembles its data")
                continue
            jobs.append(replace(self._job(ask, broadcasts[ask.digest], phase), rows=rows))
            weights.append(weight)
        for job, one in zip(jobs, engine.score(jobs, weights, self.setting.test), strict=True):
            stands_for = float(len(self.setting.split.clients[job.client]))
            answers[job.client] = (
                self._fault(one, "scoring failed")
                if isinstance(one, ValueError)
                else Reply(Payload("[]", b""), {"loss": one.loss, "accuracy": one.accuracy, "weight": stands_for})
            )
        return [answers[ask.client] for ask in asks]

    def _job(self, ask: Ask, broadcast: Broadcast, phase: Phase) -> Job:
        config, adapted = self.setting.config, self.setting.on(phase.adapter)
        work, scales = at_round(config.train, ask.round, config.rounds), self.setting.scales(ask.client, adapted)
        if scales is None and not self.strategy.mean_only:  # such a strategy may send less than the adapter's rank: HetLoRA's clients prune
            scales = adapted.scales
        recalled = self.memory.recall(ask.client, phase.adapter, ask.round)
        kept = {name: tensor for name, tensor in recalled.items() if not name.startswith(OWED)}
        return Job(
            ask.client, broadcast, self.setting.split.clients[ask.client], work,
            seeds.generator(config.seed, round=ask.round, client=ask.client, purpose="batches"),
            kept | rates(adapted, work, scales) if phase.rates else kept, scales,
            None if self.budget is None else self.budget.private(ask.client, ask.round, phase),
        )  # fmt: skip

    def _owed(self, ask: Ask, phase: Phase) -> Tensors:
        """What a lossy codec has left out of this client's updates so far."""
        found = self.memory.recall(ask.client, phase.adapter, ask.round)
        return {name.removeprefix(OWED): tensor for name, tensor in found.items() if name.startswith(OWED)}

    def _orders(self, asks: list[Ask], broadcasts: Mapping[str, Broadcast]) -> list[Order]:
        """Waves of sorted clients. Who is asked, and the run's settings, decide them; nothing else."""
        by_client = {ask.client: ask for ask in asks}
        work = {client: float(self.setting.steps(client)) for client in by_client}
        packer, packed = Packer(), dict[str, tuple[str, bytes]]()
        for digest, broadcast in broadcasts.items():
            payload = packer.pack(broadcast).payload
            packed[digest] = (payload.header, payload.data)
        made = []
        most = self.engine(self.strategy.phase(asks[0].round).adapter).wave if asks else 1
        for wave in waves(list(by_client), work, most, self.lanes):
            mine = [by_client[client] for client in wave]
            made.append(Order(mine, {ask.digest: packed[ask.digest] for ask in mine}))
        return made


def site_of(setting: Setting, memory: Memory, *, known: Mapping[str, Any] | None = None, holds: bool = True) -> Site:
    """The site of a run's setting, as its config says."""
    config = setting.config
    codec, feedback = codec_of(config)
    held = Held(downlink_of(config), config.seed, keeps=holds, starts=digested(setting.starts().values()))
    strategy = strategy_of(config)
    if feedback and not strategy.phase(config.rounds).carries:
        log.warning(
            "strategy=%s makes factors anew in every round: what codec=%s leaves out of an update means nothing in the next and is lost",
            config.choices["strategy"], config.choices["codec"],
        )  # fmt: skip
    unit = privacy_of(config)
    budget = Budget(unit, setting, strategy, memory.folder) if isinstance(unit, Example) else None
    return Site(setting, strategy, codec, memory, known=known or {}, feedback=feedback, held=held, budget=budget)


def lane_on_gpu(overrides: Sequence[str], memory: Path, known: Mapping[str, Any], lane: int) -> Callable[[Order], list[Answer]]:
    """The work of a lane that opens the run of `overrides` for itself, on the GPU of its number where there are some."""
    config = load(overrides)
    if torch.cuda.is_available():
        config = replace(config, run=replace(config.run, device=f"cuda:{lane % torch.cuda.device_count()}"))
    return site_of(open_setting(config), Memory(memory, replies=False), known=known).work


def serve(site: Site, clients: Mapping[int, int], lanes: Lanes | None = None) -> Callable[[Sequence[Message]], Iterator[Message]]:
    """Answers messages in waves, in `lanes` if they are given; `clients` maps node ids to client indices.

    What goes wrong in one client becomes an error reply, as Flower makes it; `OSError` ends the run: in simulation the clients' disk is
    ours, and a memory that cannot be kept would change the result.
    """

    began = site.ready

    def each(orders: Sequence[Order]) -> Iterator[tuple[int, list[Answer]]]:
        nonlocal began
        if lanes is None:
            return enumerate(map(site.work, orders))
        if site.ready is not began:  # a phase with another adapter: the lanes that begin now have it
            lanes.close()
            began = site.ready
        return lanes.map(orders)

    def answers(messages: Sequence[Message]) -> Iterator[Message]:
        asked: dict[tuple[int, str], Message] = {}
        for message in messages:
            client = clients[message.metadata.dst_node_id]
            if message.metadata.message_type == "query":
                yield Message(site.query(client), reply_to=message)
            else:
                asked[client, message.metadata.message_type] = message
        contents = [(client, kind, message.content) for (client, kind), message in asked.items()]
        for client, kind, made in site.answers(contents, each):
            message = asked[client, kind]
            if isinstance(made, Fault):
                if site.budget is not None:
                    log.error("client %d: %s", client, made.reason)
                reason = made.reason if site.budget is None else made.said  # clients and server are one process: no word leaves it
                yield Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)
            else:
                yield Message(made, reply_to=message)

    return answers


def _ask(client: int, kind: str, content: RecordDict, rounds: int) -> Ask:
    facts = content.config_records["facts"]
    round = _whole(facts["round"])
    if not 0 <= round <= rounds:  # the last evaluation comes after the last round
        raise ValueError(f"the message's round is {round}, this run has rounds 0 to {rounds - 1}; does the server run another config?")
    return Ask(client, kind, round, str(facts["digest"]))


def _whole(value: Any) -> int:
    if type(value) is not int:
        raise ValueError(f"the message's round is {value!r}, needed is a whole number; it does not come from fedpeft")
    return value
