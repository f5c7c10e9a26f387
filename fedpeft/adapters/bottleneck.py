"""Bottleneck adapters: h + up(gelu(down(h))) after each attention and each MLP (Houlsby et al., ICML 2019, https://arxiv.org/abs/1902.00751).

`up` starts at zero, so the model starts unchanged, and `down` at random, so the gradient of `up` does not vanish.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedpeft import seeds
from fedpeft.adapters.base import Adapted, head_parameters, precision, save_own, undoing
from fedpeft.models.base import Base

# The last linear layer of an attention or MLP, by model family: BERT; Llama, ViT; OPT, CLIP; GPT-2; DistilBERT; GPT-NeoX.
OUTPUTS = (
    "output.dense", "o_proj", "down_proj", "fc2", "out_proj", "c_proj", "out_lin", "lin2", "attention.dense", "dense_4h_to_h",
)  # fmt: skip


@dataclass(frozen=True)
class Bottleneck:
    """`width` is the bottleneck's; `targets` the layers it comes after, by the end of their names (None: the known families')."""

    width: int = 16
    targets: tuple[str, ...] | None = None

    def attach(self, base: Base, seed: int) -> Adapted:
        """Hooks a bottleneck onto every target; `down` is uniform in +-1/sqrt(layer's outputs)."""
        if self.width < 1:
            raise ValueError(f"adapter.width={self.width}: needed is at least 1")
        rng = seeds.generator(seed, purpose="adapter")
        undo = undoing(base)
        parameters: dict[str, nn.Parameter] = {}
        for path, inner in self._targets(base).items():
            made = _parts(inner, self.width, rng)
            parameters |= {f"{path}.{part}": parameter for part, parameter in made.items()}
            inner.register_forward_hook(_added(made))
        parameters |= head_parameters(base)
        return Adapted(base, parameters, undo, save_own(parameters, "bottleneck"))

    def _targets(self, base: Base) -> dict[str, nn.Module]:
        head = {name.rpartition(".")[0] for name in base.head}
        linear = {path: m for path, m in base.module.named_modules() if hasattr(m, "weight") and m.weight.dim() == 2 and path not in head}
        found: dict[str, nn.Module] = {}
        for target in self.targets or OUTPUTS:
            fits = {path: inner for path, inner in linear.items() if f".{path}".endswith(f".{target}")}
            if self.targets and not fits:
                raise ValueError(f"adapter.targets: no layer's name ends in {target}; there are {', '.join(linear)}")
            found |= fits
        if not found:
            raise ValueError(
                f"adapter=bottleneck knows no layer of {type(base.module).__name__}; set adapter.targets, of {', '.join(linear)}"
            )
        return {path: inner for path, inner in linear.items() if path in found}


def _parts(inner: nn.Module, width: int, rng: torch.Generator) -> dict[str, nn.Parameter]:
    weight = inner.weight
    assert isinstance(weight, Tensor)
    size = int(getattr(inner, "nf", 0) or getattr(inner, "out_features", 0) or weight.shape[0])  # Conv1D calls its outputs nf
    bound = 1 / math.sqrt(size)
    values = {
        "down": torch.empty(width, size).uniform_(-bound, bound, generator=rng),
        "down_bias": torch.zeros(width),
        "up": torch.zeros(size, width),
        "up_bias": torch.zeros(size),
    }
    return {part: nn.Parameter(value.to(weight.device, precision(weight))) for part, value in values.items()}


def _added(parts: dict[str, nn.Parameter]) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    def hook(module: nn.Module, inputs: Any, h: Tensor) -> Tensor:
        inside = F.gelu(F.linear(h.to(parts["down"].dtype), parts["down"], parts["down_bias"]))
        return h + F.linear(inside, parts["up"], parts["up_bias"]).to(h.dtype)

    return hook
