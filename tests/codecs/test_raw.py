import pytest
import torch

from fedpeft.codecs.base import layout
from fedpeft.codecs.raw import Half, Raw

pytestmark = pytest.mark.fast


def test_raw_bytes_are_the_little_endian_values_in_the_order_of_names():
    tensors = {"b": torch.tensor([1, 256], dtype=torch.int16), "a": torch.tensor([1.0])}
    assert Raw().encode(tensors) == b"\x00\x00\x80\x3f" + b"\x01\x00\x00\x01"


def test_half_halves_floats_and_leaves_integers():
    assert len(Half().encode({"a": torch.zeros(10), "b": torch.zeros(3, dtype=torch.int32)})) == 20 + 12


@pytest.mark.parametrize(("kind", "most"), [("fp16", 65504.0), ("bf16", 3.3895313892515355e38)])
def test_an_entry_too_large_for_half_becomes_the_largest_and_stays_finite(kind, most):
    tensors = {"a": torch.tensor([1e300, -1e300, 1.0], dtype=torch.float64)}
    assert Half(kind).decode(Half(kind).encode(tensors), layout(tensors))["a"].tolist() == [most, -most, 1.0]


@pytest.mark.parametrize("kind", ["fp16", "bf16"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_not_made_finite_unseen(kind, bad):
    tensors = {"a": torch.tensor([bad])}
    back = Half(kind).decode(Half(kind).encode(tensors), layout(tensors))["a"]
    assert torch.equal(back, tensors["a"]) or (bad != bad and back.isnan().all())


@pytest.mark.parametrize(("kind", "dtype"), [("bf16", torch.float16), ("fp16", torch.bfloat16)])
def test_the_largest_of_one_half_stays_finite_through_the_other(kind, dtype):
    """65504 is 65536 in bf16, which fp16 does not have; and the other way round."""
    tensors = {"a": torch.tensor([torch.finfo(dtype).max, 65504.0], dtype=dtype)}
    assert Half(kind).decode(Half(kind).encode(tensors), layout(tensors))["a"].tolist() in ([65504.0, 65504.0], [65536.0, 65536.0])


def test_a_kind_of_half_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match=r"^dtype=fp8"):
        Half("fp8")
