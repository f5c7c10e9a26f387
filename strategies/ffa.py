"""FFA-LoRA: freeze A, train and average B, so the mean of the products is the product of the means.

Sun et al., Improving LoRA in Privacy-preserving Federated Learning, ICLR 2024. https://arxiv.org/abs/2403.12313
"""

from fedpeft.strategy import Phase, always
from fedpeft.tensors import not_a
from strategies.fedavg import FedAvg


def ffa_lora() -> FedAvg:
    """FedAvg in which everything but the A factors (B and the head) is trained and shared."""
    return FedAvg(always(Phase(trains=not_a, shares=not_a)), low_rank=True)
