"""Stacked layers: the adapters of K clients on one frozen base, every sample with the adapter of its own client (index form).

Each tensor of the adapter gets a leading client axis: A (K, r, in), B (K, out, r), a head (K, classes, width). A frozen product runs once
over the samples of all clients; gathered batched products add each client's own part. No tensor mixes samples of two clients, so the
gradient of the sum of all losses is, for each client, its own gradient. Ranks below the largest are padded with zeros: where both tails of
a pair are zero, both gradients are, and they stay zero.

Differential privacy needs one gradient per sample: then each sample is a client of its own (`alone`), on the same code path.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedpeft.adapters.base import is_transposed
from fedpeft.adapters.dropout import Keys, factors
from fedpeft.tensors import Tensors


class Unstackable(ValueError):
    """Why an adapter or a model cannot be stacked; the reference trainer takes its clients one at a time."""


class Clients:
    """The stacked tensors of a wave, in live values, and which client each sample of the present micro-batch belongs to."""

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}  # name -> (K, ...)
        self.scales: dict[str, Tensor] = {}  # name of a B -> (K,)
        self._owner = torch.empty(0, dtype=torch.long)
        self._flat, self._slots = self._owner, 0
        self._alone: dict[str, Tensor] | None = None

    def seat(self, owner: Tensor, *, alone: Sequence[str] | None = None) -> None:
        """The samples of the next forward pass belong to the clients `owner` (N,).

        `alone` names tensors whose gradient is wanted per sample: `grads_alone` has it after the backward pass.
        """
        self._owner = owner
        self._alone = None
        if alone is not None:
            self._alone = {name: value.detach().index_select(0, owner) for name, value in self.values.items()}
            for name in alone:
                self._alone[name].requires_grad_()
            return
        order = owner.argsort(stable=True)
        counts = torch.bincount(owner, minlength=1)
        first = counts.cumsum(0) - counts
        slot = torch.empty_like(owner)
        slot[order] = torch.arange(len(owner), device=owner.device) - first[owner[order]]
        self._slots = int(counts.max())
        self._flat = owner * self._slots + slot

    def of(self, name: str) -> tuple[Tensor, Tensor | None]:
        """The tensor with one row per client and the row of each sample; None where sample i has row i."""
        if self._alone is not None:
            return self._alone[name], None
        return self.values[name], self._owner

    def each(self, name: str) -> Tensor:
        """(N, ...): the tensor of each sample's client."""
        value, index = self.of(name)
        return value if index is None else value.index_select(0, index)

    def scale(self, name: str) -> Tensor | None:
        """(N, 1, 1): the factor of each sample's low-rank product; None if it is 1 for all."""
        found = self.scales.get(name)
        return None if found is None else found.index_select(0, self._owner).view(-1, 1, 1)

    def grouped(self, x: Tensor) -> Tensor:
        """(N, L, n) samples in the rows of their clients, (K, slots * L, n), zeros between."""
        clients = len(next(iter(self.values.values())))
        made = x.new_zeros(clients * self._slots, *x.shape[1:]).index_copy(0, self._flat, x)
        return made.view(clients, self._slots * x.shape[1], x.shape[2])

    def ungrouped(self, y: Tensor, length: int) -> Tensor:
        """The inverse of `grouped`."""
        return y.reshape(-1, length, y.shape[-1]).index_select(0, self._flat)

    @property
    def is_alone(self) -> bool:
        """True while each sample is a client of its own."""
        return self._alone is not None

    def grads_alone(self, names: Sequence[str]) -> Tensors:
        """(N, ...) gradient of each sample's loss."""
        assert self._alone is not None
        got = {name: self._alone[name].grad for name in names}
        return {name: torch.zeros_like(self._alone[name]) if grad is None else grad for name, grad in got.items()}


