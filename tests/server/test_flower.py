"""FlowerStrategy with a plain ClientApp: peft's names, stock records, nothing of fedpeft at the client."""

import logging
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Error, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg as Stock
from plain_app import ALPHA, FIRST, HEAD, NAMES, A, B, Plain, bits, change, of, said, start

from fedpeft.simulation import InProcessGrid
from fedpeft.strategy import Federation, Phase, always
from server.flower import FlowerStrategy, Naming, peft_names
from strategies.fedavg import FedAvg
from strategies.fedex import fedex
from strategies.fedopt import FedOpt
from strategies.fedsvd import fedsvd
from strategies.ffa import ffa_lora
from strategies.flexlora import flexlora
from strategies.hetlora import hetlora
from strategies.lora_fair import lora_fair
from strategies.rolora import rolora
from strategies.slora import slora

pytestmark = pytest.mark.fast


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    """Flower's logger does not propagate everywhere; faults are read from it."""
    caplog.set_level(logging.INFO, logger="flwr")
    logging.getLogger("flwr").propagate = True


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
