"""LowRank: the product `B @ A` without forming it.

On this boundary a pair means exactly `B @ A`: a client's alpha / rank is already inside B, so pairs of any rank and any alpha can be added.
Every sum and every factorisation runs in float64 on the CPU; what comes out as a pair has the inputs' dtype again.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn.functional import pad as grow

from fedpeft.seeds import generator
from fedpeft.tensors import Tensors, is_a, is_factor, is_own, targets

WHOLE = 1024  # a dense matrix with a smaller side than this has its SVD in a second
OVER, PASSES = 16, 4  # oversampling and power iterations of a randomized one


@dataclass(frozen=True, eq=False)
class LowRank:
    """The (m, n) matrix `B @ A` with `B` (m, r) and `A` (r, n)."""

    B: Tensor
    A: Tensor

    def __post_init__(self) -> None:
        if self.B.dim() != 2 or self.A.dim() != 2 or self.B.shape[1] != self.A.shape[0]:
            raise ValueError(f"B {tuple(self.B.shape)} and A {tuple(self.A.shape)} have no product; needed are (m, r) and (r, n)")

    @property
    def rank(self) -> int:
        """The width r of the factors, an upper bound of the product's rank."""
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of the product."""
        return self.B.shape[0], self.A.shape[1]

    @property
    def T(self) -> "LowRank":  # noqa: N802  # as of a tensor
        """The (n, m) transpose."""
        return LowRank(self.A.T, self.B.T)

    def dense(self) -> Tensor:
        """The (m, n) product."""
        return self.B @ self.A

    def inner(self, other: "LowRank") -> float:
        """Frobenius inner product by Grams: O((m + n) r^2)."""
        b, a, other_b, other_a = map(_wide, (self.B, self.A, other.B, other.A))
        return float(((b.T @ other_b) * (a @ other_a.T)).sum())

    def norm(self) -> float:
        """Frobenius norm, by Grams: products that cancel leave about 1e-8 of their norms (`distance` does not)."""
        return math.sqrt(max(self.inner(self), 0.0))

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """U (m, q), S (q,) falling, Vt (q, n) in float64, q = min(r, m, n); the largest entry of each column of U is positive.

        Below full rank by QR of both factors and the SVD of their r x r core, O((m + n) r^2 + r^3), without the m x n product; from
        r = min(m, n) on, by the SVD of the product.
        """
        return self._svd(min(self.rank, *self.shape))

    def truncate(self, rank: int) -> "LowRank":
        """Best rank-`rank` approximation in Frobenius norm (Eckart-Young), at the cost of `svd`.

        Singular values go into B; a product of lower rank is padded with zeros, so that shapes do not depend on data.
        Signs are fixed (the largest entry of each column of B is positive) so that equal inputs give equal bits.
        """
        _positive(rank)
        u, s, vt = self._svd(min(rank, self.rank, *self.shape))
        short = rank - len(s)
        return LowRank(grow(u * s, (0, short)).to(self.B), grow(vt, (0, 0, 0, short)).to(self.A))

    def singular_values(self) -> Tensor:
        """S of `svd`, without the cost of U and Vt."""
        s: Tensor = torch.linalg.svdvals(_core(_wide(self.B), _wide(self.A)))
        return s

    def energy_rank(self, share: float) -> int:
        """The smallest p, at least 1, whose p largest squared singular values hold at least `share` in (0, 1] of their sum."""
        if not 0 < share <= 1:
            raise ValueError(f"energy_rank: a share of {share} of the energy; needed is more than 0 and at most 1")
        energy = self.singular_values().square().cumsum(0)
        return 1 + int((energy[:-1] < share * energy[-1:]).sum())

    def _svd(self, keep: int) -> tuple[Tensor, Tensor, Tensor]:
        """The first `keep` triplets. Reflectors are applied to these alone: no m x r basis is formed."""
        b, a = _wide(self.B), _wide(self.A)
        if self.rank < min(self.shape):
            left, right = torch.geqrf(b), torch.geqrf(a.T)
            u, s, vt = torch.linalg.svd(left[0][: self.rank].triu() @ right[0][: self.rank].triu().T, full_matrices=False)
            u = torch.ormqr(*left, grow(u[:, :keep], (0, 0, 0, len(b) - self.rank)))
            vt = torch.ormqr(*right, grow(vt[:keep], (0, a.shape[1] - self.rank)).T).T
        else:
            u, s, vt = torch.linalg.svd(b @ a, full_matrices=False)
            u, vt = u[:, :keep], vt[:keep]
        sign = u.gather(0, u.abs().argmax(0, keepdim=True)).sign()
        return u * sign, s[:keep], vt * sign.T


def total(pairs: Iterable[tuple[float, LowRank]]) -> LowRank:
    """The sum of weight * product, exact: factors are stacked while they fit into rank min(m, n), then folded into the m x n sum.

    The folded sum comes with an identity at its smaller side, so no rank exceeds min(m, n). Holds one product at a time besides the stack
    (at most min(m, n) wide) or the sum; past full rank the cost is linear in the number of products.
    """
    stack: list[tuple[Tensor, Tensor]] = []
    first: LowRank | None = None
    summed: Tensor | None = None
    rank = 0
    for weight, part in pairs:
        if first is None:
            first, dtype = part, part.B.dtype
        if part.shape != first.shape:
            raise ValueError(f"total: a product is {part.shape}, the first was {first.shape}; needed are products of one layer")
        dtype = torch.promote_types(dtype, torch.promote_types(part.B.dtype, part.A.dtype))
        stack.append((weight * _wide(part.B), _wide(part.A)))
        rank += part.rank
        if rank > min(first.shape):
            summed = torch.zeros(first.shape, dtype=torch.float64) if summed is None else summed
            for b, a in stack:
                summed.addmm_(b, a)
            stack.clear()
    if first is None:
        raise ValueError("total: there is no product to add; did every client fail this round?")
    m, n = first.shape
    if summed is None:
        both = torch.cat([b for b, _ in stack], 1), torch.cat([a for _, a in stack], 0)
    else:
        eye = torch.eye(min(m, n), dtype=torch.float64)
        both = (summed, eye) if n <= m else (eye, summed)
    return LowRank(both[0].to(first.B.device, dtype), both[1].to(first.A.device, dtype))


def distance(one: LowRank, other: LowRank) -> float:
    """Frobenius norm of the difference, to about 1e-15 of the larger norm: by QR of the stacked factors, since Grams cancel."""
    if one.shape != other.shape:
        raise ValueError(f"distance: the products are {one.shape} and {other.shape}; needed are two of one layer")
    b = torch.cat([_wide(one.B), -_wide(other.B)], 1)
    return float(_core(b, torch.cat([_wide(one.A), _wide(other.A)], 0)).norm())


def cosine(one: LowRank, other: LowRank) -> float:
    """Cosine of the angle between two products as vectors, in [-1, 1]; nan if either is zero."""
    norms = one.norm() * other.norm()
    return min(max(one.inner(other) / norms, -1.0), 1.0) if norms else math.nan


def pair(tensors: Tensors, target: str) -> LowRank:
    """The pair of the layer `target`."""
    return LowRank(tensors[target + ".B"], tensors[target + ".A"])


def unpair(target: str, both: LowRank) -> Tensors:
    """The inverse of `pair`."""
    return {target + ".A": both.A, target + ".B": both.B}


def product(tensors: Tensors, layer: str) -> LowRank:
    """The weight change that the layer's tensors stand for: B A, B R A with a core `.R` (r, r), or B blockdiag(H_1 .. H_h) A with heads
    `.H` (h, r, r), `A` (h r, n) and `B` (m, h r). Core and heads are absorbed in B.
    """
    both = pair(tensors, layer)
    if layer + ".H" in tensors:
        heads = tensors[layer + ".H"]
        heads = heads * tensors[layer + ".s"][:, None, None] if layer + ".s" in tensors else heads
    elif layer + ".R" in tensors:
        heads = tensors[layer + ".R"][None]
    else:
        return both
    count, r = heads.shape[0], heads.shape[-1]
    if heads.shape != (count, r, r) or count * r != both.rank:
        raise ValueError(
            f"{layer}: the core is {tuple(heads.shape)}, B and A have rank {both.rank}; needed are h cores r x r with h r the rank"
        )
    b = torch.einsum("mhi,hij->mhj", _wide(both.B).unflatten(1, (count, r)), _wide(heads)).flatten(1)
    return LowRank(b.to(both.B), both.A)


def rank_of(tensors: Tensors) -> int:
    """The largest rank over the layers' A and B factors; 0 without any."""
    return max((tensor.shape[_axis(name)] for name, tensor in tensors.items() if is_factor(name) and not is_own(name)), default=0)


