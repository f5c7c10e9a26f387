"""Losses and accuracies, the same on both sides.

The loss is per example: the mean over a text's own tokens, never over the tokens of a batch, so that no example's loss depends on its
neighbours (differential privacy needs that, and micro-batches of any size then add up to the same gradient).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fedpeft.data.table import Task
from fedpeft.models.base import Examples, in_batches

Logits = Callable[[dict[str, Tensor]], Tensor]


@dataclass(frozen=True)
class Score:
    """Mean loss, accuracy in [0, 1] (of the next token, for language), and the examples they were taken over."""

    loss: float
    accuracy: float
    examples: int


def losses(task: Task, logits: Tensor, targets: Tensor) -> Tensor:
    """(b,) cross-entropy of each example, in nats."""
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    if task != "language":
        return F.cross_entropy(logits, targets, reduction="none")
    ahead = targets[:, 1:]
    each = F.cross_entropy(logits[:, :-1].transpose(1, 2), ahead, ignore_index=-100, reduction="none")
    return each.sum(1) / (ahead != -100).sum(1).clamp(min=1)


def hits(task: Task, logits: Tensor, targets: Tensor) -> Tensor:
    """(b,) 1 where the class is right; for language the share of next tokens that are."""
    if task != "language":
        return (logits.argmax(-1) == targets).float()
    ahead = targets[:, 1:]
    right = (logits[:, :-1].argmax(-1) == ahead) & (ahead != -100)
    return right.sum(1) / (ahead != -100).sum(1).clamp(min=1)


@torch.no_grad()
def examined(logits: Logits, task: Task, examples: Examples, rows: Tensor, *, batch: int = 128) -> Tensor:
    """(2, N) float64: loss and hit of each of `rows`, zeros elsewhere."""
    seen = torch.zeros(2, len(examples), dtype=torch.float64)
    for some in in_batches(examples, rows, batch):
        inputs, targets = examples.batch(some)
        out = logits(inputs)
        targets = targets.to(out.device)
        seen[0, some] = losses(task, out, targets).double().cpu()
        seen[1, some] = hits(task, out, targets).double().cpu()
    return seen


def score(logits: Logits, task: Task, examples: Examples, *, weights: Tensor | None = None, batch: int = 128) -> Score:
    """The score over all examples, each counted once or by its weight (N,)."""
    if not len(examples):
        raise ValueError("there are no test examples; give the data a test file or data.test_share=0.2")
    weights = torch.ones(len(examples)) if weights is None else weights
    if not weights.any():
        raise ValueError("no test example has a label that this client holds; give the data more test rows")
    seen = examined(logits, task, examples, weights.nonzero()[:, 0], batch=batch)
    loss, right = (seen @ weights.double() / weights.double().sum()).tolist()
    return Score(loss, right, len(examples))
