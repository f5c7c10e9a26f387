"""FlowerStrategy with a plain ClientApp: peft's names, stock records, nothing of fedpeft at the client."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import peft
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping
from flwr.serverapp.strategy import FedAvg as Stock
from torch import nn

from fedpeft.aggregate import median
from fedpeft.lowrank import LowRank
from fedpeft.messages import Broadcast
from fedpeft.simulation import InProcessGrid
from fedpeft.strategy import Federation, Phase, always
from fedpeft.tensors import is_a, nothing
from server.flower import FlowerStrategy, Naming, peft_names
from strategies.fed_sb import fed_sb
from strategies.fedavg import FedAvg
from strategies.fedex import fedex
from strategies.fedopt import FedOpt
from strategies.fedprox import fedprox
from strategies.fedrot import fedrot
from strategies.fedsa import fedsa_lora
from strategies.fedsvd import fedsvd
from strategies.ffa import ffa_lora
from strategies.flexlora import flexlora
from strategies.flora import flora
from strategies.florist import florist
from strategies.hetlora import hetlora
from strategies.lora_fair import lora_fair
from strategies.ravan import ravan
from strategies.rolora import rolora
from strategies.scaffold import scaffold
from strategies.slora import slora

pytestmark = pytest.mark.fast

FIRST = InProcessGrid.FIRST
ALPHA = 3.0  # so that no scale is a power of two: bits would hide a mistake
A, B = "base_model.model.q.lora_A.weight", "base_model.model.q.lora_B.weight"
HEAD = "base_model.model.classifier.weight"
NAMES = peft_names(lambda rank: ALPHA / rank)


# A plain Flower app, as its user writes it


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.classifier = nn.Linear(7, 6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(torch.tanh(self.q(x)))


def model(rank: int = 4) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = peft.LoraConfig(r=rank, lora_alpha=ALPHA, target_modules=["q"], modules_to_save=["classifier"])
        return peft.get_peft_model(Tiny(), config)


def start(rank: int = 4, seed: int = 1) -> ArrayRecord:
    """As a user's server has it; B is not zero, so that products count from the first round on."""
    rng = torch.Generator().manual_seed(seed)
    state = peft.get_peft_model_state_dict(model(rank))
    return ArrayRecord({name: torch.randn(tensor.shape, generator=rng) for name, tensor in state.items()})


Spoil = Callable[[Message, RecordDict], RecordDict | Error]


@dataclass
class Plain:
    """A federation of plain clients; the client at partition k has k + 1 examples and trains on them for three steps."""

    nodes: int = 3
    spoil: dict[int, Spoil] = field(default_factory=dict)  # partition -> what becomes of its reply
    order: Callable[[Sequence[Message]], Sequence[Message]] = list  # stock sampling draws the nodes in any order: here they are sorted
    honours: bool = True  # what the config says to train
    sent: list[tuple[int, RecordDict]] = field(default_factory=list)  # (partition, content) of training messages
    replies: list[tuple[int, RecordDict]] = field(default_factory=list)
    judged: list[tuple[int, RecordDict]] = field(default_factory=list)

    def grid(self) -> InProcessGrid:
        app = self.app()

        def serve(messages: Sequence[Message]) -> Iterator[Message]:
            for message in self.order(sorted(messages, key=lambda message: message.metadata.dst_node_id)):
                node = message.metadata.dst_node_id
                yield app(message, Context(1, node, {"partition-id": node - FIRST}, RecordDict(), {}))

        return InProcessGrid(serve, self.nodes)

    def app(self) -> ClientApp:
        app = ClientApp()

        @app.train()
        def train(message: Message, context: Context) -> Message:
            part = int(context.node_config["partition-id"])
            self.sent.append((part, message.content))
            here = self.trained(part, message.content)
            arrays = ArrayRecord(peft.get_peft_model_state_dict(here))
            content: RecordDict | Error = RecordDict(
                {"arrays": arrays, "metrics": MetricRecord({"num-examples": part + 1, "loss": float(part)})}
            )
            if part in self.spoil:
                content = self.spoil[part](message, content)
            if isinstance(content, RecordDict):
                self.replies.append((part, content))
            return Message(content, reply_to=message)

        @app.evaluate()
        def evaluate(message: Message, context: Context) -> Message:
            part = int(context.node_config["partition-id"])
            self.judged.append((part, message.content))
            return Message(RecordDict({"metrics": MetricRecord({"num-examples": part + 1, "loss": float(part)})}), reply_to=message)

        return app

    def trained(self, part: int, content: RecordDict) -> Any:
        state = content["arrays"].to_torch_state_dict()
        here = model(len(state[A]))
        peft.set_peft_model_state_dict(here, state)
        trains = content["config"].get("fedpeft.trains", list(state))
        for name, parameter in here.named_parameters():
            plain = name.replace(".modules_to_save", "").replace(".default", "")
            parameter.requires_grad_(plain in trains or (not self.honours and plain in state))
        rng = torch.Generator().manual_seed(part)
        x, y = torch.randn(part + 1, 7, generator=rng), torch.randint(3, (part + 1,), generator=rng)
        optimizer = torch.optim.SGD([p for p in here.parameters() if p.requires_grad], lr=0.5)
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(here(x), y).backward()
            optimizer.step()
        return here

    def run(self, strategy: Any, rounds: int = 1, arrays: ArrayRecord | None = None) -> Any:
        return strategy.start(self.grid(), start() if arrays is None else arrays, num_rounds=rounds)


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    """Flower's logger does not propagate everywhere; faults are read from it."""
    caplog.set_level(logging.INFO, logger="flwr")
    logging.getLogger("flwr").propagate = True


