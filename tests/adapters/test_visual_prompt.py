import pytest
import torch

from fedpeft.adapters.visual_prompt import VisualPrompt

pytestmark = pytest.mark.fast


def test_each_block_sees_the_prompt_and_the_logits_keep_their_shape(tiny, batch):
    base = tiny("vit")
    adapted = VisualPrompt(tokens=3).attach(base, seed=0)
    seen = {}
    for layer, block in enumerate(base.module.vit.layers):
        block.attention.register_forward_hook(lambda module, inputs, out, layer=layer: seen.update({layer: out[0].shape}))
    assert adapted.logits(batch(base)).shape == (6, 3)
    assert seen == {0: (6, 5 + 3, 24), 1: (6, 5 + 3, 24)}  # the class token, four patches, three prompts
    assert {name: tuple(tensor.shape) for name, tensor in adapted.read().items()} == {
        "vit.layers.0.prompt": (3, 24),
        "vit.layers.1.prompt": (3, 24),
        "head.classifier.weight": (3, 24),
        "head.classifier.bias": (3,),
    }


def test_it_computes_what_blocks_on_longer_rows_compute(tiny, batch):
    base, slow = tiny("vit"), tiny("vit").module
    adapted = VisualPrompt(tokens=3).attach(base, seed=0)
    rng = torch.Generator().manual_seed(1)
    tensors = {name: torch.randn(t.shape, generator=rng).double() for name, t in adapted.read().items()}
    adapted.write(tensors)
    with torch.no_grad():
        hidden = slow.vit.embeddings(batch(base)["pixel_values"])
        for layer, block in enumerate(slow.vit.layers):
            rows = torch.stack([torch.cat([row, tensors[f"vit.layers.{layer}.prompt"]]) for row in hidden])
            hidden = block(rows)[:, :5]
        first = slow.vit.layernorm(hidden)[:, 0]
        expected = first @ tensors["head.classifier.weight"].T + tensors["head.classifier.bias"]
        assert torch.allclose(adapted.logits(batch(base)), expected, atol=1e-10, rtol=0)


def test_prompts_start_small_and_have_a_gradient(tiny, batch):
    base = tiny("vit")
    adapted = VisualPrompt(tokens=40).attach(base, seed=0)
    prompts = torch.cat([tensor.flatten() for name, tensor in adapted.read().items() if name.endswith(".prompt")])
    assert prompts.std() == pytest.approx(0.02, rel=0.05)
    adapted.logits(batch(base)).square().sum().backward()
    assert all(parameter.grad.any() for name, parameter in adapted.parameters.items() if name.endswith(".prompt"))


def test_on_a_half_precision_base_they_are_kept_in_single_precision(tiny, batch):
    base = tiny("vit", torch.bfloat16)
    adapted = VisualPrompt(tokens=3).attach(base, seed=0)
    assert adapted.read()["vit.layers.0.prompt"].dtype == torch.float32
    assert adapted.logits(batch(base)).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_texts_are_refused(kind, tiny):
    with pytest.raises(ValueError, match=r"needs a vision transformer \(model=tiny_vit\); for texts use adapter=prompt"):
        VisualPrompt().attach(tiny(kind), seed=0)


def test_no_tokens_are_refused(tiny):
    with pytest.raises(ValueError, match=r"adapter\.tokens=0: needed is at least 1"):
        VisualPrompt(tokens=0).attach(tiny("vit"), seed=0)
