"""A SuperNode that sends every reply twice, as one does whose first try was answered and the answer lost. Drills alone start it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from flwr.supernode import start_client_internal as supernode
from flwr.supernode.cli.flower_supernode import flower_supernode

SENT = Path("twice")  # file in the client's state: a line for each reply that was sent twice
STEP = "_push_messages"


def main() -> None:
    """`flower-supernode`, with its options."""
    push = getattr(supernode, STEP)

    def pushed(*, send: Callable[..., Any], **given: Any) -> None:
        def again(*message: Any) -> Any:
            send(*message)
            made = send(*message)
            with SENT.open("a") as sent:
                sent.write(f"{message[0].metadata.message_id}\n")
            return made

        push(send=again, **given)

    setattr(supernode, STEP, pushed)
    flower_supernode()
