import pytest
import torch

from fedpeft.adapters.lora import Lora
from fedpeft.adapters.sparse import Sparse, support
from fedpeft.messages import Update
from fedpeft.strategy import Federation
from strategies.fedavg import FedAvg
from strategies.slora import slora

pytestmark = pytest.mark.fast
RUN = Federation(rounds=6)
LAYERS = {"layer.0.query": (7, 11), "layer.0.value": (12, 5), "layer.1.query": (6, 6)}


def drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def places(layer: str, density: float = 0.4) -> torch.Tensor:
    return support(0, layer, LAYERS[layer], density)


def dense(tensors, layer: str, density: float = 0.4) -> torch.Tensor:
    change = torch.zeros(LAYERS[layer], dtype=torch.float64)
    change.view(-1)[places(layer, density)] = tensors[f"{layer}.values"]
    return change


@pytest.mark.parametrize("density", [0.01, 0.2, 0.7])
def test_the_share_of_places_lies_within_three_sigma_of_the_density(density):
    for seed in range(3):
        count = len(support(seed, "layer.0.query", (300, 400), density))
        assert abs(count - density * 120_000) <= 3 * (120_000 * density * (1 - density)) ** 0.5


def test_all_clients_move_the_same_places_and_layers_of_one_shape_others(tiny):
    adapter = slora(RUN, density=0.3).adapters["sparse"](Lora(rank=3))
    one, other = (adapter.attach(tiny("bert"), 5) for _ in range(2))
    found = {}
    for path, module in one.base.module.named_modules():
        if hasattr(module, "places"):
            assert torch.equal(module.places, other.base.module.get_submodule(path).places)
            found[path] = module.places
    query, key = (found[f"bert.encoder.layer.0.attention.self.{name}"].tolist() for name in ("query", "key"))
    assert query != key


def test_a_step_of_a_client_moves_its_weight_at_the_places_alone(tiny, batch):
    """By the function: one column of the weight at a time, through unit inputs."""
    base = tiny("bert")
    adapted = slora(RUN, density=0.3).adapters["sparse"](Lora(rank=3)).attach(base, 5)
    with torch.no_grad():
        for name, tensor in adapted.parameters.items():
            if name.endswith(".values"):
                tensor.normal_(generator=torch.Generator().manual_seed(1))
    path = "bert.encoder.layer.0.intermediate.dense"  # 24 in, 40 out
    wrapper = base.module.get_submodule(path)
    inner, eye = wrapper.base_layer, torch.eye(24, dtype=torch.float64)
    change = (wrapper(eye) - inner(eye)).T.detach()
    moved = (change.abs() > 1e-9).flatten().nonzero()[:, 0]
    assert torch.equal(moved, support(5, path, (40, 24), 0.3))


def test_without_a_density_a_layer_has_as_many_values_as_lora_has():
    adapter = slora(RUN).adapters["sparse"](Lora(rank=8))
    assert adapter.of((300, 500)) == pytest.approx(8 * 800 / 150_000)
    assert adapter.of((6, 6)) == 1.0


def test_sparse_rounds_average_the_values_at_shared_places(federation):
    run = federation(slora(RUN, density=0.4, sparse_rounds=3)).advance(1)
    updates, trained = run.play((0, 1, 3))  # of weight 1, 2 and 4
    run.take(updates)
    for layer in LAYERS:
        want = sum((k + 1) / 7 * dense(trained[k], layer) for k in (0, 1, 3))
        assert torch.allclose(dense(run.state.model.tensors, layer), want, rtol=0, atol=1e-15)


def test_lora_starts_from_the_best_low_rank_form_of_the_sparse_change(federation, products):
    run = federation(slora(RUN, density=0.4, sparse_rounds=2)).advance(1)
    updates, _ = run.play((0, 1, 3))
    means = {layer: sum((u.client + 1) / 7 * dense(u.tensors, layer) for u in updates) for layer in LAYERS}
    run.take(updates)
    made = products(run.state.model)
    for layer, change in means.items():
        S = torch.linalg.svdvals(change)
        assert float((made[layer] - change).norm()) == pytest.approx(float(S[3:].square().sum().sqrt()), abs=1e-12)
        b, a = run.state.model.tensors[f"{layer}.B"], run.state.model.tensors[f"{layer}.A"]
        assert torch.allclose(a @ a.T, torch.eye(3, dtype=a.dtype), rtol=0, atol=1e-13)
        assert torch.allclose(b.T @ b, torch.diag(S[:3].square()), rtol=0, atol=1e-11)


