import pytest
import torch

from fedpeft.lowrank import LowRank, cosine, total
from fedpeft.messages import Update
from strategies.fedavg import FedAvg
from strategies.lora_fair import _descended, lora_fair

pytestmark = pytest.mark.fast
LAYERS = ("layer.0.query", "layer.0.value", "layer.1.query")


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def both(tensors, layer) -> tuple[torch.Tensor, torch.Tensor]:
    return tensors[f"{layer}.B"], tensors[f"{layer}.A"]


def played(federation, strategy, mean_of_products, clients=(0, 1, 3)):
    """FedIT's factors, the strategy's, and the mean of products, of one round after another."""
    plain, run = federation(FedAvg()).advance(1), federation(strategy)
    run.state, run.round = plain.state, plain.round
    updates, trained = run.play(clients)
    true = mean_of_products(updates, trained)
    plain.take(updates)
    run.take(updates)
    return plain.state.tensors, run.state.tensors, true


def dense_cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one * other).sum() / (one.norm() * other.norm()))


SOLVERS = pytest.mark.parametrize("solver", ["cosine", "ridge"])


@SOLVERS
@pytest.mark.parametrize("residual", ["B", "A", "both"])
def test_identical_clients_need_no_correction(solver, residual, federation, distance):
    run = federation(lora_fair(solver, residual))
    updates, trained = run.play((0, 1, 2), seed=5)
    run.take(updates)
    for layer in LAYERS:
        for got, want in zip(both(run.state.tensors, layer), both(trained[0], layer), strict=True):
            assert torch.allclose(got, want, rtol=0, atol=1e-12)


@SOLVERS
@pytest.mark.parametrize(("residual", "kept"), [("B", ".A"), ("A", ".B")])
def test_the_other_factor_and_the_head_are_fedits_to_the_bit(solver, residual, kept, federation, mean_of_products):
    plain, made, _ = played(federation, lora_fair(solver, residual), mean_of_products)
    moved = [name for name, tensor in plain.items() if not torch.equal(made[name], tensor)]
    assert moved
    assert all(name.endswith(f".{residual}") and not name.endswith(kept) for name in moved)


@SOLVERS
@pytest.mark.parametrize("residual", ["B", "A", "both"])
def test_a_large_penalty_leaves_fedit(solver, residual, federation, mean_of_products, distance):
    plain, made, _ = played(federation, lora_fair(solver, residual, penalty=1e12), mean_of_products)
    assert distance(made, plain) <= 1e-10


@pytest.mark.parametrize("residual", ["B", "A", "both"])
def test_an_infinitesimal_ridge_reaches_the_projection_and_with_it_the_largest_cosine(residual, federation, mean_of_products):
    """T P_A is what T keeps on the row space of A; its cosine to T is ||T P_A|| / ||T||, and no B has a larger one with that A."""
    for penalty in (0.0, 1e-13):
        plain, made, true = played(federation, lora_fair("ridge", residual, penalty), mean_of_products)
        for layer in LAYERS:
            B, A = both(plain, layer)
            bound = true[layer] @ torch.linalg.pinv(A) @ A if residual != "A" else B @ torch.linalg.pinv(B) @ true[layer]
            if residual == "both":  # then A beside the new B: T on its column space as well
                X = true[layer] @ torch.linalg.pinv(A)
                bound = X @ torch.linalg.pinv(X) @ true[layer]
            product = made[f"{layer}.B"] @ made[f"{layer}.A"]
            assert torch.allclose(product, bound, rtol=0, atol=1e-9)
            assert dense_cosine(product, true[layer]) == pytest.approx(float(bound.norm() / true[layer].norm()), abs=1e-11)
            assert dense_cosine(product, true[layer]) > dense_cosine(B @ A, true[layer])


