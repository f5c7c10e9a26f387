import logging
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, FedMedian

from fedpeft.simulation import InProcessGrid

pytestmark = pytest.mark.fast
FIRST = InProcessGrid.FIRST


def content(value: int = 0) -> RecordDict:
    return RecordDict({
        "payload": ArrayRecord({"data": Array("uint8", (3,), "fedpeft.payload", b"abc")}),
        "facts": ConfigRecord({"value": value, "list": [1, 2]}),
        "metrics": MetricRecord({"loss": 0.5, "losses": [0.5, 0.25]}),
    })  # fmt: skip


def plus_node(message: Message) -> Message:
    value = message.content.config_records["facts"]["value"]
    return Message(RecordDict({"facts": ConfigRecord({"value": value + message.metadata.dst_node_id})}), reply_to=message)


def each(answer: Callable[[Message], Message], log: list | None = None) -> Callable[[Sequence[Message]], Iterator[Message]]:
    def serve(messages: Sequence[Message]) -> Iterator[Message]:
        for message in messages:
            if log is not None:
                log.append(message.metadata.dst_node_id)
            yield answer(message)

    return serve


def messages(nodes: Sequence[int], shared: RecordDict | None = None) -> list[Message]:
    return [Message(shared or content(), node, "train", group_id="0") for node in nodes]


def values(replies: Iterator[Message]) -> list[int]:
    return [reply.content.config_records["facts"]["value"] for reply in replies]


def test_it_is_a_grid_of_flower_with_its_node_ids():
    grid = InProcessGrid(each(plus_node), 3)
    assert isinstance(grid, Grid)
    assert list(grid.get_node_ids()) == [2, 3, 4]
    run = grid.run
    grid.set_run(run)
    assert grid.run is run
    assert run.run_id == 1


def test_replies_come_as_serve_yields_them_and_know_what_they_answer():
    grid = InProcessGrid(lambda waiting: (plus_node(message) for message in reversed(waiting)), 3)
    sent = messages([2, 3, 4])
    replies = list(grid.send_and_receive(sent, timeout=1))
    assert values(iter(replies)) == [4, 3, 2]
    assert [reply.metadata.reply_to_message_id for reply in replies] == [message.metadata.message_id for message in reversed(sent)]
    assert [reply.metadata.src_node_id for reply in replies] == [4, 3, 2]
    assert {reply.metadata.message_type for reply in replies} == {"train"}


def test_all_messages_of_a_round_reach_serve_at_once_and_every_one_has_its_own_id():
    seen: list[list[int]] = []

    def serve(waiting: Sequence[Message]) -> Iterator[Message]:
        seen.append([message.metadata.dst_node_id for message in waiting])
        return map(plus_node, waiting)

    grid = InProcessGrid(serve, 4)
    for nodes in ([2, 3], [5, 2]):
        ids = [reply.metadata.reply_to_message_id for reply in grid.send_and_receive(messages(nodes))]
        assert len(set(ids)) == 2
    assert seen == [[2, 3], [5, 2]]


def test_nothing_runs_before_a_reply_is_asked_for():
    ran: list[int] = []
    grid = InProcessGrid(each(plus_node, ran), 3)
    replies = grid.pull_messages(grid.push_messages(messages([2, 3, 4])))
    assert ran == []
    next(replies)
    assert ran == [2]
    assert values(replies) == [3, 4]
    assert ran == [2, 3, 4]


def test_messages_can_be_pulled_one_by_one_in_any_order_and_only_once():
    grid = InProcessGrid(each(plus_node), 3)
    ids = grid.push_messages(messages([2, 3, 4]))
    assert values(grid.pull_messages([ids[2]])) == [4]
    assert values(grid.pull_messages(ids[:2])) == [2, 3]
    with pytest.raises(KeyError):
        list(grid.pull_messages(ids[:1]))


def test_no_messages_are_no_replies():
    assert list(InProcessGrid(each(plus_node), 2).send_and_receive([])) == []


