"""Our strategies as strategies of stock Flower, for apps whose ClientApp is not ours.

A plain client is told of a round by two lists of array names in its config, `fedpeft.trains` and `fedpeft.shares`. What else a `Phase`
can ask of a client it cannot do, so such strategies are refused.
"""

import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, replace
from io import BytesIO
from typing import Generic, Literal, TypeVar

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from torch import Tensor

from fedpeft.aggregate import Mean, weighted_mean
from fedpeft.messages import Broadcast, Update, checked
from fedpeft.strategy import Phase, Strategy
from fedpeft.tensors import Tensors, is_b, is_factor, is_own, nothing, only
from server.exchange import Traffic

S = TypeVar("S")
MetricsMean = Callable[[list[RecordDict], str], MetricRecord]
LOG = logging.getLogger("flwr")  # Flower's own
OURS = "use fedpeft's own ClientApp instead (`flwr run .`)"
AHEAD = 1000  # rounds whose phases are looked at before anything is sent; those beyond, as they come


@dataclass(frozen=True)
class Naming:
    """How to read arrays of another program: `ours` makes a canonical name of theirs, `scale(layer, rank)` is absorbed in their B."""

    ours: Callable[[str], str] = str
    scale: Callable[[str, int], float] = lambda layer, rank: 1.0


OUR_NAMES = Naming()  # of arrays that are called as here, `<layer>.A`, `<layer>.B` and `head.<parameter>`, with the scale inside B


def peft_names(scale: float | Mapping[str, float] | Callable[[int], float]) -> Naming:
    """The names of `peft.get_peft_model_state_dict` (those of `named_parameters` too), for LoRA and DoRA.

    `scale` is what peft multiplies B A by, lora_alpha / r: one number, one for each layer (by the module's path in the base model), or a
    function of the rank: `lambda rank: 16 / rank` where clients of any rank have lora_alpha=16.
    """

    def of(layer: str, rank: int) -> float:
        if isinstance(scale, Mapping) and layer not in scale:
            raise ValueError(f"peft_names: no scale for the layer {layer}; there are scales for {', '.join(sorted(scale)) or 'none'}")
        found = scale[layer] if isinstance(scale, Mapping) else scale(rank) if callable(scale) else scale
        if not 0 < found < math.inf:
            raise ValueError(f"peft_names: the scale of {layer} is {found}; needed is lora_alpha / r, more than 0")
        return found

    return Naming(_from_peft, of)


def _from_peft(name: str) -> str:
    plain = name.removeprefix("base_model.model.")
    if found := re.fullmatch(r"(.+)\.lora_(?:([AB])(?:\.\w+)?\.weight|embedding_([AB])(?:\.\w+)?)", plain):
        return f"{found[1]}.{found[2] or found[3]}"
    if found := re.fullmatch(r"(.+)\.lora_magnitude_vector(?:\.\w+)*", plain):
        return f"{found[1]}.magnitude"
    return f"head.{plain}"


@dataclass(frozen=True, eq=False)
class _Dictionary:
    """Between their arrays and boundary tensors, which are float64 here: there and back gives float32 arrays their own bits again."""

    names: Mapping[str, str]  # theirs -> ours, in the order of their arrays
    kinds: Mapping[str, torch.dtype]  # of theirs
    scale: Callable[[str, int], float]

    def ours(self, tensors: Tensors) -> Tensors:
        """Boundary tensors of theirs."""
        wide = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
        return {self.names[name]: tensor * self._scale(name, tensor) if is_b(self.names[name]) else tensor for name, tensor in wide.items()}

    def theirs(self, tensors: Tensors) -> Tensors:
        """All their arrays, of boundary tensors."""
        made = {}
        for name, ours in self.names.items():
            tensor = tensors[ours]
            made[name] = (tensor / self._scale(name, tensor) if is_b(ours) else tensor).to(self.kinds[name])
        return made

    def _scale(self, name: str, b: Tensor) -> float:
        return self.scale(self.names[name].removesuffix(".B"), b.shape[1])