@pytest.mark.parametrize("penalty", [0.01, 1.0, 100.0])
def test_the_ridge_is_the_minimum_of_its_objective(penalty, federation, mean_of_products):
    plain, made, true = played(federation, lora_fair("ridge", "B", penalty), mean_of_products)
    for layer in LAYERS:
        (B, A), D = both(plain, layer), made[f"{layer}.B"] - plain[f"{layer}.B"]

        def objective(D, B=B, A=A, T=true[layer]):
            return (T - (B + D) @ A).square().sum() + penalty * D.square().sum()

        slope = torch.func.grad(objective)(D)
        assert float(slope.abs().max()) <= 1e-10 * max(1.0, penalty)
        assert all(float(objective(D + 1e-3 * drawn(*D.shape, seed=seed))) > float(objective(D)) for seed in range(20))


@pytest.mark.parametrize("residual", ["B", "A"])
@pytest.mark.parametrize("penalty", [0.0, 0.01, 0.3])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e3])
def test_the_published_objective_never_ends_above_its_start(residual, penalty, scale, federation, mean_of_products):
    plain, run = federation(FedAvg()), federation(lora_fair("cosine", residual, penalty))
    updates, trained = run.play((0, 1, 3))
    for update in updates:
        for name in update.tensors:
            trained[update.client][name] = update.tensors[name] = scale * update.tensors[name]
    true = mean_of_products(updates, trained)
    plain.take(updates)
    run.take(updates)
    for layer in LAYERS:
        before, after = ((lambda pair: pair[0] @ pair[1])(both(each.state.tensors, layer)) for each in (plain, run))
        D = run.state.tensors[f"{layer}.{residual}"] - plain.state.tensors[f"{layer}.{residual}"]
        end = 1 - dense_cosine(after, true[layer]) + penalty * float(D.norm())
        assert end <= 1 - dense_cosine(before, true[layer]) + 1e-9


@pytest.mark.parametrize("residual", ["B", "A", "both"])
def test_the_published_objective_brings_the_product_nearer_to_the_mean_of_products(residual, federation, mean_of_products):
    plain, made, true = played(federation, lora_fair("cosine", residual), mean_of_products)
    for layer in LAYERS:
        (B, A), (X, Y) = both(plain, layer), both(made, layer)
        assert dense_cosine(X @ Y, true[layer]) > dense_cosine(B @ A, true[layer]) + 1e-3


def test_descent_on_the_cosine_stays_below_the_bound_that_the_ridge_reaches(federation, mean_of_products):
    _, slow, true = played(federation, lora_fair("cosine", penalty=0.0), mean_of_products)
    _, best, _ = played(federation, lora_fair("ridge", penalty=0.0), mean_of_products)
    for layer in LAYERS:
        reached, bound = (dense_cosine(m[f"{layer}.B"] @ m[f"{layer}.A"], true[layer]) for m in (slow, best))
        assert reached <= bound + 1e-12


def test_cosines_by_grams_are_those_of_the_dense_products():
    parts = [(p, LowRank(drawn(7, 3, seed=k), drawn(3, 11, seed=9 + k))) for k, p in enumerate((0.5, 0.3, 0.2))]
    X, T = LowRank(drawn(7, 3, seed=20), drawn(3, 11, seed=21)), total(parts)
    assert cosine(T, X) == pytest.approx(dense_cosine(T.dense(), X.dense()), abs=1e-14)


def test_the_first_step_goes_down_the_gradient_of_the_cosine_by_finite_differences(monkeypatch):
    """Two evaluations: the start, and the point one step of rate 0.01 ||B||^2 further, which is returned if it is better."""
    monkeypatch.setattr("strategies.lora_fair.MOST", 2)
    T, B, A = drawn(7, 11, seed=1), drawn(7, 3, seed=2), drawn(3, 11, seed=3)
    D = _descended(T @ A.T, A @ A.T, float(T.norm()), B, penalty=0.0)
    slope, h = torch.zeros_like(B), 1e-6
    for i in range(7):
        for j in range(3):
            step = torch.zeros_like(B)
            step[i, j] = h
            slope[i, j] = -(dense_cosine((B + step) @ A, T) - dense_cosine((B - step) @ A, T)) / (2 * h)
    assert torch.allclose(D, -0.01 * B.square().sum() * slope, rtol=0, atol=1e-9)


