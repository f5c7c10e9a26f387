"""FedRot-LoRA: every client rotates its factors towards the global ones before they are averaged.

FedRot-LoRA: Mitigating Rotational Misalignment in Federated LoRA, ICML 2026: (B Q, Q^T A) is the same product for any orthogonal Q.
"""

from functools import partial

import torch
from torch import Tensor

from fedpeft.strategy import Phase
from fedpeft.tensors import Tensors, targets
from strategies.fedavg import FedAvg


def fedrot(strength: float = 0.5) -> FedAvg:
    """FedAvg of aligned factors; A is aligned in even rounds (B starts at zero, to nothing), B in odd ones. Strength 0 is FedIT.

    As in the paper's soft variant: Q of the Procrustes problem with det 1, then the polar factor of (1 - strength) I + strength Q.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strategy.strength={strength}: needed is a number in [0, 1]")
    a, b = (Phase(finish=partial(align, factor=factor, strength=strength)) for factor in "AB")
    return FedAvg(lambda round: b if round % 2 else a, low_rank=True)


def align(now: Tensors, start: Tensors, steps: int, *, factor: str, strength: float) -> Tensors:
    """Rewrites every pair as (B Q, Q^T A) with Q orthogonal of det 1, so that `factor` comes close to its start."""
    out = dict(now)
    for layer in targets(now):
        A, B = now[layer + ".A"].double(), now[layer + ".B"].double()
        M = A @ start[layer + ".A"].double().T if factor == "A" else B.T @ start[layer + ".B"].double()
        if not strength or float(M.norm()) == 0:
            continue
        Q = rotation((1 - strength) * torch.eye(len(M), dtype=M.dtype) + strength * rotation(M))
        dtype = now[layer + ".A"].dtype
        out |= {layer + ".A": (Q.T @ A).to(dtype), layer + ".B": (B @ Q).to(dtype)}
    return out


def rotation(M: Tensor) -> Tensor:
    """The rotation (orthogonal, det 1) nearest to M."""
    u, _, vt = torch.linalg.svd(M)
    flip = torch.ones(len(M), dtype=M.dtype)
    flip[-1] = torch.linalg.det(u @ vt).sign()
    turned: Tensor = (u * flip) @ vt
    return turned
