import pytest
import torch

from fedpeft.adapters.bottleneck import Bottleneck
from fedpeft.adapters.inplace import InPlace
from fedpeft.adapters.load import load_adapter
from fedpeft.adapters.lora import Lora
from fedpeft.adapters.visual_prompt import VisualPrompt

pytestmark = pytest.mark.fast
OURS = [InPlace("head"), InPlace("bias"), InPlace("full"), Bottleneck(width=5), VisualPrompt(tokens=3)]


@pytest.mark.parametrize("adapter", OURS, ids=str)
def test_our_own_format_is_loaded_into_the_same_adapter(adapter, tiny, batch, tmp_path):
    one, two = (adapter.attach(tiny("vit"), seed=seed) for seed in (0, 1))
    rng = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(tensor.shape, generator=rng).double() for name, tensor in one.read().items()}
    one.export(tensors, tmp_path / "adapter")
    load_adapter(tmp_path / "adapter", two)
    loaded = two.read()
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    assert torch.equal(one.logits(batch(one.base)), two.logits(batch(two.base)))


def test_a_folder_without_an_adapter_is_refused(tiny, tmp_path):
    adapted = Bottleneck(width=5).attach(tiny("vit"), seed=0)
    with pytest.raises(ValueError, match=r"has no adapter\.safetensors; give the adapter/ folder of a run"):
        load_adapter(tmp_path, adapted)
    (tmp_path / "adapter.safetensors").write_bytes(b"not safetensors at all")
    with pytest.raises(ValueError, match=r"cannot be read: .*export the adapter again"):
        load_adapter(tmp_path, adapted)


def test_another_adapters_tensors_are_refused(tiny, tmp_path):
    adapted = Bottleneck(width=5).attach(tiny("vit"), seed=0)
    InPlace("head").attach(tiny("vit"), seed=0).export({}, tmp_path)
    with pytest.raises(ValueError, match=r"lacks vit\.layers\.0.*attach the adapter and the model it was exported from"):
        load_adapter(tmp_path, adapted)
    InPlace("full").attach(tiny("vit"), seed=0).export({}, tmp_path)
    with pytest.raises(ValueError, match=r"is not a tensor of this adapter"):
        load_adapter(tmp_path, InPlace("head").attach(tiny("vit"), seed=0))


def test_pefts_format_is_left_to_peft(tiny, tmp_path):
    adapted = Lora(rank=4).attach(tiny("vit"), seed=0)
    adapted.export({}, tmp_path)
    with pytest.raises(ValueError, match=r"is in peft's format: load it by peft\.PeftModel\.from_pretrained"):
        load_adapter(tmp_path, adapted)
