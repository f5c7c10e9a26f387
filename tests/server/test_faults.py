"""Every way in which a reply can fail to come: a named fault, never an update of another round, never an endless wait."""

import time

import pytest
import torch
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode

from fedpeft.codecs.raw import Raw
from fedpeft.messages import Broadcast
from fedpeft.simulation import InProcessGrid
from server.exchange import Traffic, connect
from strategies.fedavg import FedAvg

pytestmark = pytest.mark.fast


def everyone(broadcast, clients=(0, 1, 2)):
    return dict.fromkeys(clients, broadcast)


def test_a_reply_that_cannot_be_read_is_a_named_fault_and_the_others_go_on(clients, joined, start, unreadable):
    answer, words = unreadable
    traffic = Traffic()
    updates = list(joined(clients(FedAvg(), odd={1: answer}), 3).train(0, everyone(Broadcast(start)), traffic))
    assert [update.client for update in updates] == [0, 2]
    (fault,) = traffic.faults
    assert fault.client == 1
    assert words in fault.reason


def test_a_client_that_does_not_answer_is_a_fault(start):
    def serve(messages):
        for message in messages:
            if message.metadata.message_type == "query":
                yield Message(RecordDict({"facts": ConfigRecord({"client": message.metadata.dst_node_id - 2})}), reply_to=message)

    for deadline, reason in ((None, "no answer"), (30.0, "no answer within 30 s")):
        traffic = Traffic()
        exchange = connect(InProcessGrid(serve, 2), Raw(), 2, deadline=deadline)
        assert list(exchange.train(0, everyone(Broadcast(start), (0, 1)), traffic)) == []
        assert [(fault.client, fault.reason) for fault in traffic.faults] == [(0, reason), (1, reason)]


def test_a_second_reply_of_the_same_client_is_not_taken(clients, joined, start):
    class Twice(clients):
        def __call__(self, messages):
            for reply in super().__call__(messages):
                yield reply
                if reply.metadata.message_type == "train":
                    yield reply

    traffic = Traffic()
    updates = list(joined(Twice(FedAvg()), 2).train(0, everyone(Broadcast(start), (0, 1)), traffic))
    assert [update.client for update in updates] == [0, 1]
    assert traffic.faults == []


def test_the_error_of_a_dead_node_comes_from_the_server_and_is_told_by_the_message_it_answers(clients, joined, start):
    """Flower says so in its own name (node 1) within a minute; two nodes may die in one round."""

    def dies(clients, message, client):
        error = Message(Error(ErrorCode.NODE_UNAVAILABLE, "Node Unavailable"), reply_to=message)
        error.metadata.__dict__["_src_node_id"] = SUPERLINK_NODE_ID
        return error

    for order in (list, lambda messages: list(reversed(messages))):
        traffic = Traffic()
        updates = list(joined(clients(FedAvg(), odd={0: dies, 2: dies}, order=order), 3).train(0, everyone(Broadcast(start)), traffic))
        assert [update.client for update in updates] == [1]
        assert [(fault.client, fault.reason) for fault in sorted(traffic.faults, key=lambda fault: fault.client)] == [
            (0, "Node Unavailable"), (2, "Node Unavailable"),
        ]  # fmt: skip


class Slow(InProcessGrid):
    """What `late` clients answer comes with the replies of the next round; each round takes a second of `now`."""

    late: tuple[int, ...] = ()
    now = 0.0

    def __init__(self, serve, nodes):
        super().__init__(serve, nodes)
        self.kept: list[Message] = []
        self.timeouts: list[float | None] = []

    def send_and_receive(self, messages, *, timeout=None):
        self.timeouts.append(timeout)
        kept, self.kept = self.kept, []
        replies = list(super().send_and_receive(messages, timeout=timeout))
        self.kept = [reply for reply in replies if reply.metadata.src_node_id - self.FIRST in self.late]
        self.now += 1.0
        return kept + [reply for reply in replies if reply not in self.kept]


def test_a_late_reply_is_not_taken_for_one_of_the_next_round(clients, start):
    serve = clients(FedAvg())
    grid = Slow(serve, 2)
    exchange = connect(grid, Raw(), 2, deadline=30.0)
    grid.late = (1,)
    first, second = Traffic(), Traffic()
    assert [update.client for update in exchange.train(0, everyone(Broadcast(start), (0, 1)), first)] == [0]
    assert [(fault.client, fault.reason) for fault in first.faults] == [(1, "no answer within 30 s")]
    grid.late = ()
    moved = Broadcast({name: tensor + 1 for name, tensor in start.items()})
    updates = list(exchange.train(1, everyone(moved, (0, 1)), second))
    assert [update.client for update in updates] == [0, 1]
    assert torch.equal(updates[1].tensors["q.A"], moved.tensors["q.A"] + 1 / 3)
    assert second.faults == []


def test_a_reply_that_says_another_round_is_refused(clients, joined, start):
    def stale(clients, message, client):
        reply = clients.answer(message, client)
        reply.content.config_records["facts"]["round"] -= 1
        return reply

    exchange = joined(clients(FedAvg(), odd={1: stale}), 3)
    training, measuring = Traffic(), Traffic()
    assert [update.client for update in exchange.train(4, everyone(Broadcast(start)), training)] == [0, 2]
    assert [client for client, _ in exchange.evaluate(4, everyone(Broadcast(start)), measuring)] == [0, 2]
    for traffic in (training, measuring):
        assert [fault.client for fault in traffic.faults] == [1]
        assert "its reply is of round 3, this is round 4" in traffic.faults[0].reason


@pytest.mark.parametrize(("deadline", "waits"), [(5.0, [5.0, 4.0]), (1.0, [1.0])], ids=["what is left", "nothing is left"])
def test_who_is_sent_the_whole_again_has_what_is_left_of_the_deadline(deadline, waits, clients, start, monkeypatch):
    serve = clients(FedAvg())
    grid = Slow(serve, 1)
    monkeypatch.setattr(time, "monotonic", lambda: grid.now)
    exchange = connect(grid, Raw(), 1, deadline=deadline)
    list(exchange.train(0, {0: Broadcast(start)}, Traffic()))
    serve.held.clear()
    grid.timeouts = []
    assert len(list(exchange.train(1, {0: Broadcast(start)}, Traffic()))) == len(waits) - 1
    assert grid.timeouts == waits
