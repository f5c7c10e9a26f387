"""Exact shortcuts through a model: frozen layers below the lowest adapter are computed once per sample and kept; of the last layer only
the row that the classifier reads is computed.

The output of frozen layers depends on the sample alone, so it is the same in every step and round and for every strategy. Which layers
these are, and which row is read, is known for four families (BERT, ViT, GPT-2, Llama); a shortcut is taken only after it gave the whole
model's logits on examples of this very run.
"""

import contextlib
import hashlib
import logging
import mmap
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from clients.stack import Stack
from clients.tails import FAMILIES, Family, Row, taken
from fedpeft.models.base import Examples, Tokens

log = logging.getLogger("fedpeft")
FILL = 1024  # padded tokens of a pass that fills the store: fixed, for another cut rounds otherwise


@dataclass(frozen=True, eq=False)
class Shortcut:
    """A way through the model: `below` layers come from the store, the last computes one row if `tail`."""

    stack: Stack
    examples: Examples
    below: int
    tail: bool
    family: Family | None
    store: "Store | None"
    _state: "_State" = field(default_factory=lambda: _State())

    @contextmanager
    def on(self) -> Iterator[None]:
        """Puts the shortcut into the model, and takes it out."""
        if self.family is None or not (self.below or self.tail):
            yield
            return
        root, layers = _root(self.stack), _layers(self.stack, self.family)
        kept = list(layers)[self.below :]
        self._state.row = None
        if self.tail and kept:
            kept[-1] = _LastLayer(kept[-1], self.family, self._state)
        places: list[tuple[str, nn.Module]] = [(self.family.layers, nn.ModuleList(kept))]
        if self.below:
            places.append((self.family.embedding, _Given(root.get_submodule(self.family.embedding), self._state)))
            places += [(path, _Silent(root.get_submodule(path))) for path in self.family.silent]
        with _replaced(root, places):
            yield

    def batch(self, rows: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Like `Examples.batch`; what is in the store must have been filled for these rows."""
        inputs, targets = self.examples.batch(rows)
        if self.family is None:
            return inputs, targets
        device = self.stack.adapted.base.device
        self._state.row = _row(self.stack, self.family, inputs, device) if self.tail else None
        if self.store is None:
            return inputs, targets
        single = self.store.single
        width = 1 if single else self.store.width(rows)
        self._state.hidden = self.store.padded(rows, width, left=isinstance(self.examples, Tokens) and self.examples.left).to(device)
        if single and "input_ids" in inputs:
            inputs = _one_token(inputs, self.examples)
        return inputs, targets

    @torch.no_grad()
    def fill(self, rows: Tensor) -> None:
        """Computes what the store lacks of `rows`, in blocks that do not depend on what is asked for: who comes first changes no bit."""
        if self.store is None or self.family is None or not (missing := self.store.missing(rows)):
            return
        root, layers = _root(self.stack), list(_layers(self.stack, self.family))
        whole = layers[: self.below]
        state, device = self._state, self.stack.adapted.base.device
        if self.store.single:
            whole[-1] = _LastLayer(whole[-1], self.family, state)
        caught = _Caught(whole[-1])
        with _replaced(root, [(self.family.layers, nn.ModuleList([*whole[:-1], caught]))]):
            for block in missing:
                inputs, _ = self.examples.batch(block)
                state.row = _row(self.stack, self.family, inputs, device) if self.store.single else None
                with contextlib.suppress(_Reached):
                    self.stack.logits(inputs)
                out = caught.hidden
                assert out is not None
                if self.store.single and self.family.reads_last:
                    assert state.row is not None
                    out = taken(out, state.row)
                self.store.put(block, out.cpu(), left=isinstance(self.examples, Tokens) and self.examples.left)


# For as long as the examples live: what frozen layers give is the same under every adapter and strategy.
_KEPT: WeakKeyDictionary[Examples, dict[tuple[object, ...], "Store"]] = WeakKeyDictionary()


class Store:
    """Hidden states of all examples, end to end, in memory that forked processes share."""

    def __init__(
        self, sizes: Tensor, width: int, dtype: torch.dtype, *, groups: Sequence[Tensor], single: bool, folder: Path | None
    ) -> None:  # fmt: skip
        self.single = single
        self._sizes = torch.ones_like(sizes) if single else sizes
        self._ends = self._sizes.cumsum(0)
        entries = int(self._ends[-1])
        self._flat = _shared(entries * width * dtype.itemsize, folder).view(dtype).view(entries, width)
        self._filled = _shared(len(sizes), None)
        self._block, self._blocks = _blocks(sizes, groups)

    @staticmethod
    def bytes(sizes: Tensor, width: int, dtype: torch.dtype, *, single: bool) -> int:
        """What it would take."""
        return (len(sizes) if single else int(sizes.sum())) * width * dtype.itemsize

    def missing(self, rows: Tensor) -> list[Tensor]:
        """The blocks (rows of one pass each) that must be computed before all `rows` are there."""
        return [self._blocks[block] for block in self._block[rows[self._filled[rows] == 0]].unique().tolist()]

    def put(self, rows: Tensor, hidden: Tensor, *, left: bool) -> None:
        """Keeps the states of `rows` from a padded (N, L, d) batch."""
        for i, (end, size) in enumerate(zip(self._ends[rows].tolist(), self._sizes[rows].tolist(), strict=True)):
            self._flat[end - size : end] = hidden[i, hidden.shape[1] - size :] if left else hidden[i, :size]
        self._filled[rows] = 1

    def width(self, rows: Tensor) -> int:
        """Positions of the longest of `rows`."""
        return int(self._sizes[rows].max())

    def padded(self, rows: Tensor, width: int, *, left: bool) -> Tensor:
        """(N, width, d); padding repeats a row that nobody looks at."""
        ends, sizes = self._ends[rows].unsqueeze(1), self._sizes[rows].unsqueeze(1)
        at = torch.arange(width).unsqueeze(0)
        place = (ends - width + at).maximum(ends - sizes) if left else (ends - sizes + at).minimum(ends - 1)
        return self._flat[place]


def plain(stack: Stack, examples: Examples) -> Shortcut:
    """The whole model."""
    return Shortcut(stack, examples, 0, False, None, None)


def shortcut(
    stack: Stack, examples: Examples, *, memory: int, disk: int, folder: Path | None, groups: Sequence[Tensor] = ()
) -> Shortcut:  # fmt: skip
    """The best exact way through the model for these examples: at most `memory` bytes are kept in RAM, else `disk` bytes in a file.

    `groups` are rows that will be asked for together (a client's), every row in one at most; the others are a group of their own.
    """
    family = _family(stack)
    if family is None:
        return plain(stack, examples)
    tail = stack.adapted.base.task != "language" and stack.adapted.dropout is None  # a mask goes by position, a cut row has none
    layers = _layers(stack, family)
    below = _below(stack, family, len(layers))
    store = None
    if below:
        width, dtype = _width(stack), next(layers.parameters()).dtype
        sizes, single = examples.lengths(), tail and below == len(layers)
        if not isinstance(examples, Tokens) and not single:
            sizes = torch.full_like(sizes, _image_positions(stack, examples, family))
        needs = Store.bytes(sizes, width, dtype, single=single)
        if needs > max(memory, disk):
            log.warning(
                "what %d frozen layers give takes %.1f GB and is computed anew each time; raise engine.cache or engine.disk",
                below,
                needs / 1e9,
            )
        else:
            cut = hashlib.blake2b(b"".join(group.numpy().tobytes() + b"/" for group in groups), digest_size=8).hexdigest()
            key = (stack.adapted.base.fingerprint, below, single, stack.half, cut)
            kept = _KEPT.setdefault(examples, {})
            if key not in kept:
                place = None if needs <= memory else folder
                kept[key] = Store(sizes, width, dtype, groups=groups, single=single, folder=place)
            store = kept[key]
    if store is None:
        below = 0
    return Shortcut(stack, examples, below, tail, family, store)


@torch.no_grad()
def _image_positions(stack: Stack, examples: Examples, family: Family) -> int:
    inputs, _ = examples.batch(torch.arange(1))
    like = next(stack.adapted.base.module.parameters())
    made: Tensor = _root(stack).get_submodule(family.embedding)(*(tensor.to(like.device, like.dtype) for tensor in inputs.values()))
    return made.shape[1]


def _width(stack: Stack) -> int:
    config: Any = stack.adapted.base.module.config
    return int(config.hidden_size)


def _root(stack: Stack) -> nn.Module:
    module: Any = stack.adapted.base.module
    found: nn.Module = getattr(module, module.base_model_prefix)
    return found


def _layers(stack: Stack, family: Family) -> nn.ModuleList:
    found = _root(stack).get_submodule(family.layers)
    assert isinstance(found, nn.ModuleList)
    return found


def _family(stack: Stack) -> Family | None:
    module: Any = stack.adapted.base.module
    root = getattr(module, getattr(module, "base_model_prefix", "") or " ", None)
    if root is None or root is module:
        return None
    for family in FAMILIES:
        try:
            layers, _ = root.get_submodule(family.layers), root.get_submodule(family.embedding)
        except AttributeError:
            continue
        if isinstance(layers, nn.ModuleList) and {type(layer).__name__ for layer in layers} <= set(family.kinds) and len(layers):
            return None if _slides(module.config) else family
    return None


def _slides(config: Any) -> bool:
    """True where some layer sees a window only: the last row's keys are cut another way then."""
    kinds = getattr(config, "layer_types", None) or ()
    return "sliding_attention" in kinds or (not kinds and getattr(config, "sliding_window", None) is not None)


def _below(stack: Stack, family: Family, count: int) -> int:
    """How many layers lie below everything that clients hold; 0 if something lies before the layers."""
    module: Any = stack.adapted.base.module
    prefix = module.base_model_prefix
    lowest = count
    early = (family.embedding, *family.silent)
    for path in stack.layers:
        inside = path.removeprefix(f"{prefix}.")
        if inside.startswith(f"{family.layers}."):
            lowest = min(lowest, int(inside.removeprefix(f"{family.layers}.").split(".")[0]))
        elif any(f"{inside}.".startswith(f"{one}.") for one in early):
            return 0
    return lowest


class _State:
    hidden: Tensor | None = None
    row: Row | None = None


class _Through(nn.Module):
    """Stands in a module's place; whoever asks for the module's attributes gets them."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.__dict__["_inner"] = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_inner"], name)


class _Given(_Through):
    def __init__(self, inner: nn.Module, state: _State) -> None:
        super().__init__(inner)
        self.__dict__["_state"] = state

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        assert self._state.hidden is not None
        hidden: Tensor = self._state.hidden
        return hidden


class _Silent(_Through):
    def forward(self, positions: Tensor) -> Tensor:
        weight: Tensor = self._inner.weight
        return weight.new_zeros(*positions.shape, weight.shape[1])


class _LastLayer(_Through):
    def __init__(self, inner: nn.Module, family: Family, state: _State) -> None:
        super().__init__(inner)
        self.__dict__["_family"], self.__dict__["_state"] = family, state

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        row: Row = self._state.row
        out: Tensor = self._family.tail(self._inner, hidden, row, kwargs)
        if not self._family.reads_last:
            return out
        each = torch.arange(len(hidden), device=hidden.device)
        return hidden.new_zeros(hidden.shape, dtype=out.dtype).index_put((each, row.at), out.squeeze(1))


class _Reached(Exception):
    pass


class _Caught(_Through):
    """The last of the layers whose output is wanted."""

    hidden: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        self.hidden = self._inner(*args, **kwargs)
        raise _Reached


@contextmanager
def _replaced(root: nn.Module, places: list[tuple[str, nn.Module]]) -> Iterator[None]:
    before = []
    try:
        for path, made in places:
            parent_path, _, name = path.rpartition(".")
            parent = root.get_submodule(parent_path)
            before.append((parent, name, parent._modules[name]))
            parent._modules[name] = made
        yield
    finally:
        for parent, name, module in reversed(before):
            parent._modules[name] = module


def _row(stack: Stack, family: Family, inputs: dict[str, Tensor], device: torch.device) -> Row:
    if "input_ids" not in inputs:
        return Row(torch.zeros(len(next(iter(inputs.values()))), dtype=torch.long, device=device), None)
    ids, keys = inputs["input_ids"], inputs["attention_mask"].bool()
    at = torch.zeros(len(ids), dtype=torch.long)
    if family.reads_last:  # the rightmost token that is not padding, exactly as transformers finds it
        config: Any = stack.adapted.base.module.config
        at = (torch.arange(ids.shape[1]) * (ids != config.pad_token_id)).argmax(-1)
        keys = keys & (torch.arange(ids.shape[1]) <= at.unsqueeze(1))
    return Row(at.to(device), None if bool(keys.all()) else keys.to(device))


def _one_token(inputs: dict[str, Tensor], examples: Examples) -> dict[str, Tensor]:
    """The arguments of a model that sees one position a sample, any word but padding."""
    assert isinstance(examples, Tokens)
    ids = inputs["input_ids"][:, :1]
    made = {"input_ids": torch.full_like(ids, int(examples.padding == 0)), "attention_mask": torch.ones_like(ids)}
    return made | ({"token_type_ids": torch.zeros_like(ids)} if "token_type_ids" in inputs else {})


def _blocks(sizes: Tensor, groups: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The block of each row, and the rows of each block: of one group, of rising size, at most `FILL` padded tokens."""
    rest = torch.ones(len(sizes), dtype=torch.bool)
    for group in groups:
        rest[group] = False
    block, blocks = torch.empty(len(sizes), dtype=torch.long), list[Tensor]()
    for group in (*groups, rest.nonzero()[:, 0]):
        ordered = group[sizes[group].argsort(stable=True)]
        lengths, begin = sizes[ordered].tolist(), 0
        for end in range(1, len(lengths) + 1):
            if end == len(lengths) or (end + 1 - begin) * lengths[end] > FILL:
                block[ordered[begin:end]] = len(blocks)
                blocks.append(ordered[begin:end])
                begin = end
    return block, blocks


def _shared(size: int, folder: Path | None) -> Tensor:
    """Zeroed bytes that forked processes share: anonymous memory, or a file that has no name any more."""
    size = max(size, 1)
    if folder is None:
        return torch.from_numpy(np.frombuffer(mmap.mmap(-1, size), dtype=np.uint8, count=size))
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        file.truncate(size)
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)  # all of it now: a disk that fills up later would kill the process
        return torch.from_numpy(np.frombuffer(mmap.mmap(file.fileno(), size), dtype=np.uint8, count=size))