@dataclass(frozen=True, eq=False)
class _Sent:
    """What one client was sent, in their names."""

    client: int
    message: Message
    tensors: Tensors
    arrays: ArrayRecord


class _NoAnswer(Exception):
    """Raised at the end of a round's updates if there was none, so that no aggregate of nothing ever comes to be."""


class FlowerStrategy(FedAvg, Generic[S]):
    """A stock strategy that samples, evaluates and logs as Flower's FedAvg does, and aggregates as `strategy` does.

    `mean` and the phases are those of `fedpeft run`. `round` counts aggregations from 0: where nobody answers, it stays. `client_of`
    says which client a node is, from 0 on (for strategies that tell clients apart, as by rank); without, nodes are numbered as they appear,
    in order of their ids. A client of a lower rank is sent, and evaluated with, arrays of that rank.
    `base_delta="send"`: messages have a second ArrayRecord "base_delta" with pairs `<chunk>/<layer>.B`, `<chunk>/<layer>.A`, all of whose
    products B @ A (without scale) the client must add to its frozen weights; the server's own model needs the same, see `base_delta`.
    """

    def __init__(
        self, strategy: Strategy[S], *, mean: Mean = weighted_mean, names: Naming = OUR_NAMES,
        base_delta: Literal["refuse", "send"] = "refuse", client_of: Callable[[int], int] | None = None,
        fraction_train: float = 1.0, fraction_evaluate: float = 1.0,
        min_train_nodes: int = 2, min_evaluate_nodes: int = 2, min_available_nodes: int = 2, weighted_by_key: str = "num-examples",
        arrayrecord_key: str = "arrays", configrecord_key: str = "config",
        train_metrics_aggr_fn: MetricsMean | None = None, evaluate_metrics_aggr_fn: MetricsMean | None = None,
    ) -> None:  # fmt: skip
        super().__init__(
            fraction_train, fraction_evaluate, min_train_nodes, min_evaluate_nodes, min_available_nodes, weighted_by_key, arrayrecord_key,
            configrecord_key, train_metrics_aggr_fn, evaluate_metrics_aggr_fn,
        )  # fmt: skip
        if base_delta not in ("refuse", "send"):
            raise ValueError(f"base_delta={base_delta}: needed is refuse or send")
        if mean is not weighted_mean and not strategy.mean_only:
            raise ValueError(f"{type(strategy).__name__} combines clients' products itself, the mean it is given works per coordinate; "
                             "leave mean=weighted_mean")  # fmt: skip
        for round in range(AHEAD):
            _check_plain(strategy, round, strategy.phase(round))
        self.strategy, self.mean, self.names, self.round = strategy, mean, names, 0
        self._sends_delta, self._client_of = base_delta == "send", client_of
        self._seen: dict[int, int] = {}  # node -> its number
        self._state: S
        self._given: dict[str, Array] | None = None  # the arrays that this strategy handed out last
        self._sent: dict[int, _Sent] = {}  # node -> what it was sent to train

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """Stock sampling; each node gets its client's broadcast and the names of this phase. Round 1 begins anew, with `arrays`."""
        self._given = None if server_round == 1 else self._given
        self._take(arrays)
        lists = self._lists()
        messages = list(super().configure_train(server_round, arrays, config, grid))
        self._sent = self._addressed(messages, grid, lists)
        return messages

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The global model after `strategy` took the good replies in client order; the stock mean of their metrics, and two counts.

        `fedpeft.answers` are the good replies, `fedpeft.faults` the clients without one. With no good reply the model stays as it is.
        """
        sent, self._sent = self._sent, {}
        if not sent:
            return None, None
        traffic, good = Traffic(), list[RecordDict]()
        try:
            self._state = self.strategy.aggregate(self._state, self.round, self._updates(sent, list(replies), traffic, good), self.mean)
            self.round += 1
        except _NoAnswer:
            LOG.warning("aggregate_train: the model stays as it is")
        counts = {"fedpeft.answers": len(good), "fedpeft.faults": len(traffic.faults)}
        if not good:
            return None, MetricRecord({**counts})
        made = ArrayRecord(self._theirs(self._broadcast(None)))
        self._given = dict(made.items())
        return made, MetricRecord({**self._metrics(good), **counts})

    def configure_evaluate(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """Stock sampling; each node gets its client's broadcast."""
        self._take(arrays)
        messages = list(super().configure_evaluate(server_round, arrays, config, grid))
        self._addressed(messages, grid, {})
        return messages

    @property
    def base_delta(self) -> ArrayRecord:
        """What belongs to the arrays of the result: pairs `<chunk>/<layer>.B`, `<chunk>/<layer>.A`, each B @ A to be added to its layer."""
        return ArrayRecord() if self._given is None else self._delta(self._broadcast(None))

    def _lists(self) -> dict[str, list[str]]:
        """What the config tells a client of this round's phase: names of its arrays."""
        phase = self.strategy.phase(self.round)
        _check_plain(self.strategy, self.round, phase)
        lists = {
            f"fedpeft.{what}": [theirs for theirs, ours in self._words.names.items() if names(ours)]
            for what, names in (("trains", phase.trains), ("shares", phase.shares))
        }
        if empty := [what for what, listed in lists.items() if not listed]:
            raise ValueError(f"round {self.round} has no array for {empty[0]}: none of {_few(self._words.names)} fits; is names= right?")
        return lists

    def _take(self, arrays: ArrayRecord) -> None:
        """Begins with `arrays`, or makes sure that they are those of the last round."""
        if self._given is None:
            self._begin(arrays)
        elif dict(arrays.items()) != self._given:
            raise ValueError(
                "these arrays are not those that FlowerStrategy made in the round before. It holds the model itself, so what changes the "
                f"arrays in between (Flower's differential privacy around it, say) would be lost; {OURS}"
            )

    def _begin(self, arrays: ArrayRecord) -> None:
        theirs = {name: _decoded(array) for name, array in arrays.items()}
        names = {name: self.names.ours(name) for name in theirs}
        _check_names(names, theirs)
        self._words = _Dictionary(names, {name: tensor.dtype for name, tensor in theirs.items()}, self.names.scale)
        self._state, self.round = self.strategy.init({"main": self._words.ours(theirs)}), 0
        self._rehearse()
        self._given = dict(arrays.items())

    def _rehearse(self) -> None:
        """Raises what round 0 would, were its model all that comes back: a base_delta is refused before a client has worked."""
        self._lists()
        shared = only(self._broadcast(None).tensors, self.strategy.phase(0).shares)
        two = [Update(client, shared, 1.0) for client in (0, 1)]  # FedEx moves the base by what clients differ in
        after = self.strategy.aggregate(self._state, 0, two, weighted_mean)
        self._theirs(self.strategy.broadcast(after, 1, None))

    def _broadcast(self, client: int | None) -> Broadcast:
        try:
            return self.strategy.broadcast(self._state, self.round, client)
        except IndexError as fault:
            raise ValueError(
                f"the strategy knows no client {client}; Federation(ranks=...) needs a rank for every node, or client_of= says which it is"
            ) from fault

    def _theirs(self, broadcast: Broadcast) -> Tensors:
        """Their arrays; raises `ValueError` for a broadcast that has more to it than they can hold."""
        who = type(self.strategy).__name__
        if broadcast.base_delta and not self._sends_delta:
            raise ValueError(
                f"{who} moves the frozen base, which a plain ClientApp does not know of and would train a wrong model. "
                f'Give FlowerStrategy(..., base_delta="send") and add what comes in "base_delta" at each client, or {OURS}'
            )
        if odd := set(broadcast.tensors) ^ set(self._words.names.values()):
            raise ValueError(f"{who} sends other tensors than it was begun with ({_few(odd)}), a plain ClientApp has none such; {OURS}")
        return self._words.theirs(broadcast.tensors)

    def _delta(self, broadcast: Broadcast) -> ArrayRecord:
        kinds = {ours: self._words.kinds[theirs] for theirs, ours in self._words.names.items()}
        made: Tensors = {}
        for number, chunk in enumerate(broadcast.base_delta):
            for layer, product in chunk.items():
                made |= {f"{number}/{layer}.B": product.B.to(kinds[f"{layer}.B"]), f"{number}/{layer}.A": product.A.to(kinds[f"{layer}.A"])}
        return ArrayRecord(made)

    def _addressed(self, messages: list[Message], grid: Grid, lists: Mapping[str, list[str]]) -> dict[int, _Sent]:
        """Gives each message the arrays of its client, and `lists` in its config; what was sent, by node."""
        nodes = [message.metadata.dst_node_id for message in messages]
        clients = {node: self._client_of(node) for node in nodes} if self._client_of else self._numbered({*grid.get_node_ids(), *nodes})
        _check_clients({node: clients[node] for node in nodes})
        sent: dict[int, _Sent] = {}
        made: dict[int, tuple[Broadcast, Tensors, dict[str, ArrayRecord]]] = {}
        for node, message in zip(nodes, messages, strict=True):
            broadcast = self._broadcast(clients[node])
            if id(broadcast) not in made:  # one object for all clients of a kind, translated once
                tensors = self._theirs(broadcast)
                delta = {"base_delta": self._delta(broadcast)} if self._sends_delta else {}
                made[id(broadcast)] = (broadcast, tensors, {self.arrayrecord_key: ArrayRecord(tensors)} | delta)
            _, tensors, records = made[id(broadcast)]
            config = ConfigRecord({**message.content.config_records[self.configrecord_key], **lists})
            message.content = RecordDict({**records, self.configrecord_key: config})
            sent[node] = _Sent(clients[node], message, tensors, records[self.arrayrecord_key])
        return sent

    def _numbered(self, nodes: Set[int]) -> Mapping[int, int]:
        """Each node's number, for good: new ones get the next, in order of their ids."""
        for node in sorted(nodes - self._seen.keys()):
            self._seen[node] = len(self._seen)
        return self._seen

    def _updates(self, sent: Mapping[int, _Sent], replies: list[Message], traffic: Traffic, good: list[RecordDict]) -> Iterator[Update]:
        """Updates in client order, not in that of arrival, read one at a time; their replies go into `good`, all else is a fault."""
        ids = {one.message.metadata.message_id: node for node, one in sent.items() if one.message.metadata.message_id}
        came: dict[int, Message] = {}
        for reply in replies:  # by message, not by source: the error of a dead node comes from the server's own id
            came.setdefault(ids.get(reply.metadata.reply_to_message_id, reply.metadata.src_node_id), reply)
        for node, one in sorted(sent.items(), key=lambda item: item[1].client):
            if node not in came:
                traffic.fault(one.client, "no answer")
            elif came[node].has_error():
                traffic.fault(one.client, came[node].error.reason or f"error {came[node].error.code}")
            else:
                try:
                    update = self._update(one, came[node].content)
                except (ValueError, TypeError, OverflowError, MemoryError) as fault:
                    traffic.fault(one.client, str(fault))
                    continue
                good.append(came[node].content)
                yield update
        nodes = {one.client: node for node, one in sent.items()}
        for bad in traffic.faults:
            LOG.warning("node %d (client %d): %s", nodes[bad.client], bad.client, bad.reason)
        LOG.info("aggregate_train: %d good replies, %d faults", len(good), len(traffic.faults))
        if not good:
            raise _NoAnswer

    def _update(self, one: _Sent, content: RecordDict) -> Update:
        """What the round shares of a reply, checked against what this client was sent. Raises `ValueError` for all else."""
        phase, names = self.strategy.phase(self.round), self._words.names
        arrays, metrics = content.array_records.get(self.arrayrecord_key), list(content.metric_records.values())
        weight = metrics[0].get(self.weighted_by_key) if len(metrics) == 1 else None
        if arrays is None or not isinstance(weight, int | float):
            raise ValueError(
                f"its reply needs an ArrayRecord {self.arrayrecord_key!r} and one MetricRecord with a number {self.weighted_by_key!r}"
            )

        def shares(name: str) -> bool:
            return name not in names or phase.shares(names[name])  # one that nobody knows is not dropped, but a fault

        frozen = [name for name in arrays if name in names and not phase.trains(names[name])]
        if moved := [name for name in frozen if arrays[name].data != one.arrays[name].data]:
            LOG.warning('client %d changed %s, which this round freezes; a client trains what "fedpeft.trains" lists', one.client, moved[0])
        tensors = {name: _decoded(array) for name, array in arrays.items() if shares(name)}
        good = checked(Update(one.client, tensors, float(weight)), Broadcast(one.tensors), shares, equal=True)
        return replace(good, tensors=self._words.ours(good.tensors))

    def _metrics(self, good: list[RecordDict]) -> MetricRecord:
        """The stock mean, which needs the same names of all."""
        forms = {
            frozenset((name, len(value) if isinstance(value, list) else None) for name, value in record.items())
            for content in good
            for record in content.metric_records.values()
        }
        if len(forms) == 1:
            return self.train_metrics_aggr_fn(good, self.weighted_by_key)
        LOG.warning("aggregate_train: clients report different metrics, which are not averaged")
        return MetricRecord()


