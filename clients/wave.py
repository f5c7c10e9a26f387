"""The wave: many clients trained in one pass over one frozen base. Equal to `clients.train` one client at a time, up to rounding.

Each step pools the next batch of every client that has one, cuts the pool into micro-batches by length, adds up w_i * loss_i with
w_i = 1 / (the client's batch), and steps all clients' optimizers at once. No sample of one client touches a tensor of another.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from clients.optim import Descent
from clients.plan import Plan
from clients.prefix import Shortcut
from clients.train import Job, batches, check_finite, dropout_keys, dropping, finished
from fedpeft.lowrank import LowRank
from fedpeft.messages import Update
from fedpeft.models.score import Score, hits, losses
from fedpeft.privacy.mechanism import add_noise, clip_each
from fedpeft.strategy import Phase
from fedpeft.tensors import Tensors

Done = tuple[Update, Tensors] | ValueError


@dataclass(frozen=True)
class Wave:
    """What trains a wave: a way through the stacked model, and how its samples are cut."""

    way: Shortcut
    plain: Shortcut  # the whole model: for a `base_delta` below the lowest adapter
    plan: Plan

    def train(self, phase: Phase, jobs: Sequence[Job], *, round: int) -> list[Done]:
        """Each job's update and memory, or the `ValueError` that it alone raised. All jobs have one `base_delta`."""
        began = time.perf_counter()
        own = self.way.stack.adapted.parameters
        moving = [name for name, parameter in own.items() if phase.trains(name) and parameter.is_floating_point()]
        nothing = None if moving else ValueError("this round trains no tensor of the adapter; choose another adapter= or strategy=")
        results: dict[int, Done] = {job.client: fault for job in jobs if (fault := nothing or self._fault(job))}
        good = [job for job in jobs if job.client not in results]
        try:
            if good:
                with self._open(good) as (way, starts):
                    run = _Run(way, self.plan, phase, good, starts, moving)
                    seen = run.gradient() if phase.work == "gradient" else run.descend()
                    seconds = (time.perf_counter() - began) / len(good)
                    for k, job in enumerate(good):
                        results[job.client] = _result(phase, job, way.stack.read(k, starts[k], job.scales), seen[k], seconds, round)
        except _Unfit as fault:
            results |= {job.client: ValueError(str(fault)) for job in good}
        return [results[job.client] for job in jobs]

    def score(self, jobs: Sequence[Job], weights: Sequence[Tensor]) -> list[Score | ValueError]:
        """How each job's own model does on its rows of `way.examples`, weighted by `weights` (one number a row)."""
        results: dict[int, Score | ValueError] = {job.client: fault for job in jobs if (fault := self._fault(job))}
        good = [(job, weight) for job, weight in zip(jobs, weights, strict=True) if job.client not in results]
        try:
            if good:
                with self._open([job for job, _ in good]) as (way, _), torch.no_grad():
                    results |= _scores(way, self.plan, good)
        except _Unfit as fault:
            results |= {job.client: ValueError(str(fault)) for job, _ in good}
        return [results[job.client] for job in jobs]

    def examined(self, job: Job) -> Tensor:
        """(2, N) float64: loss and hit of each of the job's rows under its model. Raises `ValueError` for tensors that do not fit."""
        if fault := self._fault(job):
            raise fault
        seen = torch.zeros(2, len(job.rows), dtype=torch.float64)
        with self._open([job]) as (way, _), torch.no_grad():
            for cut, loss, hit in _looked(way, self.plan, job.rows, torch.zeros(len(job.rows), dtype=torch.int64)):
                seen[0, cut], seen[1, cut] = loss, hit
        return seen

    def _fault(self, job: Job) -> ValueError | None:
        """Why the job's tensors do not fit the adapter."""
        try:
            self.way.stack.check(job.start, any_rank=job.scales is not None)
        except ValueError as fault:
            return fault
        return None

    @contextmanager
    def _open(self, jobs: Sequence[Job]) -> Iterator[tuple[Shortcut, list[Tensors]]]:
        """The model with the clients' tensors in it."""
        delta = jobs[0].broadcast.base_delta
        way = self.way if self._above(delta) else self.plain
        starts = [job.start for job in jobs]
        adapted = way.stack.adapted
        with ExitStack() as opened:
            try:
                opened.enter_context(adapted.shifted(delta))
            except ValueError as fault:
                raise _Unfit(str(fault)) from fault
            opened.enter_context(way.stack.on())
            for job in jobs:
                way.fill(job.rows)
            way.stack.load(starts, [adapted.scales if job.scales is None else job.scales for job in jobs])
            opened.enter_context(way.on())
            yield way, starts

    def _above(self, delta: Sequence[Mapping[str, LowRank]]) -> bool:
        """True if what is added to the base touches no layer below the lowest adapter."""
        return all(target in self.way.stack.layers for chunk in delta for target in chunk)


