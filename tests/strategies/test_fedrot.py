import math

import pytest
import torch

from fedpeft.messages import Update
from strategies.fedavg import FedAvg
from strategies.fedrot import align, fedrot, rotation

pytestmark = pytest.mark.fast
LAYERS = ("layer.0.query", "layer.0.value", "layer.1.query")


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def turned(r: int, seed: int) -> torch.Tensor:
    """A random rotation (r, r)."""
    return rotation(drawn(r, r, seed=seed))


def around(seed: int, by: float) -> tuple[dict, dict]:
    """A start, and where a client went from it."""
    start = {"q.A": drawn(3, 11, seed=seed), "q.B": drawn(7, 3, seed=seed + 1)}
    return start, {name: t + by * drawn(*t.shape, seed=seed + 2 + i) for i, (name, t) in enumerate(start.items())}


@pytest.mark.parametrize("factor", ["A", "B"])
@pytest.mark.parametrize("strength", [0.3, 0.5, 1.0])
@pytest.mark.parametrize("seed", range(5))
def test_factors_are_turned_by_one_rotation_and_the_product_stays(factor, strength, seed):
    start, now = around(10 * seed, by=1.0)
    new = align(now, start, 5, factor=factor, strength=strength)
    Q = torch.linalg.lstsq(now["q.B"], new["q.B"]).solution
    assert torch.allclose(Q.T @ Q, torch.eye(3, dtype=Q.dtype), rtol=0, atol=1e-12)
    assert float(torch.linalg.det(Q)) == pytest.approx(1, abs=1e-12)
    assert torch.allclose(now["q.B"] @ Q, new["q.B"], rtol=0, atol=1e-12)
    assert torch.allclose(Q.T @ now["q.A"], new["q.A"], rtol=0, atol=1e-12)
    assert torch.allclose(new["q.B"] @ new["q.A"], now["q.B"] @ now["q.A"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("factor", ["A", "B"])
@pytest.mark.parametrize("seed", range(5))
def test_the_aligned_factor_comes_nearer_the_stronger_it_is_turned(factor, seed):
    start, now = around(10 * seed, by=0.6)
    far = [
        float((align(now, start, 5, factor=factor, strength=strength)[f"q.{factor}"] - start[f"q.{factor}"]).norm())
        for strength in (0.0, 0.25, 0.5, 0.75, 1.0)
    ]
    assert far == sorted(far, reverse=True)
    assert far[-1] < far[0]


@pytest.mark.parametrize("factor", ["A", "B"])
def test_no_rotation_brings_the_factor_nearer_than_full_strength(factor):
    start, now = around(3, by=1.0)
    best = float((align(now, start, 5, factor=factor, strength=1.0)[f"q.{factor}"] - start[f"q.{factor}"]).norm())
    for seed in range(200):
        Q = turned(3, seed)
        other = Q.T @ now["q.A"] if factor == "A" else now["q.B"] @ Q
        assert float((other - start[f"q.{factor}"]).norm()) >= best - 1e-12


def test_half_the_strength_goes_half_of_the_angle():
    """In the plane: turned by t, the polar factor of (I + Q) / 2 turns back by t / 2."""
    t = 0.8
    turn = torch.tensor([[math.cos(t), -math.sin(t)], [math.sin(t), math.cos(t)]], dtype=torch.float64)
    start = {"q.A": torch.eye(2, 5, dtype=torch.float64), "q.B": drawn(4, 2)}
    now = {"q.A": turn @ start["q.A"], "q.B": start["q.B"] @ turn.T}
    left = align(now, start, 1, factor="A", strength=0.5)["q.A"][:, :2]
    assert math.atan2(float(left[1, 0]), float(left[0, 0])) == pytest.approx(t / 2, abs=1e-14)


@pytest.mark.parametrize("round", [0, 1])
def test_factors_that_differ_by_a_rotation_are_averaged_right(round, federation, distance, products):
    """All clients have the same product, in bases of their own: the plain mean of factors would lose most of it."""
    runs = {name: federation(strategy).advance(2 + round) for name, strategy in (("rot", fedrot(1.0)), ("fedit", FedAvg()))}
    errors = {}
    for name, run in runs.items():
        want, start, updates = products(run.state), run.start(0), []
        for client, weight in enumerate((1.0, 5.0, 2.0)):
            now = dict(start)
            for i, layer in enumerate(LAYERS):
                Q = turned(3, 7 * client + i)
                now |= {f"{layer}.A": Q.T @ start[f"{layer}.A"], f"{layer}.B": start[f"{layer}.B"] @ Q}
            end = run.phase.finish(now, start, 5) if run.phase.finish else now
            updates.append(Update(client, end, weight))
        run.take(updates)
        errors[name] = distance(products(run.state), want)
    assert errors["rot"] <= 1e-12
    assert errors["fedit"] > 0.3


@pytest.mark.parametrize("factor", ["A", "B"])
def test_a_mirrored_client_is_turned_and_not_mirrored_back(factor):
    start, _ = around(0, by=0.0)
    mirror = torch.diag(torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64))
    now = {"q.A": mirror @ start["q.A"], "q.B": start["q.B"] @ mirror}
    new = align(now, start, 5, factor=factor, strength=1.0)
    assert float(torch.linalg.det(torch.linalg.lstsq(now["q.B"], new["q.B"]).solution)) == pytest.approx(1, abs=1e-12)
    assert torch.allclose(new["q.B"] @ new["q.A"], start["q.B"] @ start["q.A"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("round", range(4))
def test_a_is_aligned_in_even_rounds_and_b_in_odd_ones(round, federation):
    """By the server's round: client 9 was never there before."""
    run = federation(fedrot(1.0)).advance(round)
    start = run.start(9)
    update, _ = run.train(9)
    for layer in LAYERS:
        cross = update.tensors[f"{layer}.A"] @ start[f"{layer}.A"].T
        other = update.tensors[f"{layer}.B"].T @ start[f"{layer}.B"]
        # Aligned means that the cross product with the start is symmetric: its own polar factor is the identity.
        symmetric = [torch.allclose(M, M.T, rtol=0, atol=1e-11 * float(M.norm())) for M in (cross, other)]
        assert symmetric[round % 2]
        assert round == 0 or not symmetric[1 - round % 2]


def test_strength_zero_is_fedit_to_the_bit(federation):
    one, other = federation(fedrot(0.0)), federation(FedAvg())
    for _ in range(4):
        for run in (one, other):
            run.take(run.play((0, 1, 2))[0])
        assert all(torch.equal(one.state.tensors[name], tensor) for name, tensor in other.state.tensors.items())


@pytest.mark.parametrize("round", [0, 1])
def test_clients_lie_nearer_to_the_start_in_the_factor_that_is_aligned(round, federation):
    """Each by itself; of their mean nothing is promised, since what was far apart may have cancelled."""
    run = federation(fedrot(1.0)).advance(round)
    start = run.start(0)
    updates, trained = run.play((0, 1, 2))
    for update in updates:
        for layer in LAYERS:
            name = f"{layer}.{'AB'[round]}"
            near, far = (float((tensors[name] - start[name]).norm()) for tensors in (update.tensors, trained[update.client]))
            assert near < far


def test_a_factor_that_starts_at_zero_is_aligned_to_nothing():
    start = {"q.A": drawn(3, 11), "q.B": torch.zeros(7, 3, dtype=torch.float64)}
    now = {"q.A": drawn(3, 11, seed=1), "q.B": drawn(7, 3, seed=2)}
    new = align(now, start, 5, factor="B", strength=1.0)
    assert all(torch.equal(new[name], tensor) for name, tensor in now.items())


def test_the_head_is_left_alone_and_the_dtype_kept():
    start, now = around(0, by=1.0)
    start, now = ({n: t.float() for n, t in each.items()} | {"head.bias": torch.ones(2)} for each in (start, now))
    new = align(now, start, 5, factor="A", strength=0.5)
    assert new["head.bias"] is now["head.bias"]
    assert {t.dtype for t in new.values()} == {torch.float32}
    assert torch.allclose(new["q.B"] @ new["q.A"], now["q.B"] @ now["q.A"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("strength", [-0.1, 1.1, float("nan")])
def test_a_strength_that_is_none_is_refused(strength):
    with pytest.raises(ValueError, match=r"strategy\.strength=.*in \[0, 1\]"):
        fedrot(strength)
