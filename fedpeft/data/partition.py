"""Which rows of the training table each client owns.

Label skew as in Yurochkin et al., Bayesian Nonparametric Federated Learning of Neural Networks, ICML 2019. https://arxiv.org/abs/1905.12022
Shards as in McMahan et al., Communication-Efficient Learning of Deep Networks, AISTATS 2017, section 3. https://arxiv.org/abs/1602.05629
"""

from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from fedpeft.data.deal import Draw, Owners, deal

Scheme = Literal["iid", "dirichlet", "shards", "quantity", "natural"]
MOST_ALPHA = 1e6  # shares are even long before; far above, their sum overflows


@dataclass(frozen=True, eq=False)
class Split:
    """Which rows of the training table each client owns: sorted, disjoint."""

    clients: tuple[Tensor, ...]
    note: str  # how it came about: scheme, redraws, moved examples; one sentence for the report
    names: tuple[str, ...]  # owners of the rows for natural, "0", "1", ... otherwise


class Partition(Protocol):
    """A scheme. `clients` clients, each with at least `min_examples` rows."""

    def __call__(self, labels: Tensor, groups: tuple[str, ...] | None, clients: int, *, min_examples: int, seed: int) -> Split:
        """The split; `labels` are class indices, `groups` the natural owners."""
        ...


def partition(
    labels: Tensor,
    groups: tuple[str, ...] | None,
    *,
    clients: int,
    scheme: Scheme = "dirichlet",
    alpha: float = 0.5,
    shards: int = 2,
    min_examples: int = 2,
    seed: int,
) -> Split:
    """The rows (N,) dealt to `clients` clients: all of them, but for `natural`.

    `alpha`: concentration of `dirichlet` and `quantity`, the smaller the more skewed. `shards`: label blocks per client.
    """
    schemes: dict[Scheme, Partition] = {
        "iid": iid,
        "dirichlet": Dirichlet(alpha),
        "shards": Shards(shards),
        "quantity": Quantity(alpha),
        "natural": natural,
    }
    if scheme not in schemes:
        raise ValueError(f"data.partition.scheme={scheme}: needed is one of {', '.join(schemes)}")
    if clients < 1 or min_examples < 1:
        raise ValueError(f"clients={clients} data.min_examples={min_examples}: needed is at least 1 of each")
    return schemes[scheme](labels, groups, clients, min_examples=min_examples, seed=seed)


def iid(labels: Tensor, groups: tuple[str, ...] | None, clients: int, *, min_examples: int, seed: int) -> Split:
    """Random rows, sizes equal up to one."""
    return _dealt("iid", lambda draw: draw.permutation(len(labels)) % clients, labels, clients, min_examples, seed)


@dataclass(frozen=True)
class Dirichlet:
    """Label skew: every class is cut over the clients by its own Dirichlet(alpha) proportions."""

    alpha: float

    def __call__(self, labels: Tensor, groups: tuple[str, ...] | None, clients: int, *, min_examples: int, seed: int) -> Split:
        """The split."""
        rows = labels.numpy()
        classes = [np.flatnonzero(rows == label) for label in np.unique(rows)]

        def owners(draw: np.random.Generator) -> Owners:
            owner = np.empty(len(rows), dtype=np.int64)
            for members in classes:
                owner[draw.permutation(members)] = np.repeat(np.arange(clients), _sizes(draw, len(members), clients, self.alpha))
            return owner

        return _dealt(f"dirichlet(alpha={self.alpha:g}) per class", owners, labels, clients, min_examples, seed)


@dataclass(frozen=True)
class Shards:
    """Few labels: rows sorted by label are cut into clients x count equal shards, and each client is dealt `count` of them."""

    count: int

    def __call__(self, labels: Tensor, groups: tuple[str, ...] | None, clients: int, *, min_examples: int, seed: int) -> Split:
        """The split."""
        if self.count < 1 or len(labels) < clients * self.count:
            raise ValueError(
                f"data.partition.shards={self.count} for clients={clients} makes {clients * self.count} shards of {len(labels)} rows; "
                "needed is 1 to rows / clients"
            )

        def owners(draw: np.random.Generator) -> Owners:
            order = draw.permutation(len(labels))
            order = order[np.argsort(labels.numpy()[order], kind="stable")]
            shard = np.arange(len(labels)) * (clients * self.count) // len(labels)
            owner = np.empty(len(labels), dtype=np.int64)
            owner[order] = (draw.permutation(clients * self.count) % clients)[shard]
            return owner

        return _dealt(f"{self.count} shards of sorted labels per client", owners, labels, clients, min_examples, seed)


