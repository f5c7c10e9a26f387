"""Bottleneck adapters: h + up(gelu(down(h))) after each attention and each MLP (Houlsby et al., ICML 2019, https://arxiv.org/abs/1902.00751).

`up` starts at zero, so the model starts unchanged, and `down` at random, so its gradient does not vanish.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedpeft import seeds
from fedpeft.adapters.base import Adapted, head_parameters, restore, save_own
from fedpeft.models.base import Base

# The last linear layer of a sublayer, by model family.
OUTPUTS = ("attention.output.dense", "output.dense", "o_proj", "fc2", "down_proj", "c_proj", "out_lin", "lin2", "out_proj")


@dataclass(frozen=True)
class Bottleneck:
    """`width` is the bottleneck's; `targets` the layers whose output it is added to, by the end of their names."""

    width: int = 16
    targets: tuple[str, ...] = OUTPUTS

    def attach(self, base: Base, seed: int) -> Adapted:
        """Hooks a bottleneck onto every target."""
        rng = seeds.generator(seed, purpose="adapter")
        parameters: dict[str, nn.Parameter] = {}
        hooks = []
        head = {name.rpartition(".")[0] for name in base.head}
        for path, inner in base.module.named_modules():
            if path in head or not path.endswith(tuple(self.targets)) or not hasattr(inner, "weight"):
                continue
            bias = getattr(inner, "bias", None)
            size = len(bias) if isinstance(bias, Tensor) else inner.weight.shape[0]
            made = _parts(size, self.width, rng, inner.weight)
            parameters |= {f"{path}.{part}": parameter for part, parameter in made.items()}
            hooks.append(inner.register_forward_hook(_added(made)))
        if not hooks:
            raise ValueError(f"adapter=bottleneck found no layer whose name ends in {', '.join(self.targets)}; set adapter.targets")
        parameters |= head_parameters(base)

        def undo() -> None:
            for hook in hooks:
                hook.remove()
            restore(base, base.start)
            base.module.requires_grad_(False)

        return Adapted(base, parameters, undo, save_own(parameters, "bottleneck"))


def _parts(size: int, width: int, rng: torch.Generator, like: Tensor) -> dict[str, nn.Parameter]:
    bound = 1 / math.sqrt(size)
    values = {
        "down": torch.empty(width, size).uniform_(-bound, bound, generator=rng),
        "down_bias": torch.zeros(width),
        "up": torch.zeros(size, width),
        "up_bias": torch.zeros(size),
    }
    return {part: nn.Parameter(value.to(like.device, like.dtype)) for part, value in values.items()}


def _added(parts: dict[str, nn.Parameter]) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    def hook(module: nn.Module, inputs: Any, h: Tensor) -> Tensor:
        inside = F.gelu(F.linear(h, parts["down"], parts["down_bias"]))
        return h + F.linear(inside, parts["up"], parts["up_bias"])

    return hook
