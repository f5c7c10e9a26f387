import pytest
import torch

from fedpeft.tensors import everything, is_a, is_b, is_head, is_own, nbytes, norm, not_a, not_b, nothing, only, targets

pytestmark = pytest.mark.fast
NAMES = ["layer.0.query.A", "layer.0.query.B", "layer.1.value.A", "layer.1.value.B", "head.weight", "control/layer.0.query.A"]


@pytest.mark.parametrize(
    ("predicate", "chosen"),
    [
        (everything, {0, 1, 2, 3, 4, 5}),
        (nothing, set()),
        (is_a, {0, 2, 5}),
        (is_b, {1, 3}),
        (not_a, {1, 3, 4}),
        (not_b, {0, 2, 4, 5}),
        (is_head, {4}),
        (is_own, {5}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_predicate_chooses_these_names(predicate, chosen):
    assert {index for index, name in enumerate(NAMES) if predicate(name)} == chosen


def test_a_layer_that_merely_ends_in_a_letter_is_no_factor():
    assert not is_a("layerA")
    assert not is_b("head.B.weight")
    assert not is_head("layer.head.weight")


def test_only_keeps_the_order_and_the_very_tensors():
    tensors = {name: torch.zeros(1) for name in NAMES}
    chosen = only(tensors, is_a)
    assert list(chosen) == ["layer.0.query.A", "layer.1.value.A", "control/layer.0.query.A"]
    assert chosen["layer.0.query.A"] is tensors["layer.0.query.A"]
    assert list(tensors) == NAMES


def test_targets_are_the_layers_with_a_pair_sorted():
    assert targets(reversed(NAMES)) == ["layer.0.query", "layer.1.value"]
    assert targets(["head.weight"]) == []


def test_bytes_are_those_of_each_dtype():
    tensors = {
        "a": torch.zeros(3, 2),
        "b": torch.zeros(5, dtype=torch.bfloat16),
        "c": torch.zeros(0, 4),
        "d": torch.tensor(1, dtype=torch.int64),
    }
    assert nbytes(tensors) == 3 * 2 * 4 + 5 * 2 + 0 + 8
    assert nbytes({}) == 0


def test_the_norm_goes_over_all_tensors():
    assert norm({"a": torch.tensor([[3.0, 0.0]]), "b": torch.tensor(4), "c": torch.zeros(0)}) == 5
    assert norm({}) == 0


def test_the_norm_is_summed_in_float64():
    many = torch.full((3000,), 1e-3)
    assert norm({"big": torch.tensor([4096.0]), "many": many}) > norm({"big": torch.tensor([4096.0])})  # float32 would lose the small ones
    assert norm({"half": torch.full((4,), 300.0, dtype=torch.float16)}) == 600  # 300^2 overflows float16
