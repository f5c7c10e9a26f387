import pytest
import torch

from fedpeft.codecs.base import layout
from fedpeft.codecs.topk import TopK

pytestmark = pytest.mark.fast


def back(codec: TopK, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return codec.decode(codec.encode(tensors), layout(tensors))


@pytest.mark.parametrize("values", ["fp32", "fp16", "bf16"])
def test_the_largest_keep_their_values(values):
    kind = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[values]
    x = torch.randn(40, 50, generator=torch.Generator().manual_seed(0))
    top = x.abs().reshape(-1).topk(100).indices
    want = torch.zeros(2000)
    want[top] = x.reshape(-1)[top].to(kind).float()
    assert torch.equal(back(TopK(0.05, values), {"w": x})["w"], want.reshape(40, 50))


def test_the_scope_is_all_tensors_or_each():
    tensors = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([10.0, -20.0])}
    assert {name: t.tolist() for name, t in back(TopK(0.5), tensors).items()} == {"a": [0, 0], "b": [10, -20]}
    assert {name: t.tolist() for name, t in back(TopK(0.5, scope="tensor"), tensors).items()} == {"a": [0, 2], "b": [0, -20]}


def test_the_size_is_values_and_a_support():
    x = {"w": torch.randn(100_000, generator=torch.Generator().manual_seed(0))}
    assert len(TopK(0.1).encode(x)) == pytest.approx(10_000 * 4 + 100_000 * 0.473 / 8, rel=0.01)
    assert len(TopK(0.1, "fp16").encode(x)) == pytest.approx(10_000 * 2 + 100_000 * 0.473 / 8, rel=0.01)


@pytest.mark.parametrize(("field", "value"), [("density", 2), ("values", "fp8"), ("scope", "row")])
def test_a_setting_that_cannot_be_is_refused_by_its_name(field, value):
    with pytest.raises(ValueError, match=rf"^{field}={value}"):
        TopK(**{field: value})


@pytest.mark.parametrize("density", [0.05, 0.1, 0.2])
def test_a_payload_is_within_one_percent_of_its_entropy(density):
    tensors = {name: torch.randn(200_000, generator=torch.Generator().manual_seed(k)) * 2**k for k, name in enumerate("abc")}
    codec = TopK(density)
    data = codec.encode(tensors)
    assert 1 < 8 * len(data) / codec.entropy(codec.decode(data, layout(tensors))) < 1.01
