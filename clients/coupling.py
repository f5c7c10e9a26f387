"""Coupling: does what a model makes of one example change with the others of its batch?

Statistics over a batch, or experts with room for so many tokens, let one example into the gradients of others: a wave would mix clients,
and no clip of single examples would bound what one of them does. Asked with numbers: one example among random others, and other others.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedpeft.adapters.base import Adapted
from fedpeft.models.base import Examples
from fedpeft.models.score import losses

MANY = 8  # examples of the batch: what couples may do so only when there are more than two
BOUND = {torch.float64: 1e-8, torch.float32: 1e-4}  # of the base's dtype, over the norm: both batches have one shape, rounding is alike
HALF = 5e-2


def coupled(adapted: Adapted, examples: Examples, row: int, moving: Mapping[str, nn.Parameter] | None = None) -> bool:
    """True if the logits of the example `row` change with the others of its batch, or the gradient of its loss in `moving`.

    Nothing of another example of the data is looked at.
    """
    bound = BOUND.get(next(adapted.base.module.parameters()).dtype, HALF)
    one, other = (_seen(adapted, examples, row, moving or {}, seed) for seed in (0, 1))
    return not all(bool((mine - its).norm() <= bound * mine.norm()) for mine, its in zip(one, other, strict=True))


def _seen(adapted: Adapted, examples: Examples, row: int, moving: Mapping[str, nn.Parameter], seed: int) -> list[Tensor]:
    inputs, targets = examples.batch(torch.tensor([row]))
    rng = torch.Generator().manual_seed(seed)
    among = {name: torch.cat([tensor, *(_another(name, tensor, rng) for _ in range(MANY - 1))]) for name, tensor in inputs.items()}
    with torch.set_grad_enabled(bool(moving)):
        logits = adapted.logits(among)[:1]
        if not moving:
            return [logits.detach()]
        loss = losses(adapted.base.task, logits, targets.to(logits.device)).sum()
    found = torch.autograd.grad(loss, list(moving.values()), allow_unused=True)
    return [logits.detach(), *(grad for grad in found if grad is not None)]


def _another(name: str, tensor: Tensor, rng: torch.Generator) -> Tensor:
    """Random pixels, or random tokens below the largest that is there; masks and kinds of tokens as they are."""
    if tensor.is_floating_point():
        return torch.randn(tensor.shape, generator=rng).to(tensor.dtype)
    if name == "input_ids":
        return torch.randint(int(tensor.max()) + 1, tensor.shape, generator=rng).to(tensor.dtype)
    return tensor
