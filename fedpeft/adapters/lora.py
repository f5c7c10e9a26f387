"""LoRA: a trained low-rank product B @ A beside each frozen weight (Hu et al., ICLR 2022, https://arxiv.org/abs/2106.09685).

With rank and alpha patterns, rsLoRA (alpha / sqrt(rank), https://arxiv.org/abs/2312.03732) and DoRA (https://arxiv.org/abs/2402.09353),
all through peft. On the boundary a layer has `<layer>.A` (r, in) and `<layer>.B` (out, r) with the scale inside B; DoRA adds
`<layer>.magnitude` (out,).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

import peft
import torch
from torch import nn

from fedpeft.adapters.base import Adapted, layer
from fedpeft.adapters.dropout import KeyedDropout, Keys
from fedpeft.adapters.injected import NAME, attach, heads
from fedpeft.adapters.wrapped import linear, sides
from fedpeft.models.base import Base
from fedpeft.seeds import generator
from fedpeft.tensors import targets

PARTS = {
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_embedding_A": "A",
    "lora_embedding_B": "B",
    "lora_magnitude_vector.weight": "magnitude",
}


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
    dropout: float = 0.0  # share of a layer's inputs that its A does not see in a step of training
    capped: bool = False  # True: a linear layer smaller than `rank` gets the rank it has

    def attach(self, base: Base, seed: int) -> Adapted:
        """A drawn from `seed` (Kaiming uniform), B zero."""
        for name, rank in {"rank": self.rank, **_under("rank_pattern", self.rank_pattern)}.items():
            if rank < 1:
                raise ValueError(f"adapter.{name}={rank}: needed is at least 1")
        for name, alpha in {"alpha": self.alpha, **_under("alpha_pattern", self.alpha_pattern)}.items():
            if not alpha > 0:
                raise ValueError(f"adapter.{name}={alpha}: needed is more than 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"adapter.dropout={self.dropout}: needed is a number in [0, 1)")
        if self.dropout and self.dora:
            raise ValueError(f"adapter.dropout={self.dropout}: DoRA is trained without dropout; leave it 0")
        capped = {}
        if self.capped:
            small = {path: min(sides(inner)) for path, inner in linear(base, self.targets).items() if min(sides(inner)) < self.rank}
            capped = {re.escape(path): rank for path, rank in small.items()}
        config = peft.LoraConfig(
            lora_dropout=self.dropout, r=self.rank, lora_alpha=self.alpha, use_rslora=self.rslora, use_dora=self.dora,
            target_modules=list(self.targets) if isinstance(self.targets, tuple) else self.targets, exclude_modules=heads(base) or None,
            rank_pattern=dict(self.rank_pattern) | capped, alpha_pattern=dict(self.alpha_pattern),
        )  # fmt: skip
        adapted = attach(base, config, seed, _name, _scales)
        try:
            _check(self, base.module, adapted.parameters)
        except ValueError:
            adapted.undo()
            raise
        _start_embeddings(base.module, adapted.parameters, seed)
        adapted.set_scale = partial(_rescale, base.module)
        if not self.dora:  # its magnitudes divide by a norm of the whole weight: no plain product
            adapted.products = frozenset(targets(adapted.parameters))
        if self.dropout:
            adapted.dropout = _keyed(base.module, sorted(adapted.products), self.dropout)
        return adapted


@torch.no_grad()
def _start_embeddings(module: nn.Module, parameters: Mapping[str, nn.Parameter], seed: int) -> None:
    """A random and B zero on embeddings too, where peft has them the other way: methods that freeze A would never move such a layer."""
    for path in targets(parameters):
        if isinstance(layer(module, path), nn.Embedding):
            a, b = parameters[f"{path}.A"], parameters[f"{path}.B"]
            a.copy_(torch.randn(a.shape, generator=generator(seed, purpose=f"adapter {path}")))
            b.zero_()


def _keyed(module: nn.Module, layers: list[str], rate: float) -> Keys:
    """Puts dropout by keys in the place of peft's; embeddings have none."""
    keys = Keys(rate)
    for number, path in enumerate(layers):
        inner = module.get_submodule(path)
        if not isinstance(layer(module, path), nn.Embedding):
            inner.lora_dropout[NAME] = KeyedDropout(keys, number)  # type: ignore[index,operator,assignment]  # peft's ModuleDict
    return keys


def _check(lora: Lora, module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    """Raises `ValueError` for a rank larger than its layer, a layer that is no matrix, and a pattern that fits no layer."""
    ranks = {name[:-2]: len(parameter) for name, parameter in parameters.items() if name.endswith(".A")}
    for path, rank in ranks.items():
        weight = getattr(layer(module, path), "weight", None)
        if weight is None or weight.dim() != 2:
            raise ValueError(f"adapter.targets reaches {path}, whose weight is no matrix; adapter=lora adapts linear layers and embeddings")
        if rank > min(weight.shape):
            raise ValueError(
                f"adapter.rank={rank} is larger than the layer {path} ({' x '.join(map(str, weight.shape))}); "
                f"needed is at most {min(weight.shape)}, for this layer alone by adapter.rank_pattern"
            )
    for field_, keys in (("rank_pattern", lora.rank_pattern), ("alpha_pattern", lora.alpha_pattern)):
        for key in keys:
            if not any(re.match(rf"(.*\.)?({key})$", path) for path in ranks):  # as peft matches them
                raise ValueError(f"adapter.{field_} names {key}, which fits no adapted layer; there are {', '.join(sorted(ranks))}")


def _under(name: str, values: Mapping[str, float]) -> dict[str, float]:
    return {f"{name}.{key}": value for key, value in values.items()}


def _rescale(module: nn.Module, name: str, scale: float) -> None:
    module.get_submodule(name.removesuffix(".B")).scaling[NAME] = scale  # type: ignore[index,operator]  # peft's LoraLayer


def _name(name: str) -> str:
    for part, letter in PARTS.items():
        if name.endswith("." + part):
            return f"{name.removesuffix('.' + part)}.{letter}"
    return name


def _scales(module: nn.Module) -> dict[str, float]:
    return {f"{path}.B": inner.scaling[NAME] for path, inner in module.named_modules() if isinstance(inner, peft.tuners.lora.LoraLayer)}
