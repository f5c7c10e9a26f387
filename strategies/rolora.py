"""RoLoRA: even rounds train and average B, odd rounds A; the mean of each round is exact.

Chen et al., Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA, NeurIPS 2025. https://arxiv.org/abs/2502.01755
"""

from fedpeft.strategy import Phase
from fedpeft.tensors import not_a, not_b
from strategies.fedavg import FedAvg

EVEN, ODD = Phase(trains=not_a, shares=not_a), Phase(trains=not_b, shares=not_b)


def rolora() -> FedAvg:
    """FedAvg of one factor at a time, by the server's round. B first: while B is zero, A has no gradient."""
    return FedAvg(lambda round: ODD if round % 2 else EVEN, low_rank=True)
