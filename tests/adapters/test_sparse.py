import pytest
import torch

from clients.train import Job, train
from fedpeft.adapters.sparse import Sparse, support
from fedpeft.config import Training
from fedpeft.messages import Broadcast
from fedpeft.models.score import losses
from fedpeft.strategy import Phase

pytestmark = pytest.mark.fast


def places(adapted):
    return {name.removesuffix(".values"): adapted.base.module.get_submodule(name.removesuffix(".values")).places
            for name in adapted.parameters if name.endswith(".values")}  # fmt: skip


def test_all_clients_of_a_run_draw_the_same_places_and_another_run_draws_others(tiny):
    """Whatever the global generator did before; and each layer has places of its own, though two have one shape."""
    one = places(Sparse(density=0.2).attach(tiny("bert"), seed=3))
    torch.manual_seed(99)
    two, other = (places(Sparse(density=0.2).attach(tiny("bert"), seed=seed)) for seed in (3, 4))
    assert one.keys() == two.keys() == other.keys()
    assert all(torch.equal(one[layer], two[layer]) for layer in one)
    assert not any(torch.equal(one[layer], other[layer]) for layer in one)
    assert not torch.equal(one["bert.encoder.layer.0.attention.self.query"], one["bert.encoder.layer.0.attention.self.key"])


def test_the_places_are_those_that_the_server_makes_from_seed_and_name(tiny):
    adapter = Sparse(like=3)
    for layer, found in places(adapter.attach(tiny("gpt2"), seed=5)).items():
        m, n = {"c_attn": (72, 24), "c_fc": (40, 24)}.get(layer.rpartition(".")[2], (24, 40) if "mlp" in layer else (24, 24))
        assert torch.equal(found, support(5, layer, (m, n), adapter.of((m, n))))
        assert found.max() < m * n


def test_places_are_distinct_sorted_and_as_many_as_the_density_says():
    found = support(0, "layer", (300, 200), 0.1)
    assert torch.equal(found, found.unique())
    assert abs(len(found) - 6000) < 4 * (60000 * 0.1 * 0.9) ** 0.5
    quarters = torch.bincount(found * 4 // 60000)
    assert (quarters - 1500).abs().max() < 4 * (15000 * 0.1 * 0.9) ** 0.5


def test_a_density_so_small_that_no_place_is_drawn_leaves_one():
    assert support(0, "layer", (3, 2), 1e-9).shape == (1,)


def test_density_one_is_the_whole_matrix():
    assert torch.equal(support(0, "layer", (3, 2), 1.0), torch.arange(6))


def test_without_a_density_there_are_as_many_values_as_lora_has_entries():
    assert Sparse(like=2).of((40, 24)) == 2 * 64 / 960
    assert Sparse(like=16).of((24, 24)) == 1.0  # LoRA would have more entries than the matrix
    assert Sparse(density=0.5, like=2).of((40, 24)) == 0.5


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "vit"])
def test_a_gradient_step_on_the_whole_matrix_is_minus_the_gradient_of_the_weight(kind, tiny, examples):
    base = tiny(kind)
    rows, data = torch.tensor([0, 2, 3, 7, 9]), examples(base)
    inputs, targets = data.batch(rows)
    base.module.requires_grad_(True)
    losses(base.task, base.module(**inputs).logits, targets).mean().backward()
    gradients = {path: inner.weight.grad.clone() for path, inner in base.module.named_modules() if hasattr(inner, "weight")}
    base.module.requires_grad_(False)
    base.module.zero_grad()
    adapted = Sparse(density=1.0).attach(base, seed=0)
    job = Job(0, Broadcast(adapted.read()), rows, Training(batch=2), torch.Generator())
    update, _ = train(adapted, Phase(work="gradient"), data, job, round=0)
    found = [name for name in update.tensors if name.endswith(".values")]
    for name in found:
        gradient = gradients[name.removesuffix(".values")]
        want = -(gradient.T if kind == "gpt2" else gradient).flatten()
        assert torch.allclose(update.tensors[name], want, atol=1e-14, rtol=1e-12), name
    assert len(found) == {"bert": 13, "gpt2": 8, "llama": 14, "vit": 12}[kind]
