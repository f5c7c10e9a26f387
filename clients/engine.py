"""Engine: trains and scores the clients of this process in waves, or one at a time where adapter or model cannot be stacked.

Before the first wave two examples of this very run pass through with two different adapters, and are compared with the model itself: what
does not agree is not used, and the log says so.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from clients.coupling import coupled
from clients.evaluate import evaluate
from clients.faults import Told
from clients.measure import measured
from clients.plan import Plan
from clients.prefix import Shortcut, plain, shortcut
from clients.private import Backend, train_private
from clients.stack import Stack
from clients.stacked import Unstackable
from clients.train import Job, train
from clients.wave import Done, Wave
from fedpeft.adapters.base import Adapted
from fedpeft.config import ConfigError, Options, Training
from fedpeft.messages import Broadcast
from fedpeft.models.base import Examples
from fedpeft.models.score import Score, examined
from fedpeft.strategy import Phase
from fedpeft.tensors import Tensors

GB = 1_000_000_000
log = logging.getLogger("fedpeft")


@dataclass
class Engine:
    """`known` is what an earlier sitting of the run measured; `folder` is where a memory-mapped cache may lie."""

    adapted: Adapted
    examples: Examples
    options: Options
    groups: Sequence[Tensor] = ()  # rows of the examples that belong together: a client's
    batch: int = 8
    lanes: int = 1
    known: Mapping[str, float] = field(default_factory=dict)
    folder: Path | None = None
    backend: Backend | Literal["wave"] = "auto"  # of private clients: auto takes waves where they can be had
    _tests: Wave | None = None  # for the one set of examples that clients are scored on

    def train(self, phase: Phase, jobs: Sequence[Job], *, round: int) -> list[Done]:
        """What each job gives, or the `ValueError` that it alone raised; all at once, however many: `wave` says how many it should be."""
        if self._wave is None:
            return [self._alone(phase, job, round) for job in jobs]
        made: dict[int, Done] = {}
        for group in _by_base(jobs):
            made |= {job.client: done for job, done in zip(group, self._wave.train(phase, group, round=round), strict=True)}
        return [made[job.client] for job in jobs]

    def score(self, jobs: Sequence[Job], weights: Sequence[Tensor], examples: Examples) -> list[Score | ValueError]:
        """How each job's own model does on its rows of `examples`; `weights` has one number for each example."""
        if self._wave is None:
            return [self._scored(job, weight, examples) for job, weight in zip(jobs, weights, strict=True)]
        wave = self._test_wave(examples)
        made: dict[int, Score | ValueError] = {}
        for group in _by_base(jobs):
            shares = [weights[jobs.index(job)][job.rows] for job in group]
            made |= {job.client: found for job, found in zip(group, wave.score(group, shares), strict=True)}
        return [made[job.client] for job in jobs]

    def examined(self, broadcast: Broadcast, examples: Examples, *, batch: int) -> Tensor:
        """(2, N) float64: loss and hit of each of `examples` under the global model, with what frozen layers gave before."""
        rows = torch.arange(len(examples))
        if self._wave is not None and (wave := self._test_wave(examples)).way is not wave.plain:
            return wave.examined(Job(-1, broadcast, rows, Training(), torch.Generator()))
        self.adapted.fill(broadcast.tensors)
        with self.adapted.shifted(broadcast.base_delta):
            return examined(self.adapted.logits, self.adapted.base.task, examples, rows, batch=batch)

    @property
    def wave(self) -> int:
        """Clients trained at once."""
        return 1 if self._wave is None else self._wave.plan.wave

    @property
    def facts(self) -> dict[str, float]:
        """What was measured, for the manifest."""
        return {} if self._wave is None else vars(self._wave.plan).copy()

    @property
    def _half(self) -> bool:
        return self.adapted.base.device.type == "cuda" if self.options.bf16 is None else self.options.bf16

    @cached_property
    def _wave(self) -> Wave | None:
        if not self.options.stacked or self.backend in ("hooks", "vmap", "loop"):
            return None
        start = self.adapted.read()
        try:
            stack = Stack(self.adapted, half=self._half, checkpointing=self.options.checkpointing)
            whole = plain(stack, self.examples)
            check(stack, whole, start, loose=self._half)
        except Unstackable as why:
            if self.backend == "wave":
                raise ConfigError(f"privacy.backend=wave: {why}; set privacy.backend=auto") from why
            log.warning("clients are trained one at a time: %s", why)
            return None
        finally:
            self.adapted.write(start)
        way = self._shortcut(stack, self.examples, start, self.groups)
        plan = _plan(self.known) if "fixed" in self.known else measured(way, start, batch=self.batch, lanes=self.lanes)
        if self.options.wave is not None:
            plan = replace(plan, wave=self.options.wave)
        return Wave(way, whole, plan)

    def _shortcut(self, stack: Stack, examples: Examples, start: Tensors, groups: Sequence[Tensor] = ()) -> Shortcut:
        memory, disk = round(self.options.cache * GB), round(self.options.disk * GB)
        try:
            way = shortcut(stack, examples, memory=memory, disk=disk, folder=self.folder, groups=groups)
            check_shortcut(stack, way, start)
        except (Unstackable, RuntimeError) as why:  # of a model that does not do what its class says
            log.warning("the whole model runs for every example: %s", why)
            return plain(stack, examples)
        finally:
            self.adapted.write(start)
        return way

    def prepare(self, examples: Examples) -> None:
        """Makes what scoring on `examples` needs, for the lanes to share."""
        if self._wave is not None:
            self._test_wave(examples)

    def _test_wave(self, examples: Examples) -> Wave:
        assert self._wave is not None
        if self._tests is None:
            stack = self._wave.way.stack
            self._tests = Wave(self._shortcut(stack, examples, self.adapted.read()), plain(stack, examples), self._wave.plan)
        return self._tests

    def _alone(self, phase: Phase, job: Job, round: int) -> Done:
        try:
            if job.private is not None:
                return train_private(
                    self.adapted, phase, self.examples, job, round=round, backend="auto" if self.backend == "wave" else self.backend
                )
            return train(self.adapted, phase, self.examples, job, round=round)
        except OSError:
            raise
        except Told as fault:
            return fault
        except Exception as fault:  # whatever happens in a client is that client's fault alone
            return ValueError(str(fault) or repr(fault))

    def _scored(self, job: Job, weight: Tensor, examples: Examples) -> Score | ValueError:
        chosen = torch.zeros_like(weight)
        chosen[job.rows] = weight[job.rows]
        try:
            return evaluate(self.adapted, job.broadcast, job.memory, examples, weights=chosen, batch=128, scales=job.scales)
        except ValueError as fault:
            return fault


