"""A client's worker to which an event happens. Drills alone start it: the worker that sites run knows of no events."""

import json
import logging
import sys
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from clients import launch
from clients.worker import Head, Worker, serve
from experiments.drill.event import Event
from experiments.drill.spoiled import SPOILED, full_disk
from fedpeft.codecs.base import Payload

HELD = "held"  # file in the client's state: the worker is in mid-fit, until somebody takes the file away
LONGEST = 300.0  # seconds that it stays there


@dataclass(eq=False)
class Odd(Worker):
    """Answers as `Worker` does, but for the messages of `event`."""

    event: Event = field(default_factory=lambda: Event("none"))
    _turns: Counter[object] = field(default_factory=Counter)  # round -> attempts
    _before: tuple[Head, bytes] = field(default_factory=lambda: ({}, b""))

    def answer(self, head: Mapping[str, Any], payload: bytes) -> tuple[Head, bytes]:
        """See `Worker`."""
        if head.get("kind") != "train" or not self._hit(head["facts"]["round"]):
            self._before = super().answer(head, payload)
            return self._before
        match self.event.kind:
            case "raises":
                return {"fault": "the GPU is out of memory"}, b""
            case "stale":
                return self._before
            case "disk":
                with full_disk():
                    return super().answer(head, payload)
            case "lost":
                super().answer(head, payload)
                raise OSError("the answer was lost on its way to the ClientApp")
            case kind if kind in SPOILED:
                return self._spoiled(*super().answer(head, payload))
        held, until = self.site.state / HELD, time.monotonic() + LONGEST
        held.touch()
        while held.exists() and time.monotonic() < until:
            time.sleep(0.02)
        return super().answer(head, payload)

    def _hit(self, round: object) -> bool:
        self._turns[round] += 1
        return round in self.event.rounds and self._turns[round] <= self.event.times

    def _spoiled(self, said: Head, data: bytes) -> tuple[Head, bytes]:
        assert self._open is not None
        shapes = {name: torch.zeros(tensor.shape) for name, tensor in self._open[1].setting.adapted.read().items()}
        made = SPOILED[self.event.kind](Payload(said["facts"]["header"], data), shapes)
        return said | {"facts": said["facts"] | {"header": made.header}}, made.data


def main() -> None:
    """`python -c ... site.yaml EVENT`, in the foreground."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    site = launch.read(Path(sys.argv[1]))
    told = json.loads(sys.argv[2])
    serve(Odd(site, event=Event(told["kind"], tuple(told["rounds"]), tuple(told["clients"]), told["times"])), site.socket)
