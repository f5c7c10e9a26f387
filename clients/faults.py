"""Faults: what went wrong at a client, and how much of it the server hears.

The text of an exception can hold a row of the data or a path of this machine; which does, only who wrote it knows. So the server hears what
failed, and the words stay in the client's log, except those of the few faults that are made to be told.
"""

from dataclasses import dataclass

WHERE = "the reason stands in the client's log (worker.log)"


class Told(ValueError):
    """A fault whose very words the server may hear: they hold what it said itself, what a policy allows, and nothing of the data."""


@dataclass(frozen=True)
class Fault:
    """`reason` stays where the data are, `said` may leave them."""

    reason: str
    said: str


def fault_of(cause: Exception, what: str, *, told: bool = False) -> Fault:
    """The fault that `cause` makes of `what` was to be done; `told` if its words may leave."""
    reason = str(cause) or repr(cause)
    return Fault(reason, reason if told else f"{what}; {WHERE}")
