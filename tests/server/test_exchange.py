import weakref

import pytest
import torch
from flwr.app import ConfigRecord, Error, Message, RecordDict

from fedpeft.codecs.base import Payload
from fedpeft.codecs.raw import Half, Raw
from fedpeft.codecs.ternary import Ternary
from fedpeft.codecs.topk import TopK
from fedpeft.config import ConfigError
from fedpeft.lowrank import LowRank
from fedpeft.messages import Broadcast
from fedpeft.records import digested, to_records
from fedpeft.simulation import InProcessGrid
from server.exchange import Traffic, connect
from server.stream import Stream
from strategies.fedavg import FedAvg
from strategies.ffa import ffa_lora

pytestmark = pytest.mark.fast


def sizes(log) -> dict[int, list[int]]:
    """Bytes of the data of every payload, by client."""
    made: dict[int, list[int]] = {}
    for client, payload in log:
        made.setdefault(client, []).append(len(payload.data))
    return made


def everyone(broadcast, clients=(0, 1, 2)):
    return dict.fromkeys(clients, broadcast)


# Who is who


def test_nodes_are_asked_which_client_they_are(clients, joined, start):
    serve = clients(FedAvg(), indices=lambda node: 4 - node)  # nodes 2, 3, 4 are clients 2, 1, 0
    exchange = joined(serve, 3)
    assert exchange.nodes == {0: 4, 1: 3, 2: 2}
    updates = list(exchange.train(0, everyone(Broadcast(start)), Traffic()))
    assert [(update.client, update.weight) for update in updates] == [(0, 1), (1, 2), (2, 3)]


def test_two_nodes_that_are_the_same_client_are_a_fault_of_the_setup(clients, joined):
    with pytest.raises(ConfigError, match="two nodes say they are client 0; give each node its own partition-id"):
        joined(clients(FedAvg(), indices=lambda node: 0), 2)


@pytest.mark.parametrize("said", ["zero", 1.5])
def test_a_client_index_that_is_no_whole_number_is_a_fault_of_the_setup(clients, joined, said):
    with pytest.raises(ConfigError, match=f"client {said!r}"):
        joined(clients(FedAvg(), indices=lambda node: said), 2)


def test_a_client_that_is_missing_is_named(clients, joined):
    with pytest.raises(ConfigError, match="client 1 "):
        joined(clients(FedAvg(), indices=lambda node: 2 * (node - InProcessGrid.FIRST)), 3)  # 0, 2, 4


def test_a_node_that_fails_its_first_message_is_missing_with_its_reason():
    def serve(messages):
        for message in messages:
            if message.metadata.dst_node_id == 3:
                yield Message(Error(1, "no such data.path"), reply_to=message)
            else:
                yield Message(RecordDict({"facts": ConfigRecord({"client": 0})}), reply_to=message)

    with pytest.raises(ConfigError, match=r"client 1 .*no such data\.path"):
        connect(InProcessGrid(serve, 2), Raw(), 2)


def test_a_node_of_another_program_is_a_fault_of_the_setup_and_no_crash():
    def serve(messages):
        return (Message(RecordDict(), reply_to=message) for message in messages)

    with pytest.raises(ConfigError, match="client"):
        connect(InProcessGrid(serve, 2), Raw(), 2)


def test_too_few_nodes_are_waited_for_and_then_a_fault(clients):
    with pytest.raises(ConfigError, match="2 nodes are connected, clients=3 are needed"):
        connect(InProcessGrid(clients(FedAvg()), 2), Raw(), 3, patience=-1.0)


def test_nodes_beyond_the_clients_are_left_alone(clients, start):
    serve = clients(FedAvg())
    exchange = connect(InProcessGrid(serve, 5), Raw(), 3)
    assert sorted(exchange.nodes) == [0, 1, 2]


# Updates


def test_updates_come_in_client_order_whoever_was_fast(clients, joined, start):
    for order in (list, reversed, lambda messages: messages[1:] + messages[:1]):
        exchange = joined(clients(FedAvg(), order=lambda messages, order=order: list(order(list(messages)))), 3)
        assert [update.client for update in exchange.train(0, everyone(Broadcast(start)), Traffic())] == [0, 1, 2]


def test_an_update_carries_values_weight_and_metrics(clients, joined, start):
    (update,) = joined(clients(FedAvg()), 3).train(0, {2: Broadcast(start)}, Traffic())
    assert torch.equal(update.tensors["q.A"], start["q.A"] + 0.25)
    assert update.weight == 3
    assert update.metrics == {"loss": 2.0, "accuracy": 0.2}


