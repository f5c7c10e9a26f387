"""RAVAN: several small trained heads between frozen factors, the scales folded into the heads before they are sent.

Raje et al., RAVAN: Multi-Head Low-Rank Adaptation for Federated Fine-Tuning, NeurIPS 2025. https://arxiv.org/abs/2506.05568
"""

from typing import Any

from fedpeft.adapters.ravan import Ravan
from fedpeft.strategy import Phase, always
from fedpeft.tensors import Tensors, not_factor
from strategies.fedavg import FedAvg, borrowed


def ravan(rank: int | None = None, heads: int = 4) -> FedAvg:
    """Exact: sum_i B_i (mean of s_i H_i) A_i. `rank` None: heads of twice the run's LoRA rank, or the most a layer has."""
    if rank is not None and rank < 1:
        raise ValueError(f"strategy.rank={rank}: needed is at least 1, or null for twice adapter.rank")
    if heads < 1:
        raise ValueError(f"strategy.heads={heads}: needed is at least 1")

    def adapter(main: Any) -> Ravan:
        borrowed(main, "ravan")
        return Ravan(rank or 2 * main.rank, heads, main.targets, capped=rank is None)

    phase = Phase("heads", trains=not_factor, shares=lambda name: not_factor(name) and not name.endswith(".s"), finish=fold)
    return FedAvg(always(phase), {"heads": adapter})


def fold(now: Tensors, start: Tensors, steps: int) -> Tensors:
    """s_i H_i goes up as H_i; at the server s stays 1."""
    return {name: now[name[:-2] + ".s"][:, None, None] * t if name.endswith(".H") else t for name, t in now.items()}
