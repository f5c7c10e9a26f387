"""The tensors as they are, or cast to half precision."""

from dataclasses import dataclass, replace
from typing import Literal

import torch

from fedpeft.codecs.base import CodecError, Layout
from fedpeft.tensors import Tensors


@dataclass(frozen=True)
class Raw:
    """Every bit of every tensor, little-endian, in the order of sorted names."""

    lossless = True

    def encode(self, tensors: Tensors, *, seed: int = 0) -> bytes:
        """The concatenated bytes."""
        return b"".join(raw_bytes(tensors[name]) for name in sorted(tensors))

    def decode(self, data: bytes, layout: Layout, *, seed: int = 0) -> Tensors:
        """Tensors that own their memory; nothing is allocated unless the layout describes exactly `len(data)` bytes."""
        want = sum(spec.nbytes for spec in layout)
        if want != len(data):
            raise CodecError(f"the layout describes {want} bytes, the payload holds {len(data)}")
        out: Tensors = {}
        at = 0
        for spec in layout:
            piece = bytearray(data[at : at + spec.nbytes])
            flat = torch.frombuffer(piece, dtype=spec.dtype) if piece else torch.empty(0, dtype=spec.dtype)
            out[spec.name] = flat.reshape(spec.shape)
            at += spec.nbytes
        return out


@dataclass(frozen=True)
class Half:
    """Floating-point differences in 16 bits; integers as they are. Relative error 2^-11 (fp16, |x| > 6e-5) or 2^-8 (bf16)."""

    dtype: Literal["fp16", "bf16"] = "bf16"
    lossless = False

    def __post_init__(self) -> None:
        if self.dtype not in ("fp16", "bf16"):
            raise ValueError(f"dtype={self.dtype}: needed is fp16 or bf16")

    def encode(self, tensors: Tensors, *, seed: int = 0) -> bytes:
        """Cast, then raw. An entry too large for fp16 becomes its largest finite value."""
        return Raw().encode({name: cast(tensor, self._kind) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()})

    def decode(self, data: bytes, layout: Layout, *, seed: int = 0) -> Tensors:
        """Raw, then cast back."""
        sent = tuple(replace(spec, dtype=self._kind) if spec.dtype.is_floating_point else spec for spec in layout)
        kinds = {spec.name: spec.dtype for spec in layout}
        return {n: cast(t, kinds[n]) if t.is_floating_point() else t for n, t in Raw().decode(data, sent).items()}

    @property
    def _kind(self) -> torch.dtype:
        return torch.float16 if self.dtype == "fp16" else torch.bfloat16


def cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The nearest of a floating-point `dtype`; a finite number beyond its range becomes its largest."""
    made = tensor.to(dtype)
    most = torch.finfo(dtype).max
    return made if most >= torch.finfo(tensor.dtype).max else torch.where(made.isinf() & tensor.isfinite(), made.sign() * most, made)


def raw_bytes(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor in row-major order."""
    whole = tensor.detach().cpu().contiguous()
    flat = whole.as_strided((whole.numel(),), (1,))  # a slice of one entry counts as contiguous, whatever its stride
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