def test_a_lossy_codec_is_undone_at_the_server(clients, joined, start):
    far = {name: tensor + 1000 for name, tensor in start.items()}
    (update,) = joined(clients(FedAvg(), codec=Half("bf16")), 1).train(0, {0: Broadcast(far)}, Traffic())
    for name, tensor in far.items():  # the difference is 0.5 within the grain of float32 at 1000, and bf16 rounds that by 2^-8
        assert torch.allclose(update.tensors[name], tensor + 0.5, rtol=0, atol=2**-8)


def test_only_the_clients_asked_for_are_asked(clients, joined, start):
    serve = clients(FedAvg())
    exchange = joined(serve, 4)
    assert [update.client for update in exchange.train(0, everyone(Broadcast(start), (1, 3)), Traffic())] == [1, 3]
    assert [client for client, _ in serve.down] == [1, 3]


def test_updates_are_decoded_one_at_a_time(clients, joined, start):
    alive: list[weakref.ref] = []
    for update in joined(clients(FedAvg()), 6).train(0, everyone(Broadcast(start), range(6)), Traffic()):
        assert sum(one() is not None for one in alive) <= 1  # the one before, which this loop let go a moment ago
        alive.append(weakref.ref(update))


# What is held is not sent


def test_what_a_client_holds_is_not_sent_again(clients, joined, start):
    """FFA's A goes down once to each client, however often it takes part."""
    strategy = ffa_lora()
    serve = clients(strategy)
    exchange = joined(serve, 3)
    a, moving = start["q.A"].nbytes, start["q.B"].nbytes + start["head.bias"].nbytes
    state = Broadcast(start)
    for round, cohort in enumerate([(0, 1), (0, 2), (0, 1, 2)]):
        updates = list(exchange.train(round, everyone(state, cohort), Traffic()))
        state = Broadcast(state.tensors | updates[0].tensors)
    assert sizes(serve.down) == {0: [a + moving, moving, moving], 1: [a + moving, moving], 2: [a + moving, moving]}


def test_a_chunk_of_base_delta_is_sent_once(clients, joined):
    serve = clients(FedAvg())
    exchange = joined(serve, 1)
    chunks = [{"q": LowRank(torch.full((4, 1), float(k)), torch.ones(1, 5))} for k in range(3)]
    for round in range(3):
        list(exchange.train(round, {0: Broadcast({"head.bias": torch.full((3,), float(round))}, tuple(chunks[: round + 1]))}, Traffic()))
    one, head = (4 + 5) * 4, 3 * 4
    assert sizes(serve.down) == {0: [one + head, one + head - 20, one + head - 20]}  # all chunks have the same A


def test_a_client_that_holds_nothing_between_messages_gets_all_of_it(clients, joined, start):
    serve = clients(FedAvg(), holds=False)
    exchange = joined(serve, 1)
    for round in range(2):
        list(exchange.train(round, {0: Broadcast(start)}, Traffic()))
    whole = sum(tensor.nbytes for tensor in start.values())
    assert sizes(serve.down) == {0: [whole, whole]}


def test_a_client_that_lost_what_it_held_asks_and_is_sent_the_whole(clients, joined, start):
    serve = clients(FedAvg())
    exchange = joined(serve, 2)
    first, second = Traffic(), Traffic()
    list(exchange.train(0, everyone(Broadcast(start), (0, 1)), first))
    serve.held.pop(1)  # its process was started anew
    serve.down.clear()
    updates = list(exchange.train(1, everyone(Broadcast(start), (0, 1)), second))
    assert [update.client for update in updates] == [0, 1]
    assert second.faults == []
    assert sizes(serve.down) == {0: [0], 1: [0, sum(tensor.nbytes for tensor in start.values())]}
    assert second.down == sum(len(payload) for _, payload in serve.down)
    serve.down.clear()
    list(exchange.train(2, everyone(Broadcast(start), (0, 1)), Traffic()))
    assert sizes(serve.down) == {0: [0], 1: [0]}  # and now it holds it again


def test_a_client_that_asks_again_and_again_is_a_fault(clients, joined, start):
    def asks(clients, message, client):
        return Message(to_records(Payload("[]", b""), {"resend": True}), reply_to=message)

    traffic = Traffic()
    serve = clients(FedAvg(), odd={0: asks})
    assert [update.client for update in joined(serve, 2).train(0, everyone(Broadcast(start), (0, 1)), traffic)] == [1]
    assert [(fault.client, "asks again" in fault.reason) for fault in traffic.faults] == [(0, True)]
    assert len(serve.down) == 3


