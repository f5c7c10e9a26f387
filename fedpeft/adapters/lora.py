"""LoRA: a trained low-rank product B @ A beside each frozen weight (Hu et al., ICLR 2022, https://arxiv.org/abs/2106.09685).

With rank and alpha patterns, rsLoRA (alpha / sqrt(rank), https://arxiv.org/abs/2312.03732) and DoRA (https://arxiv.org/abs/2402.09353),
all through peft. On the boundary a layer has `<layer>.A` (r, in) and `<layer>.B` (out, r) with the scale inside B; DoRA adds
`<layer>.magnitude` (out,).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import peft
from torch import nn

from fedpeft.adapters.base import Adapted, layer
from fedpeft.adapters.tuner import NAME, attach, config_of
from fedpeft.models.base import Base

PARTS = {
    "lora_A.weight": "A", "lora_B.weight": "B", "lora_embedding_A": "A", "lora_embedding_B": "B", "lora_magnitude_vector.weight": "magnitude",
}  # fmt: skip


@dataclass(frozen=True)
class Lora:
    """`targets` is "all-linear", a list of layer names, a pattern over whole names, or None for peft's choice (query and value)."""

    rank: int = 8
    alpha: float = 16.0
    targets: str | tuple[str, ...] | None = "all-linear"
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    rslora: bool = False
    dora: bool = False

    def attach(self, base: Base, seed: int) -> Adapted:
        """A drawn from `seed` (Kaiming uniform), B zero."""
        options = {
            "r": self.rank, "lora_alpha": self.alpha, "target_modules": self.targets, "rank_pattern": dict(self.rank_pattern),
            "alpha_pattern": dict(self.alpha_pattern), "use_rslora": self.rslora, "use_dora": self.dora, "lora_dropout": 0.0,
        }  # fmt: skip
        if self.rank < 1:
            raise ValueError(f"adapter.rank={self.rank}: needed is at least 1")
        adapted = attach(base, config_of("LORA", options, base), seed, _name, _scales)
        for name, parameter in adapted.parameters.items():
            if name.endswith(".A"):
                _check_rank(name[:-2], parameter.shape[0], base, adapted)
        return adapted


def _name(name: str) -> str:
    for part, letter in PARTS.items():
        if name.endswith("." + part):
            return f"{name.removesuffix('.' + part)}.{letter}"
    return name


def _scales(module: nn.Module) -> dict[str, float]:
    return {f"{path}.B": inner.scaling[NAME] for path, inner in module.named_modules() if isinstance(inner, peft.tuners.lora.LoraLayer)}


def _check_rank(path: str, rank: int, base: Base, adapted: Adapted) -> None:
    weight = layer(base.module, path).weight
    assert isinstance(weight, nn.Parameter)
    if rank > min(weight.shape):
        adapted.undo()
        raise ValueError(
            f"adapter.rank={rank} is larger than the layer {path} ({' x '.join(map(str, weight.shape))}); needed is at most {min(weight.shape)}"
        )