class _Unfit(Exception):
    """What is to be added to the base fits no layer: a fault of all jobs."""


@dataclass
class _Run:
    """One wave on its way."""

    way: Shortcut
    plan: Plan
    phase: Phase
    jobs: Sequence[Job]
    starts: list[Tensors]
    moving: list[str]

    def __post_init__(self) -> None:
        alike = {job.private is not None for job in self.jobs}
        assert len(alike) == 1, "a wave is private as a whole or not at all"
        self.private = alike.pop()
        clients = self.way.stack.clients
        for name, value in clients.values.items():
            value.requires_grad_(name in self.moving)
        self.values = {name: clients.values[name] for name in self.moving}

    def descend(self) -> list[list[float]]:
        """Local training; the mean loss of every batch of every client."""
        drawn = [_drawn(job) for job in self.jobs]
        steps = torch.tensor([len(each) for each in drawn])
        descent = Descent(self.values, [job.work for job in self.jobs])
        groups = self._groups() if self.phase.loss else []
        drops, draws = self.way.stack.adapted.dropout is not None, [dropout_keys(job) for job in self.jobs]
        seen: list[Tensor] = []
        for t in range(int(steps.max())):
            active = steps > t
            picked = [(k, drawn[k][t]) for k in active.nonzero()[:, 0].tolist()]
            keys = [torch.randint(2**31, (len(rows),), generator=draws[k], dtype=torch.int32) for k, rows in picked] if drops else []
            loss = self._accumulate(picked, keys)
            seen.append(loss)
            grads = self._grads(active)
            if self.phase.loss:
                grads = self._with_term(grads, groups, active)
            descent.step(grads, active)
        table = torch.stack(seen, 1).cpu()
        return [row[: int(many)].tolist() for row, many in zip(table, steps, strict=True)]

    @torch.no_grad()
    def gradient(self) -> list[list[float]]:
        """One step of rate 1 along the gradient of each client's mean loss over all its rows, in boundary values."""
        with torch.enable_grad():
            loss = self._accumulate([(k, _all(job)) for k, job in enumerate(self.jobs)])
        scales = self.way.stack.clients.scales
        for name, grad in self._grads().items():
            factor = scales.get(name)
            square = 1.0 if factor is None else factor.square().view(-1, *[1] * (grad.dim() - 1))
            self.values[name].sub_(grad / square)  # dL/d(s p) = dL/dp / s, and p = value / s
        return [[value] for value in loss.cpu().tolist()]

    def _accumulate(self, picked: list[tuple[int, Tensor]], keys: Sequence[Tensor] = ()) -> Tensor:
        """Adds the gradients of all picked batches up, or their clipped sums; (K,) mean loss of each client, float64.

        `keys` are those of the samples in the batches, for dropout.
        """
        device = self.way.stack.adapted.base.device
        for value in self.values.values():
            value.grad = None
        self._sums = {name: torch.zeros_like(value) for name, value in self.values.items()} if self.private else {}
        loss = torch.zeros(len(self.jobs), dtype=torch.float64, device=device)
        rows = torch.cat([some for _, some in picked])
        owner = torch.cat([torch.full((len(some),), k) for k, some in picked])
        share = torch.cat([torch.full((len(some),), 1 / max(len(some), 1), dtype=torch.float64) for _, some in picked])
        for cut in self.plan.cut(self.way.examples.lengths()[rows]) if len(rows) else []:
            whose, part = owner[cut].to(device), share[cut].to(device)
            self.way.stack.clients.seat(whose, alone=self.moving if self.private else None)
            inputs, targets = self.way.batch(rows[cut])
            with dropping(self.way.stack.adapted, torch.cat(list(keys))[cut] if keys else None):  # layers may be run again to go back
                each = losses(self.way.stack.adapted.base.task, self.way.stack.logits(inputs), targets.to(device))
                (each.sum() if self.private else (each * part.to(each.dtype)).sum()).backward()
            if self.private:
                self._add_clipped(whose)
            loss.index_add_(0, whose, each.detach().double() * part)
        return loss

    @torch.no_grad()
    def _add_clipped(self, whose: Tensor) -> None:
        """Adds the picked samples' gradients to their clients' sums, each clipped to its client's norm."""
        grads = self.way.stack.clients.grads_alone(self.moving)
        clips = {job.private.clip for job in self.jobs if job.private is not None}
        assert len(clips) == 1, "a wave has one clip"
        clip_each(grads, clips.pop())
        for name, grad in grads.items():
            self._sums[name].index_add_(0, whose, grad)

    def _grads(self, active: Tensor | None = None) -> Tensors:
        """Of each client's picked batch; where the wave is private, the noised sum over the expected size of a batch."""
        if not self.private:
            return {name: torch.zeros_like(value) if value.grad is None else value.grad for name, value in self.values.items()}
        for k, job in enumerate(self.jobs):
            if job.private is None or (active is not None and not active[k]):
                continue
            shapes = {name: self.starts[k][name].shape for name in self._sums}  # entries that pad a smaller rank get no noise
            mine = {name: self._sums[name][k][tuple(slice(size) for size in shape)] for name, shape in shapes.items()}
            add_noise(mine, job.private.deviation, job.private.source)
            for total in self._sums.values():
                total[k].div_(job.private.expected)
        return self._sums

    def _groups(self) -> list["_Group"]:
        """The clients whose starts have the same names and shapes: the phase's own term is computed for all of a group at once."""
        device, adapted = self.way.stack.adapted.base.device, self.way.stack.adapted
        alike: dict[tuple[tuple[str, tuple[int, ...]], ...], list[int]] = {}
        for k, start in enumerate(self.starts):
            alike.setdefault(tuple((name, tuple(tensor.shape)) for name, tensor in sorted(start.items())), []).append(k)
        made = []
        for members in alike.values():
            start = {name: torch.stack([self.starts[k][name] for k in members]).to(device) for name in self.starts[members[0]]}
            factors = {}
            for name in self.moving:
                each = [(self.jobs[k].scales or adapted.scales).get(name, 1.0) for k in members]
                if any(factor != 1.0 for factor in each):
                    value = self.values[name]
                    factors[name] = torch.tensor(each, dtype=value.dtype, device=device).view(-1, *[1] * (value.dim() - 1))
            made.append(_Group(torch.tensor(members, device=device), start, factors))
        return made

    def _with_term(self, grads: Tensors, groups: Sequence["_Group"], active: Tensor) -> Tensors:
        """The gradients with those of the phase's own term, which sees each client's boundary tensors."""
        assert self.phase.loss is not None
        terms = []
        for group in groups:
            now = {}
            for name in self.moving:
                sides = (slice(None), *(slice(size) for size in group.start[name].shape[1:]))
                value = self.values[name].index_select(0, group.members)[sides]
                now[name] = value * group.factors[name] if name in group.factors else value
            each = torch.func.vmap(self.phase.loss)(now, group.start)
            terms.append(each[active.to(each.device)[group.members]].sum())
        more = torch.autograd.grad(torch.stack(terms).sum(), list(self.values.values()), allow_unused=True)
        return {name: grads[name] if add is None else grads[name] + add for name, add in zip(self.moving, more, strict=True)}