def test_a_client_that_failed_after_it_opened_a_broadcast_goes_on_next_round(clients, joined, start, failing_client):
    def opens_and_fails(clients, message, client):
        clients.open(message, client)
        return failing_client(clients, message, client)

    serve = clients(FedAvg())
    exchange = joined(serve, 1)
    states = [Broadcast({name: tensor + k for name, tensor in start.items()}) for k in range(3)]
    list(exchange.train(0, {0: states[0]}, Traffic()))
    serve.odd = {0: opens_and_fails}  # it holds the second state now, the server believes it holds the first
    list(exchange.train(1, {0: states[1]}, Traffic()))
    serve.odd = {}
    traffic = Traffic()
    (update,) = exchange.train(2, {0: Broadcast(states[0].tensors | {"q.A": states[2].tensors["q.A"]})}, traffic)
    assert traffic.faults == []
    assert torch.equal(update.tensors["q.B"], states[0].tensors["q.B"] + 0.5)


# What a client makes for itself is not sent at all


@pytest.mark.parametrize("holds", [True, False])
def test_what_a_client_makes_for_itself_is_never_sent(clients, joined, start, holds):
    """FFA's A never, whether or not clients hold anything between messages; B and the head from the second round on."""
    starts = digested([start])
    serve = clients(ffa_lora(), holds=holds, starts=starts)
    exchange = joined(serve, 2, starts=frozenset(starts))
    moved = Broadcast(start | {name: start[name] + 1 for name in ("q.B", "head.bias")})
    for round, (state, cohort) in enumerate([(Broadcast(start), (0,)), (moved, (0, 1))]):
        traffic = Traffic()
        updates = list(exchange.train(round, everyone(state, cohort), traffic))
        assert all(torch.equal(update.tensors["q.B"], state.tensors["q.B"] + 1 / (update.client + 2)) for update in updates)
        assert (len(updates), traffic.faults) == (len(cohort), [])
    moving = start["q.B"].nbytes + start["head.bias"].nbytes
    assert sizes(serve.down) == {0: [0, moving], 1: [moving]}


@pytest.mark.parametrize("holds", [True, False])
def test_who_makes_another_start_asks_and_is_sent_the_whole(clients, joined, start, holds):
    """Its model is another one, or its SVD another's; nobody is asked twice to find that out."""
    serve = clients(ffa_lora(), holds=holds, starts=digested([{name: tensor + 1 for name, tensor in start.items()}]))
    exchange = joined(serve, 1, starts=frozenset(digested([start])))
    traffic = Traffic()
    (update,) = exchange.train(0, {0: Broadcast(start)}, traffic)
    assert torch.equal(update.tensors["q.B"], start["q.B"] + 0.5)
    assert traffic.faults == []
    list(exchange.train(1, {0: Broadcast(start)}, Traffic()))
    whole = sum(tensor.nbytes for tensor in start.values())
    assert sizes(serve.down) == {0: [0, whole, 0 if holds else whole]}
    assert traffic.raw_down == whole  # what it would take is no more because it was sent twice


def test_a_client_is_sent_the_whole_where_that_is_shorter_than_the_changes(clients, joined, start):
    """A is held: B and the head are 11 entries in fp32, 44 bytes; one change in bf16 is of all 51 entries, 102."""
    serve = clients(ffa_lora())
    exchange = joined(serve, 1, stream=Stream(Half(), seed=0))
    for round in range(2):
        state = Broadcast({"q.A": torch.ones(2, 20)} | {name: start[name] + round for name in ("q.B", "head.bias")})
        list(exchange.train(round, exchange.prepared({0: state}), Traffic()))
    assert sizes(serve.down) == {0: [204, 44]}


def test_what_one_client_lacks_is_not_left_out_because_another_holds_it(clients, joined, start):
    """Both are sent the whole of one version; client 0 holds A and the head, client 1 nothing."""
    serve = clients(ffa_lora())
    stream = Stream(Half(), seed=0)
    exchange = joined(serve, 2, stream=stream)
    list(exchange.train(0, exchange.prepared({0: Broadcast(start)}), Traffic()))
    sent = exchange.prepared(everyone(Broadcast(start | {"q.B": start["q.B"] + 1}), (0, 1)))
    stream.resume(stream.version, stream.public)  # the changes are gone
    assert [update.client for update in exchange.train(1, sent, Traffic())] == [0, 1]
    assert sizes(serve.down) == {0: [84, 32], 1: [84]}