def cut(tensors: Tensors, rank: int) -> Tensors:
    """The first `rank` columns of every B and rows of every A, or all where there are fewer; other tensors as they are."""
    _positive(rank)
    _no_core(tensors, "cut")
    return {
        name: tensor.narrow(_axis(name), 0, min(rank, tensor.shape[_axis(name)])) if is_factor(name) and not is_own(name) else tensor
        for name, tensor in tensors.items()
    }


def pad(tensors: Tensors, like: Tensors) -> Tensors:
    """Zero columns of B and zero rows of A up to the ranks they have in `like`; other tensors as they are. The products stay."""
    padded = dict(tensors)
    for name, tensor in tensors.items():
        if not is_factor(name) or is_own(name):
            continue
        axis, want = _axis(name), like[name].shape if name in like else tensor.shape[:0]
        if len(want) != 2 or want[1 - axis] != tensor.shape[1 - axis] or want[axis] < tensor.shape[axis]:
            got = f"{name} is {tuple(tensor.shape)}, in like {tuple(want) or 'absent'}"
            raise ValueError(f"{got}; needed is the same layer at no lower rank, or cut it first")
        if short := want[axis] - tensor.shape[axis]:
            _no_core(tensors, "padded")
            padded[name] = grow(tensor, (0, 0, 0, short) if axis == 0 else (0, short))
    return padded


