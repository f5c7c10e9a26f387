"""Polling: Flower's grid looks for replies every 3 seconds and gives them all at the end; this one sooner, and each as it comes.

A SuperNode itself looks for messages every 3 s and for its ClientApp's reply every 0.5 s, which nothing in Flower 1.39 changes.
"""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

SOONEST, LATEST = 0.25, 3.0  # seconds between two looks, each some milliseconds of the SuperLink
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
        """Replies as they come; those that come later than `timeout` seconds do not."""
        began = time.monotonic()
        waiting = {message_id for message_id in self.grid.push_messages(messages) if message_id}
        while waiting:
            for reply in self.grid.pull_messages(list(waiting)):
                waiting.discard(reply.metadata.reply_to_message_id)
                yield reply
            if timeout is not None and time.monotonic() - began > timeout:
                return
            if waiting:
                time.sleep(min(max(SOONEST, SHARE * (time.monotonic() - began)), LATEST))
