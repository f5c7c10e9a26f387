"""Which tokens a gradient names: all of them while there are fewer than ranks, of A, of B, and of the r x r core alike."""

import pytest
import torch
from torch import Tensor

from fedpeft.privacy.span import scored, span_test

pytestmark = pytest.mark.fast
V, N, M, R = 5000, 256, 96, 32


class Layer:
    """One linear layer m x n with factors B and A of rank 32, and a batch of `tokens` distinct tokens."""

    def __init__(self, tokens: int, seed: int = 0, steps: int = 1) -> None:
        rng = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=rng, dtype=torch.float64)

        self.vocabulary, self.A, self.B = draw(V, N), draw(R, N), draw(M, R)
        self.truth = torch.zeros(V, dtype=torch.bool)
        self.truth[torch.randperm(V, generator=rng)[:tokens]] = True
        x = self.vocabulary[self.truth]
        full = sum(draw(tokens, M).T @ x for _ in range(steps))  # dL/dW, of inputs that stay the same from step to step
        self.gradients = {"A": self.B.T @ full, "B": full @ self.A.T, "R": self.B.T @ full @ self.A.T}
        self.rng = rng

    def candidates(self, matrix: str) -> Tensor:
        return self.vocabulary if matrix == "A" else self.vocabulary @ self.A.T


@pytest.mark.parametrize("matrix", ["A", "B", "R"])
@pytest.mark.parametrize("steps", [1, 5])
def test_fewer_tokens_than_ranks_are_all_named_and_no_others(matrix: str, steps: int) -> None:
    layer = Layer(tokens=20, steps=steps)
    found = span_test(layer.gradients[matrix], layer.candidates(matrix))
    assert found.rank == 20
    assert torch.equal(found.named(), layer.truth)
    assert scored(found.named(), layer.truth) == (1.0, 1.0)
    assert scored(found.nearest(20), layer.truth) == (1.0, 1.0)


@pytest.mark.parametrize("matrix", ["B", "R"])
@pytest.mark.parametrize("tokens", [32, 60])
def test_as_many_tokens_as_ranks_name_everything_and_so_nothing(matrix: str, tokens: int) -> None:
    layer = Layer(tokens)
    found = span_test(layer.gradients[matrix], layer.candidates(matrix))
    assert found.rank == R
    assert scored(found.named(), layer.truth) == (tokens / V, 1.0)


def test_a_gradient_of_a_still_tells_who_is_near_when_tokens_outnumber_ranks() -> None:
    """Its rows have n entries and not r: what lies in their span no token does, but those that were there lie nearer."""
    layer = Layer(tokens=60)
    found = span_test(layer.gradients["A"], layer.candidates("A"))
    assert not found.named().any()
    assert scored(found.nearest(60), layer.truth)[0] > 0.5


@pytest.mark.parametrize("matrix", ["A", "B", "R"])
def test_noise_raises_the_residual_of_the_tokens_that_are_there(matrix: str) -> None:
    layer = Layer(tokens=20)
    gradient = layer.gradients[matrix]
    level = float(gradient.square().mean().sqrt())
    noise = torch.randn(gradient.shape, generator=layer.rng, dtype=torch.float64)
    seen = []
    for sigma in (0.0, 1e-2, 1e-1, 1.0, 10.0):
        found = span_test(gradient + sigma * level * noise, layer.candidates(matrix), most=20)
        seen.append(float(found.residuals[layer.truth].mean()))
    assert seen == sorted(seen)
    assert seen[0] < 1e-10
    assert seen[-1] > 0.5
    assert scored(found.nearest(20), layer.truth)[0] < 0.3


def test_a_gradient_of_nothing_names_nothing() -> None:
    found = span_test(torch.zeros(4, 6), torch.randn(9, 6, generator=torch.Generator().manual_seed(0)))
    assert found.rank == 0
    assert not found.named().any()
    assert scored(found.named(), torch.ones(9, dtype=torch.bool)) == (0.0, 0.0)


def test_a_candidate_that_is_zero_is_never_named() -> None:
    candidates = torch.cat([torch.eye(3), torch.zeros(1, 3)])
    found = span_test(torch.tensor([[1.0, 0.0, 0.0]]), candidates)
    assert found.named().tolist() == [True, False, False, False]