def appended(chunks: tuple[Mapping[str, LowRank], ...], new: Mapping[str, LowRank]) -> tuple[Mapping[str, LowRank], ...]:
    """`chunks` with one more, of bounded size: the ranks of a layer sum to at most min(m, n) over all chunks.

    A layer that would pass it is folded into the newest chunk, exactly, and leaves the older ones; chunks left empty are dropped.
    """
    older, newest = [dict(chunk) for chunk in chunks], dict(new)
    for layer, part in new.items():
        parts = [*(chunk[layer] for chunk in older if layer in chunk), part]
        if sum(p.rank for p in parts) > min(part.shape):
            newest[layer] = total((1.0, p) for p in parts)
            for chunk in older:
                chunk.pop(layer, None)
    return tuple(chunk for chunk in (*older, newest) if chunk)


def nearest(dense: Tensor, rank: int, *, seed: int = 0) -> LowRank:
    """The best rank-`rank` approximation of a dense (m, n) matrix, singular values in B.

    Up to a smaller side of `WHOLE` by its SVD; beyond by a randomized one with power iterations, which takes seconds and not minutes
    (Halko et al., SIAM Review 2011, algorithm 4.4).
    """
    m, n = dense.shape
    if min(m, n) <= WHOLE:
        eye = torch.eye(min(m, n), dtype=torch.float64)
        return (LowRank(_wide(dense), eye) if n <= m else LowRank(eye, _wide(dense))).truncate(rank)
    w = _wide(dense)
    q = torch.linalg.qr(w @ torch.randn(n, rank + OVER, generator=Generator().manual_seed(seed), dtype=w.dtype))[0]
    for _ in range(PASSES):
        q = torch.linalg.qr(w @ torch.linalg.qr(w.T @ q)[0])[0]
    return LowRank(q, q.T @ w).truncate(rank)


def fresh(tensors: Tensors, seed: int, round: int) -> Tensors:
    """New A and B for every layer of `tensors`: A as LoRA draws it (uniform within 1 / sqrt(n)), B zero, so that the model stands still."""
    made: Tensors = {}
    for layer in targets(tensors):
        a, b = tensors[f"{layer}.A"], tensors[f"{layer}.B"]
        rng = generator(seed, round=round, purpose=f"fresh {layer}")
        drawn = (2 * torch.rand(a.shape, generator=rng, dtype=torch.float64) - 1) / a.shape[1] ** 0.5
        made |= {f"{layer}.A": drawn.to(a.dtype), f"{layer}.B": torch.zeros_like(b)}
    return made


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float64)


def _core(b: Tensor, a: Tensor) -> Tensor:
    """A matrix with the singular values of `b @ a`, and no larger than need be."""
    if b.shape[1] >= min(b.shape[0], a.shape[1]):
        return b @ a
    core: Tensor = torch.linalg.qr(b, mode="r").R @ torch.linalg.qr(a.T, mode="r").R.T
    return core


def _axis(factor: str) -> int:
    """The axis of an A or B factor that is its rank."""
    return 0 if is_a(factor) else 1


def _no_core(tensors: Tensors, verb: str) -> None:
    if cores := sorted(name for name in tensors if name.endswith((".R", ".H"))):
        raise ValueError(f"{cores[0]} is a core between B and A: such adapters cannot be {verb}; give every client one rank")


def _positive(rank: int) -> None:
    if rank < 1:
        raise ValueError(f"rank {rank}: needed is at least 1")
