import pytest
import torch

from fedpeft.adapters.lora import Lora
from fedpeft.adapters.lora_sb import LoraSB
from fedpeft.adapters.ravan import Ravan
from fedpeft.lowrank import product
from strategies.ravan import fold, ravan

pytestmark = pytest.mark.fast
LAYERS = ("layer.0.query", "layer.0.value", "layer.1.query")


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_scales_go_up_inside_the_heads():
    heads, scales = drawn(2, 3, 3), torch.tensor([0.5, -2.0], dtype=torch.float64)
    sent = fold({"q.H": heads, "q.s": scales, "head.bias": scales}, {}, 5)
    assert torch.equal(sent["q.H"], torch.stack([0.5 * heads[0], -2.0 * heads[1]]))
    assert torch.equal(sent["head.bias"], scales)


def test_a_folded_client_is_the_client_that_trained(federation):
    run = federation(ravan(heads=2)).advance(1)
    updates, trained = run.play((0,))
    start = run.start(0)
    for layer in LAYERS:
        assert torch.allclose(product(start | updates[0].tensors, layer).dense(), product(trained[0], layer).dense(), rtol=0, atol=1e-12)


def test_the_mean_of_folded_heads_is_the_mean_of_the_clients_changes(federation):
    """sum_i B_i (sum_k p_k s_ki H_ki) A_i, for any weights; the mean of s times the mean of H would be another."""
    run = federation(ravan(heads=2)).advance(1)
    updates, trained = run.play((0, 1, 3))  # of weight 1, 2 and 4
    want = {layer: sum((k + 1) / 7 * product(trained[k], layer).dense() for k in (0, 1, 3)) for layer in LAYERS}
    apart = {}
    for layer in LAYERS:
        middle = {f"{layer}.{part}": sum((k + 1) / 7 * trained[k][f"{layer}.{part}"] for k in (0, 1, 3)) for part in ("H", "s")}
        apart[layer] = product(trained[0] | middle, layer).dense()
    run.take(updates)
    for layer in LAYERS:
        assert torch.allclose(product(run.state.tensors, layer).dense(), want[layer], rtol=0, atol=1e-12)
        assert not torch.allclose(apart[layer], want[layer], rtol=0, atol=1e-2)


def test_heads_and_the_task_head_are_all_that_travels_and_scales_start_at_one_again(federation):
    run = federation(ravan(heads=2))
    for _ in range(3):
        updates, trained = run.play()
        assert {name[-2:] for update in updates for name in update.tensors if not name.startswith("head.")} == {".H"}
        assert any(not torch.equal(trained[0][f"{layer}.s"], torch.ones(2, dtype=torch.float64)) for layer in LAYERS)
        run.take(updates)
        assert all(torch.equal(run.state.tensors[f"{layer}.s"], torch.ones(2, dtype=torch.float64)) for layer in LAYERS)


def test_b_and_a_are_orthonormal_over_all_heads_and_never_move(federation):
    run = federation(ravan(heads=2))
    before = {name: tensor.clone() for name, tensor in run.state.tensors.items() if name[-2:] in (".A", ".B")}
    run.advance(3)
    for layer in LAYERS:
        a, b = run.state.tensors[f"{layer}.A"], run.state.tensors[f"{layer}.B"]
        eye = torch.eye(len(a), dtype=a.dtype)
        assert torch.allclose(a @ a.T, eye, rtol=0, atol=1e-13)
        assert torch.allclose(b.T @ b, eye, rtol=0, atol=1e-13)
    assert all(torch.equal(run.state.tensors[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "vit"])
def test_the_model_starts_unchanged(kind, tiny, batch):
    base = tiny(kind)
    want = base.module(**batch(base)).logits
    adapted = ravan(heads=2).adapters["heads"](Lora(rank=3)).attach(base, 0)
    assert torch.equal(adapted.logits(batch(base)), want)


def test_heads_have_twice_the_rank_of_lora_or_what_is_asked():
    main = Lora(rank=5, targets=("query",))
    assert ravan(heads=3).adapters["heads"](main) == Ravan(10, 3, ("query",), capped=True)
    assert ravan(rank=7).adapters["heads"](main) == Ravan(7, 4, ("query",), capped=False)
    assert ravan().adapters["heads"](LoraSB(rank=5)).rank == 10


def test_head_ranks_are_those_of_all_heads_together(federation):
    """Four heads of rank r have the parameters of a core of rank 2 r, and the rank 4 r."""
    run = federation(ravan(rank=1, heads=4))
    heads = run.state.tensors["layer.1.query.H"]
    assert heads.shape == (4, 1, 1)
    assert len(run.state.tensors["layer.1.query.A"]) == 4


@pytest.mark.parametrize("more", [{"rank": 0}, {"rank": -2}, {"heads": 0}])
def test_bad_settings_are_named(more):
    ((field, value),) = more.items()
    with pytest.raises(ValueError, match=rf"strategy\.{field}={value}: .*at least 1"):
        ravan(**more)


def test_an_adapter_without_a_rank_is_refused():
    with pytest.raises(ValueError, match=r"strategy=ravan.*adapter=lora"):
        ravan().adapters["heads"](object())
