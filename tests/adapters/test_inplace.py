import pytest
import torch
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from fedpeft.adapters.inplace import InPlace
from fedpeft.models.base import Base

pytestmark = pytest.mark.fast


def size(adapted):
    return sum(tensor.numel() for tensor in adapted.read().values())


def test_the_head_alone_is_its_weight_and_bias(tiny):
    adapted = InPlace("head").attach(tiny("vit"), seed=0)
    assert {name: tuple(tensor.shape) for name, tensor in adapted.read().items()} == {
        "head.classifier.weight": (3, 24),
        "head.classifier.bias": (3,),
    }


def test_bias_is_every_bias_once_and_the_head(tiny):
    adapted = InPlace("bias").attach(tiny("vit"), seed=0)
    layer = 4 * 24 + 2 * 24 + 40 + 24  # q, k, v, output; two norms; MLP in and out
    assert size(adapted) == 2 * layer + 24 + 24 + (24 * 3 + 3)  # patches, last norm, head
    assert all(name.endswith(".bias") for name in adapted.read() if not name.startswith("head."))


def test_fedpefts_counts_for_vit_b_16_with_100_classes():
    with torch.device("meta"):
        module = ViTForImageClassification(ViTConfig(num_labels=100))
    base = Base(module, "image", ("classifier.weight", "classifier.bias"), lambda table: table, "nowhere")
    for trains, count in {"head": 76_900, "bias": 179_812, "full": 85_875_556}.items():
        adapted = InPlace(trains).attach(base, seed=0)
        assert sum(parameter.numel() for parameter in adapted.parameters.values()) == count
        adapted.undo()


def test_full_is_every_parameter_a_tied_one_once(tiny):
    base = tiny("gpt2")
    adapted = InPlace("full").attach(base, seed=0)
    assert adapted.read().keys() == dict(base.module.named_parameters()).keys()
    assert "lm_head.weight" not in adapted.parameters  # it is transformer.wte.weight


def test_the_head_starts_afresh(tiny):
    base = tiny("vit")
    nn.init.zeros_(base.module.classifier.weight)
    assert torch.equal(InPlace("head").attach(base, seed=0).read()["head.classifier.weight"], base.start["classifier.weight"])
    assert base.module.classifier.weight.any()


@pytest.mark.parametrize(("kind", "trains"), [("llama", "bias"), ("llama", "head"), ("llama", "biases")])
def test_nothing_to_train_is_refused(kind, trains, tiny):
    with pytest.raises(ValueError, match=rf"adapter\.trains={trains}: this LlamaForCausalLM has no {trains} to train; choose adapter=lora"):
        InPlace(trains).attach(tiny(kind), seed=0)


def test_a_classifier_without_biases_does_not_turn_into_a_head_alone(tiny):
    base = tiny("gpt2_classifier")
    for _, inner in base.module.named_modules():
        if getattr(inner, "bias", None) is not None:
            inner.bias = None
    with pytest.raises(ValueError, match="has no bias to train"):
        InPlace("bias").attach(base, seed=0)
