"""ClientApp: hands each message to the site's resident worker, or in Flower's simulation answers it in this process.

A deployed client has a worker (`worker="SOCKET"` in its node config), which obeys its site's file; a SuperNode without one is refused, for
it would do whatever the server says. Flower starts a deployed ClientApp anew for each message, so nothing heavy is imported here.
"""

import shlex
import sys
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from clients.forward import forward

if TYPE_CHECKING:
    from clients.site import Site


@lru_cache(maxsize=1)
def _site(overrides: str, run: int) -> "Site":
    """The site of this process for one run of Flower's own engine, whose processes come and go: nothing is held between messages."""
    from clients.memory import Memory
    from clients.site import site_of
    from fedpeft.config import ConfigError, load
    from fedpeft.setting import open_setting

    config = load(shlex.split(overrides))
    if config.privacy.get("noise") == "seeded-insecure":
        raise ConfigError("privacy.noise=seeded-insecure: whoever sent the seed could subtract the noise; it is for simulations alone")
    folder = Path(config.run.dir) if config.run.dir else Path(tempfile.gettempdir()) / f"fedpeft-{run}"
    return site_of(open_setting(config), Memory(folder / "memory"), holds=False)


def _answer(message: Message, context: Context) -> Message:
    overrides = str(context.run_config["overrides"])
    if worker := context.node_config.get("worker"):
        kind = message.metadata.message_type
        return Message(forward(str(worker), kind, message.content, run=context.run_id, overrides=overrides), reply_to=message)
    return Message(_answered_here(message, context, overrides), reply_to=message)


def _answered_here(message: Message, context: Context, overrides: str) -> RecordDict:
    from fedpeft.config import ConfigError

    if "ray" not in sys.modules:  # whose actors are the clients of Flower's simulation
        raise ConfigError(
            "this node has no worker: start it by `fedpeft client up`, whose site.yaml says which data it has and what it takes part in"
        )
    try:
        client = int(context.node_config["partition-id"])
    except KeyError:
        raise ConfigError('this node has no client index; start it with --node-config "partition-id=N"') from None
    site = _site(overrides, context.run_id)
    if not 0 <= client < site.setting.config.clients:
        raise ConfigError(
            f"this node is client {client}, the run has clients={site.setting.config.clients}; raise clients or start fewer nodes"
        )
    return site.answer(client, message.metadata.message_type, message.content)


app = ClientApp()


@app.query()
def query(message: Message, context: Context) -> Message:
    """Which client this node is."""
    return _answer(message, context)


@app.train()
def fit(message: Message, context: Context) -> Message:
    """One round of one client."""
    return _answer(message, context)


@app.evaluate()
def measure(message: Message, context: Context) -> Message:
    """Local metrics of one client."""
    return _answer(message, context)