def _check_plain(strategy: Strategy[S], round: int, phase: Phase) -> None:
    """Raises `ValueError` for a phase that asks more of a client than to train and to share some arrays."""
    asked = {
        f"put an adapter of the strategy's own ({phase.adapter}) on its model": phase.adapter != "main",
        "take one gradient of all its data in place of training": phase.work == "gradient",
        "say how far a step moves each tensor": phase.rates,
        "add a term to its training loss": phase.loss is not None,
        "compute what it sends from where it started and ended": phase.finish is not None,
        "keep tensors of its own between rounds": phase.keeps is not nothing,
    }
    if wants := [what for what, is_asked in asked.items() if is_asked]:
        raise ValueError(
            f"a plain Flower ClientApp cannot run this strategy ({type(strategy).__name__}): in round {round} a client has to "
            f"{' and '.join(wants)}; {OURS}"
        )


def _check_names(names: Mapping[str, str], tensors: Tensors) -> None:
    """Raises `ValueError` for names, of theirs to ours, that cannot be told apart or mean something else here."""
    if len(set(names.values())) < len(names):
        twice = sorted(theirs for theirs, ours in names.items() if list(names.values()).count(ours) > 1)
        raise ValueError(f"names= calls {_few(twice)} by one name; send each array once, as peft.get_peft_model_state_dict gives them")
    for theirs, ours in names.items():
        if is_own(theirs) or is_own(ours):
            raise ValueError(f"the array {theirs} has a slash in its name, which here means a strategy's own; rename it")
        if is_factor(ours) and tensors[theirs].dim() < 2:
            raise ValueError(
                f"the array {theirs} is a factor by its name ({ours}) and no matrix; rename it, or give names=peft_names(scale)"
            )


def _check_clients(clients: Mapping[int, int]) -> None:
    """Raises `ValueError` unless every node is a client of its own."""
    if len(set(clients.values())) < len(clients) or any(type(client) is not int or client < 0 for client in clients.values()):
        raise ValueError(
            f"client_of= makes of nodes the clients {dict(sorted(clients.items()))}; needed is for each its own index, from 0 on"
        )


def _decoded(array: Array) -> Tensor:
    """The tensor in the npy bytes, and only in these: no pickle, no archive. Raises `ValueError` or what numpy raises for garbage."""
    if array.stype != "numpy.ndarray":
        raise ValueError(f"an array is of the kind {array.stype!r}, needed is numpy.ndarray (ArrayRecord.from_torch_state_dict)")
    return torch.from_numpy(np.lib.format.read_array(BytesIO(array.data), allow_pickle=False))


def _few(names: Iterable[str], most: int = 3) -> str:
    listed = sorted(names)
    return ", ".join(listed[:most]) + (" ..." if len(listed) > most else "")
