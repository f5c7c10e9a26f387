"""Forward: what a deployed client's ClientApp does: hand a message to the site's worker and give its answer back. It never loads torch."""

import socket
import time
from collections.abc import Mapping
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from clients import frames

PATIENCE = 60.0  # seconds that a worker may take to come back after it ended
AGAIN = 3  # times that a message is handed over when the worker ends while it works on it; what it had answered it answers again


def forward(path: str, kind: str, content: RecordDict, *, run: int, overrides: str) -> RecordDict:
    """The content of the worker's reply; `ValueError` with its fault."""
    head, payload = plain(content)
    head |= {"kind": kind, "run": run, "overrides": overrides}
    for attempt in range(AGAIN):
        try:
            with _connected(path) as link:
                frames.send(link, head, payload)
                said, data = frames.receive(link)
            break
        except (frames.Hung, ConnectionError, BrokenPipeError) as fault:
            if attempt + 1 == AGAIN:
                raise ValueError(f"this client's worker ended {AGAIN} times over one message; its worker.log says why") from fault
    if "fault" in said:
        raise ValueError(str(said["fault"]))
    return recorded(said, data)


def plain(content: RecordDict) -> tuple[dict[str, Any], bytes]:
    """A message's content as numbers, strings and bytes; a message without payload has none."""
    arrays, facts, metrics = (content.array_records, content.config_records, content.metric_records)
    payload: bytes = arrays["payload"]["data"].data if "payload" in arrays else b""
    head: dict[str, Any] = {"facts": dict(facts["facts"]) if "facts" in facts else {}}
    if "metrics" in metrics:
        head["metrics"] = dict(metrics["metrics"])
    return head, payload


def recorded(head: Mapping[str, Any], payload: bytes) -> RecordDict:
    """The inverse of `plain`."""
    array = Array("uint8", (len(payload),), "fedpeft.payload", payload)
    records = RecordDict({"payload": ArrayRecord({"data": array}), "facts": ConfigRecord(dict(head["facts"]))})
    if "metrics" in head:
        records["metrics"] = MetricRecord(dict(head["metrics"]))
    return records


def _connected(path: str) -> socket.socket:
    until = time.monotonic() + PATIENCE
    while True:
        link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            link.connect(path)
            return link
        except (FileNotFoundError, ConnectionRefusedError) as fault:
            link.close()
            if time.monotonic() > until:
                raise ValueError("this client's worker does not answer; start it: fedpeft client up") from fault
            time.sleep(0.1)