def of(strategy: Any, **more: Any) -> FlowerStrategy[Any]:
    return FlowerStrategy(strategy, **{"names": NAMES, "min_train_nodes": 1, "min_evaluate_nodes": 1, "min_available_nodes": 1} | more)


def change(record: ArrayRecord) -> torch.Tensor:
    """What the adapter does to q: s B A, in float64."""
    state = record.to_torch_state_dict()
    return ALPHA / len(state[A]) * state[B].double() @ state[A].double()


def bits(record: ArrayRecord) -> dict[str, bytes]:
    return {name: array.data for name, array in record.items()}


def said(caplog: pytest.LogCaptureFixture, level: int = logging.WARNING) -> str:
    return "\n".join(record.getMessage() for record in caplog.records if record.levelno >= level)


# Names


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (A, "q.A"),
        (B, "q.B"),
        ("base_model.model.h.0.attn.q.lora_A.default.weight", "h.0.attn.q.A"),
        ("base_model.model.emb.lora_embedding_A", "emb.A"),
        ("base_model.model.emb.lora_embedding_B.default", "emb.B"),
        ("base_model.model.q.lora_magnitude_vector", "q.magnitude"),
        ("base_model.model.q.lora_magnitude_vector.default.weight", "q.magnitude"),
        (HEAD, "head.classifier.weight"),
        ("base_model.model.q.lora_B.bias", "head.q.lora_B.bias"),
        ("base_model.model.q.base_layer.bias", "head.q.base_layer.bias"),
    ],
)
def test_a_name_of_peft_has_a_canonical_name(theirs, ours):
    assert NAMES.ours(theirs) == ours


def test_every_array_of_a_peft_model_comes_back_under_its_name_in_its_place_with_its_bits():
    """Frozen or not: float64 between float32 and float32 forgets nothing, whatever the scale."""
    still = FedAvg(always(Phase(shares=lambda name: name == "head.classifier.bias")))
    begin = start()
    result = Plain().run(of(still), arrays=begin)
    assert list(result.arrays) == list(begin)
    for name in begin:
        assert (result.arrays[name] == begin[name]) == (name != "base_model.model.classifier.bias")


@pytest.mark.parametrize("scale", [0.75, {"q": 0.75}, lambda rank: ALPHA / rank])
def test_the_scale_is_a_number_one_of_a_layer_or_a_function_of_the_rank(scale):
    seen = []

    class Sees(FedAvg):
        def init(self, starts):
            seen.append(starts["main"])
            return super().init(starts)

    Plain().run(of(Sees(), names=peft_names(scale)))
    assert torch.equal(seen[0]["q.B"], 0.75 * start().to_torch_state_dict()[B].double())
    assert torch.equal(seen[0]["q.A"], start().to_torch_state_dict()[A].double())


@pytest.mark.parametrize(("scale", "words"), [({"k": 1.0}, "no scale for the layer q; there are scales for k"), (0.0, "scale of q is 0")])
def test_a_scale_that_cannot_be_is_an_error(scale, words):
    with pytest.raises(ValueError, match=words):
        Plain().run(of(FedAvg(), names=peft_names(scale)))


