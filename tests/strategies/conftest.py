"""A federation on paper: clients that move what their phase trains by random amounts, in float64, without a model."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from fedpeft.aggregate import weighted_mean
from fedpeft.lowrank import LowRank, pair
from fedpeft.messages import Broadcast, Update
from fedpeft.strategy import Strategy
from fedpeft.tensors import Tensors, is_own, only, targets

SHAPES = {"layer.0.query": (7, 11), "layer.0.value": (12, 5), "layer.1.query": (6, 6)}  # out x in
RANK = 3
Trained = dict[int, Tensors]  # client -> where it ended, before anything is left out


def adapter(dtype: torch.dtype = torch.float64, *, seed: int = 0) -> Tensors:
    """LoRA on three layers and a head: A random, B zero."""
    rng = torch.Generator().manual_seed(seed)
    made: Tensors = {}
    for name, (m, n) in SHAPES.items():
        made |= {f"{name}.A": torch.randn(RANK, n, generator=rng, dtype=dtype), f"{name}.B": torch.zeros(m, RANK, dtype=dtype)}
    return made | {"head.weight": torch.randn(4, 6, generator=rng, dtype=dtype), "head.bias": torch.zeros(4, dtype=dtype)}


@dataclass
class Federation:
    """A strategy, its state and what its clients keep."""

    strategy: Strategy[Any]
    dtype: torch.dtype = torch.float64
    state: Any = None
    round: int = 0
    memory: dict[tuple[int, str], Tensors] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.state is None:
            self.state = self.strategy.init(adapter(self.dtype))

    def start(self, client: int) -> Tensors:
        """Where `client` starts this round: the broadcast, and what it keeps laid over it."""
        kept = self.memory.get((client, self.strategy.phase(self.round).adapter), {})
        return self.strategy.broadcast(self.state, self.round, client).tensors | kept

    def train(self, client: int, *, by: float = 1.0, seed: int | None = None, weight: float | None = None) -> tuple[Update, Tensors]:
        """What `client` sends, and where it ended; what it keeps is kept. Clients with the same `seed` move by the same amounts."""
        phase, start = self.strategy.phase(self.round), self.start(client)
        rng = torch.Generator().manual_seed(1000 * self.round + (client if seed is None else seed))
        now = {}
        for name, tensor in start.items():
            moves = phase.trains(name) and not is_own(name) and tensor.is_floating_point()
            now[name] = tensor + by * torch.randn(tensor.shape, generator=rng, dtype=tensor.dtype) if moves else tensor
        end = phase.finish(now, start, 5) if phase.finish else now
        self.memory[client, phase.adapter] = only(end, phase.keeps)
        return Update(client, only(end, phase.shares), float(client + 1) if weight is None else weight), now

    def play(self, clients: Sequence[int] = (0, 1, 2), **how: Any) -> tuple[list[Update], Trained]:
        """The updates of `clients`, and where each ended."""
        pairs = [self.train(client, **how) for client in clients]
        return [update for update, _ in pairs], {update.client: now for update, now in pairs}

    def take(self, updates: Iterable[Update], mean: Callable[[Iterable[Update]], Tensors] = weighted_mean) -> None:
        """Ends the round with `updates`."""
        self.state = self.strategy.aggregate(self.state, self.round, updates, mean)
        self.round += 1

    def advance(self, rounds: int) -> "Federation":
        """Plays whole rounds of three clients."""
        for _ in range(rounds):
            self.take(self.play()[0])
        return self

    def model(self, client: int | None = None, now: Tensors | None = None) -> Tensors:
        """What the adapter does: the change of every layer's weight (base deltas included), and the tensors that are no factors.

        Of the broadcast to `client` with what it keeps laid over it, or of tensors `now` on the broadcast's base deltas.
        """
        sent = self.strategy.broadcast(self.state, self.round, client)
        if now is None:
            now = sent.tensors if client is None else self.start(client)
        plain = {name: tensor for name, tensor in now.items() if not is_own(name)}
        layers = targets(plain)
        made = {name: tensor for name, tensor in plain.items() if name.rpartition(".")[0] not in layers}
        for layer in layers:
            made[layer] = pair(plain, layer).dense() + sum(chunk[layer].dense() for chunk in sent.base_delta if layer in chunk)
        return made


@pytest.fixture
def federation() -> type[Federation]:
    return Federation


@pytest.fixture
def distance() -> Callable[[Tensors, Tensors], float]:
    """|| a - b || / || b ||, over tensors of the same names."""

    def relative(a: Tensors, b: Tensors) -> float:
        assert set(a) == set(b)
        top = sum(float((a[name] - b[name]).double().square().sum()) for name in b)
        return (top / max(sum(float(tensor.double().square().sum()) for tensor in b.values()), 1e-300)) ** 0.5

    return relative


@pytest.fixture
def mean_of_products() -> Callable[[Sequence[Update], Trained], Tensors]:
    """The weighted mean of the clients' B @ A, formed layer by layer: what an exact method reaches."""

    def ideal(updates: Sequence[Update], trained: Trained) -> Tensors:
        whole = sum(update.weight for update in updates)
        made = {}
        for layer in SHAPES:
            made[layer] = sum(
                update.weight / whole * trained[update.client][f"{layer}.B"] @ trained[update.client][f"{layer}.A"] for update in updates
            )
        return made

    return ideal


@pytest.fixture
def start() -> Tensors:
    return adapter()


@pytest.fixture
def products() -> Callable[[Broadcast], Tensors]:
    """The change of every layer that a broadcast makes."""
    return lambda sent: {layer: LowRank(sent.tensors[f"{layer}.B"], sent.tensors[f"{layer}.A"]).dense() for layer in SHAPES}
