"""Adapters that wrap linear layers themselves: which layers, and how the wrappers come on and off."""

import re
from collections.abc import Callable

import peft.utils
import torch
from torch import Tensor, nn

from fedpeft.adapters.base import Adapted, head_parameters, is_transposed, save_own, undoing
from fedpeft.models.base import Base
from fedpeft.tensors import targets


def linear(base: Base, targets: str | tuple[str, ...] | None) -> dict[str, nn.Module]:
    """The linear layers that `adapter.targets` means, as peft reads it: "all-linear", names, a pattern, or None for peft's choice.

    The task head and the output of a language model are never among them. Raises `ValueError` for a name that fits no layer.
    """
    last = base.module.get_output_embeddings()  # type: ignore[operator]  # every transformers model has it
    head = {name.rpartition(".")[0] for name in base.head}
    there = {
        path: inner
        for path, inner in base.module.named_modules()
        if (isinstance(inner, nn.Linear) or is_transposed(inner)) and path not in head and inner is not last
    }
    if targets == "all-linear":
        return there
    if targets is None:
        kind = str(base.module.config.model_type)  # type: ignore[union-attr]  # every transformers model has it
        targets = tuple(peft.utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(kind, ()))
        if not targets:
            raise ValueError(f"adapter.targets=null: peft has no choice for a {kind}; set adapter.targets=all-linear")
    found: dict[str, nn.Module] = {}
    pattern = isinstance(targets, str)
    for target in (targets,) if isinstance(targets, str) else targets:
        fits = {p: inner for p, inner in there.items() if (re.fullmatch(target, p) if pattern else f".{p}".endswith(f".{target}"))}
        if not fits:
            verb = "whole name fits" if pattern else "name ends in"
            raise ValueError(f"adapter.targets: no layer's {verb} {target}; there are {', '.join(there)}")
        found |= fits
    return found


def sides(inner: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear layer stored either way round."""
    weight = inner.weight
    assert isinstance(weight, Tensor)
    out, into = reversed(weight.shape) if is_transposed(inner) else weight.shape
    return out, into


def fitting(rank: int, inner: nn.Module, path: str, *, capped: bool, field: str = "adapter.rank", most: int | None = None) -> int:
    """`rank`, if the layer has that many; `capped` takes the most it has instead of raising `ValueError`."""
    most = min(sides(inner)) if most is None else most
    if rank < 1:
        raise ValueError(f"{field}={rank}: needed is at least 1")
    if rank > most and not capped:
        raise ValueError(f"{field}={rank} is larger than the layer {path} ({' x '.join(map(str, sides(inner)))}); needed is at most {most}")
    return min(rank, most)


def wrap(
    base: Base, chosen: dict[str, nn.Module], make: Callable[[str, nn.Module], nn.Module], parts: tuple[str, ...], kind: str
) -> Adapted:
    """The base with every chosen layer inside what `make` gives for it; `parts` are the names of a wrapper's own tensors."""
    made = {path: make(path, inner) for path, inner in chosen.items()}
    undo = undoing(base)
    parameters: dict[str, nn.Parameter] = {}
    for path, wrapper in made.items():
        base.module.set_submodule(path, wrapper)
        parameters |= {f"{path}.{part}": getattr(wrapper, part) for part in parts}
    parameters |= head_parameters(base)
    return Adapted(base, parameters, undo, save_own(parameters, kind), products=frozenset(targets(parameters)))


def orthonormal(out: int, into: int, rank: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random B (out, rank) with orthonormal columns and A (rank, into) with orthonormal rows, float64."""
    a, b = (torch.linalg.qr(torch.randn(size, rank, generator=rng, dtype=torch.float64))[0] for size in (into, out))
    return b, a.T.contiguous()
