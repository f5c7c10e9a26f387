import pytest
import torch

import fedpeft.lowrank
from fedpeft.adapters.lora import Lora
from fedpeft.adapters.lora_sb import LoraSB
from fedpeft.tensors import targets

pytestmark = pytest.mark.fast
each_kind = pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "vit"])
each_start = pytest.mark.parametrize("start", ["random", "xs"])


@each_start
@each_kind
def test_both_factors_are_orthonormal_and_the_core_is_zero(kind, start, tiny):
    tensors = LoraSB(rank=5, start=start).attach(tiny(kind), seed=0).read()
    eye = torch.eye(5, dtype=torch.float64)
    for layer in targets(tensors):
        assert torch.allclose(tensors[f"{layer}.A"] @ tensors[f"{layer}.A"].T, eye, atol=1e-13, rtol=0)
        assert torch.allclose(tensors[f"{layer}.B"].T @ tensors[f"{layer}.B"], eye, atol=1e-13, rtol=0)
        assert torch.equal(tensors[f"{layer}.R"], torch.zeros(5, 5, dtype=torch.float64))


@each_kind
def test_xs_takes_the_leading_singular_vectors_of_the_frozen_weight(kind, tiny):
    """Between orthonormal factors the weight is diagonal and holds its largest singular values: only singular vectors do that."""
    base = tiny(kind)
    weights = {path: inner.weight.T if kind == "gpt2" else inner.weight for path, inner in base.module.named_modules()
               if type(inner).__name__ in ("Linear", "Conv1D")}  # fmt: skip
    tensors = LoraSB(rank=5, start="xs").attach(base, seed=0).read()
    for layer in targets(tensors):
        B, A = tensors[f"{layer}.B"], tensors[f"{layer}.A"]
        values = torch.linalg.svdvals(weights[layer])[:5]
        assert torch.allclose(B.T @ weights[layer] @ A.T, torch.diag(values), atol=1e-13, rtol=0)
        assert all(column[column.abs().argmax()] > 0 for column in B.T)  # one sign of two, so that equal weights give equal bits


def test_xs_asks_no_seed_and_random_asks_nothing_else(tiny):
    ends = {
        (start, seed): LoraSB(rank=3, start=start).attach(tiny("vit"), seed=seed).read() for start in ("random", "xs") for seed in (0, 1)
    }
    same = {start: all(torch.equal(ends[start, 0][name], ends[start, 1][name]) for name in ends[start, 0]) for start in ("random", "xs")}
    assert same == {"random": False, "xs": True}


@pytest.mark.parametrize("lost", [24, 22], ids=["zero", "of rank two"])
def test_xs_of_a_weight_of_lower_rank_is_orthonormal_too(lost, tiny):
    base = tiny("bert")
    weight = base.module.bert.encoder.layer[0].attention.self.query.weight.data
    weight[24 - lost :] = 0.0
    tensors = LoraSB(rank=5, start="xs", targets=("query",)).attach(base, seed=0).read()
    layer = "bert.encoder.layer.0.attention.self.query"
    eye = torch.eye(5, dtype=torch.float64)
    assert torch.allclose(tensors[f"{layer}.A"] @ tensors[f"{layer}.A"].T, eye, atol=1e-13, rtol=0)
    assert torch.allclose(tensors[f"{layer}.B"].T @ tensors[f"{layer}.B"], eye, atol=1e-13, rtol=0)


def test_xs_of_a_large_weight_comes_near_and_is_orthonormal_all_the_same(tiny, monkeypatch):
    """Beyond `WHOLE` by a randomized SVD: its directions are drawn, but alike on every machine."""
    monkeypatch.setattr(fedpeft.lowrank, "WHOLE", 10)
    one, two = (LoraSB(rank=3, start="xs", targets=("fc1",)).attach(tiny("vit"), seed=0) for _ in range(2))
    tensors, eye = one.read(), torch.eye(3, dtype=torch.float64)
    for layer in targets(tensors):
        B, A = tensors[f"{layer}.B"], tensors[f"{layer}.A"]
        assert torch.equal(B, two.read()[f"{layer}.B"])
        assert torch.allclose(A @ A.T, eye, atol=1e-13, rtol=0)
        assert torch.allclose(B.T @ B, eye, atol=1e-13, rtol=0)
        weight = one.base.module.get_submodule(layer).base_layer.weight
        assert torch.allclose(B.T @ weight @ A.T, torch.diag(torch.linalg.svdvals(weight)[:3]), atol=1e-4, rtol=0)


@each_start
def test_a_capped_layer_gets_the_rank_it_has(start, tiny):
    """Llama's keys and values have 12 rows."""
    tensors = LoraSB(rank=16, start=start, capped=True).attach(tiny("llama"), seed=0).read()
    ranks = {layer.rpartition(".")[2]: tuple(tensors[f"{layer}.R"].shape) for layer in targets(tensors)}
    assert ranks["k_proj"] == ranks["v_proj"] == (12, 12)
    assert ranks["q_proj"] == ranks["up_proj"] == (16, 16)


@pytest.mark.parametrize(("kind", "small"), [("llama", ("k_proj", "v_proj")), ("gpt2", ())])
def test_a_capped_lora_has_the_ranks_of_a_capped_core(kind, small, tiny):
    core = LoraSB(rank=16, capped=True).attach(tiny(kind), seed=0).read()
    adapted = Lora(rank=16, alpha=16, capped=True).attach(tiny(kind), seed=0)
    lora = adapted.read()
    assert targets(core) == targets(lora)
    for layer in targets(core):
        assert lora[f"{layer}.A"].shape == core[f"{layer}.A"].shape
        assert lora[f"{layer}.B"].shape == core[f"{layer}.B"].shape
        assert adapted.scales[f"{layer}.B"] == 16 / (12 if layer.endswith(small or "none") else 16)


def test_another_start_than_there_is_is_refused():
    with pytest.raises(ValueError, match=r"adapter\.start=svd: needed is random or xs"):
        LoraSB(start="svd")