@pytest.mark.parametrize(
    ("arrays", "names", "words"),
    [
        ({A: torch.ones(2, 3), A.replace("weight", "default.weight"): torch.ones(2, 3)}, NAMES, "calls .*lora_A.* by one name"),
        ({"a/b": torch.ones(2)}, Naming(), "a/b has a slash"),
        ({"q.B": torch.ones(2)}, Naming(), "q.B is a factor by its name"),
    ],
)
def test_names_that_mean_two_things_are_an_error(arrays, names, words):
    with pytest.raises(ValueError, match=words):
        Plain().run(of(FedAvg(), names=names), arrays=ArrayRecord(arrays))


def test_low_rank_strategies_refuse_arrays_without_pairs_by_name():
    with pytest.raises(ValueError, match="the adapter has none"):
        Plain().run(of(flexlora(Federation()), names=Naming()))  # peft's names are not ours


# Strategies


def test_fedavg_is_flowers_fedavg():
    ours, theirs = Plain(), Plain()
    mine = ours.run(of(FedAvg(), names=peft_names(0.75)), rounds=3)
    stock = theirs.run(Stock(min_train_nodes=1), rounds=3)
    assert list(mine.arrays) == list(stock.arrays)
    for name, array in mine.arrays.items():
        assert array.dtype == stock.arrays[name].dtype
        assert np.allclose(array.numpy(), stock.arrays[name].numpy(), rtol=0, atol=1e-6)
        assert np.abs(array.numpy() - start()[name].numpy()).max() > 1e-3
    for round in (1, 2, 3):
        counts = {"fedpeft.answers": 3, "fedpeft.faults": 0}
        assert dict(mine.train_metrics_clientapp[round]) == dict(stock.train_metrics_clientapp[round]) | counts
        assert mine.evaluate_metrics_clientapp[round] == stock.evaluate_metrics_clientapp[round]


def test_our_own_names_need_no_translation():
    """A user whose arrays are called as here, and whose client adds its node's number to each."""

    def serve(messages: Sequence[Message]) -> Iterator[Message]:
        for message in messages:
            node = message.metadata.dst_node_id
            arrays = {name: tensor + node for name, tensor in message.content["arrays"].to_torch_state_dict().items()}
            yield Message(RecordDict({"arrays": ArrayRecord(arrays), "m": MetricRecord({"num-examples": node})}), reply_to=message)

    begin = {"q.A": torch.ones(2, 3), "q.B": torch.zeros(4, 2), "steps": torch.tensor(3)}
    strategy = FlowerStrategy(FedAvg(), fraction_evaluate=0.0)
    found = strategy.start(InProcessGrid(serve, 2), ArrayRecord(begin), num_rounds=1).arrays.to_torch_state_dict()
    assert torch.allclose(found["q.A"], torch.full((2, 3), 1 + 13 / 5))  # (2 * 2 + 3 * 3) / 5
    assert found["steps"] == 5  # an int64 stays one
    assert found["steps"].dtype == torch.int64


def test_a_smaller_rank_than_was_sent_is_a_fault_under_our_own_names_too(caplog):
    def serve(messages: Sequence[Message]) -> Iterator[Message]:
        for message in messages:
            arrays = ArrayRecord({"q.A": torch.ones(1, 3), "q.B": torch.ones(4, 1)})
            yield Message(RecordDict({"arrays": arrays, "m": MetricRecord({"num-examples": 1})}), reply_to=message)

    begin = ArrayRecord({"q.A": torch.ones(2, 3), "q.B": torch.zeros(4, 2)})
    FlowerStrategy(fedex(), base_delta="send", fraction_evaluate=0.0).start(InProcessGrid(serve, 2), begin, num_rounds=1)
    assert "q.A is (1, 3) torch.float32, sent was (2, 3)" in said(caplog)


def test_flexlora_gives_the_best_approximation_of_the_mean_product():
    plain = Plain()
    result = plain.run(of(flexlora(Federation())))
    mean = sum((part + 1) / 6 * change(content["arrays"]) for part, content in plain.replies)
    u, s, vt = torch.linalg.svd(mean)
    assert float(s[4]) > 1e-3  # the truncation cuts something off
    assert torch.allclose(change(result.arrays), (u[:, :4] * s[:4]) @ vt[:4], atol=1e-6)


