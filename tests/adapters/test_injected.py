import json

import peft
import pytest
import torch

from fedpeft.adapters.lora import Lora
from fedpeft.adapters.tuner import Tuner

pytestmark = [
    pytest.mark.fast,
    # stock peft loading an adapter: nothing that we call
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]
LINEAR = {"target_modules": "all-linear"}


def test_a_prompt_trains_the_head_in_place(tiny, batch):
    base = tiny("bert")
    adapted = Tuner("PROMPT_TUNING", {"num_virtual_tokens": 3}).attach(base, seed=0)
    assert list(adapted.parameters) == ["prompt_encoder.embedding.weight", "head.classifier.weight", "head.classifier.bias"]
    adapted.select(lambda name: True)
    adapted.logits(batch(base)).square().sum().backward()
    assert all(parameter.grad.any() for parameter in adapted.parameters.values())
    assert adapted.parameters["head.classifier.weight"] is base.module.classifier.weight


def test_a_prompt_stands_before_the_text_and_has_no_logits(tiny, batch):
    base = tiny("llama")
    adapted = Tuner("PROMPT_TUNING", {"num_virtual_tokens": 3}).attach(base, seed=0)
    inputs = batch(base)
    embedded = base.module.get_input_embeddings()(inputs["input_ids"])
    prompt = adapted.read()["prompt_encoder.embedding.weight"].to(embedded.dtype).expand(6, -1, -1)
    mask = torch.cat([torch.ones(6, 3, dtype=torch.long), inputs["attention_mask"]], 1)
    slow = base.module(inputs_embeds=torch.cat([prompt, embedded], 1), attention_mask=mask).logits[:, 3:]
    assert torch.allclose(adapted.logits(inputs), slow, atol=1e-10)


def test_adaloras_count_of_ranks_is_not_trained(tiny):
    for dtype in (torch.float32, torch.float64):  # in float64, as on a GPU, peft's move makes it a trained parameter
        adapted = Tuner("ADALORA", {**LINEAR, "init_r": 4}).attach(tiny("llama", dtype), seed=0)
        assert {key.rpartition(".")[2] for key in adapted.parameters} == {"lora_A", "lora_B", "lora_E"}


def test_more_modules_can_be_trained_whole(tiny, batch, tmp_path):
    base = tiny("vit")
    adapted = Tuner("LORA", {**LINEAR, "r": 4, "modules_to_save": ["vit.layernorm"]}).attach(base, seed=0)
    assert {"vit.layernorm.weight", "vit.layernorm.bias", "head.classifier.bias"} < adapted.parameters.keys()
    adapted.export({key: tensor + 0.1 for key, tensor in adapted.read().items()}, tmp_path)
    stock = peft.PeftModel.from_pretrained(tiny("vit").module, tmp_path).eval()
    assert torch.allclose(stock(**batch(base)).logits, adapted.logits(batch(base)), atol=1e-10)


@pytest.mark.parametrize(
    "adapter",
    [Lora(rank=4), Lora(rank=4, targets=("dense",)), Tuner("VERA", {**LINEAR, "r": 4}), Tuner("PROMPT_TUNING", {"num_virtual_tokens": 3})],
    ids=["lora", "named", "vera", "prompt"],
)
def test_a_head_of_several_layers_is_trained_and_saved_whole(adapter, tiny, batch, tmp_path):
    base = tiny("roberta")
    adapted = adapter.attach(base, seed=0)
    assert {key for key in adapted.parameters if "classifier" in key} == {
        "head.classifier.dense.weight", "head.classifier.dense.bias", "head.classifier.out_proj.weight", "head.classifier.out_proj.bias",
    }  # fmt: skip
    adapted.export({key: tensor + 0.1 for key, tensor in adapted.read().items()}, tmp_path)
    assert set(json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"]) <= {"classifier", "score"}
    stock = peft.PeftModel.from_pretrained(tiny("roberta").module, tmp_path).eval()
    assert torch.allclose(stock(**batch(base)).logits, adapted.logits(batch(base)), atol=1e-10)


def test_an_image_models_export_names_its_class(tiny, batch, tmp_path):
    tiny("vit").module.save_pretrained(tmp_path / "base")
    adapted = Lora(rank=4).attach(tiny("vit", torch.float32, str(tmp_path / "base")), seed=0)
    adapted.export({key: tensor + 0.1 for key, tensor in adapted.read().items()}, tmp_path / "adapter")
    stock = peft.AutoPeftModel.from_pretrained(tmp_path / "adapter", dtype=torch.float32).eval()
    assert torch.allclose(stock(**batch(adapted.base)).logits, adapted.logits(batch(adapted.base)), atol=1e-6)


def test_a_failed_attachment_leaves_the_global_generator_where_it_was(tiny):
    before = torch.random.get_rng_state()
    with pytest.raises(ValueError, match="no layer is called nowhere"):
        Lora(targets=("nowhere",)).attach(tiny("vit"), seed=0)
    assert torch.equal(torch.random.get_rng_state(), before)
