"""FedSA-LoRA: A is shared, B and the head stay at the client; there is no global model, clients are evaluated with their own.

Guo et al., Selective Aggregation for Low-Rank Adaptation in Federated Learning, ICLR 2025. https://arxiv.org/abs/2410.01463
"""

from fedpeft.strategy import Phase, always
from fedpeft.tensors import is_a, not_a
from strategies.fedavg import FedAvg


def fedsa_lora() -> FedAvg:
    """FedAvg of the A factors; both factors are trained."""
    return FedAvg(always(Phase(shares=is_a, keeps=not_a)), low_rank=True)
