"""Replies come as soon as they are there, each once, and what comes too late does not."""

import time
from collections.abc import Iterable, Iterator

import pytest
from flwr.app import Array, ArrayRecord, Message, RecordDict

from fedpeft.simulation import InProcessGrid
from server import polling
from server.polling import Prompt


class Patient(InProcessGrid):
    """Can be asked for the same replies again, as Flower's own grid can; those of the nodes in `late` never come."""

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
