"""FlowerStrategy: what comes back, how Flower drives a round, what is refused."""

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping
from plain_app import FIRST, HEAD, A, B, Plain, Spoil, bits, change, model, of, said, start

from fedpeft.aggregate import median
from fedpeft.lowrank import LowRank
from fedpeft.messages import Broadcast
from fedpeft.simulation import InProcessGrid
from fedpeft.strategy import Federation, Phase, always
from fedpeft.tensors import is_a, nothing
from server.flower import FlowerStrategy, Naming
from strategies.fed_sb import fed_sb
from strategies.fedavg import FedAvg
from strategies.fedex import fedex
from strategies.fedopt import FedOpt
from strategies.fedprox import fedprox
from strategies.fedrot import fedrot
from strategies.fedsa import fedsa_lora
from strategies.ffa import ffa_lora
from strategies.flexlora import flexlora
from strategies.flora import flora
from strategies.florist import florist
from strategies.hetlora import hetlora
from strategies.ravan import ravan
from strategies.rolora import rolora
from strategies.scaffold import scaffold
from strategies.slora import slora

pytestmark = pytest.mark.fast


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    """Flower's logger does not propagate everywhere; faults are read from it."""
    caplog.set_level(logging.INFO, logger="flwr")
    logging.getLogger("flwr").propagate = True


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
