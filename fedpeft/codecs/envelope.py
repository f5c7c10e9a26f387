"""The envelope of a lossy payload: what it is, for whom, unharmed; integers raw, floats as one vector.

    "fC" | version | CRC-32 of the rest | BLAKE2b-8 of codec and layout | integer tensors, raw | what the codec made of the floats

Counts, parameters and shapes are not sent: both ends have them from the codec's settings and the layout, and no length on the wire is
believed. The checksum finds accidents; whoever forges one meets the checks of the codec itself.
"""

import hashlib
import math
import zlib
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from fedpeft.codecs.base import CodecError, Layout, header, layout
from fedpeft.codecs.raw import Raw, cast, raw_bytes
from fedpeft.tensors import Tensors

MAGIC, VERSION, HEADER = b"fC", 1, 15
Vector = npt.NDArray[np.float32]
Sizes = Sequence[int]  # entries of each floating-point tensor, by sorted name; a size of 0 can be
Kind = Literal["fp32", "fp16", "bf16"]
KINDS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
MOST = float(np.finfo(np.float32).max)


def sealed(codec: str, tensors: Tensors, pack: Callable[[Vector, Sizes], bytes]) -> bytes:
    """The payload of `tensors` with `pack` for the floats; `codec` says what both ends agree on. `CodecError` if an entry is not finite."""
    floats = [name for name in sorted(tensors) if tensors[name].is_floating_point()]
    parts = [_vector(name, tensors[name]) for name in floats]
    whole = parts[0] if len(parts) == 1 else np.concatenate([np.zeros(0, np.float32), *parts])
    integers = Raw().encode({name: tensor for name, tensor in tensors.items() if not tensor.is_floating_point()})
    agreed = _agreed(codec, layout(tensors))
    body = integers + pack(whole, [len(part) for part in parts])
    return b"".join((MAGIC, bytes([VERSION]), _checksum(agreed, body), agreed, body))


def opened(codec: str, data: bytes, specs: Layout, unpack: Callable[[memoryview, Sizes], list[Vector]]) -> Tensors:
    """The tensors of a payload. `unpack` gets the bytes of the floats and gives one array for each, which it owns."""
    view = memoryview(data).cast("B")
    if len(view) < HEADER or view[:2] != MAGIC:
        raise CodecError(f"the payload of {len(view)} bytes does not begin like one of {codec}")
    if view[2] != VERSION:
        raise CodecError(f"the payload is of version {view[2]}, this side reads {VERSION}; install the same fedpeft at both ends")
    if view[3:7] != _checksum(view[7:HEADER], view[HEADER:]):
        raise CodecError("the payload's checksum is not that of its bytes; it was cut or changed on its way")
    if view[7:HEADER] != _agreed(codec, specs):
        raise CodecError(f"the payload was made by another codec than {codec}, or for another layout; both ends need the same settings")
    floats = [spec for spec in specs if spec.dtype.is_floating_point]
    others = tuple(spec for spec in specs if not spec.dtype.is_floating_point)
    at = HEADER + sum(spec.nbytes for spec in others)
    if at > len(view):
        raise CodecError(f"the layout's integers need {at - HEADER} bytes, the payload holds {len(view) - HEADER}")
    out = Raw().decode(bytes(view[HEADER:at]), others)
    for spec, part in zip(floats, unpack(view[at:], [spec.entries for spec in floats]), strict=True):
        out[spec.name] = cast(torch.from_numpy(part), spec.dtype).reshape(spec.shape)
    return out


def packed(values: Vector, kind: Kind) -> bytes:
    """Values in `kind`, little-endian; what is too large for it becomes its largest."""
    return raw_bytes(cast(torch.from_numpy(values), KINDS[kind]))


def unpacked(data: memoryview, kind: Kind) -> Vector:
    """The values of `packed`; `CodecError` if one is not finite."""
    values = torch.frombuffer(bytearray(data), dtype=KINDS[kind]).float().numpy() if data else np.zeros(0, np.float32)
    if not finite(values):
        raise CodecError("the payload holds a scale or a value that is not finite")
    return values


def entropy(tensors: Tensors, each: int) -> float:
    """Bits that a sparse update needs if in each tensor the k of n entries that are not zero lie anywhere with equal chance.

    n H(k/n) for a tensor's support and `each` bits for a kept entry (a sign: 1); integers as they are. By tensor, because densities differ
    so much between tensors that a coder which knows them goes below the entropy of the whole at its mean density.
    """
    floats = [tensor for tensor in tensors.values() if tensor.is_floating_point()]
    integers = sum(8 * tensor.nbytes for tensor in tensors.values() if not tensor.is_floating_point())
    counts = [(int(torch.count_nonzero(tensor)), tensor.numel()) for tensor in floats]
    return integers + sum(_spread(k, n) + _spread(n - k, n) + each * k for k, n in counts)


def finite(vector: Vector) -> bool:
    """True if every entry is: read from the bits, where all that is not finite lies above the largest number."""
    if not len(vector):
        return True
    return bool(vector.view(np.int32).max() < 0x7F800000 and vector.view(np.uint32).max() < 0xFF800000)


def _vector(name: str, tensor: torch.Tensor) -> Vector:
    flat: Vector = cast(tensor.detach().cpu(), torch.float32).contiguous().reshape(-1).numpy()
    if not finite(flat):
        raise CodecError(f"{name} holds an entry that is not finite, which no lossy codec sends; did training diverge?")
    return flat


def _spread(count: int, entries: int) -> float:
    return count * math.log2(entries / count) if count else 0.0


def _checksum(*parts: bytes | memoryview) -> bytes:
    value = 0
    for part in parts:
        value = zlib.crc32(part, value)
    return value.to_bytes(4, "little")


def _agreed(codec: str, specs: Layout) -> bytes:
    return hashlib.blake2b(f"{codec} {header(specs)}".encode(), digest_size=8).digest()
