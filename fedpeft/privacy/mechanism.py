"""The one mechanism of all private runs: contributions clipped jointly over all tensors, summed, noised once.

Abadi et al., Deep Learning with Differential Privacy, CCS 2016, algorithm 1. A contribution is an example's gradient or a client's change.
"""

import torch
from torch import Tensor

from fedpeft.privacy.noise import Source
from fedpeft.tensors import Tensors


@torch.no_grad()
def clip_each(each: Tensors, clip: float) -> Tensor:
    """Scales the N contributions (each tensor (N, ...)) in place to a norm of at most `clip` over all tensors together.

    One that is not finite becomes zero: scaled, it would make every sum NaN, and tell that it was there. Gives the norms before (N,),
    float64, infinite for those.
    """
    norms = torch.stack([part.flatten(1).double().square().sum(1) for part in each.values()]).sum(0).sqrt()
    broken = ~norms.isfinite()
    factor = (clip / (norms + 1e-6)).clamp(max=1.0).masked_fill(broken, 0.0)
    for part in each.values():
        if broken.any():
            part[broken] = 0.0
        below = torch.where(factor < 1, factor * (1 - torch.finfo(part.dtype).eps), factor)  # both roundings may go up
        part.mul_(below.to(part.dtype).view(-1, *[1] * (part.dim() - 1)))
    return norms.masked_fill(broken, torch.inf)


@torch.no_grad()
def add_noise(sums: Tensors, std: float, source: Source) -> None:
    """Adds independent Gaussian noise of standard deviation `std` to every entry of `sums`, in place and in the order of their names.

    Sum and noise meet in float64, and are rounded once: noise in float32 would leave what it is added to in the lowest bits.
    """
    if not std:
        return
    names = sorted(sums)
    drawn, at = source.normal(sum(sums[name].numel() for name in names)), 0
    for name in names:
        total = sums[name]
        part = drawn[at : at + total.numel()].view(total.shape)
        total.copy_(total.double().add_(part.to(total.device, torch.float64), alpha=std))
        at += total.numel()