def test_rolora_alternates_and_what_is_frozen_keeps_its_bits(caplog):
    plain, begin = Plain(), start()
    strategy = of(rolora())
    rounds = [begin]
    result = plain.run(strategy, rounds=3, arrays=begin)
    for part, content in plain.sent:
        if part == 0:
            rounds.append(content["arrays"])
    rounds = [*rounds[1:], result.arrays]
    for round, frozen in enumerate((A, B, A)):
        for part, content in plain.sent[3 * round : 3 * round + 3]:
            assert content["config"]["server-round"] == round + 1, part
            assert content["config"]["fedpeft.trains"] == content["config"]["fedpeft.shares"] == [n for n in begin if n != frozen]
        now, after = bits(rounds[round]), bits(rounds[round + 1])
        assert [name for name in begin if now[name] == after[name]] == [frozen]
    assert said(caplog) == ""  # nobody is said to have trained it


def test_ffa_never_moves_a_and_averages_products_exactly():
    plain, begin = Plain(), start()
    result = plain.run(of(ffa_lora()), rounds=2, arrays=begin)
    assert result.arrays[A] == begin[A]
    mean = sum((part + 1) / 6 * change(content["arrays"]) for part, content in plain.replies[3:])
    assert torch.allclose(change(result.arrays), mean, atol=1e-6)


def test_a_client_that_trains_what_is_frozen_is_named_and_its_frozen_arrays_are_not_taken(caplog):
    plain, begin = Plain(honours=False), start()
    result = plain.run(of(ffa_lora()), arrays=begin)
    assert result.arrays[A] == begin[A]
    assert f"client 0 changed {A}, which this round freezes" in said(caplog)


def test_clients_of_mixed_ranks_are_sent_their_rank_and_evaluated_with_it():
    ranks = (1, 2, 4)
    plain = Plain()
    result = plain.run(of(flexlora(Federation(clients=3, ranks=ranks))), rounds=2)
    for part, content in plain.sent + plain.judged:
        assert content["arrays"][A].shape == (ranks[part], 7)
        assert content["arrays"][B].shape == (6, ranks[part])
    assert result.arrays[A].shape == (4, 7)
    mean = sum((part + 1) / 6 * change(content["arrays"]) for part, content in plain.replies[3:])
    u, s, vt = torch.linalg.svd(mean)
    assert torch.allclose(change(result.arrays), (u[:, :4] * s[:4]) @ vt[:4], atol=1e-6)
    u, s, vt = torch.linalg.svd(change(result.arrays))
    judged = dict(plain.judged[3:])[0]["arrays"]
    assert torch.allclose(change(judged), s[0] * u[:, :1] @ vt[:1], atol=1e-6)  # its scale is alpha / 1


def test_hetlora_without_pruning_mixes_ranks():
    plain = Plain()
    result = plain.run(of(hetlora(Federation(clients=3, ranks=(1, 2, 4)), penalty=0.0, weights="examples", rankwise=True)), rounds=2)
    assert [content["arrays"][A].shape[0] for _, content in plain.sent] == [1, 2, 4] * 2
    assert result.train_metrics_clientapp[2]["fedpeft.faults"] == 0


@pytest.mark.parametrize("strategy", [fedsvd(), lora_fair(), FedOpt(), flexlora(Federation()), slora(Federation(), share=0.0)])
def test_every_strategy_that_asks_no_more_of_a_client_runs(strategy):
    result = Plain().run(of(strategy), rounds=2)
    assert result.train_metrics_clientapp[2]["fedpeft.answers"] == 3
    assert all(np.isfinite(array.numpy()).all() for array in result.arrays.values())


# Which node is which client


def test_client_of_says_which_rank_a_node_has():
    plain = Plain()
    plain.run(of(flexlora(Federation(clients=3, ranks=(1, 2, 4))), client_of=lambda node: FIRST + 2 - node))
    assert {part: content["arrays"][A].shape[0] for part, content in plain.sent} == {0: 4, 1: 2, 2: 1}


def test_a_node_keeps_its_number_when_others_appear():
    """Seen by the rank that each is sent: 1 for client 0, 2 for client 1, ..."""
    nodes, seen = [7, 9], []

    class Grows(InProcessGrid):
        def get_node_ids(self) -> list[int]:
            return nodes

    def serve(messages: Sequence[Message]) -> Iterator[Message]:
        if messages:
            seen.append({message.metadata.dst_node_id: len(message.content["arrays"][A].numpy()) for message in messages})
        nodes[:] = [3, 2, *nodes]
        return (Message(Error(0, "gone"), reply_to=message) for message in messages)

    strategy = of(flexlora(Federation(ranks=(1, 2, 3, 4))), fraction_evaluate=0.0)
    strategy.start(Grows(serve, 2), start(), num_rounds=2)
    assert seen == [{7: 1, 9: 2}, {7: 1, 9: 2, 2: 3, 3: 4}]


