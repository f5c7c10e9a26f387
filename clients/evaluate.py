"""Local metrics: how one client's own model does on a test set that looks like its data."""

from torch import Tensor

from fedpeft.adapters.base import Adapted
from fedpeft.messages import Broadcast
from fedpeft.models.base import Examples
from fedpeft.models.score import Score, score
from fedpeft.tensors import Tensors


def evaluate(adapted: Adapted, broadcast: Broadcast, memory: Tensors, examples: Examples, *, weights: Tensor | None, batch: int) -> Score:
    """The score of the broadcast with what this client keeps laid over it."""
    adapted.fill(broadcast.tensors | memory)
    with adapted.shifted(broadcast.base_delta):
        return score(adapted.logits, adapted.base.task, examples, weights=weights, batch=batch)