def test_a_change_of_loras_rank_goes_on_as_the_same_function(federation, distance):
    run = federation(slora(RUN, density=1.0, sparse_rounds=1))
    update, _ = run.train(0)
    for i, (layer, (m, n)) in enumerate(LAYERS.items()):
        b, a = drawn(m, 3, seed=i), drawn(3, n, seed=9 + i)
        update.tensors[f"{layer}.values"] = (b[:, : 3 - i % 2] @ a[: 3 - i % 2]).flatten()
    want = run.model(0, run.start(0) | update.tensors)
    run.take([update])
    assert distance(run.model(), want) <= 1e-13
    for layer in LAYERS:
        assert float(run.state.model.tensors[f"{layer}.A"].norm(dim=1).min()) > 0.99  # no rank is dead


@pytest.mark.parametrize("kind", ["bert", "gpt2", "vit"])
def test_the_model_computes_after_the_transition_what_it_computed_before(kind, federation, tiny, batch):
    """The whole way, transposition included: a change of rank 3 on every layer, by both adapters."""
    strategy = slora(RUN, density=1.0, sparse_rounds=1)
    run, base = federation(strategy, kind=kind), tiny(kind)
    update, _ = run.train(0)
    for name, tensor in run.starts["main"].items():
        if name.endswith(".B"):
            m, n = len(tensor), run.starts["main"][name[:-2] + ".A"].shape[1]
            low = drawn(m, 3, seed=m) @ drawn(3, n, seed=n + 1) / n
            update.tensors[name[:-2] + ".values"] = low.flatten()
    sparse = strategy.adapters["sparse"](Lora(rank=3, alpha=4.5)).attach(base, 0)
    sparse.fill(run.start(0) | update.tensors)
    before = sparse.logits(batch(base))
    sparse.undo()
    run.take([update])
    lora = Lora(rank=3, alpha=4.5).attach(base, 0)
    lora.fill(run.state.model.tensors)
    after = lora.logits(batch(base))
    assert (after - before).abs().max() <= 1e-10 * before.abs().max()


def test_the_head_goes_on_and_no_sparse_value_does(federation):
    run = federation(slora(RUN, density=0.4, sparse_rounds=1))
    updates, trained = run.play((0, 1))
    run.take(updates)
    want = (trained[0]["head.classifier.weight"] + 2 * trained[1]["head.classifier.weight"]) / 3
    assert torch.allclose(run.state.model.tensors["head.classifier.weight"], want, rtol=0, atol=1e-15)
    assert set(run.state.model.tensors) == set(run.starts["main"])
    assert run.state.lora == {}


def test_a_layer_that_nobody_moved_starts_as_lora_does(federation):
    run = federation(slora(RUN, density=0.4, sparse_rounds=1))
    updates, _ = run.play()
    for update in updates:
        update.tensors["layer.0.value.values"].zero_()
    run.take(updates)
    for part in ("A", "B"):
        name = f"layer.0.value.{part}"
        assert torch.equal(run.state.model.tensors[name], run.starts["main"][name])


def test_without_sparse_rounds_it_is_fedit_to_the_bit(federation):
    for strategy in (slora(RUN, sparse_rounds=0), slora(RUN, share=0.0)):
        one, other = federation(strategy), federation(FedAvg())
        for _ in range(3):
            for run in (one, other):
                run.take(run.play((0, 1, 2))[0])
        assert set(one.state.model.tensors) == set(other.state.tensors)
        assert all(torch.equal(one.state.model.tensors[name], tensor) for name, tensor in other.state.tensors.items())


