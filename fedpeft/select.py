"""Selections: what of a round's updates is aggregated, against hostile clients.

A selection stands between the checked updates and `Strategy.aggregate`, so it composes with every strategy; median and trimmed mean are
`Mean`s. It reads its input to the end, and an exception from there (too few answered) passes through. A client says itself how many
examples it has: `weights=uniform` keeps an update that passed from counting more than another.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from statistics import median

import torch
from torch import Tensor

from fedpeft.lowrank import product
from fedpeft.messages import Broadcast, Update
from fedpeft.tensors import Tensors, is_own, norm

Sent = Callable[[int], Broadcast]  # what a client started from
Selection = Callable[[Iterable[Update], Sent], Iterator[Update]]  # updates in client order, and so the result

CHUNK = 1 << 18  # entries of a plain tensor compared at once: 200 MB of float64 for 100 clients


def everyone() -> Selection:
    """All updates as they are."""
    return lambda updates, sent: iter(updates)


def norm_bound(bound: float | None = None, factor: float = 2.0) -> Selection:
    """All updates, each scaled to a difference from what its client was sent of Euclidean norm at most `bound`.

    Sun et al., Can You Really Backdoor Federated Learning?, 2019, https://arxiv.org/abs/1911.07963. The norm is that of all
    floating-point tensors together and of the factors, not of their products; a longer update becomes start + scale * (now - start) per
    coordinate, an integer tensor stays. A client that pruned is compared with what it was sent, cut to its shape.
    With `bound` holds one update at a time, and `factor` has no say; without, `bound` is `factor` times the median norm of this round's
    updates, all of which are held.
    """
    if bound is not None and not _positive(bound):
        raise ValueError(f"select.bound={bound}: needed is a norm greater than 0, or null for select.factor times the round's median")
    if not _positive(factor):
        raise ValueError(f"select.factor={factor}: needed is a number greater than 0, of median norms")

    def select(updates: Iterable[Update], sent: Sent) -> Iterator[Update]:
        most = bound
        if most is None:
            updates = list(updates)
            most = factor * median(norm(_moves(update, sent)) for update in updates) if updates else 0.0
        for update in updates:
            moves = _moves(update, sent)
            far = norm(moves)
            yield update if far <= most else _shortened(update, sent, moves, most / far)

    return select


def krum(hostile: float = 0.2, keep: int | None = 1) -> Selection:
    """The `keep` updates that lie closest to their nearest others; None: K - f of K (multi-Krum). Holds all updates.

    Blanchard et al., Machine Learning with Adversaries, NeurIPS 2017: an update's score is the sum of its squared distances to its
    K - f - 2 nearest others; of equal scores the lower client wins. `hostile` below 1 is a share of the K updates, rounded up to f, else f
    itself. Needs K >= f + 3; the paper's guarantee needs K >= 2 f + 3. No more than K - f are kept.

    Distances lie between changes since the broadcast. Low-rank layers are compared by their products, so that (B Q, Q^-1 A) is no outlier;
    a factor or core that was not uploaded is the broadcast's. Other tensors are compared by their entries, and so is the A of a layer of
    which nothing else came: its B may have stayed at the client. What a client was not sent counts as unchanged; integers and a strategy's
    own tensors are not compared. A layer costs O((m + n) (K r)^2), up to four times as much if every client was sent another thing.
    """
    if not (_positive(hostile) or hostile == 0) or (hostile >= 1 and hostile != int(hostile)):
        raise ValueError(f"select.hostile={hostile}: needed is a share of the cohort below 1, or a whole number of clients")
    if keep is not None and (isinstance(keep, bool) or not isinstance(keep, int) or keep < 1):
        raise ValueError(f"select.keep={keep}: needed is a whole number of at least 1, or null for cohort - hostile")

    def select(updates: Iterable[Update], sent: Sent) -> Iterator[Update]:
        held = sorted(updates, key=lambda update: update.client)
        cohort = len(held)
        f = int(hostile) if hostile >= 1 else math.ceil(hostile * cohort - 1e-9)  # 0.07 * 100 is a little more than 7
        if cohort < f + 3:
            raise ValueError(
                f"krum needs cohort >= hostile + 3, got {cohort} updates and hostile {f} (select.hostile={hostile}); "
                "raise cohort or min_clients, or lower select.hostile"
            )
        far = _squared_distances(held, sent).fill_diagonal_(torch.inf)
        scores = far.sort(1).values[:, : cohort - f - 2].sum(1).tolist()
        best = sorted(range(cohort), key=lambda k: scores[k])[: min(keep or cohort, cohort - f)]
        yield from (held[k] for k in sorted(best))

    return select


def _positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _moves(update: Update, sent: Sent) -> Tensors:
    """Now - start in float64, of every floating-point tensor that was sent and came back."""
    start = sent(update.client).tensors
    return {
        name: now.double() - _cut(start[name], now) for name, now in update.tensors.items() if name in start and now.is_floating_point()
    }


def _cut(start: Tensor, like: Tensor) -> Tensor:
    return start[tuple(slice(size) for size in like.shape)].double()


def _shortened(update: Update, sent: Sent, moves: Tensors, scale: float) -> Update:
    start = sent(update.client).tensors
    short = {name: (_cut(start[name], move) + scale * move).to(update.tensors[name].dtype) for name, move in moves.items()}
    return replace(update, tensors=update.tensors | short)


def _squared_distances(updates: Sequence[Update], sent: Sent) -> Tensor:
    """(K, K) between the changes of K updates, from inner products of everything that came and everything that was sent."""
    began = [sent(update.client) for update in updates]
    starts = list(dict.fromkeys(began))  # each broadcast once, by identity
    ends = [start.tensors | update.tensors for start, update in zip(began, updates, strict=True)]
    inner = _inner([*ends, *(start.tensors for start in starts)], {name for update in updates for name in update.tensors})
    cohort, base = len(updates), [len(updates) + starts.index(start) for start in began]
    # <a - s, b - t> by its four terms and by indexing alone: a matrix product would spread one client's inf to all.
    change = inner[:cohort, :cohort] - inner[:cohort, base] - inner[base, :cohort] + inner[base][:, base]
    squares = change.diagonal()[:, None] + change.diagonal()[None] - (change + change.T)
    return squares.nan_to_num(nan=torch.inf, posinf=torch.inf)  # overflow: as far as can be


def _inner(items: Sequence[Tensors], uploaded: set[str]) -> Tensor:
    """(len(items),) * 2 inner products, summed over the layers and tensors of which `uploaded` has a part."""
    total = torch.zeros(len(items), len(items), dtype=torch.float64)
    known = {name for item in items for name in item}
    layers = {
        name[:-2]
        for name in uploaded
        if name.endswith((".B", ".R", ".H")) and {name[:-2] + ".A", name[:-2] + ".B"} <= known and not is_own(name)
    }
    for layer in sorted(layers):
        total += _of_products(items, layer)
    parts = {f"{layer}.{part}" for layer in layers for part in "ABRH"}
    for name in sorted(uploaded - parts):
        if not is_own(name):
            total += _of_entries([item.get(name) for item in items])
    return total


def _of_products(items: Sequence[Tensors], layer: str) -> Tensor:
    """Inner products of the layer's products by the Grams of all B side by side and all A on top of each other."""
    made = [(k, product(item, layer)) for k, item in enumerate(items) if layer + ".B" in item]
    B, A = torch.cat([one.B.double() for _, one in made], 1), torch.cat([one.A.double() for _, one in made])
    owner = torch.tensor([k for k, one in made for _ in range(one.rank)])
    columns = B.new_zeros(len(A), len(items)).index_add_(1, owner, (B.T @ B).mul_(A @ A.T))
    return B.new_zeros(len(items), len(items)).index_add_(0, owner, columns)


def _of_entries(tensors: Sequence[Tensor | None]) -> Tensor:
    """Inner products of floating-point tensors, a smaller one padded with zeros; None is zero."""
    total = torch.zeros(len(tensors), len(tensors), dtype=torch.float64)
    there = [(k, tensor) for k, tensor in enumerate(tensors) if tensor is not None and tensor.is_floating_point()]
    if not there:
        return total
    at = torch.tensor([k for k, _ in there])
    shape = [max(sizes) for sizes in zip(*(tensor.shape for _, tensor in there), strict=True)]
    flat = [_padded(tensor, shape).flatten() for _, tensor in there]
    for first in range(0, len(flat[0]), CHUNK):
        rows = torch.stack([one[first : first + CHUNK].double() for one in flat])
        total[at[:, None], at] += rows @ rows.T
    return total


def _padded(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    if list(tensor.shape) == list(shape):
        return tensor
    wide = tensor.new_zeros(list(shape))
    wide[tuple(slice(size) for size in tensor.shape)] = tensor
    return wide
