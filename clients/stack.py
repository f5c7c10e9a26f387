"""Stack: an adapted model whose layers are the stacked ones of `clients.stacked`, filled and read client by client."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from clients.stacked import (
    Clients,
    Convolution,
    CoreProduct,
    EmbeddingProduct,
    Half,
    HalfLinear,
    HeadsProduct,
    Linear,
    Norm,
    Product,
    Stacked,
    Unstackable,
    is_linear,
)  # fmt: skip
from fedpeft.adapters.base import Adapted, layer
from fedpeft.tensors import Tensors, is_b, is_own, rank_axes


class Stack:
    """The stacked form of an adapted base: `with stack.on():` the base's module computes with the tensors in `clients`.

    `half`: frozen products run in bfloat16. `checkpointing`: layers are recomputed in the backward pass. Raises `Unstackable` for an
    adapter that trains something no stacked layer holds.
    """

    def __init__(self, adapted: Adapted, *, half: bool = False, checkpointing: bool = False) -> None:
        self.adapted, self.clients = adapted, Clients()
        self.half, self._checkpointing = half, checkpointing
        self.layers: dict[str, Stacked] = {}  # path in the module -> what computes there
        self._swaps: list[tuple[nn.Module, str, nn.Module]] = []
        module, own = adapted.base.module, _owners(adapted)
        for path, parts in own.items():
            inner = layer(module, path)
            made = _made(self.clients, inner, parts, product=path in adapted.products)
            self.layers[path] = made
            self._swap(path, made)
        for number, path in enumerate(sorted(adapted.products)):
            made = self.layers[path]
            if adapted.dropout is not None and isinstance(made, Product):
                made.dropout = (adapted.dropout, number)
        if half:
            self._halve()

    @contextmanager
    def on(self) -> Iterator[None]:
        """Puts the stacked layers in, and the model's own back."""
        before = [(parent, name, parent._modules[name]) for parent, name, _ in self._swaps]
        model: Any = self.adapted.base.module
        config = model.config
        caches = getattr(config, "use_cache", None)
        recomputed = []
        try:
            if self._checkpointing:
                _recompute(model, "enable", {"use_reentrant": False})
                recomputed = [inner for inner in model.modules() if getattr(inner, "gradient_checkpointing", False)]
                for inner in recomputed:
                    inner.training = True  # itself alone: what it holds stays without dropout
            if caches:  # keys and values kept for generation are memory for nothing here
                config.use_cache = False
            for parent, name, made in self._swaps:
                parent._modules[name] = made
            yield
        finally:
            for parent, name, inner in before:
                parent._modules[name] = inner
            if caches:
                config.use_cache = caches
            if self._checkpointing:
                for inner in recomputed:
                    inner.training = False
                _recompute(model, "disable")

    def load(self, starts: Sequence[Tensors], scales: Sequence[Mapping[str, float]] | None = None) -> None:
        """Fills the stack with the clients' boundary tensors; a smaller rank is padded with zeros.

        `scales` are the clients' own factors of B where they differ from the adapter's. Raises `ValueError` for a tensor that does not fit.
        """
        device, own = self.adapted.base.device, self.adapted.parameters
        scales = scales or [self.adapted.scales] * len(starts)
        for name, parameter in own.items():
            rows = [
                _fitting(start, name, parameter, any_rank=True) / scale.get(name, 1.0) for start, scale in zip(starts, scales, strict=True)
            ]
            shape = [max(sizes) for sizes in zip(*(row.shape for row in rows), strict=True)]
            stacked = torch.zeros(len(rows), *shape, dtype=parameter.dtype)
            for into, row in zip(stacked, rows, strict=True):
                into[tuple(slice(size) for size in row.shape)] = row
            self.clients.values[name] = stacked.to(device)
            factors = torch.tensor([scale.get(name, 1.0) for scale in scales], dtype=parameter.dtype)
            if is_b(name) and bool((factors != 1).any()):
                self.clients.scales[name] = factors.to(device)
            else:
                self.clients.scales.pop(name, None)

    def check(self, start: Tensors, *, any_rank: bool) -> None:
        """Raises `ValueError` for a tensor that is missing, unknown or ill-shaped; ranks are the adapter's, or a layer's own."""
        for name in start:
            if not is_own(name) and name not in self.adapted.parameters:
                raise ValueError(f"{name} is not a tensor of this adapter; do server and client use the same adapter= and model=?")
        ranks: dict[str, set[int]] = {}
        for name, parameter in self.adapted.parameters.items():
            tensor = _fitting(start, name, parameter, any_rank=any_rank)
            for axis in rank_axes(name):
                ranks.setdefault(name[:-2], set()).add(tensor.shape[axis])
        for target, found in ranks.items():
            if len(found) > 1:
                raise ValueError(f"the factors of {target} have ranks {', '.join(map(str, sorted(found)))}; needed is one rank")

    def read(self, client: int, start: Tensors, scales: Mapping[str, float] | None = None) -> Tensors:
        """The boundary tensors of one row, in the shapes of `start`, on the CPU."""
        scales = self.adapted.scales if scales is None else scales
        made = {}
        for name in self.adapted.parameters:
            value = self.clients.values[name][client].detach()[tuple(slice(size) for size in start[name].shape)]
            made[name] = (value * scales.get(name, 1.0)).cpu().clone()
        return made

    def logits(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The model's logits for the seated samples."""
        there = {name: tensor.to(self.adapted.base.device) for name, tensor in inputs.items()}
        out: Tensor = self.adapted.base.module(**there).logits
        return out

    def _swap(self, path: str, made: nn.Module) -> None:
        parent, _, name = path.rpartition(".")
        self._swaps.append((self.adapted.base.module.get_submodule(parent), name, made))

    def _halve(self) -> None:
        """bfloat16 copies of every frozen linear weight that a product runs over."""
        for path, inner in list(self.adapted.base.module.named_modules()):
            if path in self.layers or path.removesuffix(".base_layer") in self.layers or not is_linear(inner):
                continue
            if inner.weight.dtype == torch.float32 and not any(p.startswith(f"{path}.") for p in self.layers):
                self._swap(path, HalfLinear(inner))
        for made in self.layers.values():
            if isinstance(made, Product):
                made.halved = Half()


def _recompute(model: Any, what: str, *arguments: Any) -> None:
    """transformers 5.23 calls it activation checkpointing, 5.17 gradient checkpointing."""
    getattr(model, f"activation_checkpointing_{what}", getattr(model, f"gradient_checkpointing_{what}"))(*arguments)


def _owners(adapted: Adapted) -> dict[str, dict[str, str]]:
    """Layer -> part -> name, for every tensor of the adapter. Raises `Unstackable` where a tensor has no layer of its own."""
    places: dict[int, list[str]] = {}
    for path, inner in adapted.base.module.named_modules():
        for part, parameter in inner._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append(f"{path}.{part}")
    own: dict[str, dict[str, str]] = {}
    for name, parameter in adapted.parameters.items():
        target = name.rpartition(".")[0]
        if target in adapted.products:
            own.setdefault(target, {})[name.rpartition(".")[2]] = name
            continue
        found = places.get(id(parameter), [])
        if len(found) != 1:
            raise Unstackable(f"{name} {'is shared by several layers' if found else 'is no weight or bias of a layer'}")
        path, _, part = found[0].rpartition(".")
        own.setdefault(path, {})[part] = name
    return own


def _made(clients: Clients, inner: nn.Module, parts: Mapping[str, str], *, product: bool) -> Stacked:
    """The stacked layer for the tensors `parts` of a layer."""
    kind = type(inner).__name__
    if product:
        if set(parts) == {"A", "R", "B"} and is_linear(inner):
            return CoreProduct(clients, inner, parts)
        if set(parts) == {"A", "H", "s", "B"} and is_linear(inner):
            return HeadsProduct(clients, inner, parts)
        if set(parts) != {"A", "B"}:
            raise Unstackable(f"{kind} trains {', '.join(sorted(parts))} beside its product")
        if isinstance(inner, nn.Embedding):
            return EmbeddingProduct(clients, inner, parts)
        if is_linear(inner):
            return Product(clients, inner, parts)
        raise Unstackable(f"a product on a {kind}")
    if parts.keys() <= {"weight", "bias"}:
        if is_linear(inner):
            return Linear(clients, inner, parts)
        if isinstance(inner, nn.LayerNorm) or kind.endswith("RMSNorm"):
            return Norm(clients, inner, parts)
        if isinstance(inner, nn.Conv2d) and set(parts) == {"bias"}:
            return Convolution(clients, inner, parts)
    raise Unstackable(f"{' and '.join(sorted(parts))} of a {kind}, for which there is no stacked layer")


def _fitting(start: Tensors, name: str, like: Tensor, *, any_rank: bool) -> Tensor:
    """A client's tensor in the adapter's dtype. `any_rank`: its rank may be another than the adapter's."""
    if name not in start:
        raise ValueError(f"{name} was neither sent nor kept; do server and client use the same adapter=?")
    tensor, free = start[name], rank_axes(name) if any_rank else ()
    fits = tensor.dim() == like.dim() and all(i in free or a == b for i, (a, b) in enumerate(zip(tensor.shape, like.shape, strict=True)))
    if not fits or any(tensor.shape[i] < 1 for i in free) or tensor.is_floating_point() != like.is_floating_point():
        raise ValueError(
            f"{name} is {tuple(tensor.shape)} {tensor.dtype}, the adapter here has {tuple(like.shape)} {like.dtype}; "
            "do server and client use the same rank and model?"
        )
    return tensor.to(like.dtype)
