"""Polling: Flower's grid looks for replies every 3 seconds and gives them all at the end; this one sooner, and each as it comes.

A SuperNode itself looks for messages every 3 s and for its ClientApp's reply every 0.5 s, which nothing in Flower 1.39 changes. And it
announces a reply before it sends the reply's parts. Who was told of it has to wait for them, since nobody is told twice, and all that was
announced in the same look waits, too: up to two hours in Flower's grid, and here to the round's deadline.
"""

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, ObjectPushError
from flwr.superlink.grid import http_grid

log = logging.getLogger("fedpeft")
SOONEST, LATEST = 0.25, 3.0  # seconds between two looks, each some milliseconds of the SuperLink
AT_ONCE = 64_000_000  # bytes; a look at one more message costs some milliseconds
PUSHES = 3  # times that messages are sent, where a part of them is not taken
PAUSES = (0.25, 1.0)  # seconds, the first and the longest, until a part that had not come is asked for again; Flower's are 1 and 10
LATE = "not all of its parts came in time"
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

        A reply of which a part is missing then is not there. Flower's grid has all replies of one look in memory before it gives the first,
        so that no more are asked for at once than hold `AT_ONCE` bytes, if each is as large as the largest yet, or as what was sent.
        """
        began, sent = time.monotonic(), list(messages)
        until = math.inf if timeout is None else began + timeout
        waiting = self._pushed(sent)
        largest = max((_size(message) for message in sent), default=0)
        while waiting:
            last = time.monotonic() >= until
            asked = sorted(waiting)
            while asked:
                some = max(1, AT_ONCE // max(largest, 1))
                with _pulling(until):
                    replies = list(self.grid.pull_messages(asked[:some]))
                for reply in replies:
                    waiting.discard(reply.metadata.reply_to_message_id)
                    if reply.has_error() and LATE in (reply.error.reason or ""):
                        continue
                    largest = max(largest, _size(reply))
                    yield reply
                del asked[:some]
            if last:
                return
            if waiting:
                now = time.monotonic()
                time.sleep(max(0.0, min(max(SOONEST, SHARE * (now - began)), LATEST, until - now)))

    def _pushed(self, messages: list[Message]) -> set[str]:
        """The ids of the messages that were taken. A SuperLink that was started again knows them, but not what of their parts had come."""
        for attempt in range(PUSHES):
            try:
                return {message_id for message_id in self.grid.push_messages(messages) if message_id}
            except ObjectPushError as fault:
                if attempt == PUSHES - 1:
                    raise
                log.warning("the round's messages are sent again: %s", fault)
        raise AssertionError


@contextmanager
def _pulling(until: float) -> Iterator[None]:
    """Here Flower's grid waits for the parts of a reply until this time of `time.monotonic`, and asks once for each when it has passed."""
    names = vars(http_grid)  # it takes no such setting
    flowers: Callable[..., dict[str, bytes]] = names["pull_objects"]

    def pull(object_ids: list[str], pull_object_fn: Callable[[str], bytes]) -> dict[str, bytes]:
        left = max(0.0, until - time.monotonic())
        try:
            return flowers(
                object_ids, pull_object_fn, max_time=left, max_tries_per_object=None, initial_backoff=PAUSES[0], backoff_cap=PAUSES[1]
            )
        except ObjectPullError as fault:
            if time.monotonic() < until:
                raise
            raise ObjectPullError("of a reply", LATE) from fault

    names["pull_objects"] = pull
    try:
        yield
    finally:
        names["pull_objects"] = flowers


def _size(message: Message) -> int:
    """Bytes of a message's arrays."""
    if message.has_error():
        return 0
    return sum(len(array.data) for record in message.content.array_records.values() for array in record.values())