def _plan(known: Mapping[str, float]) -> Plan:
    return Plan(int(known["fixed"]), int(known["tokens"]), int(known["wave"]), known.get("token_us", 0.0))


@torch.no_grad()
def check(stack: Stack, way: Shortcut, start: Tensors, *, loose: bool = False) -> None:
    """Two clients' logits on two examples through `way` against the model itself, one by one. Raises `Unstackable` if they differ, and
    for a model that couples the examples of a batch.
    """
    adapted, rows = stack.adapted, _extremes(way)
    starts = [_moved(start, seed) for seed in (1, 2)]
    want = []
    for tensors, row in zip(starts, rows, strict=True):
        adapted.fill(tensors)
        want.append(adapted.logits(way.examples.batch(row.view(1))[0])[0])
    got = _logits(stack, way, starts)
    precise = next(adapted.base.module.parameters()).dtype in (torch.float32, torch.float64) and not loose
    bound = 1e-4 if precise else 5e-2
    for mine, whole, row in zip(got, want, rows, strict=True):
        _compare(stack, _own(mine, way.examples, int(row)), _own(whole, way.examples, int(row)), bound, "the stacked form")
    if coupled(adapted, way.examples, int(rows[0])):
        raise Unstackable(f"what {type(adapted.base.module).__name__} makes of an example changes with the others of its batch")


def check_shortcut(stack: Stack, way: Shortcut, start: Tensors) -> None:
    """The same logits through `way` against the whole stacked model, in one precision. Raises `Unstackable` if they differ."""
    starts = [_moved(start, seed) for seed in (1, 2)]
    dtype = next(stack.adapted.base.module.parameters()).dtype
    bound = 1e-4 if dtype in (torch.float32, torch.float64) and not stack.half else 1e-2
    short, long = _logits(stack, way, starts), _logits(stack, plain(stack, way.examples), starts)
    for mine, whole, row in zip(short, long, _extremes(way), strict=True):
        _compare(stack, _own(mine, way.examples, int(row)), _own(whole, way.examples, int(row)), bound, "the shortcut")


def _own(logits: Tensor, examples: Examples, row: int) -> Tensor:
    """The logits of an example without those of what pads it, which mean nothing and differ: (classes,), or (its tokens, vocabulary)."""
    if logits.dim() == 1:
        return logits
    many = int(examples.lengths()[row])
    return logits[len(logits) - many :] if getattr(examples, "left", False) else logits[:many]


@torch.no_grad()
def _logits(stack: Stack, way: Shortcut, starts: Sequence[Tensors]) -> Tensor:
    rows = _extremes(way)
    try:
        with stack.on():
            way.fill(rows)
            stack.load(starts)
            stack.clients.seat(torch.arange(2, device=stack.adapted.base.device))
            with way.on():
                return stack.logits(way.batch(rows)[0])
    except Unstackable:
        raise
    except Exception as fault:  # whatever an unknown architecture does with other layers in it
        raise Unstackable(f"{type(stack.adapted.base.module).__name__}: {fault}") from fault


def _extremes(way: Shortcut) -> Tensor:
    """The shortest and the longest example: one of them is padded."""
    lengths = way.examples.lengths()
    return torch.tensor([int(lengths.argmin()), int(lengths.argmax())])


def _compare(stack: Stack, mine: Tensor, whole: Tensor, bound: float, what: str) -> None:
    far, size = float((mine - whole).abs().max()), float(whole.abs().max())
    if not far <= bound * size:
        raise Unstackable(f"{what} of {type(stack.adapted.base.module).__name__} gives other logits (by {far:.2g} of {size:.2g})")


def _moved(start: Tensors, seed: int) -> Tensors:
    """The start with every entry moved a little: a fresh B is zero and would hide its A."""
    rng = torch.Generator().manual_seed(seed)
    return {name: t + 0.05 * torch.randn(t.shape, generator=rng).to(t.dtype) for name, t in start.items()}


def _by_base(jobs: Sequence[Job]) -> list[list[Job]]:
    """Jobs with the same `base_delta`: a wave has one base."""
    groups: dict[tuple[tuple[str, int, int], ...], list[Job]] = {}
    for job in jobs:
        key = tuple((target, id(p.B), id(p.A)) for chunk in job.broadcast.base_delta for target, p in chunk.items())
        groups.setdefault(key, []).append(job)
    return list(groups.values())