def test_the_second_step_goes_down_the_gradient_of_the_whole_objective(monkeypatch):
    monkeypatch.setattr("strategies.lora_fair.MOST", 3)
    T, B, A, penalty = drawn(7, 11, seed=1), 0.2 * drawn(7, 3, seed=2), drawn(3, 11, seed=3), 0.02
    D = _descended(T @ A.T, A @ A.T, float(T.norm()), B, penalty)

    def objective(D):
        X = (B + D) @ A
        return 1 - (X * T).sum() / (X.norm() * T.norm()) + penalty * (D.square().sum() + 1e-12).sqrt()

    want = torch.zeros_like(B)
    for _ in range(2):
        want = want - 0.01 * B.square().sum() * torch.func.grad(objective)(want)
    assert torch.allclose(D, want, rtol=0, atol=1e-14)


@pytest.mark.parametrize("size", [1e-6, 1e-3, 1e2])
def test_the_correction_is_as_small_a_part_of_small_factors_as_of_large_ones(size):
    """The cosine does not know sizes. At one rate for all, the first step threw a B of entries 0.001 to 30 times its norm."""
    T, B, A = drawn(7, 11, seed=1), drawn(7, 3, seed=2), drawn(3, 11, seed=3)
    T = B @ A + 0.5 * T
    D = _descended(T @ A.T, A @ A.T, float(T.norm()), B, penalty=0.0)
    small = _descended(size * T @ A.T, A @ A.T, float(size * T.norm()), size * B, penalty=0.0)
    assert torch.allclose(small / size, D, rtol=0, atol=1e-9)
    assert 0.01 * B.norm() < D.norm() < 0.5 * B.norm()
    assert float((B + D).norm() / B.norm()) == pytest.approx(1, abs=0.05)  # algorithms 3.2: descent keeps the size


@SOLVERS
@pytest.mark.parametrize("residual", ["B", "A", "both"])
def test_factors_that_start_at_zero_and_did_not_move_stay(solver, residual, federation):
    run = federation(lora_fair(solver, residual))
    before = {name: tensor.clone() for name, tensor in run.state.tensors.items()}
    run.take(run.play(by=0.0)[0])
    assert all(torch.equal(run.state.tensors[name], tensor) for name, tensor in before.items())


def test_clients_count_by_their_examples_in_the_target_as_well(federation, mean_of_products):
    """Client 3 has nearly all of the weight: its product is the target, its factors the means."""
    run = federation(lora_fair("ridge", penalty=1e-12)).advance(1)
    updates, trained = run.play((0, 3))
    updates = [Update(0, updates[0].tensors, 1e-9), Update(3, updates[1].tensors, 1.0)]
    run.take(updates)
    for layer in LAYERS:
        (B, A), (X, Y) = both(trained[3], layer), both(run.state.tensors, layer)
        assert torch.allclose(X @ Y, B @ A, rtol=0, atol=1e-7)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_language_model_has_no_head_and_needs_none(kind, federation):
    run = federation(lora_fair("ridge"), kind=kind).advance(2)
    assert {name[-2:] for name in run.state.tensors} == {".A", ".B"}


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ({"solver": "sgd"}, r"strategy\.solver=sgd: needed is cosine or ridge"),
        ({"residual": "C"}, r"strategy\.residual=C: needed is B, A or both"),
        ({"penalty": -0.1}, r"strategy\.penalty=-0\.1"),
        ({"penalty": float("nan")}, r"strategy\.penalty=nan"),
    ],
)
def test_bad_settings_are_named(more, field):
    with pytest.raises(ValueError, match=field):
        lora_fair(**more)
