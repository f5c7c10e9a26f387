"""Local training of one client: (Phase, Broadcast, memory, data) -> (Update, memory). The reference; it knows no strategy by name."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from clients.faults import Told
from fedpeft.adapters.base import Adapted, precision
from fedpeft.config import Training
from fedpeft.messages import Broadcast, Update
from fedpeft.models.base import Examples
from fedpeft.models.score import losses
from fedpeft.privacy.noise import Source
from fedpeft.strategy import Phase
from fedpeft.tensors import Tensors, is_head, only

HEAD_RATE = 3.0  # the head starts from nothing: with the adapter's own rate banking77 ends 12 points lower after an epoch


@dataclass(frozen=True, eq=False)
class Private:
    """How a client's sums of gradients are kept private (Abadi et al., CCS 2016, algorithm 1).

    Each example's gradient over all trained tensors together is clipped to `clip`; noise of standard deviation `noise_multiplier * clip` is
    added to a batch's sum; the sum is divided by `expected`, the expected and not the drawn size of a batch. `draw` gives the batches of
    the client's rows.
    """

    clip: float
    expected: float
    noise_multiplier: float
    source: Source
    draw: Callable[[Tensor], Sequence[Tensor]]

    def __post_init__(self) -> None:
        if not (self.clip > 0 and self.expected > 0 and self.noise_multiplier >= 0):
            raise ValueError(f"needed are a clip and an expected batch above 0 and a noise multiplier of at least 0, got {self}")

    @property
    def deviation(self) -> float:
        """Standard deviation of the noise on a sum."""
        return self.noise_multiplier * self.clip if self.noise_multiplier else 0.0


def poisson(rows: Tensor, rate: float, steps: int, source: Source) -> list[Tensor]:
    """`steps` batches in which each row lies with probability `rate`, independently; a batch may be empty."""
    return [rows[source.uniform(len(rows)) < rate] for _ in range(steps)]


@dataclass(frozen=True, eq=False)
class Job:
    """One client's work in one round: where it starts, which rows of the examples are its own, how it trains, its generator of batches."""

    client: int
    broadcast: Broadcast
    rows: Tensor
    work: Training
    rng: torch.Generator
    memory: Tensors = field(default_factory=dict)
    scales: Mapping[str, float] | None = None  # of its B factors, where its ranks are not the adapter's
    private: Private | None = None

    @property
    def start(self) -> Tensors:
        """The broadcast under what this client keeps."""
        return self.broadcast.tensors | self.memory


def train(adapted: Adapted, phase: Phase, examples: Examples, job: Job, *, round: int) -> tuple[Update, Tensors]:
    """Trains one client and gives what it shares and what it keeps. Raises `ValueError` if the loss stops being finite."""
    began = time.perf_counter()
    start = job.start
    with adapted.rescaled(job.scales), adapted.shifted(job.broadcast.base_delta):
        adapted.fill(start, any_rank=job.scales is not None)
        moving = adapted.select(phase.trains)
        if phase.work == "gradient":
            seen, steps = [_gradient_step(adapted, examples, job.rows, moving, job.work.batch)], 1
        else:
            seen = _descend(adapted, phase, start, examples, job, moving)
            steps = len(seen)
        end = adapted.read(start)
    check_finite(seen, job.client, round)
    return finished(phase, job, end, seen, steps, time.perf_counter() - began)


def finished(phase: Phase, job: Job, end: Tensors, seen: list[float], steps: int, seconds: float) -> tuple[Update, Tensors]:
    """The update and the memory of a client that ended at `end` after batches of mean losses `seen`.

    A private client says nothing of its examples but what was noised: not their loss, not their number, not how long they took.
    """
    if phase.finish:
        end = phase.finish(end, job.start, steps)
    if job.private is not None:
        return Update(job.client, only(end, phase.shares), 1.0, {"steps": float(steps)}), only(end, phase.keeps)
    metrics = {"loss": sum(seen) / len(seen), "steps": float(steps), "seconds": seconds}
    return Update(job.client, only(end, phase.shares), float(len(job.rows)), metrics), only(end, phase.keeps)


def rates(adapted: Adapted, work: Training, scales: Mapping[str, float] | None) -> Tensors:
    """`rate/<name>`: how far a step of plain SGD moves each tensor per unit of gradient, in boundary values: lr s^2."""
    made, scales = {}, adapted.scales if scales is None else scales
    for name, parameter in adapted.parameters.items():
        lr = head_lr(work) if is_head(name) else work.lr
        made[f"rate/{name}"] = torch.tensor(lr * scales.get(name, 1.0) ** 2, dtype=precision(parameter))
    return made