@pytest.mark.parametrize("client_of", [lambda node: 0, lambda node: FIRST - 1 - node, lambda node: float(node)])
def test_client_of_gives_each_node_its_own_index(client_of):
    with pytest.raises(ValueError, match="needed is for each its own index, from 0 on"):
        Plain().run(of(FedAvg(), client_of=client_of))


def test_more_nodes_than_ranks_are_an_error_that_says_so():
    with pytest.raises(ValueError, match="knows no client 2; Federation"):
        Plain().run(of(flexlora(Federation(ranks=(2, 4)))))


# Replies


@pytest.mark.parametrize("order", [list, reversed, lambda waiting: [*waiting[1:], waiting[0]]])
def test_updates_come_in_client_order_whoever_was_fast(order):
    seen = []

    class Sees(FedAvg):
        def aggregate(self, state, round, updates, mean):
            return super().aggregate(state, round, (seen.append(update.client) or update for update in updates), mean)

    strategy = of(Sees(), client_of=lambda node: 5 * (FIRST + 2 - node))
    Plain(order=order).run(strategy)
    assert seen == [0, 1, 0, 5, 10]  # the first two are the rehearsal


def answering(**records: Any) -> Spoil:
    """The reply with other records; None takes one away."""

    def spoil(message: Message, content: RecordDict) -> RecordDict:
        return RecordDict({name: record for name, record in ({**content} | records).items() if record is not None})

    return spoil


def with_array(name: str, array: Array | torch.Tensor | None) -> Spoil:
    def spoil(message: Message, content: RecordDict) -> RecordDict:
        kept = {other: held for other, held in content["arrays"].items() if other != name}
        new = {} if array is None else {name: array if isinstance(array, Array) else Array(array)}
        return answering(arrays=ArrayRecord(kept | new))(message, content)

    return spoil


def header(shape: str, dtype: str = "'<f4'") -> Array:
    """An npy array of no data, whatever its header says."""
    text = f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}}}".ljust(117) + "\n"
    return Array("float32", (1,), "numpy.ndarray", b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode())


