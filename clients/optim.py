"""Stacked optimizers: AdamW and SGD over tensors with a leading client axis, each client with its own rate, norm and count of steps.

A client that has no step left is left exactly as it is: weight decay and momentum would else move it. Bias corrections are kept in float64;
`1 - beta ** t` in float32 is wrong in the fifth digit.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from clients.train import head_lr
from fedpeft.config import Training
from fedpeft.tensors import Tensors, is_head

BETAS, EPS = (0.9, 0.999), 1e-8  # torch's own


class Descent:
    """One optimizer for `values` (name -> (K, ...)), updated in place. `works` are the clients' settings; only their rates may differ."""

    def __init__(self, values: Mapping[str, Tensor], works: Sequence[Training]) -> None:
        alike = {(work.optimizer, work.momentum, work.weight_decay, work.clip) for work in works}
        if len(alike) != 1:
            raise ValueError(f"clients of one wave need one optimizer, momentum, decay and clip; got {sorted(map(str, alike))}")
        self._values, self._work = dict(values), works[0]
        self._rates = {False: _column([work.lr for work in works]), True: _column([head_lr(work) for work in works])}
        self._steps = torch.zeros(len(works), dtype=torch.float64)
        self._m = {name: torch.zeros_like(value) for name, value in values.items()} if self._has_momentum else {}
        self._v = {name: torch.zeros_like(value) for name, value in values.items()} if self._work.optimizer == "adamw" else {}

    @property
    def _has_momentum(self) -> bool:
        return self._work.optimizer == "adamw" or self._work.momentum > 0

    @torch.no_grad()
    def step(self, grads: Tensors, active: Tensor) -> None:
        """One step of the clients `active` (K,) bool along `grads`, which are clipped first to `clip` per client if it is set."""
        rows = None if bool(active.all()) else active.nonzero()[:, 0]
        self._steps += active.double()
        if self._work.clip is not None:
            clip(grads, self._work.clip)
        if rows is None and self._work.optimizer == "adamw" and self._alike():
            self._fused(grads)
            return
        for name, value in self._values.items():
            if rows is None:
                self._move(name, value, grads[name], self._m.get(name), self._v.get(name), None)
                continue
            here = rows.to(value.device)
            held = [value, *(moments[name] for moments in (self._m, self._v) if name in moments)]
            some = [tensor.index_select(0, here) for tensor in held]
            m = some[1] if name in self._m else None
            self._move(name, some[0], grads[name].index_select(0, here), m, some[-1] if name in self._v else None, rows)
            for tensor, part in zip(held, some, strict=True):
                tensor.index_copy_(0, here, part)

    def _alike(self) -> bool:
        """True while all clients have made the same steps at the same rates: elementwise optimizers see no clients then."""
        return all(bool((each == each[0]).all()) for each in (self._steps, *self._rates.values()))

    def _fused(self, grads: Tensors) -> None:
        """torch's own kernel, one pass over memory instead of nine."""
        for head, rate in self._rates.items():
            names = [name for name in self._values if is_head(name) == head]
            if not names:
                continue
            done = [torch.tensor(float(self._steps[0]) - 1, device=self._values[name].device) for name in names]  # it adds this one
            adamw(
                [self._values[name].detach() for name in names], [grads[name] for name in names], [self._m[name] for name in names],
                [self._v[name] for name in names], [], done,
                fused=True, amsgrad=False, beta1=BETAS[0], beta2=BETAS[1], lr=float(rate[0]), weight_decay=self._work.weight_decay, eps=EPS,
                maximize=False,
            )  # fmt: skip

    def _move(self, name: str, p: Tensor, g: Tensor, m: Tensor | None, v: Tensor | None, rows: Tensor | None) -> None:
        rate, steps = self._rates[is_head(name)], self._steps
        if rows is not None:
            rate, steps = rate[rows], steps[rows]
        decay = self._work.weight_decay
        if self._work.optimizer == "adamw":
            assert m is not None
            assert v is not None
            if decay:
                p.mul_(_beside(1 - rate * decay, p))
            m.lerp_(g, 1 - BETAS[0])
            v.mul_(BETAS[1]).addcmul_(g, g, value=1 - BETAS[1])
            size, root = rate / (1 - BETAS[0] ** steps), (1 - BETAS[1] ** steps).sqrt()
            p.sub_((m * _beside(size, p)).div_(v.sqrt().div_(_beside(root, p)).add_(EPS)))
            return
        g = g + decay * p if decay else g
        if m is not None:  # torch's first step takes the gradient itself: m is zero then, so this is the same
            g = m.mul_(self._work.momentum).add_(g)
        p.sub_(g * _beside(rate, p))


@torch.no_grad()
def clip(grads: Tensors, most: float) -> None:
    """Scales each client's gradient (its rows of all tensors together) to at most the norm `most`, in place, as torch does."""
    total = sum(grad.flatten(1).square().sum(1) for grad in grads.values())
    assert isinstance(total, Tensor)
    factor = (most / (total.sqrt() + 1e-6)).clamp(max=1.0)
    for grad in grads.values():
        grad.mul_(factor.view(-1, *[1] * (grad.dim() - 1)).to(grad.dtype))


def _column(rates: Sequence[float]) -> Tensor:
    return torch.tensor(rates, dtype=torch.float64)


def _beside(factor: Tensor, p: Tensor) -> Tensor | float:
    """A (K,) float64 factor ready to multiply p (K, ...): one number where all are equal."""
    if len(factor) and bool((factor == factor[0]).all()):
        return float(factor[0])
    return factor.to(p.device, p.dtype).view(-1, *[1] * (p.dim() - 1))
