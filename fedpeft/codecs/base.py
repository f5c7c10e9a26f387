"""The codec protocol: `Tensors` to bytes and back. The cost of a message is `len(payload)`, never a formula."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch

from fedpeft.tensors import Tensors

DTYPES = {str(kind).removeprefix("torch."): kind for kind in (
    torch.float64, torch.float32, torch.float16, torch.bfloat16,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
)}  # fmt: skip
MAX_ENTRIES = 1 << 40  # of one tensor; a layout that names more is hostile, whatever the payload's length
MAX_DIMS = 64  # torch's own limit in most operations


@dataclass(frozen=True)
class Spec:
    """Name, dtype and shape of one tensor."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def entries(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the raw tensor."""
        return self.entries * self.dtype.itemsize


Layout = tuple[Spec, ...]


def layout(tensors: Tensors) -> Layout:
    """The layout of `tensors`, sorted by name."""
    return tuple(Spec(name, tensors[name].dtype, tuple(tensors[name].shape)) for name in sorted(tensors))


@dataclass(frozen=True)
class Payload:
    """What crosses the wire: a JSON header and the encoded bytes. Its length is what the ledger counts."""

    header: str
    data: bytes

    def __len__(self) -> int:
        return len(self.header.encode()) + len(self.data)


class CodecError(ValueError):
    """Tensors that a codec cannot send, or bytes that are not what it makes of tensors of this layout."""


class Codec(Protocol):
    """`Tensors` <-> bytes. A lossless codec is given values, a lossy one differences from the broadcast; integers keep their bits in both.

    (Values, because start + (end - start) is not end in floating point: the ways to run would differ in the last bit.)
    `seed` (63 bits) is the same at both ends: for the codecs that round by chance or draw a mask; the others do not read it.
    A field that cannot be is named alone (`density=2`): a codec serves `codec=` and `downlink=`, and whoever builds it names the family.
    A codec whose bytes have a floor also has `entropy(decoded)`, in bits.
    """

    @property
    def lossless(self) -> bool:
        """True if `decode(encode(x))` has the bits of x."""
        ...

    def encode(self, tensors: Tensors, *, seed: int = 0) -> bytes:
        """The bytes of `tensors`, in the order of their sorted names."""
        ...

    def decode(self, data: bytes, layout: Layout, *, seed: int = 0) -> Tensors:
        """The tensors of `layout`; `CodecError` if `data` is not what `encode` makes of such tensors, before memory is taken for them."""
        ...


def header(specs: Iterable[Spec]) -> str:
    """The layout as JSON rows [name, dtype, shape]."""
    rows = [[s.name, str(s.dtype).removeprefix("torch."), list(s.shape)] for s in specs]
    return json.dumps(rows, separators=(",", ":"))


def parse(rows: object) -> Layout:
    """The layout of JSON rows [name, dtype, shape] from the network; `ValueError` unless every field is in range and names are unique."""
    if not isinstance(rows, list):
        raise ValueError(f"layout is a {type(rows).__name__}, needed is a list of [name, dtype, shape]")
    specs = tuple(_spec(row) for row in rows)
    if len({spec.name for spec in specs}) != len(specs):
        raise ValueError("layout names a tensor twice")
    return specs


def _spec(row: object) -> Spec:
    match row:
        case [str(name), str(dtype), list(shape)] if dtype in DTYPES and all(type(side) is int and side >= 0 for side in shape):
            # An empty side hides the others in the product of all, and torch cannot hold a side past 64 bits.
            if len(shape) <= MAX_DIMS and math.prod(max(side, 1) for side in shape) <= MAX_ENTRIES:
                return Spec(name, DTYPES[dtype], tuple(shape))
    raise ValueError(f"layout row {str(row)[:80]} is not [name, dtype, shape] with a known dtype and a size that can be")
