import pytest
import torch

from strategies.fedavg import FedAvg
from strategies.fedprox import fedprox

pytestmark = pytest.mark.fast
START = {"q.A": torch.tensor([1.0, 2.0], dtype=torch.float64), "head.bias": torch.tensor([0.0], dtype=torch.float64)}


def moved(a: float = 0.0, b: float = 0.0, c: float = 0.0) -> dict[str, torch.Tensor]:
    steps = {"q.A": torch.tensor([a, b], dtype=torch.float64), "head.bias": torch.tensor([c], dtype=torch.float64)}
    return {name: (START[name] + step).requires_grad_() for name, step in steps.items()}


def test_its_term_is_half_mu_times_the_squared_distance():
    now = moved(3.0, -1.0, 2.0)
    assert fedprox(mu=0.5).phase(0).loss(now, START).detach() == 0.25 * (9 + 1 + 4)


def test_the_gradient_of_its_term_is_mu_times_the_distance():
    now = moved(3.0, -1.0, 2.0)
    fedprox(mu=0.5).phase(0).loss(now, START).backward()
    assert now["q.A"].grad.tolist() == [1.5, -0.5]
    assert now["head.bias"].grad.tolist() == [1.0]


def test_its_term_is_zero_at_the_start_and_so_is_its_gradient():
    now = moved()
    term = fedprox(mu=0.5).phase(0).loss(now, START)
    term.backward()
    assert term.detach() == 0
    assert now["q.A"].grad.tolist() == [0, 0]


def test_only_what_moves_is_held():
    """`now` has the trained tensors; the start has all."""
    now = {"head.bias": START["head.bias"] + 2}
    assert fedprox(mu=1.0).phase(0).loss(now, START) == 2.0


def test_gradient_descent_on_its_term_alone_goes_back_to_the_start():
    now, loss = moved(3.0, -1.0, 2.0), fedprox(mu=0.5).phase(0).loss
    for _ in range(60):
        steps = torch.autograd.grad(loss(now, START), list(now.values()))
        now = {name: (tensor - step).detach().requires_grad_() for (name, tensor), step in zip(now.items(), steps, strict=True)}
    assert all(torch.allclose(now[name], START[name], rtol=0, atol=1e-12) for name in START)


def test_its_server_is_fedavgs():
    strategy = fedprox()
    assert isinstance(strategy, FedAvg)
    phase = strategy.phase(3)
    assert phase.trains("q.A")
    assert phase.shares("head.bias")
    assert phase.finish is None


def test_mu_of_zero_adds_nothing_and_a_negative_one_is_refused():
    assert fedprox(mu=0.0).phase(0).loss(moved(3.0), START).detach() == 0
    with pytest.raises(ValueError, match=r"strategy\.mu=-0\.1"):
        fedprox(mu=-0.1)
