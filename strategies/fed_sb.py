"""Fed-SB: B and A are the same everywhere and frozen, only the r x r core R between them is trained and exchanged, so means are exact.

Singhal et al., Fed-SB: A Silver Bullet for Extreme Communication Efficiency and Performance in (Private) Federated LoRA Fine-Tuning, 2025.
https://arxiv.org/abs/2502.15436. Start as in LoRA-SB, Ponkshe et al., 2024, https://arxiv.org/abs/2411.19557, or as in LoRA-XS.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from fedpeft.adapters.lora import Lora
from fedpeft.adapters.lora_sb import LoraSB
from fedpeft.adapters.sparse import Sparse
from fedpeft.aggregate import Mean
from fedpeft.lowrank import LowRank, nearest, pair
from fedpeft.messages import Broadcast, Update
from fedpeft.strategy import Adapters, Federation, Phase
from fedpeft.tensors import Tensors, is_a, is_b, is_factor, is_own, not_factor, targets
from strategies.fedavg import borrowed

Start = Literal["xs", "gradient", "sign"]
PRINT = "fed_sb/print"  # fingerprint of B and A
OVER = 8  # ranks of a gradient's sketch beyond the core's: without them the subspace of a flat spectrum is far from the best


@dataclass(frozen=True)
class State:
    """The model, and the core adapter that follows rounds of gradients; empty once it has begun."""

    model: Broadcast
    core: Tensors


@dataclass(frozen=True)
class FedSB:
    """FedAvg of R and the head, behind as many rounds of gradients as `start` takes.

    `xs`: the leading singular vectors of the frozen weight, no data. `gradient` (ours): a LoRA with B = 0 has dL/dB = G A^T, and one with
    A = 0 has dL/dA = B^T G, so two rounds of ordinary gradient steps are both passes of a randomized SVD of the clients' mean gradient G.
    `sign` (as published): the SVD of -step sign(G), for which every client sends whole gradients; a sign cannot be sketched.
    """

    start: Start
    step: float
    phase: Callable[[int], Phase]
    adapters: Adapters
    mean_only = True  # no annotation: not a field, so that no config can switch it

    def init(self, starts: Mapping[str, Tensors]) -> State:
        """The core at zero (`xs`), or what takes the gradient."""
        first = self.phase(0).adapter
        return State(Broadcast(starts[first]), starts["core"]) if first != "core" else State(_sealed(starts["core"]), {})

    def broadcast(self, state: State, round: int, client: int | None) -> Broadcast:
        """The model; with the core goes a fingerprint of B and A."""
        return state.model

    def aggregate(self, state: State, round: int, updates: Iterable[Update], mean: Mean) -> State:
        """The mean; after a round of gradients what follows from it."""
        tensors = state.model.tensors | mean(updates)
        if not state.core:
            return State(Broadcast(tensors), {})
        if self.start == "gradient" and round == 0:
            for layer in targets(tensors):
                b, a = tensors[f"{layer}.B"], tensors[f"{layer}.A"]
                tensors |= {f"{layer}.B": torch.linalg.qr(b.double())[0].to(b.dtype), f"{layer}.A": torch.zeros_like(a)}
            return replace(state, model=Broadcast(tensors))
        return State(_sealed(self._begun(tensors, state.core)), {})

    def _begun(self, tensors: Tensors, core: Tensors) -> Tensors:
        """B and A from the leading singular vectors of the step that clients would take, R = step * S / S_max or, for signs, step * S."""
        made = dict(core) | {name: t for name, t in tensors.items() if name in core and not_factor(name)}
        for layer in targets(core):
            (m, r), n = core[f"{layer}.B"].shape, core[f"{layer}.A"].shape[1]
            if self.start == "sign":
                best = nearest(tensors[f"{layer}.values"].double().view(m, n).sign(), r)
            else:
                sketch = pair(tensors, layer)
                best = LowRank(sketch.B.double(), sketch.A.double()).truncate(r)
            sizes = best.B.norm(dim=0)
            if not bool(sizes.min() > 0):  # no gradient, or one of lower rank: singular vectors of the weight serve as well
                continue
            top = self.step * (sizes if self.start == "sign" else sizes / sizes[0])
            kind = core[f"{layer}.A"].dtype
            parts = {"B": best.B / sizes, "A": best.A, "R": torch.diag(top)}
            made |= {f"{layer}.{part}": t.to(kind) for part, t in parts.items()}
        return made


def fed_sb(run: Federation, start: Start = "xs", rank: int | None = None, step: float | None = None) -> FedSB:
    """`rank` None: four times the run's LoRA rank, or the most a layer has. `step` None: 0 (R starts at zero); for signs lr / all steps.

    A run of epochs, whose steps nobody knows, counts one a round.
    """
    before = {"xs": 0, "gradient": 2, "sign": 1}.get(start)
    if before is None:
        raise ValueError(f"strategy.start={start}: needed is xs, gradient or sign")
    if before >= run.rounds:
        raise ValueError(
            f"strategy.start={start} takes {before} rounds of gradients, rounds={run.rounds} leaves none to train; raise rounds"
        )
    if rank is not None and rank < 1:
        raise ValueError(f"strategy.rank={rank}: needed is at least 1, or null for four times adapter.rank")
    if step is not None and not 0 <= step < math.inf:
        raise ValueError(f"strategy.step={step}: needed is at least 0, or null")
    if step and start == "xs":
        raise ValueError(f"strategy.step={step}: strategy.start=xs takes no gradient to step along; set strategy.start=gradient")
    if step is None:
        step = run.lr / (run.rounds * (run.steps or 1)) if start == "sign" else 0.0
    train = Phase("core", trains=_moves, shares=_moves, finish=same_basis)
    plan = {
        "gradient": {
            0: Phase("sketch", trains=is_b, shares=is_b, work="gradient"),
            1: Phase("sketch", trains=is_a, shares=is_a, work="gradient"),
        },
        "sign": {0: Phase("whole", trains=_is_value, shares=_is_value, work="gradient")},
    }.get(start, {})
    adapters: Adapters = {"core": partial(_core, rank), "sketch": partial(_sketch, rank), "whole": _whole}
    return FedSB(start, step, lambda round: plan.get(round, train), adapters)


def same_basis(now: Tensors, start: Tensors, steps: int) -> Tensors:
    """What was trained, if this client's B and A have the fingerprint that the server sent. Raises `ValueError` if not."""
    if not torch.equal(fingerprint(now), start[PRINT]):
        raise ValueError("its B and A are not those of the server (their fingerprints differ): a mean of R would mean nothing")
    return now


def fingerprint(tensors: Tensors) -> Tensor:
    """(16,) uint8 digest of all B and A."""
    made = hashlib.blake2b(digest_size=16)
    for name in sorted(name for name in tensors if is_factor(name)):
        made.update(name.encode())
        made.update(tensors[name].detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return torch.frombuffer(bytearray(made.digest()), dtype=torch.uint8)


def _sealed(tensors: Tensors) -> Broadcast:
    return Broadcast(tensors | {PRINT: fingerprint(tensors)})


def _moves(name: str) -> bool:
    return not_factor(name) and not is_own(name)


def _is_value(name: str) -> bool:
    return name.endswith(".values")


def _core(rank: int | None, main: Any) -> LoraSB:
    if isinstance(main, LoraSB):
        return replace(main, start="xs", rank=rank or main.rank)
    borrowed(main, "fed_sb")
    return LoraSB(rank or 4 * main.rank, main.targets, "xs", capped=rank is None)


def _sketch(rank: int | None, main: Any) -> Lora:
    core = _core(rank, main)
    return Lora(core.rank + OVER, core.rank + OVER, core.targets, capped=True)


def _whole(main: Any) -> Sparse:
    return Sparse(1.0, targets=_core(None, main).targets)
