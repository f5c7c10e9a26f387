"""`fedpeft audit`: what canaries prove about the mechanism, and which tokens a client's update names."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from rich.table import Table as Columns
from torch import Tensor

from clients.plan import Plan
from clients.prefix import plain
from clients.private import train_private
from clients.stack import Stack
from clients.train import Job, Private
from clients.wave import Wave
from fedpeft import seeds
from fedpeft.adapters.base import Adapted, Adapter
from fedpeft.adapters.lora import Lora
from fedpeft.adapters.lora_sb import LoraSB
from fedpeft.config import ConfigError, Training
from fedpeft.data.table import Dataset, Table
from fedpeft.messages import Broadcast, Update
from fedpeft.models.base import Base, Examples
from fedpeft.models.score import losses
from fedpeft.models.tiny import TinyLlama
from fedpeft.privacy.audit import DEVIATIONS, Check, Claim, audit_mechanism, check_mechanism, core
from fedpeft.privacy.noise import Secret, Source
from fedpeft.privacy.span import scored, span_test
from fedpeft.privacy.spending import Spending
from fedpeft.privacy.unit import Client
from fedpeft.strategy import Phase
from fedpeft.tensors import Names, Tensors, everything, is_b, is_factor, norm
from server.private import Hidden

SIZES = (1.0, 1e4)  # of the canaries, in clips: a clip that is missing shows in the large ones
FEWEST = 100
TIGHT, EXPECTED = 0.01, 4.0  # clip and expected batch of the trainers that are checked: each text of NOTES has a larger gradient
ROUNDING = 1e-3  # of float32 parameters less their start
SIGNIFICANCE = 0.05

# One client's notes, as its model reads them: by byte. The first has 14 distinct tokens with the one it begins with, all have 57.
NOTES = (
    "call Anna at 0151 2345", "Mr. Berg: new knee, left, 14 May", "x-ray of Jo's hip @ 9:30 (Dr. Quint)", "ask Zoe for HIV + TB tests",
    "fax no. 030/6678#21", "Kim, 57, owes $480; pays weekly",
)  # fmt: skip
RANK, RATE, SLOW = 32, 0.1, 1e-3
LAYER = "model.layers.0.self_attn.v_proj"


@dataclass(frozen=True)
class Situation:
    """How the client trains before it sends its update."""

    said: str
    notes: int = 1
    steps: int = 1
    adamw: bool = False
    noise: float = 0.0  # multiplier of the DP noise


SITUATIONS = (
    Situation("1 step"),
    Situation("5 SGD steps", steps=5),
    Situation("5 AdamW steps", steps=5, adamw=True),
    Situation("1 step, many tokens", notes=len(NOTES)),
    Situation("1 step, DP noise", noise=1.0),
)


@dataclass(frozen=True)
class Kind:
    """A kind of update: what it trains and sends, and the matrix that is tried."""

    said: str
    method: str
    adapter: Adapter
    sends: Names
    matrix: str  # the end of its name


KINDS = (
    Kind("A and B", "LoRA", Lora(rank=RANK, alpha=RANK, targets=("v_proj",)), is_factor, "A"),
    Kind("B only", "FFA-LoRA", Lora(rank=RANK, alpha=RANK, targets=("v_proj",)), is_b, "B"),
    Kind("R only", "Fed-SB", LoraSB(rank=RANK, targets=("v_proj",)), lambda name: name.endswith(".R"), "R"),
)


@dataclass(frozen=True)
class Attack:
    """What the span test made of one update."""

    kind: str
    situation: str
    tokens: int  # distinct, that were there
    rank: int
    precision: float
    recall: float
    told: float  # right of the guesses of someone who knows `tokens`
    chance: float  # right of as many guesses without the update
    read: str


# The mechanism


def audit(
    console: Console, *, noise_multiplier: float, clip: float, expected: float, steps: int, delta: float, canaries: int
) -> int:  # fmt: skip
    """Prints verdicts and checks of the mechanism that private training uses; gives the exit code, 1 if it is not what it claims."""
    if canaries < FEWEST:
        raise ConfigError(f"--canaries {canaries}: needed are at least {FEWEST}; fewer prove nothing")
    try:
        claim = Claim(clip, noise_multiplier, expected, steps, delta)
    except ValueError as fault:
        raise ConfigError(str(fault)) from fault
    source = Secret()
    step = core(claim, source)
    _say(console, f"{steps} noised sums, noise {noise_multiplier:g} x clip, every example in each; delta {delta:g}")
    _say(console, f"{canaries} canaries, each in with probability 1/2; bounds at {1 - SIGNIFICANCE:.0%}")
    verdicts = [audit_mechanism(step, claim, canaries=canaries, coins=source, size=size, significance=SIGNIFICANCE) for size in SIZES]
    checks = check_mechanism(step, core(claim, source, noise=False), claim)
    checks += check_trainers(noise_multiplier, source) + check_server(noise_multiplier)
    table = Columns("canaries", "claimed epsilon", "at least", "at least (one run)", "", box=None)
    for verdict in verdicts:
        table.add_row(
            f"{verdict.size:,.0f} x clip", f"{verdict.claim:.3f}", f"{verdict.lower:.3f}", f"{verdict.one_run:.3f}",
            "REFUTED" if verdict.caught else "no violation",
        )  # fmt: skip
    console.print(table)
    for check in checks:
        _say(console, f"{'ok   ' if check.holds else 'FAILS'} {check.name}: {check.found}")
    seconds = sum(verdict.seconds for verdict in verdicts)
    if any(verdict.caught for verdict in verdicts) or not all(check.holds for check in checks):
        _say(console, f"the mechanism is NOT what it claims; {seconds:.1f} s")
        return 1
    _say(console, f"no violation found, which proves nothing: more --canaries see more; {seconds:.1f} s")
    return 0


def _say(console: Console, text: str) -> None:
    console.print(text, soft_wrap=True, highlight=False, markup=False)


# The trainers


def check_trainers(noise_multiplier: float, source: Source) -> list[Check]:
    """What both private trainers make of one client's texts: the clip, the denominator and the noise that they apply themselves."""
    base, made = _base(), []
    with _adapted(base, KINDS[0].adapter) as adapted:
        examples, phase = base.encode(_table(NOTES)), Phase(trains=is_factor, work="gradient")  # a step of rate 1: the release itself
        whole = plain(Stack(adapted), examples)
        start = adapted.read()

        def wave(job: Job) -> Tensors:
            (done,) = Wave(whole, whole, Plan()).train(phase, [job], round=0)
            if isinstance(done, ValueError):
                raise done
            return done[0].tensors

        def alone(job: Job) -> Tensors:
            return train_private(adapted, phase, examples, job, round=0, backend="loop")[0].tensors

        for name, train in (("many clients at once", wave), ("one client", alone)):

            def release(rows: Sequence[int], noise: float, train: Callable[[Job], Tensors] = train) -> Tensors:
                some = torch.tensor(rows, dtype=torch.int64)
                private = Private(TIGHT, EXPECTED, noise, source, lambda _: [some])
                job = Job(0, Broadcast(start), torch.arange(len(NOTES)), Training(), torch.Generator(), private=private)
                return {key: (start[key].double() - end.double()) * EXPECTED / TIGHT for key, end in train(job).items()}

            made += [replace(check, name=f"{name}: {check.name}") for check in check_trainer(release, noise_multiplier)]
    return made


