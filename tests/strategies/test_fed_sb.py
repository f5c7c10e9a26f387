import pytest
import torch

from fedpeft.adapters.lora import Lora
from fedpeft.adapters.lora_sb import LoraSB
from fedpeft.aggregate import weighted_mean
from fedpeft.lowrank import product
from fedpeft.messages import Update
from fedpeft.strategy import Federation
from fedpeft.tensors import Tensors, only
from strategies.fed_sb import PRINT, FedSB, State, fed_sb, fingerprint, same_basis

pytestmark = pytest.mark.fast
RUN = Federation(rounds=6, lr=0.01, steps=5)
LAYERS = ("layer.0.query", "layer.0.value", "layer.1.query")


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def best(dense: torch.Tensor, rank: int) -> torch.Tensor:
    u, s, vt = torch.linalg.svd(dense, full_matrices=False)
    return u[:, :rank] * s[:rank] @ vt[:rank]


class Regressions:
    """Three clients of 2, 3 and 4 examples, losses mean |(W + change) x - y|^2 / 2: one layer, whose pooled gradient has rank 9."""

    M, N, RANK, SKETCH = 30, 40, 4, 12
    EXAMPLES = (2, 3, 4)

    def __init__(self, strategy: FedSB) -> None:
        self.W = drawn(self.M, self.N, seed=1)
        self.x = [drawn(many, self.N, seed=10 + k) for k, many in enumerate(self.EXAMPLES)]
        self.y = [drawn(many, self.M, seed=20 + k) for k, many in enumerate(self.EXAMPLES)]
        core = {"q.B": torch.linalg.qr(drawn(self.M, self.RANK, seed=2))[0], "q.A": torch.linalg.qr(drawn(self.N, self.RANK, seed=3))[0].T}
        head = {"head.bias": drawn(2, seed=5)}
        zero = torch.zeros(self.RANK, self.RANK, dtype=torch.float64)
        starts = {
            "core": core | {"q.R": zero} | head,
            "sketch": {"q.A": drawn(self.SKETCH, self.N, seed=4), "q.B": torch.zeros(self.M, self.SKETCH, dtype=torch.float64)} | head,
            "whole": {"q.values": torch.zeros(self.M * self.N, dtype=torch.float64)} | head,
        }
        self.strategy, self.starts, self.state = strategy, starts, strategy.init(starts)

    def loss(self, k: int, tensors: Tensors) -> torch.Tensor:
        change = tensors["q.values"].view(self.M, self.N) if "q.values" in tensors else product_of(tensors)
        return (self.x[k] @ (self.W + change).T - self.y[k]).square().sum(1).mean() / 2

    def pooled(self) -> torch.Tensor:
        """The gradient of the mean loss over all examples, with respect to W."""
        whole = sum(self.EXAMPLES)
        return sum((x @ self.W.T - y).T @ x for x, y in zip(self.x, self.y, strict=True)) / whole

    def gradient_round(self, round: int) -> None:
        phase, updates = self.strategy.phase(round), []
        assert phase.work == "gradient"
        for k, many in enumerate(self.EXAMPLES):
            start = self.strategy.broadcast(self.state, round, k).tensors
            moving = {name: t for name, t in start.items() if phase.trains(name)}
            slope = torch.func.grad(lambda moving, start=start, k=k: self.loss(k, start | moving))(moving)
            end = start | {name: start[name] - slope[name] for name in moving}
            updates.append(Update(k, only(end, phase.shares), float(many)))
        self.state = self.strategy.aggregate(self.state, round, updates, weighted_mean)


def product_of(tensors: Tensors) -> torch.Tensor:
    b = tensors["q.B"] @ tensors["q.R"] if "q.R" in tensors else tensors["q.B"]
    return b @ tensors["q.A"]


def orthonormal(tensors: Tensors, layer: str, within: float = 1e-12) -> bool:
    b, a = tensors[f"{layer}.B"], tensors[f"{layer}.A"]
    eye = torch.eye(len(a), dtype=a.dtype)
    return torch.allclose(b.T @ b, eye, rtol=0, atol=within) and torch.allclose(a @ a.T, eye, rtol=0, atol=within)


# From singular vectors of the weight


def test_it_starts_from_orthonormal_factors_and_a_core_of_zero(federation):
    run = federation(fed_sb(RUN, rank=2))
    for layer in LAYERS:
        assert orthonormal(run.state.model.tensors, layer)
        assert not bool(run.state.model.tensors[f"{layer}.R"].any())


