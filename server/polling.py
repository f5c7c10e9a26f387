"""Polling: Flower's grid looks for replies every 3 seconds and gives them all at the end; this one sooner, and each as it comes.

A SuperNode itself looks for messages every 3 s and for its ClientApp's reply every 0.5 s, which nothing in Flower 1.39 changes.
"""

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

SOONEST, LATEST = 0.25, 3.0  # seconds between two looks, each some milliseconds of the SuperLink
AT_ONCE = 64_000_000  # bytes; a look at one more message costs some milliseconds
SHARE = 0.02  # of the time that has passed: a round of minutes need not be looked for four times a second


@dataclass(eq=False)
class Prompt(Grid):
    """`grid` in all but that."""

    grid: Grid

    def set_run(self, run: Any) -> None:
        """As `grid`."""
        self.grid.set_run(run)

    @property
    def run(self) -> Any:
        """As `grid`."""
        return self.grid.run

    def create_message(self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None) -> Message:
        """As `grid`."""
        return self.grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> Iterable[int]:
        """As `grid`."""
        return self.grid.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """As `grid`."""
        return self.grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """As `grid`."""
        return self.grid.pull_messages(message_ids)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Replies as they come; those that are not there after `timeout` seconds do not.

        Flower's grid has all replies of one look in memory before it gives the first, so that no more are asked for at once than hold
        `AT_ONCE` bytes, if each is as large as the largest yet, or as what was sent.
        """
        began, sent = time.monotonic(), list(messages)
        waiting = {message_id for message_id in self.grid.push_messages(sent) if message_id}
        largest = max((_size(message) for message in sent), default=0)
        while waiting:
            last = timeout is not None and time.monotonic() - began >= timeout
            asked = sorted(waiting)
            while asked:
                some = max(1, AT_ONCE // max(largest, 1))
                for reply in self.grid.pull_messages(asked[:some]):
                    waiting.discard(reply.metadata.reply_to_message_id)
                    largest = max(largest, _size(reply))
                    yield reply
                del asked[:some]
            if last:
                return
            passed = time.monotonic() - began
            if waiting:
                time.sleep(max(0.0, min(max(SOONEST, SHARE * passed), LATEST, math.inf if timeout is None else timeout - passed)))


def _size(message: Message) -> int:
    """Bytes of a message's arrays."""
    if message.has_error():
        return 0
    return sum(len(array.data) for record in message.content.array_records.values() for array in record.values())