def check_server(noise_multiplier: float) -> list[Check]:
    """What the server's mean makes of clients, if clients are hidden: its own clip, denominator and noise."""
    start = {"A": torch.zeros(64, 64), "B": torch.zeros(64, 64)}

    def changed(client: int) -> Update:
        rng = seeds.generator(0, client=client, purpose="audit")
        return Update(client, {name: torch.randn(tensor.shape, generator=rng) for name, tensor in start.items()}, 1.0)

    def release(rows: Sequence[int], noise: float) -> Tensors:
        unit = Client(epsilon=math.inf, noise_multiplier=noise or 1e-9, clip=TIGHT)
        with TemporaryDirectory() as folder:
            hidden = Hidden(unit, len(NOTES), int(EXPECTED), 1, 0, Spending(Path(folder) / "privacy.jsonl"))
            mean = hidden.mean(0, Broadcast(start), range(len(NOTES)), everything)(changed(row) for row in rows)
        return {name: end.double() * EXPECTED / TIGHT for name, end in mean.items()}

    return [replace(check, name=f"clients at the server: {check.name}") for check in check_trainer(release, noise_multiplier)]


def check_trainer(release: Callable[[Sequence[int], float], Tensors], noise_multiplier: float) -> list[Check]:
    """`release(rows, noise)` is what a trainer, or the server, makes of a batch, times the expected batch, in clips."""
    moved = 0.0
    for beside in ((), (1,), (1, 2, 3, 4)):
        with_it, without = release((*beside, 0), 0.0), release(beside, 0.0)
        moved = max(moved, norm({name: with_it[name] - without[name] for name in with_it}))
    alike = {many: norm(release([0] * many, 0.0)) for many in (1, 2, 8)}
    empty = torch.cat([part.flatten() for part in release((), noise_multiplier).values()])
    level = float(empty.square().mean().sqrt())
    right = all(abs(size - many) <= ROUNDING * many for many, size in alike.items())
    return [
        Check("one contribution moves the sum by the clip at most", moved <= 1 + ROUNDING, f"{moved:.4f} clips"),
        Check("the sum is divided by the expected batch", right, ", ".join(f"{n} give {size:.3f}" for n, size in alike.items())),
        Check(
            "an empty batch has all the noise",
            abs(level / noise_multiplier - 1) <= DEVIATIONS / (2 * len(empty)) ** 0.5,
            f"{level:.4g} clips, claimed {noise_multiplier:.4g}",
        ),
    ]