@dataclass(frozen=True)
class Quantity:
    """Quantity skew: sizes by Dirichlet(alpha), labels random."""

    alpha: float

    def __call__(self, labels: Tensor, groups: tuple[str, ...] | None, clients: int, *, min_examples: int, seed: int) -> Split:
        """The split."""

        def owners(draw: np.random.Generator) -> Owners:
            return draw.permutation(np.repeat(np.arange(clients), _sizes(draw, len(labels), clients, self.alpha)))

        return _dealt(f"sizes by dirichlet(alpha={self.alpha:g})", owners, labels, clients, min_examples, seed)


def natural(labels: Tensor, groups: tuple[str, ...] | None, clients: int, *, min_examples: int, seed: int) -> Split:
    """One client per owner: the `clients` largest with at least `min_examples` rows, largest first, ties by name. Nothing is drawn."""
    if groups is None:
        raise ValueError("data.partition.scheme=natural: the data names no owners; name their column with data.group=COLUMN")
    ranked = sorted(Counter(groups).items(), key=lambda item: (-item[1], item[0]))
    large = [name for name, size in ranked if size >= min_examples]
    if len(large) < clients:
        raise ValueError(
            f"clients={clients}: {len(large)} of {len(ranked)} owners have at least data.min_examples={min_examples} rows; "
            + (f"use clients={len(large)} or fewer, or a smaller data.min_examples" if large else "use a smaller data.min_examples")
        )
    client = {name: at for at, name in enumerate(large[:clients])}
    owner = np.array([client.get(name, -1) for name in groups], dtype=np.int64)
    left_out = int((owner < 0).sum())
    note = f"one client per owner, the {clients} largest of {len(ranked)}; {left_out} rows of the others are left out"
    return Split(_rows(owner, clients), note, tuple(client))


def owned_by(client: int, rows: int, clients: int) -> Split:
    """All rows are one client's, who is alone with them; nothing is dealt."""
    each = tuple(torch.arange(rows if one == client else 0) for one in range(clients))
    return Split(each, "all of this site's rows are its own", tuple(map(str, range(clients))))


def histogram(split: Split, labels: Tensor, classes: int) -> Tensor:
    """How many rows of each class each client owns: (clients, classes) int64; one column if there are no classes (language)."""
    width = max(classes, 1)
    return torch.stack([torch.bincount(labels[rows], minlength=width) for rows in split.clients])


def describe(split: Split, labels: Tensor, class_count: int) -> dict[str, float | int | str]:
    """The split in numbers: sizes in rows, and the mean number of different labels at a client."""
    sizes = [len(rows) for rows in split.clients]
    return {
        "clients": len(sizes),
        "rows": sum(sizes),
        "smallest": min(sizes),
        "median": float(np.median(sizes)),
        "largest": max(sizes),
        "labels_per_client": float((histogram(split, labels, class_count) > 0).sum(dim=1).double().mean()),
        "note": split.note,
    }


def _dealt(what: str, draw: Draw, labels: Tensor, clients: int, min_examples: int, seed: int) -> Split:
    owner, how = deal(draw, labels.numpy(), clients, min_examples, seed)
    return Split(_rows(owner, clients), f"{what}, {how}", tuple(map(str, range(clients))))


def _sizes(draw: np.random.Generator, rows: int, clients: int, alpha: float) -> Owners:
    """`rows` cut by Dirichlet(alpha) proportions: (clients,) sizes, each within one of its proportion."""
    if not 0 < alpha <= MOST_ALPHA:
        raise ValueError(
            f"data.partition.alpha={alpha}: needed is a number above 0, at most {MOST_ALPHA:g}, the smaller the more skewed; "
            "for no skew use data.partition.scheme=iid"
        )
    ends = np.cumsum(draw.dirichlet(np.full(clients, alpha))) * rows
    # One random offset for all cuts: rounding down would shift half a row per class from the first client to the last.
    cuts = np.minimum(np.floor(ends + draw.random()), rows).astype(np.int64)
    cuts[-1] = rows
    return np.diff(cuts, prepend=0)


def _rows(owner: Owners, clients: int) -> tuple[Tensor, ...]:
    """The rows of each client, sorted; those of client -1 belong to nobody."""
    order = np.argsort(owner, kind="stable")
    ends = np.searchsorted(owner[order], np.arange(clients + 1))
    return tuple(torch.from_numpy(order[start:end]) for start, end in pairwise(ends))
