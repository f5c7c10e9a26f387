"""What crosses the wire, and the check that what came back fits what was sent."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from fedpeft.lowrank import LowRank
from fedpeft.tensors import Names, Tensors, is_own

MOST_EXAMPLES = 2.0**53  # beyond it floats no longer count, and a few such weights have no finite sum


@dataclass(frozen=True, eq=False)
class Broadcast:
    """Where a client starts: adapter tensors, and low-rank products to add to its frozen base, in order, never edited.

    `base_delta` is a tuple of chunks, each a mapping from layer to product: a server only ever appends, so a client that missed rounds
    needs only the chunks since.
    """

    tensors: Tensors
    base_delta: tuple[Mapping[str, LowRank], ...] = ()


@dataclass(frozen=True, eq=False)
class Update:
    """Where a client ended: the tensors it shares (values, not differences), and the number of examples they stand for."""

    client: int
    tensors: Tensors
    weight: float
    metrics: Mapping[str, float] = field(default_factory=dict)  # for the ledger; no strategy reads it


def checked(update: Update, sent: Broadcast, shares: Names, *, equal: bool) -> Update:
    """The update, if it has every shared tensor it was sent, none larger, all of one dtype with it and finite.

    `equal` asks for equal shapes (a strategy that takes a mean); otherwise a client may send a smaller rank than it was sent.
    Raises `ValueError` naming the client, the tensor, what was got and what was needed.
    """
    want = {name for name in sent.tensors if shares(name) and not is_own(name)}
    got = {name for name in update.tensors if not (is_own(name) and shares(name))}
    if got != want:
        raise ValueError(
            f"client {update.client} sent other tensors than this round shares: missing {_few(want - got)}, unasked {_few(got - want)}; "
            "do server and client run the same strategy, adapter and model?"
        )
    if odd := {name for name in update.tensors if is_own(name) and name not in sent.tensors}:
        raise ValueError(f"client {update.client} sent {_few(odd)}, which no strategy sent it")
    if not 0 < update.weight <= MOST_EXAMPLES:
        raise ValueError(f"client {update.client} sent weight {update.weight}; needed is a number of examples, more than 0")
    for name, tensor in update.tensors.items():
        like = sent.tensors.get(name, tensor)
        smaller = tensor.dim() == like.dim() and all(a <= b for a, b in zip(tensor.shape, like.shape, strict=True))
        if not (tensor.shape == like.shape if equal else smaller) or tensor.dtype != like.dtype:
            raise ValueError(
                f"client {update.client}: {name} is {tuple(tensor.shape)} {tensor.dtype}, sent was {tuple(like.shape)} {like.dtype}"
            )
        if not torch.isfinite(tensor).all():
            raise ValueError(f"client {update.client}: {name} is not finite; lower train.lr or set train.clip")
    return update


def _few(names: set[str], most: int = 3) -> str:
    listed = ", ".join(sorted(names)[:most]) or "none"
    return listed + (f" and {len(names) - most} more" if len(names) > most else "")