def test_the_start_is_the_weights_own_and_asks_no_data_and_no_seed(tiny):
    base = tiny("bert")
    path = "bert.encoder.layer.0.intermediate.dense"
    weight = base.module.get_submodule(path).weight.detach().clone()
    made = fed_sb(RUN, rank=4).adapters["core"](Lora(rank=3))
    starts = []
    for seed in (0, 7):
        adapted = made.attach(base, seed)
        starts.append(adapted.read())
        adapted.undo()
    assert all(torch.equal(starts[0][name], tensor) for name, tensor in starts[1].items())
    b, a = starts[0][f"{path}.B"], starts[0][f"{path}.A"]
    assert torch.allclose(b @ (b.T @ weight @ a.T) @ a, best(weight, 4), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "vit"])
def test_the_model_starts_unchanged_to_the_bit(kind, tiny, batch):
    base = tiny(kind)
    want = base.module(**batch(base)).logits
    adapted = fed_sb(RUN, rank=4).adapters["core"](Lora(rank=3)).attach(base, 0)
    assert torch.equal(adapted.logits(batch(base)), want)


def test_the_mean_of_cores_is_the_mean_of_the_changes_for_any_weights(federation):
    run = federation(fed_sb(RUN, rank=3)).advance(1)
    updates, trained = run.play((0, 1, 3))  # of weight 1, 2 and 4
    run.take(updates)
    for layer in LAYERS:
        R = sum((k + 1) / 7 * trained[k][f"{layer}.R"] for k in (0, 1, 3))
        assert torch.allclose(run.state.model.tensors[f"{layer}.R"], R, rtol=0, atol=1e-15)
        change = sum((k + 1) / 7 * product(trained[k], layer).dense() for k in (0, 1, 3))
        assert torch.allclose(product(run.state.model.tensors, layer).dense(), change, rtol=0, atol=1e-13)


def test_cores_and_the_head_are_all_that_goes_up(federation):
    run = federation(fed_sb(RUN, rank=2))
    for _ in range(2):
        updates, _ = run.play()
        adapter = {name: tensor for update in updates for name, tensor in update.tensors.items() if not name.startswith("head.")}
        assert set(adapter) == {f"{layer}.R" for layer in LAYERS}
        assert sum(tensor.numel() for tensor in adapter.values()) == 3 * 2 * 2
        assert "head.classifier.weight" in updates[0].tensors
        run.take(updates)


def test_the_cores_gradient_is_the_weights_between_b_and_a(tiny, batch):
    """g_R = B^T g_W A^T; so a step of R changes the weight by -lr B B^T g_W A^T A, the projection of the full step."""
    base, path = tiny("bert"), "bert.encoder.layer.1.output.dense"  # 40 in, 24 out
    adapted = LoraSB(rank=4, start="xs").attach(base, 0)
    inner = base.module.get_submodule(path).base_layer
    adapted.select(lambda name: name == f"{path}.R")
    inner.weight.requires_grad_(True)
    adapted.logits(batch(base)).square().sum().backward()
    b, a = (adapted.parameters[f"{path}.{part}"].detach() for part in "BA")
    want = b.T @ inner.weight.grad @ a.T
    got = adapted.parameters[f"{path}.R"].grad
    assert float(want.norm()) > 1e-6
    assert torch.allclose(got, want, rtol=0, atol=1e-12 * float(want.norm()))


def test_with_square_factors_a_step_of_the_core_is_a_full_step():
    W, g = drawn(5, 5), drawn(5, 5, seed=1)
    b, a = torch.linalg.qr(drawn(5, 5, seed=2))[0], torch.linalg.qr(drawn(5, 5, seed=3))[0]
    R = -0.1 * b.T @ g @ a.T
    assert torch.allclose(W + b @ R @ a, W - 0.1 * g, rtol=0, atol=1e-13)


# From gradients


def test_two_rounds_of_gradients_give_the_svd_of_the_clients_pooled_gradient():
    game = Regressions(fed_sb(RUN, "gradient", rank=Regressions.RANK, step=0.25))
    for round in (0, 1):
        game.gradient_round(round)
    made, G = game.state.model.tensors, game.pooled()
    S = torch.linalg.svdvals(G)
    assert orthonormal(made, "q")
    b, a, R = made["q.B"], made["q.A"], made["q.R"]
    assert torch.allclose(b @ (b.T @ G @ a.T) @ a, best(G, game.RANK), rtol=0, atol=1e-10 * float(S[0]))
    assert torch.allclose(b @ torch.diag(S[: game.RANK]) @ a, best(-G, game.RANK), rtol=0, atol=1e-10 * float(S[0]))
    assert torch.allclose(R, 0.25 * torch.diag(S[: game.RANK] / S[0]), rtol=0, atol=1e-12)


