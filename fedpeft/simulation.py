"""InProcessGrid: Flower's `Grid` in this process.

`serve` answers a round's messages, in any order and as many at a time as it likes; it is an argument, so that this file knows no client.
Server code cannot tell this grid from Flower's own.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

Serve = Callable[[Sequence[Message]], Iterator[Message]]


class InProcessGrid(Grid):
    """A grid of `nodes` nodes with the ids `FIRST`, `FIRST + 1`, ...; replies come as `serve` yields them."""

    FIRST = 2  # Flower's own server is node 1

    def __init__(self, serve: Serve, nodes: int) -> None:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, SUPERLINK_NODE_ID, 1
        self._serve, self._nodes = serve, nodes
        self._run = Run.create_empty(run_id=1)
        self._ids = itertools.count(1)
        self._waiting: dict[str, Message] = {}

    def set_run(self, run: Run) -> None:
        """Takes over Flower's description of the run."""
        self._run = run

    @property
    def run(self) -> Run:
        """Flower's description of the run."""
        return self._run

    def create_message(self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None) -> Message:
        """A message to one node."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """All node ids; every node is always there."""
        return range(self.FIRST, self.FIRST + self._nodes)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Gives each message an id and holds it until it is pulled."""
        ids = []
        for message in messages:
            ids.append(f"m{next(self._ids)}")
            message.metadata.__dict__["_message_id"] = ids[-1]
            message.content = _copied(message.content)
            self._waiting[ids[-1]] = message
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        """The replies, as `serve` yields them: nothing runs before the first is asked for."""
        return self._serve([self._waiting.pop(key) for key in message_ids])

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Push, then pull. `timeout` has no meaning here: there is no network to wait for."""
        return self.pull_messages(self.push_messages(messages))


def _copied(records: RecordDict) -> RecordDict:
    """The same values in containers of its own: one `RecordDict` is shared by all messages of a round."""
    made: dict[str, ArrayRecord | MetricRecord | ConfigRecord] = {}
    for name, record in records.items():
        match record:
            case ArrayRecord():
                made[name] = ArrayRecord(dict(record.items()))
            case MetricRecord():
                made[name] = MetricRecord(deepcopy(dict(record.items())))  # values may be lists
            case ConfigRecord():
                made[name] = ConfigRecord(deepcopy(dict(record.items())))
    return RecordDict(made)
