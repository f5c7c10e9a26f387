"""Replies come as soon as they are there, each once, and what comes too late does not."""

import threading
import time
from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.app import Array, ArrayRecord, Message, Metadata, RecordDict
from flwr.app.message import make_message, remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import PullObjectResponse
from flwr.proto.runtime_pb2 import PullAppMessagesResponse
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError
from flwr.superlink.grid import http_grid

from fedpeft.simulation import InProcessGrid
from server import polling
from server.polling import Prompt


class Patient(InProcessGrid):
    """Can be asked for a reply again until it has come, as Flower's own grid can; those of the nodes in `late` never come."""

    late: frozenset[int] = frozenset()
    looks: list[int]  # how many replies each look asked for

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        message_ids = list(message_ids)
        self.looks = [*getattr(self, "looks", []), len(message_ids)]
        there = [key for key in message_ids if key in self._waiting and self._waiting[key].metadata.dst_node_id not in self.late]
        return super().pull_messages(there)


def grid(*late: int) -> Patient:
    """Two nodes that echo."""
    made = Patient(lambda messages: (Message(RecordDict(), reply_to=one) for one in messages), 2)
    made.late = frozenset(late)
    return made


def asked(to: Prompt) -> list[Message]:
    return [Message(RecordDict(), node, "query", group_id="0") for node in sorted(to.get_node_ids())]


@pytest.mark.fast
def test_every_reply_comes_once_and_at_once() -> None:
    prompt = Prompt(grid())
    began = time.monotonic()
    messages = asked(prompt)
    replies = list(prompt.send_and_receive(messages))
    assert {one.metadata.reply_to_message_id for one in replies} == {one.metadata.message_id for one in messages}
    assert len(replies) == 2
    assert time.monotonic() - began < polling.SOONEST


@pytest.mark.fast
def test_who_is_late_is_not_waited_for_longer_than_the_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(polling, "SOONEST", 0.01)
    prompt = Prompt(grid(InProcessGrid.FIRST))
    assert [one.metadata.src_node_id for one in prompt.send_and_receive(asked(prompt), timeout=0.1)] == [InProcessGrid.FIRST + 1]


@pytest.mark.fast
def test_no_pause_goes_past_the_timeout_and_what_came_in_the_last_one_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(polling, "SOONEST", 60.0)
    monkeypatch.setattr(polling, "LATEST", 60.0)
    inside = grid(InProcessGrid.FIRST)
    replies = Prompt(inside).send_and_receive(asked(Prompt(inside)), timeout=0.2)
    began = time.monotonic()
    next(replies)
    inside.late = frozenset()
    assert [one.metadata.src_node_id for one in replies] == [InProcessGrid.FIRST]
    assert time.monotonic() - began < 5


def bytes_of(size: int) -> RecordDict:
    return RecordDict({"payload": ArrayRecord({"data": Array("uint8", (size,), "raw", bytes(size))})})