def test_a_start_along_the_gradient_lowers_every_ones_loss():
    game = Regressions(fed_sb(RUN, "gradient", rank=Regressions.RANK, step=0.05))
    before = sum(n * float(game.loss(k, {"q.values": torch.zeros(30 * 40)})) for k, n in enumerate(game.EXAMPLES))
    for round in (0, 1):
        game.gradient_round(round)
    after = sum(n * float(game.loss(k, game.state.model.tensors)) for k, n in enumerate(game.EXAMPLES))
    assert after < before


def test_without_a_step_the_gradient_gives_the_subspace_and_the_model_starts_unchanged():
    game = Regressions(fed_sb(RUN, "gradient", rank=Regressions.RANK))
    for round in (0, 1):
        game.gradient_round(round)
    assert not bool(game.state.model.tensors["q.R"].any())
    assert torch.equal(game.state.model.tensors["head.bias"], game.starts["core"]["head.bias"])


def test_a_sign_start_is_the_svd_of_the_sign_of_the_pooled_gradient():
    """The sign of the sum, not the sum of signs; R are its singular values, as in the paper's code."""
    game = Regressions(fed_sb(RUN, "sign", rank=Regressions.RANK, step=0.01))
    game.gradient_round(0)
    made, step = game.state.model.tensors, -0.01 * game.pooled().sign()
    assert orthonormal(made, "q")
    assert torch.allclose(product_of(made), best(step, game.RANK), rtol=0, atol=1e-10)
    assert torch.allclose(made["q.R"], torch.diag(torch.linalg.svdvals(step)[: game.RANK]), rtol=0, atol=1e-12)
    assert set(made) == {*game.starts["core"], PRINT}


def test_a_sign_start_of_step_zero_gives_the_subspace_of_the_signs():
    game = Regressions(fed_sb(RUN, "sign", rank=Regressions.RANK, step=0.0))
    game.gradient_round(0)
    made, signs = game.state.model.tensors, game.pooled().sign()
    assert not bool(made["q.R"].any())
    assert torch.allclose(made["q.B"] @ (made["q.B"].T @ signs @ made["q.A"].T) @ made["q.A"], best(signs, game.RANK), rtol=0, atol=1e-10)


def test_the_default_step_of_a_sign_is_the_rate_over_all_steps():
    assert fed_sb(RUN, "sign").step == pytest.approx(0.01 / 30)
    assert fed_sb(RUN, "gradient").step == fed_sb(RUN, "xs").step == 0


@pytest.mark.parametrize(("start", "before"), [("gradient", 2), ("sign", 1)])
def test_a_layer_without_a_gradient_keeps_the_singular_vectors_of_its_weight(start, before, federation):
    run = federation(fed_sb(RUN, start, rank=2, step=0.1))
    for _ in range(before):
        updates, _ = run.play()
        for update in updates:
            for name, tensor in update.tensors.items():
                if name.startswith("layer.0.value."):
                    tensor.zero_()
        run.take(updates)
    core = run.starts["core"]
    for part in "BAR":
        assert torch.equal(run.state.model.tensors[f"layer.0.value.{part}"], core[f"layer.0.value.{part}"])
        assert not torch.equal(run.state.model.tensors[f"layer.0.query.{part}"], core[f"layer.0.query.{part}"])
    run.take(run.play()[0])  # and the federation goes on


@pytest.mark.parametrize("kind", ["paper", "gpt2"])
@pytest.mark.parametrize(("start", "before"), [("gradient", 2), ("sign", 1)])
def test_after_the_rounds_of_gradients_the_core_adapter_is_trained(start, before, kind, federation):
    run = federation(fed_sb(RUN, start, rank=2, step=0.1), kind=kind)
    assert [run.strategy.phase(round).work for round in range(3)] == ["gradient"] * before + ["train"] * (3 - before)
    run.advance(before)
    assert run.state.core == {}
    assert set(run.state.model.tensors) == {*run.starts["core"], PRINT}
    run.advance(1)


@pytest.mark.parametrize("start", ["gradient", "sign"])
def test_the_head_rests_while_gradients_are_gathered(start, federation):
    """A step of rate 1 would ruin it."""
    run = federation(fed_sb(RUN, start))
    for round in range(2 if start == "gradient" else 1):
        assert not run.strategy.phase(round).trains("head.classifier.weight")
        run.take(run.play()[0])
    assert torch.equal(run.state.model.tensors["head.classifier.weight"], run.starts["core"]["head.classifier.weight"])


