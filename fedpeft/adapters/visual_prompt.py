"""Visual prompts: trained tokens put before every block and taken out after it (VPT-Deep: Jia et al., ECCV 2022, https://arxiv.org/abs/2203.12119)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedpeft import seeds
from fedpeft.adapters.base import Adapted, head_parameters, precision, save_own, undoing
from fedpeft.models.base import Base


@dataclass(frozen=True)
class VisualPrompt:
    """`tokens` new prompt tokens at each block of a vision transformer."""

    tokens: int = 10

    def attach(self, base: Base, seed: int) -> Adapted:
        """Hooks the prompts onto every block; they start at N(0, 0.02^2), as transformers' own embeddings do."""
        if self.tokens < 1:
            raise ValueError(f"adapter.tokens={self.tokens}: needed is at least 1")
        blocks = _blocks(base.module)
        if base.task != "image" or not blocks:
            raise ValueError("adapter=visual_prompt needs a vision transformer (model=tiny_vit); for texts use adapter=prompt")
        rng = seeds.generator(seed, purpose="adapter")
        undo = undoing(base)
        width = int(base.module.config.hidden_size)  # type: ignore[union-attr,arg-type]  # a transformers model has a config
        kind = precision(next(base.module.parameters()))
        parameters: dict[str, nn.Parameter] = {}
        for path, block in blocks.items():
            prompt = nn.Parameter((torch.randn(self.tokens, width, generator=rng) * 0.02).to(base.device, kind))
            parameters[f"{path}.prompt"] = prompt
            block.register_forward_pre_hook(_put(prompt))
            block.register_forward_hook(_take(self.tokens))
        parameters |= head_parameters(base)
        return Adapted(base, parameters, undo, save_own(parameters, "visual_prompt"))


def _blocks(module: nn.Module) -> dict[str, nn.Module]:
    """The transformer blocks: the entries of the longest module list whose entries hold attention."""
    lists = [
        (p, m) for p, m in module.named_modules() if isinstance(m, nn.ModuleList) and any("attention" in n for n, _ in m.named_modules())
    ]
    if not lists:
        return {}
    path, longest = max(lists, key=lambda item: len(item[1]))
    return {f"{path}.{i}": block for i, block in enumerate(longest)}


def _put(prompt: nn.Parameter) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    def hook(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = inputs[0]
        return torch.cat([hidden, prompt.to(hidden.dtype).expand(len(hidden), -1, -1)], 1), *inputs[1:]

    return hook


def _take(count: int) -> Callable[[nn.Module, Any, Any], Any]:
    def hook(module: nn.Module, inputs: Any, out: Any) -> Any:
        if isinstance(out, Tensor):
            return out[:, :-count]
        return out[0][:, :-count], *out[1:]

    return hook