class _Product(torch.autograd.Function):
    """y = frozen(x) + s (x A_i^T) B_i^T for sample i; gradients of x, and of A and B summed per row of the stack."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool, half: Tensor | None,
        A: Tensor, B: Tensor, index: Tensor | None, s: Tensor | None, kept: Tensor | None,
    ) -> Tensor:  # fmt: skip
        y = frozen_forward(x, weight, bias, transposed, half)
        mine_a, mine_b = (A, B) if index is None else (A.index_select(0, index), B.index_select(0, index))
        inner = x.to(A.dtype)
        inner = inner if kept is None else inner * kept
        h = torch.bmm(inner, mine_a.mT)
        h = h if s is None else h.mul_(s)
        y = y.baddbmm_(h, mine_b.mT) if y.dtype == A.dtype else y.to(A.dtype).baddbmm_(h, mine_b.mT).to(y.dtype)
        ctx.save_for_backward(inner, h, weight, half, mine_a, mine_b, index, s, kept)
        ctx.facts = (transposed, x.dtype, A.shape[0])
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inner, h, weight, half, mine_a, mine_b, index, s, kept = ctx.saved_tensors
        transposed, dtype, rows = ctx.facts
        (g,) = grads
        wants_x, wants_a, wants_b = ctx.needs_input_grad[0], ctx.needs_input_grad[5], ctx.needs_input_grad[6]
        precise = g.to(mine_a.dtype)
        grad_x = grad_a = grad_b = None
        if wants_x or wants_a:
            gh = torch.bmm(precise, mine_b)
            gh = gh if s is None else gh.mul_(s)
        if wants_a:
            grad_a = _summed(torch.bmm(gh.mT, inner), index, rows)
        if wants_b:
            grad_b = _summed(torch.bmm(precise.mT, h), index, rows)
        if wants_x:
            grad_x = frozen_backward(g, weight, transposed, half)
            if kept is not None:
                grad_x = grad_x + (torch.bmm(gh, mine_a) * kept).to(grad_x.dtype)
                return grad_x, None, None, None, None, grad_a, grad_b, None, None, None
            grad_x = grad_x.baddbmm_(gh, mine_a) if grad_x.dtype == gh.dtype else grad_x.to(gh.dtype).baddbmm_(gh, mine_a).to(dtype)
        return grad_x, None, None, None, None, grad_a, grad_b, None, None, None


class _Frozen(torch.autograd.Function):
    """A frozen linear layer whose products run in bfloat16; everything around them stays as it is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, transposed: bool, half: Tensor) -> Tensor:
        ctx.save_for_backward(half)
        ctx.transposed = transposed
        return frozen_forward(x, half, bias, transposed, half)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (half,) = ctx.saved_tensors
        return frozen_backward(grads[0], half, ctx.transposed, half), None, None, None


def frozen_forward(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool, half: Tensor | None) -> Tensor:
    """x W^T + bias, or x W + bias where the weight is stored in x out; the product in the precision of `half` if it is given."""
    if half is not None:
        y = (x.to(half.dtype) @ (half if transposed else half.mT)).to(x.dtype)
        return y if bias is None else y.add_(bias)
    if not transposed:
        return F.linear(x, weight, bias)
    y = x @ weight
    return y if bias is None else y.add_(bias)


def frozen_backward(g: Tensor, weight: Tensor, transposed: bool, half: Tensor | None) -> Tensor:
    """The gradient of x."""
    if half is not None:
        return (g.to(half.dtype) @ (half.mT if transposed else half)).to(g.dtype)
    return g @ (weight.mT if transposed else weight)


def _summed(each: Tensor, index: Tensor | None, rows: int) -> Tensor:
    return each if index is None else each.new_zeros(rows, *each.shape[1:]).index_add_(0, index, each)


class Stacked(nn.Module):
    """A layer whose tensors are the clients'. `inner` is the frozen layer, reachable for whoever reads its weight."""

    base_layer: nn.Module

    def __init__(self, clients: Clients, inner: nn.Module, names: Mapping[str, str]) -> None:
        super().__init__()
        self._clients, self._names = clients, names  # part (A, B, weight, bias) -> name
        self.__dict__["base_layer"] = inner  # not a submodule: it is one of the model already

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.base_layer, name)  # some models ask a layer for its weight's dtype

    def _alone(self, x: Tensor) -> Tensor:
        """x (N, n) or (N, L, n) as (N, L, n)."""
        owners = len(self._clients._owner)
        x = x.unsqueeze(1) if x.dim() == 2 else x
        if x.dim() != 3 or x.shape[0] not in (1, owners):
            raise Unstackable(f"a layer sees {tuple(x.shape)} for {owners} samples, needed is one row of the first axis for each sample")
        return x.expand(owners, -1, -1)


class Product(Stacked):
    """LoRA on a linear layer, stored either way round."""

    halved: "Half | None" = None
    dropout: tuple[Keys, int] | None = None  # and the layer's number

    def forward(self, x: Tensor) -> Tensor:
        """(N, L, in) -> (N, L, out)."""
        inner: Any = self.base_layer
        half = None if self.halved is None else self.halved.of(inner.weight)
        A, index = self._clients.of(self._names["A"])
        B, _ = self._clients.of(self._names["B"])
        wide, kept = self._alone(x), None
        if self.dropout is not None and self.dropout[0].present is not None:
            kept = factors(self.dropout[0].present, self.dropout[1], wide, self.dropout[0].rate).to(A.dtype)
        y: Tensor = _Product.apply(  # type: ignore[no-untyped-call]  # torch's own
            wide, inner.weight, inner.bias, is_transposed(inner), half, A, B, index, self._clients.scale(self._names["B"]), kept
        )
        made: Tensor = y.squeeze(1) if x.dim() == 2 else y
        return made


class CoreProduct(Stacked):
    """LoRA-SB on a linear layer: R (K, r, r) between A and B."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, L, in) -> (N, L, out)."""
        inner: Any = self.base_layer
        wide = self._alone(x)
        A, R, B = (self._clients.each(self._names[part]) for part in "ARB")
        inside = torch.bmm(torch.bmm(wide.to(A.dtype), A.mT), R.mT)
        y = frozen_forward(wide, inner.weight, inner.bias, is_transposed(inner), None)
        y = y + torch.bmm(inside, B.mT).to(y.dtype)
        return y.squeeze(1) if x.dim() == 2 else y