def test_an_error_reply_is_a_reply():
    def fails(message: Message) -> Message:
        return Message(Error(7, "out of memory"), reply_to=message) if message.metadata.dst_node_id == 3 else plus_node(message)

    first, second = InProcessGrid(each(fails), 2).send_and_receive(messages([3, 2]))
    assert (first.has_error(), first.error.code, first.error.reason, first.metadata.src_node_id) == (True, 7, "out of memory", 3)
    assert values(iter([second])) == [2]


def test_a_grid_makes_messages_as_flowers_does():
    grid = InProcessGrid(each(plus_node), 1)
    made = grid.create_message(content(5), "train", 2, "7", ttl=60.0)
    assert (made.metadata.dst_node_id, made.metadata.group_id, made.metadata.ttl) == (2, "7", 60.0)
    assert values(grid.send_and_receive([made])) == [7]


SPOILING = [
    lambda records: records.config_records["facts"].update({"value": 99}),
    lambda records: records.config_records["facts"]["list"].append(3),
    lambda records: records.metric_records["metrics"].update({"loss": 9.0}),
    lambda records: records.metric_records["metrics"]["losses"].append(9.0),
    lambda records: records.array_records["payload"].update({"data": Array("uint8", (1,), "x", b"z")}),
    lambda records: setattr(records.array_records["payload"]["data"], "data", b"zzz"),
    lambda records: records.__delitem__("metrics"),
]


@pytest.mark.parametrize("spoil", SPOILING)
def test_a_client_cannot_change_what_another_or_the_server_holds(spoil):
    shared = content()
    seen = []

    def answer(message: Message) -> Message:
        seen.append(message.content == content())
        spoil(message.content)
        return Message(RecordDict(), reply_to=message)

    list(InProcessGrid(each(answer), 3).send_and_receive(messages([2, 3, 4], shared)))
    assert seen == [True] * 3
    assert shared == content()


# Flower's own apps, mods and strategies


def client_app(mods: list) -> ClientApp:
    app = ClientApp(mods=mods)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        start = message.content.array_records["arrays"].to_numpy_ndarrays()
        node = int(context.node_config["partition-id"])
        metrics = MetricRecord({"num-examples": node + 1, "loss": float(node)})
        return Message(RecordDict({"arrays": ArrayRecord([array + node for array in start]), "metrics": metrics}), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        mean = float(message.content.array_records["arrays"].to_numpy_ndarrays()[0].mean())
        return Message(RecordDict({"metrics": MetricRecord({"num-examples": 1, "mean": mean})}), reply_to=message)

    return app


def serve_app(app: ClientApp) -> Callable[[Sequence[Message]], Iterator[Message]]:
    def answer(message: Message) -> Message:
        node = message.metadata.dst_node_id
        return app(message, Context(1, node, {"partition-id": node - FIRST}, RecordDict(), {}))

    return each(answer)


@pytest.mark.parametrize(
    ("strategy", "first"),
    [(FedAvg, (0 * 1 + 1 * 2 + 2 * 3) / 6), (FedMedian, 1.0)],  # client k adds k and has k + 1 examples
)
def test_a_stock_client_app_with_mods_and_a_stock_strategy_run_a_round(strategy, first, caplog):
    sizes = []

    def doubles(message: Message, context: Context, call_next: Callable) -> Message:
        sizes.append(message.content.array_records["arrays"].count_bytes() if message.content.array_records else 0)
        reply = call_next(message, context)
        for array in reply.content.array_records.values():
            for name, value in list(array.items()):
                array[name] = Array(value.numpy() * 2)
        return reply

    caplog.set_level(logging.CRITICAL, logger="flwr")
    grid = InProcessGrid(serve_app(client_app([doubles])), 3)
    start = [np.ones((2, 3)), np.zeros(1)]
    result = strategy().start(grid, ArrayRecord(start), num_rounds=1)
    one, other = result.arrays.to_numpy_ndarrays()
    assert np.allclose(one, 2 * (1 + first))
    assert np.allclose(other, 2 * first)
    assert result.evaluate_metrics_clientapp[1]["mean"] == pytest.approx(2 * (1 + first))
    assert len(sizes) == 6
