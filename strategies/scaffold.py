"""SCAFFOLD: control variates against the drift of clients that train by plain SGD (option II).

Karimireddy et al., SCAFFOLD: Stochastic Controlled Averaging for Federated Learning, ICML 2020. https://arxiv.org/abs/1910.06378
`control/<name>` is the server's variate c, `mine/<name>` the client's c_i; a linear term in the loss adds c - c_i to the gradient.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedpeft.aggregate import Mean
from fedpeft.messages import Broadcast, Update
from fedpeft.strategy import Federation, Phase, always
from fedpeft.tensors import Tensors, is_own
from strategies.fedavg import FedAvg


@dataclass(frozen=True)
class Scaffold(FedAvg):
    """FedAvg of the model; of the variates only the share of clients that a round draws moves (algorithm 1, line 17).

    The paper's clients all weigh the same. With other weights c is the mean of all c_i only while all take part; if a round draws some of
    them it is so up to how their examples happen to differ, and the model ends beside the optimum (nearer than FedAvg's).
    """

    share: float = 1.0  # of the clients that are drawn in a round

    def init(self, starts: Mapping[str, Tensors]) -> Broadcast:
        """Variates start at zero."""
        adapter = super().init(starts).tensors
        return Broadcast(adapter | {f"control/{name}": torch.zeros_like(t) for name, t in adapter.items() if t.is_floating_point()})

    def aggregate(self, state: Broadcast, round: int, updates: Iterable[Update], mean: Mean) -> Broadcast:
        """c moves by share * mean(c_i' - c_i): clients send c + c_i' - c_i, so that the server's mean is all it needs."""
        old, new = state.tensors, mean(updates)
        return Broadcast(old | {name: torch.lerp(old[name], t, self.share) if is_own(name) else t for name, t in new.items()})


def scaffold(run: Federation) -> Scaffold:
    """Needs train.optimizer=sgd without momentum or clip: c_i' = c_i - c + (start - now) / (steps * rate) counts plain steps."""
    if run.optimizer != "sgd" or run.momentum or run.clip is not None:
        raise ValueError(
            f"SCAFFOLD's control variates are gradients of plain SGD, the clients take {run.optimizer} with momentum {run.momentum:g} "
            f"and clip {run.clip}; set train.optimizer=sgd train.momentum=0 train.clip=null and a larger train.lr, for instance 0.1"
        )
    phase = Phase(shares=lambda name: not _stays(name), keeps=_is_mine, rates=True, loss=correct, finish=renew)
    return Scaffold(always(phase), share=run.cohort / run.clients)


def correct(now: Tensors, start: Tensors) -> Tensor:
    """<now, c - c_i>, whose gradient is the correction."""
    return torch.stack([(t * (start[f"control/{name}"] - start.get(f"mine/{name}", 0))).sum() for name, t in now.items()]).sum()


def renew(now: Tensors, start: Tensors, steps: int) -> Tensors:
    """The client's new variate, to keep, and what moves the server's, to send."""
    out = dict(now)
    for name, t in now.items():
        if is_own(name) or f"control/{name}" not in start:
            continue
        control = start[f"control/{name}"]
        old = start.get(f"mine/{name}", torch.zeros_like(control))
        mine = old - control + (start[name] - t) / (steps * start[f"rate/{name}"])
        out |= {f"mine/{name}": mine, f"control/{name}": control + mine - old}
    return out


def _is_mine(name: str) -> bool:
    return name.startswith("mine/")


def _stays(name: str) -> bool:
    return name.startswith(("mine/", "rate/"))
