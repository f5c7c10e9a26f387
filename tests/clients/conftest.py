"""Four clients with rows, starts and batches of their own, trained in a wave and one at a time."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from clients.plan import Plan
from clients.prefix import plain, shortcut
from clients.stack import Stack
from clients.train import Job, train
from clients.wave import Wave
from fedpeft.adapters.base import Adapted
from fedpeft.adapters.lora import Lora
from fedpeft.config import Training
from fedpeft.messages import Broadcast
from fedpeft.models.base import Base, Examples
from fedpeft.strategy import Phase
from fedpeft.tensors import Tensors

PLAIN = Phase()
WORK = Training(steps=5, batch=3, lr=5e-3, weight_decay=0.01, clip=1.0)
OWN = [torch.tensor([0, 3, 5, 7, 8]), torch.tensor([1]), torch.tensor([2, 4, 6, 9]), torch.tensor([10, 11])]  # rows of four clients
QV = {"bert": ("query", "value"), "roberta": ("query", "value"), "vit": ("q_proj", "v_proj"), "gpt2": ("c_attn",)} | {
    "gpt2_classifier": ("c_attn",), "llama": ("q_proj", "v_proj"), "llama_classifier": ("q_proj", "v_proj")
}  # fmt: skip


def _apart(tensors: Tensors, client: int) -> Tensors:
    rng = torch.Generator().manual_seed(client)
    return {name: t + 0.1 * torch.randn(t.shape, generator=rng, dtype=torch.float64).to(t.dtype) for name, t in tensors.items()}


def _jobs(start: Tensors, work: Training = WORK, **more: Any) -> list[Job]:
    return [
        Job(client, Broadcast(_apart(start, client)), rows, work, torch.Generator().manual_seed(client), **more)
        for client, rows in enumerate(OWN)
    ]


def _wave(adapted: Adapted, examples: Examples, *, short: bool = True, **more: Any) -> Wave:
    stack = Stack(adapted)
    whole = plain(stack, examples)
    way = shortcut(stack, examples, memory=1 << 30, disk=0, folder=None) if short else whole
    return Wave(way, whole, Plan(6, 40, 8), **more)


def _farthest(got: list[Any], want: list[Any]) -> float:
    assert all(not isinstance(one, ValueError) for one in got), got
    far = 0.0
    for (update, kept), (other, other_kept) in zip(got, want, strict=True):
        assert update.client == other.client
        assert update.weight == other.weight
        assert update.metrics["steps"] == other.metrics["steps"]
        assert update.metrics["loss"] == pytest.approx(other.metrics["loss"], abs=1e-11)
        for mine, theirs in ((update.tensors, other.tensors), (kept, other_kept)):
            assert mine.keys() == theirs.keys()
            far = max([far, *(float((mine[name] - theirs[name]).abs().max()) for name in mine)])
    return far


def _check(adapted: Adapted, examples: Examples, phase: Phase = PLAIN, work: Training = WORK, bound: float = 1e-10, **more: Any) -> None:
    start = adapted.read()
    want = [train(adapted, phase, examples, job, round=0) for job in _jobs(start, work, **more)]
    made = _wave(adapted, examples)
    got = made.train(phase, _jobs(start, work, **more), round=0)
    assert _farthest(got, want) < bound
    moved = [float((update.tensors[n] - job.start[n]).abs().max()) for (update, _), job in zip(want, _jobs(start), strict=True)
             for n in update.tensors if phase.trains(n)]  # fmt: skip
    assert max(moved, default=1.0) > 1e-4


@pytest.fixture
def own() -> list[Tensor]:
    """The rows of the four clients."""
    return OWN


@pytest.fixture
def work() -> Training:
    """Five steps of AdamW with weight decay and clipping."""
    return WORK


@pytest.fixture
def query_value() -> dict[str, tuple[str, ...]]:
    """The layers that LoRA usually adapts, of each kind of tiny base."""
    return QV


@pytest.fixture
def apart() -> Callable[[Tensors, int], Tensors]:
    """A start of each client's own, with a B that is not zero."""
    return _apart


@pytest.fixture
def jobs() -> Callable[..., list[Job]]:
    """The work of the four clients, each from a start of its own."""
    return _jobs


@pytest.fixture
def wave() -> Callable[..., Wave]:
    """A wave of small micro-batches, so that each step has several, with several clients in each."""
    return _wave


@pytest.fixture
def farthest() -> Callable[[list[Any], list[Any]], float]:
    """The largest difference between what clients gave here and there; all else about them must be equal."""
    return _farthest


@pytest.fixture
def check() -> Callable[..., None]:
    """The wave ends where the reference ends, and both moved."""
    return _check


@pytest.fixture
def adapted(tiny: Callable[..., Base]) -> Adapted:
    return Lora(rank=3).attach(tiny("bert"), seed=0)


@pytest.fixture
def texts(adapted: Adapted, examples: Callable[..., Examples]) -> Examples:
    return examples(adapted.base)
