import math

import pytest
import torch
from torch.nn import functional as F

from fedpeft.adapters.bottleneck import Bottleneck

pytestmark = pytest.mark.fast
PLACES = {
    "bert": ["bert.encoder.layer.{}.attention.output.dense", "bert.encoder.layer.{}.output.dense"],
    "gpt2_classifier": ["transformer.h.{}.attn.c_proj", "transformer.h.{}.mlp.c_proj"],
    "gpt2": ["transformer.h.{}.attn.c_proj", "transformer.h.{}.mlp.c_proj"],
    "llama": ["model.layers.{}.self_attn.o_proj", "model.layers.{}.mlp.down_proj"],
    "vit": ["vit.layers.{}.attention.o_proj", "vit.layers.{}.mlp.fc2"],
}
each_kind = pytest.mark.parametrize("kind", PLACES)


@each_kind
def test_one_comes_after_each_attention_and_each_mlp(kind, tiny):
    adapted = Bottleneck(width=5).attach(tiny(kind), seed=0)
    places = {place.format(layer) for place in PLACES[kind] for layer in (0, 1)}
    shapes = {"down": (5, 24), "down_bias": (5,), "up": (24, 5), "up_bias": (24,)}
    expected = {f"{place}.{part}": shape for place in places for part, shape in shapes.items()}
    assert {name: tuple(t.shape) for name, t in adapted.read().items() if not name.startswith("head.")} == expected


@each_kind
def test_it_starts_as_the_base_and_its_gradient_does_not_vanish(kind, tiny, batch):
    base = tiny(kind)
    logits = base.module(**batch(base)).logits
    adapted = Bottleneck(width=5).attach(base, seed=0)
    assert torch.equal(adapted.logits(batch(base)), logits)
    chosen = adapted.select(lambda name: True)
    adapted.logits(batch(base)).square().sum().backward()
    for name, parameter in chosen.items():
        if name.endswith((".up", ".up_bias")):
            assert parameter.grad.abs().max() > 1e-6, name  # down follows as soon as up has moved
    with torch.no_grad():
        for parameter in chosen.values():
            parameter.sub_(0.1 * parameter.grad)
    adapted.select(lambda name: True)
    adapted.logits(batch(base)).square().sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in chosen.values())


def test_it_computes_h_plus_up_gelu_down(tiny, batch):
    base, slow = tiny("vit"), tiny("vit")
    adapted = Bottleneck(width=5).attach(base, seed=0)
    rng = torch.Generator().manual_seed(1)
    tensors = {name: torch.randn(t.shape, generator=rng).double() * 0.3 for name, t in adapted.read().items()}
    adapted.write(tensors)

    def after(path):
        parts = {part: tensors[f"{path}.{part}"] for part in ("down", "down_bias", "up", "up_bias")}
        return lambda module, inputs, h: h + F.gelu(h @ parts["down"].T + parts["down_bias"]) @ parts["up"].T + parts["up_bias"]

    for place in PLACES["vit"]:
        for layer in (0, 1):
            path = place.format(layer)
            slow.module.get_submodule(path).register_forward_hook(after(path))
    slow.module.classifier.weight.data = tensors["head.classifier.weight"]
    slow.module.classifier.bias.data = tensors["head.classifier.bias"]
    assert torch.allclose(adapted.logits(batch(base)), slow.module(**batch(base)).logits, atol=1e-10, rtol=0)


def test_down_is_uniform_within_one_over_the_root_of_its_inputs(tiny):
    down = Bottleneck(width=20).attach(tiny("vit"), seed=0).read()["vit.layers.0.mlp.fc2.down"]
    bound = 1 / math.sqrt(24)
    assert 0.95 * bound < down.abs().max() <= bound


def test_it_can_come_after_other_layers(tiny):
    adapted = Bottleneck(width=5, targets=("fc1", "layers.1.attention.v_proj")).attach(tiny("vit"), seed=0)
    assert {name.removesuffix(".up") for name in adapted.parameters if name.endswith(".up")} == {
        "vit.layers.0.mlp.fc1", "vit.layers.1.mlp.fc1", "vit.layers.1.attention.v_proj",
    }  # fmt: skip
    assert adapted.read()["vit.layers.0.mlp.fc1.up"].shape == (40, 5)


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (Bottleneck(targets=("fc1", "c1")), r"adapter\.targets: no layer's name ends in c1; there are .*vit\.layers\.0\.mlp\.fc1"),
        (Bottleneck(targets=("classifier",)), r"no layer's name ends in classifier"),  # the head is trained whole
        (Bottleneck(width=0), r"adapter\.width=0: needed is at least 1"),
    ],
)
def test_what_does_not_fit_the_model_is_said_and_nothing_is_hooked(adapter, message, tiny):
    base = tiny("vit")
    with pytest.raises(ValueError, match=message):
        adapter.attach(base, seed=0)
    assert not any(inner._forward_hooks for inner in base.module.modules())


def test_on_a_half_precision_base_it_is_kept_in_single_precision(tiny, batch):
    base = tiny("llama", torch.bfloat16)
    adapted = Bottleneck(width=5).attach(base, seed=0)
    assert {tensor.dtype for tensor in adapted.read().values()} == {torch.float32}
    logits = adapted.logits(batch(base))
    assert logits.dtype == torch.bfloat16
    logits.float().sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for name, parameter in adapted.parameters.items() if name.endswith(".up"))