@dataclass(frozen=True)
class _Group:
    members: Tensor  # positions in the wave
    start: Tensors  # stacked
    factors: Tensors  # of the boundary values, where they are not 1


def _drawn(job: Job) -> list[Tensor]:
    """The batches of a client's round."""
    return list(batches(job.rows, job.work, job.rng) if job.private is None else job.private.draw(job.rows))


def _all(job: Job) -> Tensor:
    """The rows of a gradient round: all, or what a private client's query takes."""
    return job.rows if job.private is None else job.private.draw(job.rows)[0]


def _result(phase: Phase, job: Job, end: Tensors, seen: list[float], seconds: float, round: int) -> Done:
    try:
        if job.private is None:  # else one example's loss would stop the client, and tell that it is there
            check_finite(seen, job.client, round)
        return finished(phase, job, end, seen, len(seen), seconds)
    except ValueError as fault:
        return fault


def _scores(way: Shortcut, plan: Plan, judged: Sequence[tuple[Job, Tensor]]) -> dict[int, Score]:
    rows = torch.cat([job.rows for job, _ in judged])
    owner = torch.cat([torch.full((len(job.rows),), k) for k, (job, _) in enumerate(judged)])
    weight = torch.cat([weight.double() for _, weight in judged])
    sums = torch.zeros(3, len(judged), dtype=torch.float64)
    for cut, loss, hit in _looked(way, plan, rows, owner):
        for into, each in zip(sums, (loss, hit, torch.ones(len(cut))), strict=True):
            into.index_add_(0, owner[cut], each * weight[cut])
    shares = (sums[:2] / sums[2]).T.tolist()
    return {job.client: Score(loss, right, len(job.rows)) for (job, _), (loss, right) in zip(judged, shares, strict=True)}


def _looked(way: Shortcut, plan: Plan, rows: Tensor, owner: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(positions in `rows`, their losses, their hits) of all rows, in micro-batches; `owner` is whose model each row is put through."""
    task, device = way.stack.adapted.base.task, way.stack.adapted.base.device
    for cut in plan.cut(way.examples.lengths()[rows]):
        way.stack.clients.seat(owner[cut].to(device))
        inputs, targets = way.batch(rows[cut])
        logits, targets = way.stack.logits(inputs), targets.to(device)
        yield cut, losses(task, logits, targets).double().cpu(), hits(task, logits, targets).double().cpu()