# The leak


def leak(console: Console) -> int:
    """Prints which tokens of a client's texts its update names, for each kind of update and situation."""
    attacks = list(attack())
    _say(console, f"one client of a tiny Llama with adapters of rank {RANK}; its first text: {NOTES[0]}")
    table = Columns("update", "client trains", "tokens", "rank", "precision", "recall", "guess", "chance", box=None)
    for one in attacks:
        shares = (f"{share:.2f}" for share in (one.precision, one.recall, one.told, one.chance))
        table.add_row(one.kind, one.situation, str(one.tokens), str(one.rank), *shares)
    console.print(table)
    _say(console, "; ".join(f"{kind.said}: {kind.method}" for kind in KINDS))
    _say(
        console,
        "precision and recall: of what lies in the span of the update; guess: share right by someone who knows how many there are",
    )
    small = next(one for one in attacks if one.kind == KINDS[-1].said)
    _say(console, f"read from R alone, after {small.situation}: {small.read}")
    _say(
        console,
        "Fewer numbers are no privacy, nor are more steps. Where this test fails another may not: only differential privacy gives a bound.",
    )
    return 0


def attack() -> Iterator[Attack]:
    """Every kind of update in every situation."""
    base = _base()
    for kind in KINDS:
        for situation in SITUATIONS:
            with _adapted(base, kind.adapter) as adapted:
                yield _tried(adapted, kind, situation)


def _base() -> Base:
    table = _table(NOTES)
    dataset = Dataset("language", table, table, (), public=table)
    return TinyLlama(layers=2, epochs=1).load(dataset, seed=0, device=torch.device("cpu"))


@contextmanager
def _adapted(base: Base, adapter: Adapter) -> Iterator[Adapted]:
    """The base with the adapter in the middle of a run: a B that is still zero lets no gradient into A."""
    adapted = adapter.attach(base, seed=0)
    try:
        rng = seeds.generator(0, purpose="audit")
        some = {name: 0.05 * torch.randn(tensor.shape, generator=rng) for name, tensor in adapted.read().items() if not tensor.any()}
        adapted.write(some)
        yield adapted
    finally:
        adapted.undo()


def _tried(adapted: Adapted, kind: Kind, situation: Situation) -> Attack:
    module: Any = adapted.base.module
    inputs: Tensor = module.model.layers[0].input_layernorm(module.model.embed_tokens.weight.detach())  # of every token
    if kind.matrix != "A":
        inputs = inputs @ adapted.read()[f"{LAYER}.A"].T
    examples, rows = adapted.base.encode(_table(NOTES[: situation.notes])), torch.arange(situation.notes)
    there = torch.zeros(len(inputs), dtype=torch.bool)
    for row in rows:
        there[examples.batch(row.view(1))[0]["input_ids"][0, :-1]] = True  # the last token predicts nothing
    many, matrix = int(there.sum()), _update(adapted, kind, situation, examples, rows)[f"{LAYER}.{kind.matrix}"]
    found = span_test(matrix, inputs)
    precision, recall = scored(found.named(), there)
    told, _ = scored(span_test(matrix, inputs, most=many).nearest(many), there)
    read = "".join(chr(token) for token in found.named().nonzero()[:, 0].tolist() if token < 128)
    return Attack(kind.said, situation.said, many, found.rank, precision, recall, told, many / len(inputs), read)


def _update(adapted: Adapted, kind: Kind, situation: Situation, examples: Examples, rows: Tensor) -> Tensors:
    """What the client changed."""
    moving = adapted.select(kind.sends)
    before = {name: parameter.detach().clone() for name, parameter in moving.items()}
    kinds: dict[bool, Any] = {True: partial(torch.optim.AdamW, lr=SLOW), False: partial(torch.optim.SGD, lr=RATE)}
    optimizer = kinds[situation.adamw](moving.values())
    private = core(Claim(1.0, situation.noise, len(rows), 1, 1e-5), Secret()) if situation.noise else None
    for _ in range(situation.steps):
        each: list[tuple[Tensor, ...]] = []
        for row in rows:
            inputs, targets = examples.batch(row.view(1))
            each.append(torch.autograd.grad(losses(adapted.base.task, adapted.logits(inputs), targets).sum(), list(moving.values())))
        stacked = {name: torch.stack(parts) for name, parts in zip(moving, zip(*each, strict=True), strict=True)}
        release = private(stacked) if private else {name: part.mean(0) for name, part in stacked.items()}
        for name, parameter in moving.items():
            parameter.grad = release[name]
        optimizer.step()
    return {name: parameter.detach() - before[name] for name, parameter in moving.items()}


def _table(notes: tuple[str, ...]) -> Table:
    return Table(notes, torch.zeros(len(notes), dtype=torch.int64))
