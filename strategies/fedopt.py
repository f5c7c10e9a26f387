"""FedOpt: the server takes an optimizer's step along the mean change: FedAvgM, FedAdam, FedYogi.

Reddi et al., Adaptive Federated Optimization, ICLR 2021 (Algorithm 2). https://arxiv.org/abs/2003.00295
Hsu et al., Measuring the Effects of Non-Identical Data Distribution, 2019 (FedAvgM). https://arxiv.org/abs/1909.06335
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

from fedpeft.aggregate import Mean
from fedpeft.messages import Broadcast, Update
from fedpeft.strategy import Adapters, Phase, always
from fedpeft.tensors import Tensors


@dataclass(frozen=True)
class State:
    """The model and the moments of its mean changes; a tensor has moments from its first change on."""

    model: Broadcast
    m: Tensors = field(default_factory=dict)
    v: Tensors = field(default_factory=dict)


@dataclass(frozen=True)
class FedOpt:
    """With d the mean change: m = beta1 m + (1 - beta1) d, and the step lr m / (sqrt(v) + tau), where v follows d^2.

    `momentum` (FedAvgM) takes m = beta1 m + d and the step lr m. As in the paper there is no bias correction and v starts at tau^2.
    """

    optimizer: Literal["momentum", "adam", "yogi"] = "adam"
    lr: float = 3e-2
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3
    phase: Callable[[int], Phase] = always(Phase())
    adapters: Adapters = field(default_factory=dict)
    mean_only = True  # no annotation: not a field, so that no config can switch it

    def __post_init__(self) -> None:
        if self.optimizer not in ("momentum", "adam", "yogi"):
            raise ValueError(f"strategy.optimizer={self.optimizer}: needed is momentum, adam or yogi")
        if not self.lr > 0:
            raise ValueError(f"strategy.lr={self.lr}: needed is more than 0")
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise ValueError(f"strategy.beta1={self.beta1}, strategy.beta2={self.beta2}: needed are numbers in [0, 1)")
        if not self.tau > 0:  # what no client moves has v = tau^2 alone
            raise ValueError(f"strategy.tau={self.tau}: needed is more than 0")

    def init(self, starts: Mapping[str, Tensors]) -> State:
        """The first adapter's start, without moments."""
        return State(Broadcast(starts[self.phase(0).adapter]))

    def broadcast(self, state: State, round: int, client: int | None) -> Broadcast:
        """The model."""
        return state.model

    def aggregate(self, state: State, round: int, updates: Iterable[Update], mean: Mean) -> State:
        """One step of the server's optimizer."""
        old = state.model.tensors
        change = {name: tensor - old[name] for name, tensor in mean(updates).items()}
        m = state.m | {name: self._m(state.m.get(name), d) for name, d in change.items()}
        if self.optimizer == "momentum":
            return State(Broadcast(old | {name: old[name] + self.lr * m[name] for name in change}), m)
        v = state.v | {name: self._v(state.v.get(name), d) for name, d in change.items()}
        new = {name: old[name] + self.lr * m[name] / (v[name].sqrt() + self.tau) for name in change}
        return State(Broadcast(old | new), m, v)

    def _m(self, m: torch.Tensor | None, d: torch.Tensor) -> torch.Tensor:
        before = torch.zeros_like(d) if m is None else m
        return self.beta1 * before + (d if self.optimizer == "momentum" else (1 - self.beta1) * d)

    def _v(self, v: torch.Tensor | None, d: torch.Tensor) -> torch.Tensor:
        before = torch.full_like(d, self.tau**2) if v is None else v
        if self.optimizer == "yogi":
            return before - (1 - self.beta2) * d.square() * (before - d.square()).sign()
        return self.beta2 * before + (1 - self.beta2) * d.square()
