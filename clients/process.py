"""The process that Flower starts at a client for each message: it runs the ClientApp that is installed here.

Flower itself would install and run the code that came with the run: whoever can start a run, or has broken into the server, would run
what they like on every client's machine. `clients/launch.py` puts this in the place of Flower's command of the same name. So a
site's code is the site's, and its policy holds.
"""

import os
import threading
import time
from typing import Any

from flwr.supernode.cli import flwr_clientapp
from flwr.supernode.runtime import run_clientapp

from clients.app import app


def main() -> None:
    """`flwr-clientapp`, with two steps of it left out. Raises `AttributeError` if Flower has them no more: nothing runs then."""
    for step, instead in (("install_from_fab", _not_installed), ("get_load_client_app_fn", _ours)):
        getattr(run_clientapp, step)
        setattr(run_clientapp, step, instead)
    end_with_parent()
    flwr_clientapp()


def end_with_parent() -> None:
    """Ends this process soon after the one that started it: nobody is left who would take its answer, and Flower's retries have no end."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _not_installed(content: bytes, *, skip_prompt: bool) -> None:
    """What came is left as it is."""


def _ours(**_: Any) -> Any:
    return lambda name, version, digest: app
