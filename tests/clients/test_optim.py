"""Stacked optimizers against torch's, one model at a time, in float64."""

import pytest
import torch
from torch import Tensor, nn

from clients.optim import Descent
from clients.train import optimizer
from fedpeft.config import Training

pytestmark = pytest.mark.fast
WORKS = [
    Training(lr=1e-2),
    Training(lr=1e-2, weight_decay=0.1, clip=0.5),
    Training(lr=1e-2, head_lr=0.3, optimizer="sgd", momentum=0.9, weight_decay=0.1),
    Training(lr=1e-2, optimizer="sgd", clip=0.1),
]


@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("work", WORKS)
def test_clients_with_unequal_steps_and_rates_end_where_torch_ends(work: Training, alike: bool) -> None:
    rng = torch.Generator().manual_seed(0)
    shapes, steps = {"q.A": (2, 5), "q.B": (4, 2), "head.bias": (3,)}, [2, 3, 5, 5]
    works = [Training(**(vars(work) | {"lr": work.lr * (1 if alike else k + 1)})) for k in range(4)]
    start = {name: torch.randn(4, *shape, generator=rng, dtype=torch.float64) for name, shape in shapes.items()}
    grads = [{name: torch.randn(4, *shape, generator=rng, dtype=torch.float64) for name, shape in shapes.items()} for _ in range(5)]
    values = {name: value.clone() for name, value in start.items()}
    descent = Descent(values, works)
    for t in range(5):
        descent.step({name: grad.clone() for name, grad in grads[t].items()}, torch.tensor([t < many for many in steps]))
    for k in range(4):
        alone = {name: nn.Parameter(value[k].clone()) for name, value in start.items()}
        theirs = optimizer(alone, works[k])
        for t in range(steps[k]):
            for name, parameter in alone.items():
                parameter.grad = grads[t][name][k].clone()
            if works[k].clip is not None:
                nn.utils.clip_grad_norm_(alone.values(), works[k].clip)
            theirs.step()
        assert max(far(values[name][k], alone[name]) for name in shapes) < 1e-14


def far(one: Tensor, other: Tensor) -> float:
    return float((one - other.detach()).abs().max())


def test_what_must_be_alike_in_a_wave_is_checked() -> None:
    with pytest.raises(ValueError, match="clients of one wave need one optimizer"):
        Descent({}, [Training(), Training(weight_decay=0.1)])
