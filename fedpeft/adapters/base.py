"""The adapter protocol, and `Adapted`: a base model with an adapter on it whose tensors are read and written by raw copies.

Only one adapter lies on a base at a time. Swapping a client's tensors is a copy into live parameters (0.3 to 0.7 ms for MiniLM); nothing is
injected, removed or re-keyed between clients.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fedpeft.adapters.dropout import Keys
from fedpeft.lowrank import LowRank
from fedpeft.models.base import Base
from fedpeft.tensors import Names, Tensors, is_own, rank_axes

HEAD = "head."
OWN = "adapter.safetensors"


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
    products: frozenset[str] = frozenset()  # layers that compute base(x) + scale * B A x, B R A x or B H A x: what the wave engine stacks
    dropout: Keys | None = None  # of the inputs of those layers
    set_scale: Callable[[str, float], None] | None = None  # changes the scale of one B where it can be changed

    def read(self, like: Tensors | None = None) -> Tensors:
        """Copies of all tensors, in boundary values, on the CPU; cut to the ranks they have in `like`."""
        return {name: self.value(name, like).detach().cpu().clone() for name in self.parameters}

    def value(self, name: str, like: Tensors | None = None) -> Tensor:
        """The live tensor in boundary values, with its gradient path; cut to the shape it has in `like`."""
        scale = self.scales.get(name, 1.0)
        live: Tensor = self.parameters[name]
        if like is not None and like[name].shape != live.shape:
            live = live[tuple(slice(size) for size in like[name].shape)]
        return live if scale == 1.0 else live * scale

    @contextmanager
    def rescaled(self, scales: Mapping[str, float] | None) -> Iterator[None]:
        """With a device's own scales in place of the adapter's; None: the adapter's own."""
        own = self.scales
        try:
            self._scale(own if scales is None else scales)
            yield
        finally:
            self._scale(own)

    def _scale(self, scales: Mapping[str, float]) -> None:
        for name in self.scales:
            if scales[name] != self.scales[name]:
                if self.set_scale is None:
                    raise ValueError(f"this adapter has one scale for all clients, not {scales[name]:g} for {name}; set adapter=lora")
                self.set_scale(name, scales[name])
        self.scales = scales

    def fill(self, tensors: Tensors, *, any_rank: bool = False) -> None:
        """`write`, for tensors that must be all there are: what is missing would be left over from the client before."""
        if missing := sorted(self.parameters.keys() - tensors.keys()):
            raise ValueError(
                f"{missing[0]} and {len(missing) - 1} more were neither sent nor kept; do server and client use the same adapter=?"
            )
        self.write(tensors, any_rank=any_rank)

    @torch.no_grad()
    def write(self, tensors: Tensors, *, any_rank: bool = False) -> None:
        """Copies boundary values into the live parameters; names with a slash belong to a strategy and are skipped.

        With `any_rank` a smaller rank is padded with zeros, which stay zero in training: each padded factor's gradient is a product with
        the other's zeros. Raises `ValueError` for a name this adapter does not have or another shape than it has, and then writes nothing.
        """
        mine = {name: tensor for name, tensor in tensors.items() if not is_own(name)}
        for name, tensor in mine.items():
            here = self.parameters.get(name)
            if here is None:
                raise ValueError(f"{name} is not a tensor of this adapter; do server and client use the same adapter= and model=?")
            fits = here.shape == tensor.shape or (any_rank and _is_smaller(tensor, here, rank_axes(name)))
            if not fits:
                raise ValueError(
                    f"{name} is {tuple(tensor.shape)}, the adapter here has {tuple(here.shape)}; "
                    "do server and client use the same rank and model?"
                )
        for name, tensor in mine.items():
            scale, live = self.scales.get(name, 1.0), self.parameters[name].data
            if live.shape != tensor.shape:
                live.zero_()
                live = live[tuple(slice(size) for size in tensor.shape)]
            live.copy_(tensor if scale == 1.0 else tensor / scale)

    def select(self, names: Names) -> dict[str, nn.Parameter]:
        """Lets gradients into the parameters that satisfy `names`, and into no other; gives those."""
        chosen = {name: parameter for name, parameter in self.parameters.items() if names(name) and parameter.is_floating_point()}
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(name in chosen)
            parameter.grad = None
        return chosen

    def logits(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The model's logits for one batch: (b, classes), or (b, T, vocabulary) for language."""
        there = {name: tensor.to(self.base.device) for name, tensor in inputs.items()}
        out: Tensor = (self.module or self.base.module)(**there).logits
        return out if out.dim() == 2 else out[:, -there["input_ids"].shape[1] :]  # virtual tokens of a prompt stand before the text

    @contextmanager
    def shifted(self, base_delta: Sequence[Mapping[str, LowRank]]) -> Iterator[None]:
        """Runs with low-rank products added to the frozen base weights, and puts the very same weights back.

        A layer that shares its weight with another is shifted alone. Raises `ValueError` for a layer that is not there or does not fit.
        """
        parts: dict[str, list[LowRank]] = defaultdict(list)
        for chunk in base_delta:
            for target, product in chunk.items():
                parts[target].append(product)
        kept: dict[nn.Module, nn.Parameter] = {}
        try:
            for target, products in parts.items():
                inner, weight = self._frozen(target)
                dense = torch.cat([p.B for p in products], 1) @ torch.cat([p.A for p in products], 0)
                dense = dense.T if is_transposed(inner) or isinstance(inner, nn.Embedding) else dense
                if dense.shape != weight.shape:
                    raise ValueError(
                        f"base_delta of {target} is {tuple(dense.shape)}, the weight here {tuple(weight.shape)}; "
                        "do server and client use the same model?"
                    )
                kept[inner] = weight
                inner.weight = nn.Parameter((weight + dense.to(weight.device)).to(weight.dtype), requires_grad=False)
            yield
        finally:
            for inner, weight in kept.items():
                inner.weight = weight

    def _frozen(self, target: str) -> tuple[nn.Module, nn.Parameter]:
        """The layer `target`, seen through peft's wrapper if there is one, and its weight."""
        try:
            inner = layer(self.base.module, target)
        except AttributeError:
            raise ValueError(
                f"base_delta names the layer {target}, which this model lacks; do server and client use the same model?"
            ) from None
        weight = getattr(inner, "weight", None)
        if not isinstance(weight, nn.Parameter) or any(weight is parameter for parameter in self.parameters.values()):
            raise ValueError(f"base_delta names {target}, which has no frozen weight here; this strategy needs adapter=lora")
        return inner, weight

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


def undoing(base: Base) -> Callable[[], None]:
    """What takes off whatever is put on the base from now on: every submodule, hook and attribute of its module becomes what it is now.

    Holds references to the base's tensors, not copies; only the head gets its values back too. Who trains another base tensor in place
    keeps a copy of it.
    """
    facts = [(vars(module), {key: _Kept(value) for key, value in vars(module).items()}) for module in base.module.modules()]
    tensors = [(tensor, tensor.data) for tensor in (*base.module.parameters(), *base.module.buffers())]

    def undo() -> None:
        for now, before in facts:
            now.clear()
            now.update({key: kept.value() for key, kept in before.items()})
        for tensor, data in tensors:
            tensor.data = data
            tensor.grad = None
        restore(base, base.start)
        base.module.requires_grad_(False)

    return undo


class _Kept:
    """One attribute of a module; a dict (of submodules, tensors, hooks) with what is in it, for these are edited in place."""

    def __init__(self, value: object) -> None:
        self._value = value
        self._items = dict(value) if isinstance(value, dict) else None

    def value(self) -> object:
        if isinstance(self._value, dict) and self._items is not None:
            self._value.clear()
            self._value.update(self._items)
        return self._value


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
    """Our own format for adapters that peft does not know: canonical names in one file; `fedpeft.load_adapter` reads it."""

    def save(folder: Path) -> None:
        tensors = {name: parameter.detach().cpu().contiguous() for name, parameter in parameters.items()}
        save_file(tensors, folder / OWN, metadata={"format": "fedpeft", "adapter": kind})

    return save


def precision(beside: Tensor) -> torch.dtype:
    """What a new tensor beside a frozen one is kept in: float32 at least, since half precision loses the steps of training."""
    return torch.promote_types(beside.dtype, torch.float32)


def layer(module: nn.Module, path: str) -> nn.Module:
    """The submodule at `path`, seen through peft's wrapper if there is one."""
    found = module.get_submodule(path)
    inner = getattr(found, "base_layer", None)
    return inner if isinstance(inner, nn.Module) else found


def _is_smaller(tensor: Tensor, like: Tensor, free: Sequence[int]) -> bool:
    """True if the tensor has the shape of `like` but for smaller sizes along the axes `free`."""
    return tensor.dim() == like.dim() and all(
        (1 <= a <= b) if axis in free else a == b for axis, (a, b) in enumerate(zip(tensor.shape, like.shape, strict=True))
    )


def is_transposed(inner: nn.Module) -> bool:
    """True for a linear layer whose weight is stored in x out: GPT-2's Conv1D."""
    return type(inner).__name__ == "Conv1D"