# The same B and A everywhere


def test_a_client_whose_factors_are_others_raises_instead_of_sending_its_core(federation):
    run = federation(fed_sb(RUN, rank=2)).advance(1)
    start = run.start(0)
    assert same_basis(start, start, 5) is start
    for name in ("layer.0.query.A", "layer.1.query.B"):
        other = start | {name: start[name] + 1e-15}
        with pytest.raises(ValueError, match=r"B and A are not those of the server"):
            same_basis(other, start, 5)
    run.strategy.phase(1).finish(start | {"layer.0.query.R": start["layer.0.query.R"] + 1}, start, 5)


def test_the_fingerprint_is_of_names_and_bits_of_b_and_a_alone():
    tensors = {"q.A": drawn(2, 3), "q.B": drawn(4, 2), "q.R": drawn(2, 2), "head.bias": drawn(2)}
    same = fingerprint(tensors)
    assert same.dtype == torch.uint8
    assert same.shape == (16,)
    assert torch.equal(fingerprint({name: tensor.clone() for name, tensor in reversed(tensors.items())}), same)
    assert torch.equal(fingerprint(tensors | {"q.R": drawn(2, 2, seed=9)}), same)
    assert torch.equal(fingerprint(tensors | {"q.A": tensors["q.A"].T.contiguous().T}), same)  # stored the other way round
    assert not torch.equal(fingerprint(tensors | {"q.A": -tensors["q.A"]}), same)
    assert not torch.equal(fingerprint({name.replace("q.A", "v.A"): tensor for name, tensor in tensors.items()}), same)


def test_every_broadcast_of_the_core_carries_the_fingerprint_of_what_it_sends(federation):
    run = federation(fed_sb(RUN, "gradient", rank=2, step=0.1))
    for round in range(4):
        sent = run.strategy.broadcast(run.state, round, 1).tensors
        assert (PRINT in sent) == (round >= 2)
        assert round < 2 or torch.equal(sent[PRINT], fingerprint(sent))
        run.take(run.play()[0])


# Settings


def test_the_core_has_four_times_loras_rank_or_what_is_asked():
    main = Lora(rank=3, targets=("query",))
    assert fed_sb(RUN).adapters["core"](main) == LoraSB(12, ("query",), "xs", capped=True)
    assert fed_sb(RUN, rank=5).adapters["core"](main) == LoraSB(5, ("query",), "xs", capped=False)
    assert fed_sb(RUN).adapters["core"](LoraSB(rank=7)) == LoraSB(7, start="xs")


def test_a_sketch_is_wider_than_the_core_by_eight():
    made = fed_sb(RUN, "gradient", rank=5).adapters["sketch"](Lora(rank=3))
    assert (made.rank, made.alpha / made.rank, made.capped) == (13, 1.0, True)


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ({"start": "svd"}, r"strategy\.start=svd: needed is xs, gradient or sign"),
        ({"rank": 0}, r"strategy\.rank=0: .*at least 1"),
        ({"rank": -3}, r"strategy\.rank=-3: .*at least 1"),
        ({"start": "sign", "step": -0.1}, r"strategy\.step=-0\.1: .*at least 0"),
        ({"start": "gradient", "step": float("nan")}, r"strategy\.step=nan: .*at least 0"),
        ({"start": "xs", "step": 0.1}, r"strategy\.step=0\.1.*strategy\.start=gradient"),
    ],
)
def test_bad_settings_are_named(more, field):
    with pytest.raises(ValueError, match=field):
        fed_sb(RUN, **more)


@pytest.mark.parametrize(("start", "before"), [("gradient", 2), ("sign", 1)])
def test_rounds_of_gradients_must_leave_one_to_train(start, before):
    fed_sb(Federation(rounds=before + 1), start)
    with pytest.raises(ValueError, match=rf"strategy\.start={start} takes {before} rounds.*rounds={before}"):
        fed_sb(Federation(rounds=before), start)


def test_an_adapter_without_a_rank_is_refused():
    with pytest.raises(ValueError, match=r"strategy=fed_sb.*adapter=lora"):
        fed_sb(RUN).adapters["core"](object())


def test_its_state_begins_with_what_takes_the_gradient():
    game = Regressions(fed_sb(RUN, "gradient"))
    assert isinstance(game.state, State)
    assert set(game.state.core) == set(game.starts["core"])
    assert Regressions(fed_sb(RUN)).state.core == {}