class HeadsProduct(Stacked):
    """RAVAN on a linear layer: heads s_i H_i (K, h, r, r) between A and B."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, L, in) -> (N, L, out)."""
        inner: Any = self.base_layer
        wide = self._alone(x)
        A, H, s, B = (self._clients.each(self._names[part]) for part in "AHsB")
        inside = torch.bmm(wide.to(A.dtype), A.mT).unflatten(-1, H.shape[1:3])
        inside = torch.einsum("nlhj,nhij->nlhi", inside, H * s[:, :, None, None]).flatten(-2)
        y = frozen_forward(wide, inner.weight, inner.bias, is_transposed(inner), None)
        y = y + torch.bmm(inside, B.mT).to(y.dtype)
        return y.squeeze(1) if x.dim() == 2 else y


class EmbeddingProduct(Stacked):
    """LoRA on an embedding: A (K, r, words), B (K, width, r)."""

    def forward(self, ids: Tensor) -> Tensor:
        """(N, L) -> (N, L, width)."""
        y: Tensor = self.base_layer(ids)
        owners = len(self._clients._owner)
        y, ids = y.expand(owners, -1, -1), ids.expand(owners, -1)
        A, index = self._clients.of(self._names["A"])
        at = torch.arange(owners, device=ids.device) if index is None else index
        h = A.mT[at.unsqueeze(1), ids]  # (N, L, r)
        inner: Any = self.base_layer
        if inner.padding_idx is not None:  # as in torch's embeddings, this word learns nothing
            h = torch.where((ids == inner.padding_idx).unsqueeze(-1), h.detach(), h)
        s = self._clients.scale(self._names["B"])
        return y + torch.bmm(h if s is None else h * s, self._clients.each(self._names["B"]).mT).to(y.dtype)


class Linear(Stacked):
    """A linear layer of which the clients train weight, bias, or both."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, n) or (N, L, n) -> the same with m."""
        inner: Any = self.base_layer
        flat, wide = x.dim() == 2, self._alone(x)
        if "weight" not in self._names:
            y = frozen_forward(wide, inner.weight, None, is_transposed(inner), None)
        elif self._clients.is_alone:
            y = torch.bmm(wide.to(inner.weight.dtype), self._oriented(self._clients.each(self._names["weight"])))
        else:
            stacked, _ = self._clients.of(self._names["weight"])
            wide = wide.to(stacked.dtype)
            y = self._clients.ungrouped(torch.bmm(self._clients.grouped(wide), self._oriented(stacked)), wide.shape[1])
        if "bias" in self._names:
            y = y + self._clients.each(self._names["bias"]).unsqueeze(1)
        elif inner.bias is not None:
            y = y + inner.bias
        return y.squeeze(1) if flat else y

    def _oriented(self, weight: Tensor) -> Tensor:
        return weight if is_transposed(self.base_layer) else weight.mT


class Norm(Stacked):
    """A LayerNorm or RMSNorm of which the clients train weight, bias, or both."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, ..., n) -> the same."""
        inner: Any = self.base_layer
        plain = {"weight": torch.ones_like(inner.weight)}
        if getattr(inner, "bias", None) is not None:
            plain["bias"] = torch.zeros_like(inner.bias)
        y: Tensor = torch.func.functional_call(inner, plain, (x,))
        if y.shape[0] != len(self._clients._owner):
            raise Unstackable(f"a norm sees {tuple(x.shape)} for {len(self._clients._owner)} samples")
        for part in plain:
            if part in self._names:
                each = self._clients.each(self._names[part])
                value = each.view(len(each), *[1] * (y.dim() - 2), -1)
            else:
                value = getattr(inner, part)
            y = y * value if part == "weight" else y + value
        return y


class Convolution(Stacked):
    """A convolution (patch embedding) of which the clients train the bias alone."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, c, h, w) -> (N, C, h', w')."""
        inner: Any = self.base_layer
        y: Tensor = inner._conv_forward(x, inner.weight, None)
        return y + self._clients.each(self._names["bias"])[:, :, None, None]


class Half:
    """A bfloat16 copy of a frozen weight, made again when another weight stands in its place (a `base_delta`)."""

    def __init__(self) -> None:
        self._source: Tensor | None = None
        self._copy: Tensor | None = None

    def of(self, weight: Tensor) -> Tensor:
        """The copy of `weight`."""
        if self._source is not weight or self._copy is None:
            self._source, self._copy = weight, weight.detach().to(torch.bfloat16)
        return self._copy


class HalfLinear(nn.Module):
    """A frozen linear layer with its products in bfloat16."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.__dict__["base_layer"], self._half = inner, Half()

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        inner: Any = self.base_layer
        made: Tensor = _Frozen.apply(  # type: ignore[no-untyped-call]  # torch's own
            x, inner.bias, is_transposed(inner), self._half.of(inner.weight)
        )
        return made


def is_linear(inner: nn.Module) -> bool:
    """A linear layer whose forward pass is what its weight says, stored either way round."""
    return type(inner) is nn.Linear or is_transposed(inner)
