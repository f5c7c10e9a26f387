"""What crosses the wire, and the check that what came back fits what was sent."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from weakref import WeakKeyDictionary

import torch

from fedpeft.lowrank import LowRank, cut
from fedpeft.tensors import Names, Tensors, is_own, only, rank_axes

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

    def only(self, names: Names) -> "Update":
        """The update without the tensors whose names do not satisfy `names`."""
        return replace(self, tensors=only(self.tensors, names))


def proportions(updates: Iterable[Update]) -> list[tuple[float, Update]]:
    """All updates, each with its share p_k of the round's weight; the shares add up to 1."""
    held = list(updates)
    whole = sum(update.weight for update in held)
    if not held or not math.isfinite(whole):
        raise ValueError("no update of finite weight came; did every client fail this round?")
    return [(update.weight / whole, update) for update in held]


_SIZED: WeakKeyDictionary[Broadcast, dict[int, Broadcast]] = WeakKeyDictionary()


def sized(model: Broadcast, rank: int | None) -> Broadcast:
    """`model` with every pair cut to its first `rank` columns; None: as it is.

    The same object for the same question as long as the model lives, so that it is packed once for all clients of one rank.
    """
    if rank is None:
        return model
    cuts = _SIZED.setdefault(model, {})
    if rank not in cuts:
        cuts[rank] = replace(model, tensors=cut(model.tensors, rank))
    return cuts[rank]


def checked(update: Update, sent: Broadcast, shares: Names, *, equal: bool) -> Update:
    """The update, if it has every shared tensor it was sent, none of a higher rank, all of one dtype with it and finite.

    `equal` asks for equal shapes (a strategy that takes a mean); otherwise a client may send a smaller rank than it was sent, the same in
    both factors of a layer. Raises `ValueError` naming the client, the tensor, what was got and what was needed.
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
    ranks: dict[str, int] = {}
    for name, tensor in update.tensors.items():
        like, free = sent.tensors.get(name, tensor), () if equal else rank_axes(name)
        fits = tensor.dim() == like.dim() and all(
            (1 <= a <= b if axis in free else a == b) for axis, (a, b) in enumerate(zip(tensor.shape, like.shape, strict=True))
        )
        if not fits or tensor.dtype != like.dtype:
            raise ValueError(
                f"client {update.client}: {name} is {tuple(tensor.shape)} {tensor.dtype}, sent was {tuple(like.shape)} {like.dtype}"
            )
        for axis in free:
            if ranks.setdefault(name[:-2], tensor.shape[axis]) != tensor.shape[axis]:
                raise ValueError(f"client {update.client}: the factors of {name[:-2]} have two ranks; needed is one for both")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"client {update.client}: {name} is not finite; lower train.lr or set train.clip")
    return update


def _few(names: set[str], most: int = 3) -> str:
    listed = ", ".join(sorted(names)[:most]) or "none"
    return listed + (f" and {len(names) - most} more" if len(names) > most else "")
