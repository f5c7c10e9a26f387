"""Base: a frozen model with its task head, and the examples it can run."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor, nn

from fedpeft.data.table import Dataset, Table, Task
from fedpeft.tensors import Tensors


class Examples(Protocol):
    """Encoded examples: what a model's forward pass takes, for any choice of rows."""

    @property
    def labels(self) -> Tensor:
        """(N,) class of each example; zeros for language."""
        ...

    def __len__(self) -> int: ...

    def lengths(self) -> Tensor:
        """(N,) tokens of each example."""
        ...

    def batch(self, rows: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Keyword arguments of the model, and the targets: (b,) classes, or (b, T) token ids with -100 where nothing is predicted."""
        ...


@dataclass(frozen=True, eq=False)
class Images:
    """Dense images."""

    pixels: Tensor  # (N, C, H, W) float32
    labels: Tensor
    positions: int = 1  # that a transformer makes of an image: what its passes cost

    def __len__(self) -> int:
        return len(self.labels)

    def lengths(self) -> Tensor:
        """All equal."""
        return torch.full((len(self),), self.positions)

    def batch(self, rows: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """`pixel_values` and classes."""
        return {"pixel_values": self.pixels[rows]}, self.labels[rows]


@dataclass(frozen=True, eq=False)
class Tokens:
    """Token rows of unequal length, end to end; a batch is padded to its own longest row."""

    ids: Tensor  # (sum of lengths,) int32
    ends: Tensor  # (N,) int64: where each row ends in `ids`
    labels: Tensor  # (N,)
    padding: int  # token id
    left: bool = False  # pad on the left
    types: Tensor | None = None  # (sum of lengths,) int8: 1 for the second sentence of a pair
    predicts: bool = False  # causal language modelling: the targets are the tokens themselves

    def __len__(self) -> int:
        return len(self.ends)

    def lengths(self) -> Tensor:
        """Tokens of each row."""
        return self._sizes

    @cached_property
    def _sizes(self) -> Tensor:
        return self.ends.diff(prepend=self.ends.new_zeros(1))

    def batch(self, rows: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """`input_ids`, `attention_mask` (and `token_type_ids`), and classes or token targets."""
        sizes = self._sizes[rows].unsqueeze(1)
        width = int(sizes.max())
        at = torch.arange(width) - (width - sizes if self.left else 0)
        there = ((at >= 0) & (at < sizes)).expand(len(rows), width)
        place = (self.ends[rows].unsqueeze(1) - sizes + at).clamp(0, len(self.ids) - 1)
        ids, mask = self.ids[place].long().where(there, self.padding), there.long()
        inputs = {"input_ids": ids, "attention_mask": mask}
        if self.types is not None:
            inputs["token_type_ids"] = self.types[place].long().where(there, 0)
        return inputs, ids.masked_fill(mask == 0, -100) if self.predicts else self.labels[rows]


@dataclass(eq=False)
class Base:
    """A frozen model in eval mode. `head` names the parameters of its task head, which every adapter trains with its own tensors."""

    module: nn.Module
    task: Task
    head: tuple[str, ...]
    encode: Callable[[Table], Examples]
    source: str  # hub id or folder that stock transformers loads the same weights from
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    vocabulary: str = ""  # digest of its tokenizer's words and their numbers, where it has some

    def __post_init__(self) -> None:
        self.module.requires_grad_(False)
        self.module.eval()
        own = dict(self.module.named_parameters())
        self.start: Tensors = {name: own[name].detach().clone() for name in self.head}

    @cached_property
    def fingerprint(self) -> str:
        """Digest of every frozen parameter: name, dtype, shape and bytes. The head is not frozen and does not count."""
        made = hashlib.blake2b(digest_size=16)
        for name, tensor in sorted(self.module.state_dict().items()):
            if name not in self.head:
                made.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                made.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
        return made.hexdigest()


class ModelSource(Protocol):
    """What a model preset builds."""

    def load(self, dataset: Dataset, *, seed: int, device: torch.device) -> Base:
        """The base model with a head for the data set's classes; the same bits for the same seed."""
        ...


def in_batches(examples: Examples, rows: Tensor, size: int) -> Iterator[Tensor]:
    """`rows` in batches of `size`, sorted by length so that little is padded."""
    ordered = rows[examples.lengths()[rows].argsort(stable=True)]
    yield from ordered.split(size)
