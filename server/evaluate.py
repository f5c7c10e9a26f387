"""Central metrics: the global model on the test set, or every client's own model where there is no global one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fedpeft.config import ConfigError
from fedpeft.messages import Broadcast
from fedpeft.models.score import examined
from fedpeft.setting import Setting
from fedpeft.strategy import Strategy
from server.exchange import Exchange, Traffic


@dataclass(frozen=True)
class Measured:
    """A score, and what was measured: the global model, or the mean over clients' own models weighted by their examples."""

    loss: float
    accuracy: float
    of: Literal["global", "personal"]
    own: float | None = None  # accuracy on test sets with each client's label proportions, weighted by their examples


def is_personal(strategy: Strategy[Any], state: Any, round: int) -> bool:
    """True if clients keep tensors of their own that the global model lacks."""
    keeps = strategy.phase(round).keeps
    return any(keeps(name) for name in strategy.broadcast(state, round, None).tensors)


Look = Callable[[str, Broadcast], Tensor]  # (adapter, its tensors) -> (2, test examples) float64: loss and hit of each


def central(setting: Setting, adapter: str, broadcast: Broadcast, look: Look | None = None) -> Measured:
    """The model of `broadcast`, whose tensors are of the adapter of that name, on the test set; `look` is a quicker way to look at it."""
    many = len(setting.test)
    if not many:
        raise ConfigError("there are no test examples; give the data a test file or data.test_share=0.2")
    if look is not None:
        seen = look(adapter, broadcast)
    else:
        adapted = setting.on(adapter)
        adapted.fill(broadcast.tensors)
        with adapted.shifted(broadcast.base_delta):
            seen = examined(adapted.logits, setting.base.task, setting.test, torch.arange(many), batch=setting.config.evaluate.batch)
    loss, right = seen.mean(1).tolist()
    return Measured(loss, right, "global", None if setting.base.task == "language" else float(seen[1] @ setting.owned))


def personal(
    strategy: Strategy[Any], state: Any, round: int, clients: Sequence[int], exchange: Exchange, traffic: Traffic
) -> Measured | None:  # fmt: skip
    """The mean over `clients`' own models before `round`; None if no client answers."""
    out = {client: strategy.broadcast(state, round, client) for client in clients}
    loss = accuracy = total = 0.0
    for _, metrics in exchange.evaluate(round, out, traffic):
        loss += metrics["weight"] * metrics["loss"]
        accuracy += metrics["weight"] * metrics["accuracy"]
        total += metrics["weight"]
    return Measured(loss / total, accuracy / total, "personal", accuracy / total) if total else None