@pytest.mark.fast
@pytest.mark.parametrize(
    ("sent", "answered", "looks"), [(10, 10, [5]), (50, 10, [2, 2, 1]), (100, 0, [1] * 5), (0, 50, [5]), (101, 0, [1] * 5)]
)
def test_no_more_replies_are_asked_for_at_once_than_memory_is_meant_for(
    sent: int, answered: int, looks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(polling, "AT_ONCE", 100)
    inside = Patient(lambda messages: (Message(bytes_of(answered), reply_to=one) for one in messages), 5)
    messages = [Message(bytes_of(sent), node, "train", group_id="0") for node in sorted(inside.get_node_ids())]
    assert len(list(Prompt(inside).send_and_receive(messages))) == 5
    assert inside.looks == looks


@pytest.mark.fast
def test_once_large_replies_have_come_fewer_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(polling, "AT_ONCE", 100)
    monkeypatch.setattr(polling, "SOONEST", 0.0)
    inside = Patient(lambda messages: (Message(bytes_of(50), reply_to=one) for one in messages), 5)
    inside.late = frozenset(sorted(inside.get_node_ids())[1:])
    replies = Prompt(inside).send_and_receive(
        [Message(RecordDict(), node, "train", group_id="0") for node in sorted(inside.get_node_ids())]
    )
    next(replies)
    inside.late = frozenset()
    assert len(list(replies)) == 4
    assert inside.looks == [5, 2, 2]


@pytest.mark.fast
def test_in_all_else_it_is_the_grid_itself() -> None:
    inside = grid()
    prompt = Prompt(inside)
    assert list(prompt.get_node_ids()) == list(inside.get_node_ids())
    assert prompt.run is inside.run


class Superlink:
    """What `HttpGrid` calls of a SuperLink: announces each of `replies` once, and has the first `come[i]` parts of the i-th."""

    def __init__(self, *replies: Message) -> None:
        for reply in replies:
            reply.metadata.__dict__["_message_id"] = reply.object_id
        self.parts = [{name: one.deflate() for name, one in get_all_nested_objects(reply).items()} for reply in replies]
        self.come = [len(parts) for parts in self.parts]
        self.gone = False  # whether it has given the parts up
        self.lacks: set[str] = set()  # parts that have not come, whatever `come` says
        self.confirmed: list[str] = []
        self._unread = list(replies)

    def PullMessages(self, request: Any) -> Any:  # noqa: N802  # Flower's name
        new = [one for one in self._unread if one.metadata.reply_to_message_id in request.message_ids]
        self._unread = [one for one in self._unread if one not in new]
        announced = [message_to_proto(remove_content_from_message(one)) for one in new]
        return PullAppMessagesResponse(messages_list=announced, message_object_trees=[get_object_tree(one) for one in new])

    def PullObject(self, request: Any) -> Any:  # noqa: N802  # Flower's name
        index, parts = next((i, parts) for i, parts in enumerate(self.parts) if request.object_id in parts)
        there = list(parts).index(request.object_id) < self.come[index] and request.object_id not in self.lacks
        content = parts[request.object_id] if there else b""
        return PullObjectResponse(object_found=not self.gone, object_available=there, object_content=content)

    def ConfirmMessageReceived(self, request: Any) -> None:  # noqa: N802  # Flower's name
        self.confirmed.append(request.message_object_id)


@pytest.fixture
def link(monkeypatch: pytest.MonkeyPatch) -> tuple[Superlink, Prompt, list[Message]]:
    """Flower's own grid, two messages that were sent through it, and a reply of 1 kB announced to each."""
    monkeypatch.setattr(polling, "PAUSES", (0.02, 0.05))
    sent = [
        make_message(
            metadata=Metadata(run_id=1, message_id=name, src_node_id=1, dst_node_id=7, message_type="train", group_id="", ttl=100.0,
                              reply_to_message_id="", created_at=time.time()), content=RecordDict())
        for name in ("first", "second")
    ]  # fmt: skip
    superlink = Superlink(*(Message(bytes_of(1000 + index), reply_to=one) for index, one in enumerate(sent)))
    inside = http_grid.HttpGrid(token="none")
    inside._client = superlink  # type: ignore[assignment]  # three of its calls
    inside._run = SimpleNamespace(run_id=1)  # type: ignore[assignment]  # all that is asked of it
    monkeypatch.setattr(inside, "push_messages", lambda messages: [one.metadata.message_id for one in messages])
    return superlink, Prompt(inside), sent


def data_of(reply: Message) -> int:
    """Bytes of a reply of `bytes_of`."""
    return len(reply.content.array_records["payload"]["data"].data)


@pytest.mark.fast
@pytest.mark.parametrize("come", [0, 3])
def test_a_reply_that_is_not_whole_in_time_is_none_and_takes_no_other_with_it(
    come: int, link: tuple[Superlink, Prompt, list[Message]]
) -> None:
    superlink, prompt, sent = link
    superlink.come[0] = come
    began = time.monotonic()
    replies = list(prompt.send_and_receive(sent, timeout=0.6))
    assert 0.5 < time.monotonic() - began < 5
    assert [data_of(one) for one in replies] == [1001]
    assert len(superlink.confirmed) == 1


@pytest.mark.fast
def test_whose_parts_never_come_and_who_waits_in_the_same_look_both_end_by_the_deadline(
    link: tuple[Superlink, Prompt, list[Message]],
) -> None:
    superlink, prompt, sent = link
    superlink.come = [0, 0]
    began = time.monotonic()
    assert list(prompt.send_and_receive(sent, timeout=0.6)) == []
    assert time.monotonic() - began < 5
    assert superlink.confirmed == []


@pytest.mark.fast
@pytest.mark.parametrize("timeout", [60.0, None])
@pytest.mark.parametrize("come", [0, 2, 3])
def test_a_reply_is_waited_for_until_all_of_it_has_come(
    come: int, timeout: float | None, link: tuple[Superlink, Prompt, list[Message]]
) -> None:
    superlink, prompt, sent = link
    superlink.come[0] = come
    threading.Timer(0.4, lambda: superlink.come.__setitem__(0, len(superlink.parts[0]))).start()
    replies = list(prompt.send_and_receive(sent, timeout=timeout))
    assert sorted(map(data_of, replies)) == [1000, 1001]
    assert len(superlink.confirmed) == 2


@pytest.mark.fast
def test_a_part_that_lacks_though_the_last_is_there_is_waited_for_too(link: tuple[Superlink, Prompt, list[Message]]) -> None:
    superlink, prompt, sent = link
    superlink.lacks = {next(iter(superlink.parts[0]))}
    threading.Timer(0.4, superlink.lacks.clear).start()
    assert sorted(map(data_of, prompt.send_and_receive(sent, timeout=60))) == [1000, 1001]


@pytest.mark.fast
@pytest.mark.parametrize("timeout", [60.0, None])
def test_parts_that_the_superlink_gave_up_are_an_error(timeout: float | None, link: tuple[Superlink, Prompt, list[Message]]) -> None:
    superlink, prompt, sent = link
    superlink.gone = True
    replies = list(prompt.send_and_receive(sent, timeout=timeout))
    assert {one.metadata.reply_to_message_id for one in replies} == {"first", "second"}
    assert all("could not be found" in (one.error.reason or "") for one in replies)


@pytest.mark.fast
def test_outside_of_a_look_flower_pulls_as_it_always_does(link: tuple[Superlink, Prompt, list[Message]]) -> None:
    before = http_grid.pull_objects
    assert len(list(link[1].send_and_receive(link[2]))) == 2
    assert http_grid.pull_objects is before


@pytest.mark.fast
@pytest.mark.parametrize("failures", [0, 1, polling.PUSHES - 1, polling.PUSHES])
def test_messages_whose_parts_were_not_taken_are_sent_again(
    failures: int, link: tuple[Superlink, Prompt, list[Message]], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, prompt, sent = link
    pushes: list[int] = []

    def push(messages: list[Message]) -> list[str]:
        pushes.append(len(messages))
        if len(pushes) <= failures:
            raise ObjectPushError("part", 1, "session")
        return [one.metadata.message_id for one in messages]

    monkeypatch.setattr(prompt.grid, "push_messages", push)
    replies = prompt.send_and_receive(sent, timeout=60)
    if failures == polling.PUSHES:
        with pytest.raises(ObjectPushError):
            next(replies)
    else:
        assert len(list(replies)) == 2
        assert pushes == [2] * (failures + 1)
