import pytest
import torch

from fedpeft.adapters.ravan import Ravan
from fedpeft.tensors import targets

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("kind", ["gpt2", "llama", "vit"])
def test_the_factors_of_all_heads_together_are_orthonormal(kind, tiny):
    tensors = Ravan(rank=2, heads=3).attach(tiny(kind), seed=0).read()
    eye = torch.eye(6, dtype=torch.float64)
    for layer in targets(tensors):
        assert torch.allclose(tensors[f"{layer}.A"] @ tensors[f"{layer}.A"].T, eye, atol=1e-14, rtol=0)
        assert torch.allclose(tensors[f"{layer}.B"].T @ tensors[f"{layer}.B"], eye, atol=1e-14, rtol=0)
        assert torch.equal(tensors[f"{layer}.H"], torch.zeros(3, 2, 2, dtype=torch.float64))
        assert torch.equal(tensors[f"{layer}.s"], torch.ones(3, dtype=torch.float64))


def test_each_head_has_its_own_part_of_the_factors_and_its_own_scale(tiny, batch):
    """The sum over heads as the paper writes it, layer by layer."""
    adapted = Ravan(rank=2, heads=3, targets=("query",)).attach(tiny("bert"), seed=0)
    rng = torch.Generator().manual_seed(0)
    adapted.write({name: torch.randn(t.shape, generator=rng, dtype=t.dtype) for name, t in adapted.read().items()})
    wrapped = adapted.base.module.bert.encoder.layer[0].attention.self.query
    x = torch.randn(5, 24, generator=rng, dtype=torch.float64)
    want = wrapped.base_layer(x)
    for head in range(3):
        part = slice(2 * head, 2 * head + 2)
        want = want + wrapped.s[head] * x @ wrapped.A[part].T @ wrapped.H[head].T @ wrapped.B[:, part].T
    assert torch.allclose(wrapped(x), want, atol=1e-12, rtol=0)


def test_a_capped_layer_gives_every_head_the_rank_it_has(tiny):
    """Llama's keys and values have 12 rows: three heads of rank 4."""
    tensors = Ravan(rank=6, heads=3, capped=True).attach(tiny("llama"), seed=0).read()
    ranks = {layer.rpartition(".")[2]: tuple(tensors[f"{layer}.H"].shape) for layer in targets(tensors)}
    assert ranks["k_proj"] == ranks["v_proj"] == (3, 4, 4)
    assert ranks["q_proj"] == ranks["down_proj"] == (3, 6, 6)
