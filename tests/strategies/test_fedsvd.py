import pytest
import torch

from fedpeft.messages import Update
from strategies.fedsvd import fedsvd
from strategies.ffa import ffa_lora

pytestmark = pytest.mark.fast
LAYERS = ("layer.0.query", "layer.0.value", "layer.1.query")


def orthonormal(a: torch.Tensor, within: float = 1e-13) -> bool:
    return torch.allclose(a @ a.T, torch.eye(len(a), dtype=a.dtype), rtol=0, atol=within)


@pytest.mark.parametrize(("dtype", "within"), [(torch.float64, 1e-13), (torch.float32, 1e-6)])
def test_a_comes_down_with_orthonormal_rows_after_every_round(dtype, within, federation):
    run = federation(fedsvd(), dtype)
    for _ in range(4):
        run.take(run.play()[0])
        assert all(orthonormal(run.state.tensors[f"{layer}.A"], within) for layer in LAYERS)


def test_the_product_is_ffas(federation, distance, products):
    """FFA-LoRA is the same without the new factors: after one round the models agree."""
    one, other = federation(fedsvd()), federation(ffa_lora())
    for run in (one, other):
        run.take(run.play((0, 1, 3))[0])
    assert distance(products(one.state), products(other.state)) <= 1e-14


def test_the_product_of_a_round_is_the_mean_of_products_and_its_singular_values_lie_in_b(federation, distance, mean_of_products, products):
    run = federation(fedsvd())
    for _ in range(4):
        updates, trained = run.play((0, 1, 3))
        true = mean_of_products(updates, trained)
        run.take(updates)
        assert distance(products(run.state), true) <= 1e-14
        for layer in LAYERS:
            b = run.state.tensors[f"{layer}.B"]
            squares = torch.linalg.svdvals(true[layer])[:3].square()
            assert torch.allclose(b.T @ b, torch.diag(squares), rtol=0, atol=1e-12 * float(squares[0]))


def test_a_layer_keeps_its_a_to_the_bit_until_b_moves(federation):
    run = federation(fedsvd())
    before = {name: tensor.clone() for name, tensor in run.state.tensors.items()}
    updates, _ = run.play()
    still = [Update(u.client, u.tensors | {"layer.0.value.B": before["layer.0.value.B"]}, u.weight) for u in updates]
    run.take(still)
    for layer in LAYERS:
        assert torch.equal(run.state.tensors[f"{layer}.A"], before[f"{layer}.A"]) == (layer == "layer.0.value")


def test_factors_that_are_an_svd_already_stay_while_nobody_moves(federation):
    run = federation(fedsvd()).advance(2)
    before = {name: tensor.clone() for name, tensor in run.state.tensors.items()}
    run.take(run.play(by=0.0)[0])
    assert all(torch.allclose(run.state.tensors[name], tensor, rtol=0, atol=1e-12) for name, tensor in before.items())


def test_a_product_of_lower_rank_leaves_no_row_of_a_at_zero(federation):
    """Else that rank would never learn again."""
    run = federation(fedsvd())
    updates, _ = run.play()
    for update in updates:
        for layer in LAYERS:
            update.tensors[f"{layer}.B"][:, 1:] = 0
    run.take(updates)
    for layer in LAYERS:
        assert orthonormal(run.state.tensors[f"{layer}.A"])
        assert float(run.state.tensors[f"{layer}.B"][:, 1:].abs().max()) <= 1e-14


def test_clients_train_and_send_b_and_the_head_alone(federation):
    run = federation(fedsvd()).advance(1)
    updates, trained = run.play()
    assert {name[-2:] for update in updates for name in update.tensors if not name.startswith("head.")} == {".B"}
    assert "head.classifier.weight" in updates[0].tensors
    sent = run.strategy.broadcast(run.state, 1, 0).tensors
    assert all(torch.equal(trained[0][f"{layer}.A"], sent[f"{layer}.A"]) for layer in LAYERS)


def test_it_says_mean_only_as_all_clients_send_is_a_mean():
    assert fedsvd().mean_only


def test_an_adapter_without_pairs_is_refused():
    with pytest.raises(ValueError, match=r"low-rank pairs.*adapter=lora"):
        fedsvd().init({"main": {"head.weight": torch.zeros(2, 3)}})