FAULTS: dict[str, tuple[Spoil, str]] = {
    "an error": (lambda message, content: Error(2, "out of memory"), "out of memory"),
    "an error without words": (lambda message, content: Error(7), "error 7"),
    "no arrays": (answering(arrays=None), "needs an ArrayRecord 'arrays'"),
    "no metrics": (answering(metrics=None), "one MetricRecord"),
    "two kinds of metrics": (answering(more=MetricRecord({"x": 1})), "one MetricRecord"),
    "no number of examples": (answering(metrics=MetricRecord({"loss": 1.0})), "'num-examples'"),
    "a list of examples": (answering(metrics=MetricRecord({"num-examples": [1, 2]})), "'num-examples'"),
    "no examples": (answering(metrics=MetricRecord({"num-examples": 0, "loss": 1.0})), "weight 0"),
    "examples that are no number": (answering(metrics=MetricRecord({"num-examples": float("nan"), "loss": 1.0})), "weight nan"),
    "more examples than can be": (answering(metrics=MetricRecord({"num-examples": 10**400, "loss": 1.0})), "too large"),
    "a missing array": (with_array(B, None), f"missing {B}"),
    "an array it was not sent": (with_array("more", torch.ones(1)), "unasked more"),
    "another shape": (with_array(HEAD, torch.ones(3, 5)), "(3, 5)"),
    "another rank": (with_array(B, torch.ones(6, 2)), "(6, 2)"),
    "another rank of both factors": (
        lambda message, content: with_array(A, torch.ones(2, 7))(message, with_array(B, torch.ones(6, 2))(message, content)),
        "(6, 2)",
    ),
    "another dtype": (with_array(HEAD, torch.ones(3, 6, dtype=torch.float64)), "float64"),
    "a NaN": (with_array(HEAD, torch.full((3, 6), float("nan"))), "not finite"),
    "an array of another library": (with_array(HEAD, Array("float32", (3, 6), "tensorflow", b"")), "tensorflow"),
    "garbage": (with_array(HEAD, Array("float32", (3, 6), "numpy.ndarray", b"garbage")), "magic"),
    "an archive": (with_array(HEAD, Array("float32", (3, 6), "numpy.ndarray", b"PK\x03\x04" + bytes(40))), "magic"),
    "terabytes": (with_array(HEAD, header(f"({1 << 46},)")), ""),
    "a side past 64 bits": (with_array(HEAD, header(f"({1 << 70},)")), ""),
    "objects": (with_array(HEAD, header("(1,)", "'|O'")), "Object arrays"),
    "letters": (with_array(HEAD, header("(0,)", "'<U4'")), "numpy.str_"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_bad_reply_is_a_named_fault_and_the_others_go_on(kind, caplog):
    spoil, words = FAULTS[kind]
    plain = Plain(spoil={1: spoil})
    result = plain.run(of(FedAvg()))
    good = [content for part, content in plain.replies if part != 1]
    mean = sum(part * content["arrays"][HEAD].numpy() for part, content in zip((0.25, 0.75), good, strict=True))
    assert np.allclose(result.arrays[HEAD].numpy(), mean, atol=1e-6)
    assert dict(result.train_metrics_clientapp[1]) == {"loss": 1.5, "fedpeft.answers": 2, "fedpeft.faults": 1}
    (fault,) = [line for line in said(caplog).splitlines() if line.startswith("node")]
    assert fault.startswith("node 3 (client 1): ")
    assert words in fault


def test_an_array_that_is_not_shared_need_not_be_sent_and_is_not_read():
    spoils = {0: with_array(A, None), 1: with_array(A, header("(1,)", "'|O'"))}
    plain = Plain(spoil=spoils)
    assert plain.run(of(ffa_lora())).train_metrics_clientapp[1]["fedpeft.faults"] == 0


def test_a_node_that_never_answers_is_a_fault(caplog):
    plain = Plain(order=lambda waiting: [message for message in waiting if message.metadata.dst_node_id != FIRST])
    assert plain.run(of(FedAvg())).train_metrics_clientapp[1]["fedpeft.faults"] == 1
    assert "node 2 (client 0): no answer" in said(caplog)


def test_the_error_of_a_dead_node_comes_from_the_servers_own_id_and_is_laid_to_the_node(caplog):
    def dead(message: Message, content: RecordDict) -> Error:
        message.metadata.dst_node_id = 1
        return Error(5, "node is gone")

    Plain(spoil={2: dead}).run(of(FedAvg()))
    assert "node 4 (client 2): node is gone" in said(caplog)


def test_of_two_replies_of_one_node_the_first_counts():
    plain = Plain()
    grid = plain.grid()
    strategy = of(FedAvg())
    once = list(grid.send_and_receive(strategy.configure_train(1, start(), ConfigRecord(), grid)))
    later = [Message(answering(metrics=MetricRecord({"num-examples": 99, "loss": 9.0}))(one, one.content), reply_to=one) for one in once]
    for first, second in zip(once, later, strict=True):
        second.metadata.__dict__["_src_node_id"] = first.metadata.src_node_id
        second.metadata.__dict__["_reply_to_message_id"] = first.metadata.reply_to_message_id
    _, metrics = strategy.aggregate_train(1, [*once, *later])
    assert dict(metrics) == {"loss": pytest.approx(4 / 3), "fedpeft.answers": 3, "fedpeft.faults": 0}


def test_a_round_without_a_good_reply_leaves_the_model_and_the_phase_as_they_are(caplog):
    failing = {part: answering(arrays=None) for part in range(3)}
    plain = Plain(spoil=dict(failing))
    strategy, begin = of(rolora()), start()
    grid = plain.grid()
    strategy.configure_train(1, begin, ConfigRecord(), grid)
    replies = grid.send_and_receive(strategy.configure_train(1, begin, ConfigRecord(), grid))
    arrays, metrics = strategy.aggregate_train(1, replies)
    assert arrays is None
    assert dict(metrics) == {"fedpeft.answers": 0, "fedpeft.faults": 3}
    assert strategy.round == 0
    assert "the model stays as it is" in said(caplog)
    plain.spoil.clear()
    messages = list(strategy.configure_train(2, begin, ConfigRecord(), grid))
    assert messages[0].content["arrays"] == begin
    assert A not in messages[0].content["config"]["fedpeft.trains"]  # round 0 of RoLoRA again
    strategy.aggregate_train(2, grid.send_and_receive(messages))
    assert strategy.round == 1


def test_metrics_that_differ_between_clients_are_not_averaged_and_the_arrays_are(caplog):
    plain = Plain(spoil={1: answering(metrics=MetricRecord({"num-examples": 2}))})
    assert dict(plain.run(of(FedAvg())).train_metrics_clientapp[1]) == {"fedpeft.answers": 3, "fedpeft.faults": 0}
    assert "clients report different metrics" in said(caplog)


def test_the_users_own_mean_of_metrics_is_called():
    strategy = of(FedAvg(), train_metrics_aggr_fn=lambda contents, key: MetricRecord({"many": len(contents)}))
    assert Plain().run(strategy).train_metrics_clientapp[1]["many"] == 3


# The round as Flower drives it


def test_the_users_config_reaches_the_clients_and_is_not_written_to():
    plain = Plain()
    config = ConfigRecord({"lr": 0.1})
    of(FedAvg()).start(plain.grid(), start(), num_rounds=1, train_config=config)
    assert plain.sent[0][1]["config"]["lr"] == 0.1
    assert set(config) == {"lr", "server-round"}  # as stock FedAvg leaves it


def test_keys_of_records_and_weights_can_be_others():
    def serve(messages: Sequence[Message]) -> Iterator[Message]:
        for message in messages:
            node = message.metadata.dst_node_id
            assert set(message.content) == {"model", "how"}
            arrays = {name: tensor + node for name, tensor in message.content["model"].to_torch_state_dict().items()}
            yield Message(RecordDict({"model": ArrayRecord(arrays), "m": MetricRecord({"n": node})}), reply_to=message)

    strategy = FlowerStrategy(FedAvg(), fraction_evaluate=0.0, arrayrecord_key="model", configrecord_key="how", weighted_by_key="n")
    found = strategy.start(InProcessGrid(serve, 2), ArrayRecord({"w": torch.zeros(1)}), num_rounds=1)
    assert found.arrays["w"].numpy() == pytest.approx(13 / 5)


def test_only_a_share_of_the_nodes_is_drawn_and_none_if_none_is_asked():
    plain = Plain(nodes=8)
    result = plain.run(of(FedAvg(), fraction_train=0.5, fraction_evaluate=0.25))
    assert (len(plain.sent), len(plain.judged)) == (4, 2)
    assert result.train_metrics_clientapp[1]["fedpeft.answers"] == 4
    idle = Plain()
    assert idle.run(of(FedAvg(), fraction_train=0.0, fraction_evaluate=0.0)).train_metrics_clientapp == {}
    assert idle.sent == idle.judged == []


def test_a_strategy_begins_anew_with_every_start():
    strategy = of(FedOpt("momentum"))
    first = Plain().run(strategy, rounds=2)
    assert strategy.round == 2
    assert bits(Plain().run(strategy, rounds=2).arrays) == bits(first.arrays)


def test_arrays_that_something_changed_between_rounds_are_an_error():
    """Else the noise of Flower's differential privacy would be dropped, and the model sent without."""
    private = DifferentialPrivacyServerSideFixedClipping(of(FedAvg()), 1.0, 1.0, 3)
    with pytest.raises(ValueError, match="not those that FlowerStrategy made"):
        Plain().run(private)


def test_evaluation_may_come_first():
    plain = Plain()
    grid = plain.grid()
    strategy, begin = of(FedAvg()), start()
    messages = list(strategy.configure_evaluate(1, begin, ConfigRecord(), grid))
    assert [message.content["arrays"] == begin for message in messages] == [True] * 3


# Refusals

SGD = Federation(optimizer="sgd")


@pytest.mark.parametrize(
    ("strategy", "words"),
    [
        (fedsa_lora(), "keep tensors of its own between rounds"),
        (hetlora(Federation()), "add a term to its training loss and compute what it sends"),
        (fedprox(), "add a term to its training loss"),
        (fedrot(), "compute what it sends"),
        (fed_sb(Federation()), r"an adapter of the strategy's own \(core\)"),
        (fed_sb(Federation(), start="gradient"), "take one gradient"),
        (slora(Federation()), r"in round 0 .*\(sparse\)"),
        (ravan(), r"\(heads\)"),
        (scaffold(SGD), "how far a step moves each tensor"),
    ],
)
def test_what_a_plain_client_cannot_do_is_refused_at_once_with_the_reason(strategy, words):
    with pytest.raises(ValueError, match=f"plain Flower ClientApp cannot run.*{words}.*`flwr run"):
        FlowerStrategy(strategy)


def test_a_later_round_is_looked_at_too():
    late = FedAvg(lambda round: Phase(work="gradient") if round == 30 else Phase())
    with pytest.raises(ValueError, match="in round 30 a client has to take one gradient"):
        FlowerStrategy(late)


@pytest.mark.parametrize("strategy", [flora(Federation()), fedex(), florist(Federation())])
def test_a_strategy_that_moves_the_base_is_refused_before_a_client_has_worked(strategy):
    plain = Plain()
    with pytest.raises(ValueError, match=r'moves the frozen base.*base_delta="send"'):
        plain.run(of(strategy))
    assert plain.sent == []


def test_a_strategy_with_tensors_of_its_own_is_refused():
    class Own(FedAvg):
        def broadcast(self, state, round, client):
            return Broadcast(state.tensors | {"own/x": torch.ones(1)})

    with pytest.raises(ValueError, match=r"sends other tensors than it was begun with \(own/x\)"):
        Plain().run(of(Own()))


def test_a_phase_that_fits_no_array_is_an_error():
    with pytest.raises(ValueError, match=r"has no array for fedpeft\.trains"):
        Plain().run(of(FedAvg(always(Phase(trains=nothing)))))
    with pytest.raises(ValueError, match=r"has no array for fedpeft\.shares"):
        Plain().run(of(FedAvg(always(Phase(shares=is_a))), names=Naming()))


def test_a_robust_mean_with_a_strategy_of_products_is_refused():
    with pytest.raises(ValueError, match="leave mean=weighted_mean"):
        FlowerStrategy(flexlora(Federation()), mean=median())
    plain = Plain()
    result = plain.run(of(FedAvg(), mean=median()))
    middle = np.median([content["arrays"][HEAD].numpy() for _, content in plain.replies], axis=0)
    assert np.allclose(result.arrays[HEAD].numpy(), middle, atol=1e-7)


def test_a_word_for_base_delta_that_is_none_is_an_error():
    with pytest.raises(ValueError, match="needed is refuse or send"):
        FlowerStrategy(FedAvg(), base_delta="keep")


# Base deltas


@pytest.mark.parametrize("strategy", [flora(Federation()), fedex(), florist(Federation(), energy=1.0)])
def test_base_deltas_go_to_clients_who_add_them_and_the_model_is_the_mean_of_theirs(strategy):
    """What a client of the next round computes with, s B A and all of base_delta, is the mean of what the clients ended with."""

    def whole(content: RecordDict | dict[str, ArrayRecord], arrays: ArrayRecord) -> torch.Tensor:
        held = content["base_delta"].to_torch_state_dict()
        chunks = {name.removesuffix("/q.B") for name in held if name.endswith("/q.B")}
        assert {name for chunk in chunks for name in (f"{chunk}/q.A", f"{chunk}/q.B")} == set(held)
        moved = sum((held[f"{chunk}/q.B"].double() @ held[f"{chunk}/q.A"].double() for chunk in chunks), torch.zeros(6, 7).double())
        return change(arrays) + moved

    plain = Plain()
    flower = of(strategy, base_delta="send")
    assert len(flower.base_delta) == 0
    result = plain.run(flower, rounds=2)
    assert len(plain.sent[0][1]["base_delta"]) == 0
    assert len(plain.sent[3][1]["base_delta"]) > 0
    ended = [whole(sent, back["arrays"]) for (_, sent), (_, back) in zip(plain.sent[3:], plain.replies[3:], strict=True)]
    mean = sum((part + 1) / 6 * end for part, end in enumerate(ended))
    assert torch.allclose(whole({"base_delta": flower.base_delta}, result.arrays), mean, atol=1e-5)
    last = plain.judged[-1][1]
    assert torch.allclose(whole(last, last["arrays"]), mean, atol=1e-5)
    assert {array.dtype for array in flower.base_delta.values()} == {"float32"}


def test_a_layer_of_base_delta_is_called_as_its_module():
    flower = of(flora(Federation()), base_delta="send")
    Plain().run(flower)
    assert set(flower.base_delta) == {"0/q.A", "0/q.B"}
    base = dict(model().get_base_model().named_modules())
    pair = {name: array.numpy() for name, array in flower.base_delta.items()}
    product = LowRank(torch.tensor(pair["0/q.B"]), torch.tensor(pair["0/q.A"]))
    assert product.shape == base["q"].weight.shape
