"""Replies come as soon as they are there, each once, and what comes too late does not."""

import time
from collections.abc import Iterable, Iterator

import pytest
from flwr.app import Message, RecordDict

from fedpeft.simulation import InProcessGrid
from server import polling
from server.polling import Prompt


class Patient(InProcessGrid):
    """Can be asked for the same replies again, as Flower's own grid can; those of the nodes in `late` never come."""

    late: frozenset[int] = frozenset()

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
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
def test_in_all_else_it_is_the_grid_itself() -> None:
    inside = grid()
    prompt = Prompt(inside)
    assert list(prompt.get_node_ids()) == list(inside.get_node_ids())
    assert prompt.run is inside.run
