"""Spoiled: replies as a broken or hostile client would send them, and a disk that is full."""

import resource
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch

from fedpeft.codecs.base import Payload, header, layout
from fedpeft.codecs.raw import Raw
from fedpeft.tensors import Tensors, rank_axes

MANY = 64 * 2**20  # bytes of an update that is far too large; the whole adapter has 0.1 MB


def _higher_rank(payload: Payload, shapes: Tensors) -> Payload:
    """A well-formed update of zeros whose factors have a rank more."""
    made = {n: torch.zeros([size + (axis in rank_axes(n)) for axis, size in enumerate(t.shape)]) for n, t in shapes.items()}
    return Payload(header(layout(made)), Raw().encode(made))


SPOILED: Mapping[str, Callable[[Payload, Tensors], Payload]] = {
    "truncated": lambda payload, _: replace(payload, data=payload.data[: len(payload.data) // 2]),
    "nan": lambda payload, _: replace(payload, data=torch.tensor([torch.nan]).numpy().tobytes() + payload.data[4:]),
    "rank": _higher_rank,
    "oversized": lambda payload, _: replace(payload, data=payload.data + bytes(MANY)),
}


@contextmanager
def full_disk() -> Iterator[None]:
    """No file of this process can grow."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