def test_after_the_transition_it_is_fedavg_of_the_factors(federation):
    run = federation(slora(RUN, density=0.4, sparse_rounds=2)).advance(2)
    other = federation(FedAvg(), state=run.state.model, round=2)
    for _ in range(2):
        for each in (run, other):
            each.take(each.play((0, 1, 2))[0])
    assert all(torch.equal(run.state.model.tensors[name], tensor) for name, tensor in other.state.tensors.items())


@pytest.mark.parametrize(
    ("more", "sparse"), [({}, 1), ({"share": 0.5}, 3), ({"sparse_rounds": 4}, 4), ({"share": 0.01}, 1), ({"share": 0.0}, 0)]
)
def test_the_sparse_rounds_are_a_share_of_the_run_or_so_many(more, sparse):
    strategy = slora(RUN, **more)
    assert [strategy.phase(round).adapter for round in range(7)] == ["sparse"] * sparse + ["main"] * (7 - sparse)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_language_model_has_no_head_and_needs_none(kind, federation):
    run = federation(slora(RUN, density=0.1, sparse_rounds=1), kind=kind).advance(2)
    assert {name[-2:] for name in run.state.model.tensors} == {".A", ".B"}


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ({"density": 0.0}, r"strategy\.density=0\.0: .*\(0, 1\]"),
        ({"density": 1.1}, r"strategy\.density=1\.1: .*\(0, 1\]"),
        ({"share": 1.0}, r"strategy\.share=1\.0: .*\[0, 1\)"),
        ({"share": -0.1}, r"strategy\.share=-0\.1: .*\[0, 1\)"),
        ({"sparse_rounds": 6}, r"strategy\.sparse_rounds=6 .*at most 5"),
        ({"sparse_rounds": -1}, r"strategy\.sparse_rounds=-1: needed is at least 0"),
    ],
)
def test_bad_settings_are_named(more, field):
    with pytest.raises(ValueError, match=field):
        slora(RUN, **more)


def test_layers_of_other_ranks_need_a_density_of_their_own():
    """Places are drawn from the density: of as many as LoRA has, server and clients would have to know each layer's rank."""
    main = Lora(rank=3, targets=tuple(LAYERS), rank_pattern={"layer.0.query": 2})
    with pytest.raises(ValueError, match=r"adapter\.rank_pattern.*strategy\.density"):
        slora(RUN).adapters["sparse"](main)
    assert slora(RUN, density=0.4).adapters["sparse"](main) == Sparse(0.4, 3, tuple(LAYERS))


def test_an_adapter_that_is_no_plain_product_is_refused():
    strategy, pair = slora(RUN), {"q.A": torch.zeros(2, 3), "q.B": torch.zeros(4, 2)}
    sparse = {"q.values": torch.zeros(5)}
    for more, message in (({"q.magnitude": torch.ones(4)}, "DoRA"), ({"q.R": torch.zeros(2, 2)}, "core")):
        with pytest.raises(ValueError, match=rf"{message}.*adapter=lora"):
            strategy.init({"main": pair | more, "sparse": sparse})
    with pytest.raises(ValueError, match=r"low-rank pairs.*adapter=lora"):
        strategy.init({"main": {"head.weight": torch.zeros(2, 3)}, "sparse": sparse})
    with pytest.raises(ValueError, match=r"low-rank pairs.*adapter=lora"):
        strategy.adapters["sparse"](object())


def test_the_sum_over_clients_needs_their_examples(federation):
    """A client of nearly all weight decides where LoRA starts."""
    run = federation(slora(RUN, density=0.4, sparse_rounds=1))
    updates, _ = run.play((0, 1))
    run.take([Update(0, updates[0].tensors, 1e-9), Update(1, updates[1].tensors, 1.0)])
    layer = "layer.1.query"
    u, s, vt = torch.linalg.svd(dense(updates[1].tensors, layer))
    best = u[:, :3] * s[:3] @ vt[:3]
    got = run.state.model.tensors[f"{layer}.B"] @ run.state.model.tensors[f"{layer}.A"]
    assert torch.allclose(got, best, rtol=0, atol=1e-7)
