"""The adapter protocol, and `Adapted`: a base model with an adapter on it whose tensors are read and written by raw copies.

Only one adapter lies on a base at a time. Swapping a client's tensors is a copy into live parameters (0.3 to 0.7 ms for MiniLM); nothing is
injected, removed or re-keyed between clients.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fedpeft.lowrank import LowRank
from fedpeft.models.base import Base
from fedpeft.tensors import Names, Tensors, is_own

HEAD = "head."


@dataclass(eq=False)
class Adapted:
    """A base with an adapter. `parameters` maps each canonical name to its live parameter, adapter first, then the head.

    A boundary value is `scales[name] * parameter` (1 where no scale is given): LoRA's alpha / rank goes into B here.
    """

    base: Base
    parameters: Mapping[str, nn.Parameter]
    undo: Callable[[], None]  # takes the adapter off and gives the base its own tensors back
    save: Callable[[Path], None]  # writes the adapter's files; see `export`
    scales: Mapping[str, float] = field(default_factory=dict)
    module: nn.Module | None = None  # what is called, if not the base's own module

    def read(self) -> Tensors:
        """Copies of all tensors, in boundary values, on the CPU."""
        return {name: self.value(name).detach().cpu().clone() for name in self.parameters}

    def value(self, name: str) -> Tensor:
        """The live tensor in boundary values, with its gradient path."""
        scale = self.scales.get(name, 1.0)
        return self.parameters[name] if scale == 1.0 else self.parameters[name] * scale

    @torch.no_grad()
    def write(self, tensors: Tensors) -> None:
        """Copies boundary values into the live parameters; names with a slash belong to a strategy and are skipped.

        Raises `ValueError` for a name this adapter does not have or another shape than it has.
        """
        for name, tensor in tensors.items():
            if is_own(name):
                continue
            here = self.parameters.get(name)
            if here is None:
                raise ValueError(f"{name} is not a tensor of this adapter; do server and client use the same adapter= and model=?")
            if here.shape != tensor.shape:
                raise ValueError(f"{name} is {tuple(tensor.shape)}, the adapter here has {tuple(here.shape)}; the ranks differ")
            scale = self.scales.get(name, 1.0)
            here.copy_(tensor if scale == 1.0 else tensor / scale)

    def select(self, names: Names) -> dict[str, nn.Parameter]:
        """Lets gradients into the parameters that satisfy `names`, and into no other; gives those."""
        chosen = {name: parameter for name, parameter in self.parameters.items() if names(name) and parameter.is_floating_point()}
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(name in chosen)
            parameter.grad = None
        return chosen

    def logits(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The model's logits for one batch."""
        there = {name: tensor.to(self.base.device) for name, tensor in inputs.items()}
        out: Tensor = (self.module or self.base.module)(**there).logits
        return out

    @contextmanager
    def shifted(self, base_delta: Sequence[Mapping[str, LowRank]]) -> Iterator[None]:
        """Runs with low-rank products added to the frozen base weights, and puts the very same weights back."""
        kept: dict[str, Tensor] = {}
        try:
            for chunk in base_delta:
                for target, product in chunk.items():
                    weight = _weight(self.base.module, target)
                    kept.setdefault(target, weight.data)
                    dense = product.dense().to(weight.device, weight.dtype)
                    weight.data = weight.data + (dense.T if _transposed(self.base.module, target) else dense)
            yield
        finally:
            for target, original in kept.items():
                _weight(self.base.module, target).data = original

    def export(self, tensors: Tensors, folder: Path) -> None:
        """Writes the adapter with these tensors to `folder`: Hugging Face PEFT format where peft knows the adapter, else our own."""
        self.write(tensors)
        folder.mkdir(parents=True, exist_ok=True)
        self.save(folder)


class Adapter(Protocol):
    """A PEFT method: puts its tensors on a base model."""

    def attach(self, base: Base, seed: int) -> Adapted:
        """The base with this adapter and a fresh head, the same bits for the same seed on every machine."""
        ...


def head_parameters(base: Base) -> dict[str, nn.Parameter]:
    """The base's own head under canonical names, set back to its start."""
    own = dict(base.module.named_parameters())
    restore(base, base.start)
    return {HEAD + name: own[name] for name in base.head}


@torch.no_grad()
def restore(base: Base, start: Tensors) -> None:
    """Copies tensors back into parameters of the base's module, by their own names."""
    own = dict(base.module.named_parameters())
    for name, tensor in start.items():
        own[name].copy_(tensor)


def save_own(parameters: Mapping[str, nn.Parameter], kind: str) -> Callable[[Path], None]:
    """Our own format for adapters that peft does not know: canonical names in `adapter.safetensors`; `fedpeft.load_adapter` reads it."""

    def save(folder: Path) -> None:
        tensors = {name: parameter.detach().cpu().contiguous() for name, parameter in parameters.items()}
        save_file(tensors, folder / "adapter.safetensors", metadata={"format": "fedpeft", "adapter": kind})

    return save


def layer(module: nn.Module, path: str) -> nn.Module:
    """The submodule at `path`, seen through peft's wrapper if there is one."""
    found = module.get_submodule(path)
    inner = getattr(found, "base_layer", None)
    return inner if isinstance(inner, nn.Module) else found


def _weight(module: nn.Module, path: str) -> nn.Parameter:
    weight = layer(module, path).weight
    assert isinstance(weight, nn.Parameter)
    return weight


def _transposed(module: nn.Module, path: str) -> bool:
    """True where the weight is stored in x out: GPT-2's Conv1D and embeddings."""
    return isinstance(layer(module, path), nn.Embedding) or type(layer(module, path)).__name__ == "Conv1D"