def head_lr(work: Training) -> float:
    """The learning rate of the task head."""
    return HEAD_RATE * work.lr if work.head_lr is None else work.head_lr


def at_round(work: Training, round: int, rounds: int) -> Training:
    """The work of one round: a cosine schedule takes both learning rates from their peak in round 0 towards zero after the last."""
    if work.schedule == "constant":
        return work
    share = (1 + math.cos(math.pi * round / rounds)) / 2
    return replace(work, lr=work.lr * share, head_lr=None if work.head_lr is None else work.head_lr * share)


def batches(rows: Tensor, work: Training, rng: torch.Generator) -> Iterator[Tensor]:
    """Batches without replacement, reshuffled after each pass; a client with fewer rows than a batch uses all of them each step."""
    size = min(work.batch, len(rows))
    a_pass = len(rows) // size if work.epochs is None else math.ceil(len(rows) / size)
    steps = work.steps if work.epochs is None else max(1, round(work.epochs * a_pass))
    assert steps is not None
    done = 0
    while done < steps:
        order = rows[torch.randperm(len(rows), generator=rng)]
        for batch in order.split(size)[: min(a_pass, steps - done)]:
            yield batch
            done += 1


def dropout_keys(job: Job) -> torch.Generator:
    """What draws the client's dropout keys, one for each sample of each step in order; its batches have a generator of their own."""
    return torch.Generator().manual_seed(job.rng.initial_seed() ^ 0x5DEECE66D)


@contextmanager
def dropping(adapted: Adapted, keys: Tensor | None) -> Iterator[None]:
    """Drops inputs of the adapter's layers by `keys` (N,) of the samples in a batch."""
    if adapted.dropout is None:
        yield
        return
    adapted.dropout.present = keys
    try:
        yield
    finally:
        adapted.dropout.present = None


def optimizer(moving: dict[str, nn.Parameter], work: Training) -> torch.optim.Optimizer:
    """A fresh optimizer: moments of the last round would belong to parameters the server has replaced."""
    head = [parameter for name, parameter in moving.items() if is_head(name)]
    rest = [parameter for name, parameter in moving.items() if not is_head(name)]
    groups = [{"params": some, "lr": lr} for some, lr in ((rest, work.lr), (head, head_lr(work))) if some]
    if work.optimizer == "adamw":
        return torch.optim.AdamW(groups, weight_decay=work.weight_decay, fused=True)
    return torch.optim.SGD(groups, momentum=work.momentum, weight_decay=work.weight_decay, fused=True)


def _descend(
    adapted: Adapted, phase: Phase, start: Tensors, examples: Examples, job: Job, moving: dict[str, nn.Parameter]
) -> list[float]:  # fmt: skip
    here = {name: tensor.to(adapted.base.device) for name, tensor in start.items()} if phase.loss else {}
    descent, work = optimizer(moving, job.work), job.work
    seen, rng = [], dropout_keys(job)
    for batch in batches(job.rows, work, job.rng):
        inputs, targets = examples.batch(batch)
        with dropping(adapted, torch.randint(2**31, (len(batch),), generator=rng, dtype=torch.int32) if adapted.dropout else None):
            loss = losses(adapted.base.task, adapted.logits(inputs), targets.to(adapted.base.device)).mean()
        seen.append(loss.detach())
        if phase.loss:
            loss = loss + phase.loss({name: adapted.value(name, start) for name in moving}, here)
        descent.zero_grad()
        loss.backward()
        if work.clip is not None:
            nn.utils.clip_grad_norm_(moving.values(), work.clip)
        descent.step()
    return [float(loss) for loss in seen]


def _gradient_step(adapted: Adapted, examples: Examples, rows: Tensor, moving: dict[str, nn.Parameter], batch: int) -> float:
    """One step of rate 1 along the gradient of the mean loss over all rows, in boundary values: there a scale s divides the gradient."""
    total = 0.0
    for some in rows.split(batch):
        inputs, targets = examples.batch(some)
        loss = losses(adapted.base.task, adapted.logits(inputs), targets.to(adapted.base.device)).sum() / len(rows)
        loss.backward()
        total += float(loss.detach())
    with torch.no_grad():
        for name, parameter in moving.items():
            if parameter.grad is not None:
                parameter.sub_(parameter.grad / adapted.scales.get(name, 1.0) ** 2)  # dL/d(s p) = dL/dp / s, and p = value / s
    return total


def check_finite(seen: list[float], client: int, round: int) -> None:
    """Raises `Told`, which names the first local step whose loss is not a number."""
    for step, loss in enumerate(seen):
        if not math.isfinite(loss):
            raise Told(
                f"client {client}, round {round}: the loss became {loss} at local step {step}; "
                "lower train.lr, set train.clip=1, or look at its data"
            )
