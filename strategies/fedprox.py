"""FedProx: FedAvg whose clients are held near their start.

Li et al., Federated Optimization in Heterogeneous Networks, MLSys 2020. https://arxiv.org/abs/1812.06127
"""

import torch
from torch import Tensor

from fedpeft.strategy import Phase, always
from fedpeft.tensors import Tensors
from strategies.fedavg import FedAvg


def fedprox(mu: float = 0.01) -> FedAvg:
    """Adds mu/2 * |now - start|^2 over all trained tensors to the local loss (equation 2)."""
    if mu < 0:
        raise ValueError(f"strategy.mu={mu}: needed is at least 0 (0 is FedAvg)")

    def near(now: Tensors, start: Tensors) -> Tensor:
        return mu / 2 * torch.stack([(tensor - start[name]).square().sum() for name, tensor in now.items()]).sum()

    return FedAvg(always(Phase(loss=near)))