# Bytes


def test_the_entropy_of_updates_is_that_of_what_was_decoded(clients, joined):
    """Of 8 entries 2 are sent: 8 H(1/4) = 2 log2(4) + 6 log2(4/3) bits for where they are, and a bit, or fp16, for each."""
    start = {"w": torch.zeros(8)}

    def two(tensors):
        return {"w": torch.tensor([0.0, 3.0, 0.0, 0.0, 0.0, 0.0, -5.0, 0.0])}

    where = 2 * 2 + 6 * 0.4150374993
    for codec, bits in ((Ternary(0.25), where + 2), (TopK(0.25, "fp16"), where + 32), (Ternary(0.5), where + 2), (Raw(), None)):
        serve = clients(FedAvg(), codec=codec, odd={k: lambda c, message, client: c.answer(message, client, two) for k in (0, 1)})
        traffic = Traffic()
        assert len(list(joined(serve, 2).train(0, everyone(Broadcast(start), (0, 1)), traffic))) == 2
        assert traffic.entropy_up == (None if bits is None else pytest.approx(2 * bits / 8))
        assert traffic.raw_up == 64


def test_entropy_counts_differences_that_rounding_takes_from_the_values(clients, joined):
    """1e-9 added to 1 in fp32 is 1: the update does not show it, the bytes were sent all the same."""
    start = {"w": torch.ones(4)}
    serve = clients(FedAvg(), codec=Ternary(1.0, alpha=1e-9))
    traffic = Traffic()
    (update,) = joined(serve, 1).train(0, {0: Broadcast(start)}, traffic)
    assert torch.equal(update.tensors["w"], start["w"])
    assert traffic.entropy_up == 0.5  # four signs


@pytest.mark.parametrize("codec", [Raw(), Half()])
def test_the_bytes_counted_are_those_that_clients_saw(clients, joined, start, codec):
    serve = clients(FedAvg(), codec=codec)
    exchange = joined(serve, 3)
    for round in range(3):
        serve.up.clear()
        serve.down.clear()
        if round == 2:
            serve.held.clear()  # everyone asks again
        traffic = Traffic()
        list(exchange.train(round, everyone(Broadcast(start | {"head.bias": start["head.bias"] + round})), traffic))
        assert traffic.down == sum(len(payload) for _, payload in serve.down)
        assert traffic.up == sum(len(payload) for _, payload in serve.up)
    assert len(serve.up) == 6


def test_bytes_of_a_reply_that_is_refused_were_sent_all_the_same(clients, joined, start):
    def garbage(clients, message, client):
        return Message(to_records(Payload("[]", b"\0" * 100), {}, {"weight": 1.0}), reply_to=message)

    traffic = Traffic()
    list(joined(clients(FedAvg(), odd={0: garbage}), 1).train(0, {0: Broadcast(start)}, traffic))
    assert traffic.up == 102


# Evaluation


def test_local_metrics_come_in_client_order_and_their_bytes_are_counted(clients, joined, start):
    serve = clients(FedAvg(), order=lambda messages: list(reversed(messages)))
    traffic = Traffic()
    found = list(joined(serve, 3).evaluate(5, everyone(Broadcast(start)), traffic))
    assert found == [(k, {"weight": k + 1.0, "loss": float(k), "accuracy": k / 10}) for k in range(3)]
    assert traffic.down == sum(len(payload) for _, payload in serve.down)
    assert traffic.up == sum(len(payload) for _, payload in serve.up)


def test_an_evaluation_changes_no_byte_of_training(clients, joined, start):
    serve = clients(FedAvg())
    exchange = joined(serve, 1)
    whole = sum(tensor.nbytes for tensor in start.values())
    for send in (exchange.evaluate, exchange.train, exchange.evaluate, exchange.train):
        list(send(0, {0: Broadcast(start)}, Traffic()))
    assert sizes(serve.down) == {0: [whole, whole, whole, 0]}


def test_an_evaluation_that_fails_is_a_fault(clients, joined, start, failing_client):
    def no_metrics(clients, message, client):
        return Message(to_records(Payload("[]", b""), {}), reply_to=message)

    traffic = Traffic()
    serve = clients(FedAvg(), odd={0: failing_client, 1: no_metrics})
    assert [client for client, _ in joined(serve, 3).evaluate(0, everyone(Broadcast(start)), traffic)] == [2]
    assert [fault.client for fault in traffic.faults] == [0, 1]
