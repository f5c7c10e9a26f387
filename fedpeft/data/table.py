"""Table and Dataset: examples as their owner has them, before a model's tokenizer or processor."""

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from fedpeft import seeds

Task = Literal["text", "image", "language"]  # sequence classification, image classification, causal language modelling
Inputs = tuple[str, ...] | tuple[tuple[str, str], ...] | Tensor  # texts, text pairs, or images float32 (N, C, H, W) in [0, 1]


@dataclass(frozen=True, eq=False)
class Table:
    """Examples before a model's tokenizer or processor has seen them."""

    inputs: Inputs
    labels: Tensor  # (N,) int64 class indices; zeros for language
    groups: tuple[str, ...] | None = None  # natural owner of each example (author, speaker), if the data names one

    def __post_init__(self) -> None:
        lengths = {"inputs": len(self.inputs), "labels": len(self.labels)} | ({} if self.groups is None else {"groups": len(self.groups)})
        if len(set(lengths.values())) > 1:
            raise ValueError(f"a table needs one of each for every example, got {lengths}")

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, indices: Tensor) -> "Table":
        """The examples at `indices` (int64), in that order."""
        at: list[int] = indices.tolist()
        return Table(
            inputs=_picked(self.inputs, indices, at),
            labels=self.labels[indices],
            groups=None if self.groups is None else tuple(self.groups[i] for i in at),
        )


@dataclass(frozen=True, eq=False)
class Dataset:
    """A task: examples to be dealt to clients, and examples to measure on."""

    task: Task
    train: Table
    test: Table
    classes: tuple[str, ...]  # class names in the order of the labels; () for language
    public: Table | None = None  # disjoint examples that a small base model may be pre-trained on


class Source(Protocol):
    """What a data preset's `_target_` builds."""

    def read(self, seed: int) -> Dataset:
        """The data set; every random choice in it (held-out rows, a limit) comes from `seed`."""
        ...


def held_out(table: Table, share: float, seed: int, *, key: str) -> tuple[Table, Table]:
    """The table without a random `share` of its rows, and those rows: both in file order, neither empty.

    `key` is the config field that holds the share (`test_share`); it also keeps draws for different fields apart.
    """
    if not 0 < share < 1:
        raise ValueError(f"data.{key}={share}: needed is a share of the rows between 0 and 1, such as data.{key}=0.2")
    if len(table) < 2:
        raise ValueError(f"data.{key}={share}: {len(table)} row cannot be split in two; give more rows")
    count = min(max(1, round(share * len(table))), len(table) - 1)
    order = torch.randperm(len(table), generator=seeds.generator(seed, purpose=f"data {key}"))
    return table.rows(order[count:].sort().values), table.rows(order[:count].sort().values)


def limited(table: Table, limit: int | None, seed: int, *, part: Literal["train", "test"]) -> Table:
    """At most `limit` random rows in file order; all of them if `limit` is None."""
    if limit is None:
        return table
    if not isinstance(limit, int) or limit < 1:
        raise ValueError(f"data.limit={limit}: needed is a whole number of at least 1 row, or data.limit=null for all")
    order = torch.randperm(len(table), generator=seeds.generator(seed, purpose=f"data limit {part}"))
    return table.rows(order[:limit].sort().values)


def _picked(inputs: Inputs, indices: Tensor, at: list[int]) -> Inputs:
    if isinstance(inputs, Tensor):
        return inputs[indices]
    return tuple(inputs[i] for i in at)  # type: ignore[return-value]  # all texts or all pairs, as in `inputs`
