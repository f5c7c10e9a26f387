"""The span test: which tokens a gradient names. What one client sends is not private because it is small.

A linear layer's gradient is a sum of outer products delta_t x_t^T over tokens: its rows lie in the span of the layer's inputs (DAGER,
Petrov et al., NeurIPS 2024, https://arxiv.org/abs/2405.15586). In the first layer an input is a known function of its token, so each token
of the vocabulary can be tried. The gradient of A has rows in the span of the x_t; that of B, or of an r x r core R, in the span of the
A x_t; there the test works as well while the batch has fewer distinct tokens than the adapter has ranks.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Leak:
    """The rank of the gradient, and how far outside the span of its rows each candidate lies (V,), from 0 (inside) to 1."""

    rank: int
    residuals: Tensor

    def named(self, threshold: float = 0.01) -> Tensor:
        """(V,) True for the candidates that lie in the span."""
        return self.residuals < threshold

    def nearest(self, many: int) -> Tensor:
        """(V,) True for the `many` candidates that lie closest: what someone names who knows how many there are."""
        found = torch.zeros_like(self.residuals, dtype=torch.bool)
        found[self.residuals.argsort()[:many]] = True
        return found


def span_test(gradient: Tensor, candidates: Tensor, *, tolerance: float = 1e-5, most: int | None = None) -> Leak:
    """Tries every row of `candidates` (V, q) against the rows of `gradient` (p, q), in float64.

    For the gradient of B or R the candidates are A x. Singular values below `tolerance` times the largest count as rounding; `most` keeps
    the largest alone, which is what can be done against noise.
    """
    _, sizes, right = torch.linalg.svd(gradient.double(), full_matrices=False)
    rank = int((sizes > tolerance * sizes[0]).sum()) if sizes[0] > 0 else 0
    basis = right[: rank if most is None else min(rank, most)]
    inputs = candidates.double()
    outside, whole = (inputs - inputs @ basis.T @ basis).norm(dim=1), inputs.norm(dim=1)
    return Leak(rank, torch.where(whole > 0, outside / whole, 1.0))  # zero, as a padding token's input, lies in every span


def scored(found: Tensor, truth: Tensor) -> tuple[float, float]:
    """Precision and recall of the candidates that were found (V,), if those of `truth` (V,) were there; 0 where nothing was found."""
    right = int((found & truth).sum())
    return right / max(int(found.sum()), 1), right / max(int(truth.sum()), 1)
