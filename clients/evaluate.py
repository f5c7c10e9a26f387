"""Local metrics: how one client's own model does on a test set that looks like its data."""

from collections.abc import Mapping

from torch import Tensor

from fedpeft.adapters.base import Adapted
from fedpeft.messages import Broadcast
from fedpeft.models.base import Examples
from fedpeft.models.score import Score, score
from fedpeft.tensors import Tensors


def evaluate(
    adapted: Adapted, broadcast: Broadcast, memory: Tensors, examples: Examples, *,
    weights: Tensor | None, batch: int, scales: Mapping[str, float] | None = None,
) -> Score:  # fmt: skip
    """The score of the broadcast with what this client keeps laid over it; `scales` as in `clients.train.Job`."""
    with adapted.rescaled(scales), adapted.shifted(broadcast.base_delta):
        adapted.fill(broadcast.tensors | memory, any_rank=scales is not None)
        return score(adapted.logits, adapted.base.task, examples, weights=weights, batch=batch)
