"""Every preset of `experiments/conf/adapter` on the shapes of model=tiny_vit, model=tiny_llama and model=minilm (one layer of it)."""

from dataclasses import fields
from pathlib import Path
from pydoc import locate

import pytest
import torch
from omegaconf import OmegaConf
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from fedpeft.config import build, load
from fedpeft.models.base import Base
from fedpeft.models.load import quiet
from fedpeft.models.tiny import TinyLlama, TinyViT

# torch, of SHiRA's first forward
pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled:UserWarning")
PRESETS = sorted((Path(__file__).parents[2] / "experiments" / "conf" / "adapter").glob("*.yaml"))
each_preset = pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)

NOT_ON = {  # and what the user is told
    ("bias", "tiny_llama"): "has no bias to train",
    ("head", "tiny_llama"): "has no head to train",
    ("peft", "tiny_vit"): "Please specify `target_modules`",
    ("prompt", "tiny_vit"): "choose adapter=visual_prompt",
    ("prefix", "tiny_vit"): "choose adapter=visual_prompt",
    ("p_tuning", "tiny_vit"): "choose adapter=visual_prompt",
    ("visual_prompt", "tiny_llama"): "for texts use adapter=prompt",
    ("visual_prompt", "minilm"): "for texts use adapter=prompt",
}
MOVES = ("prompt", "prefix", "p_tuning", "visual_prompt", "vblora")  # the model does not start as the base


@pytest.fixture(scope="module")
def bases():
    vit, llama = TinyViT(), TinyLlama()
    made = {
        "tiny_vit": (
            ViTForImageClassification,
            ViTConfig(
                hidden_size=vit.width, num_hidden_layers=vit.layers, num_attention_heads=vit.heads, intermediate_size=2 * vit.width,
                image_size=8, patch_size=2, num_channels=1, num_labels=10,
            ),
            "image",
        ),
        "tiny_llama": (
            LlamaForCausalLM,
            LlamaConfig(
                vocab_size=260, hidden_size=llama.width, intermediate_size=3 * llama.width, num_hidden_layers=2,
                num_attention_heads=llama.heads, num_key_value_heads=llama.kv_heads, pad_token_id=258,
            ),
            "language",
        ),
        "minilm": (
            BertForSequenceClassification,
            BertConfig(
                vocab_size=100, hidden_size=384, num_hidden_layers=1, num_attention_heads=12, intermediate_size=1536, num_labels=7,
                max_position_embeddings=64,
            ),
            "text",
        ),
    }  # fmt: skip
    with torch.random.fork_rng(), quiet():
        torch.manual_seed(0)
        modules = {name: (kind(config), task) for name, (kind, config, task) in made.items()}
    return {
        name: Base(
            module, task, tuple(n for n, _ in module.named_parameters() if n.startswith("classifier.")), lambda table: table, "nowhere"
        )
        for name, (module, task) in modules.items()
    }


def inputs(base):
    if base.task == "image":
        return {"pixel_values": torch.linspace(0, 1, 128).reshape(2, 1, 8, 8)}
    return {"input_ids": torch.arange(20).reshape(2, 10), "attention_mask": torch.ones(2, 10, dtype=torch.long)}


@pytest.mark.fast
@each_preset
def test_a_preset_lists_every_field_of_its_adapter(path):
    content = OmegaConf.to_container(OmegaConf.load(path))
    source = locate(content.pop("_target_"))
    assert set(content) == {field.name for field in fields(source)}  # what is not listed cannot be overridden on the command line


@each_preset
@pytest.mark.parametrize("model", ["tiny_vit", "tiny_llama", "minilm"])
def test_a_preset_fits_the_built_in_models_or_says_what_does(path, model, bases):
    base = bases[model]
    adapter = build(OmegaConf.to_container(OmegaConf.load(path)))
    if message := NOT_ON.get((path.stem, model)):
        with pytest.raises(ValueError, match=message):
            adapter.attach(base, seed=0)
        return
    logits = base.module(**inputs(base)).logits
    adapted = adapter.attach(base, seed=0)
    try:
        adapted.select(lambda name: True)
        found = adapted.logits(inputs(base))
        assert found.shape == logits.shape
        assert torch.isfinite(found).all()
        assert torch.allclose(found, logits, atol=1e-5) == (path.stem not in MOVES)
        found.square().sum().backward()
        ours = [p for name, p in adapted.parameters.items() if not name.startswith("head.")]
        assert not ours or any(parameter.grad is not None and parameter.grad.any() for parameter in ours)
    finally:
        adapted.undo()
    assert torch.equal(base.module(**inputs(base)).logits, logits)


@pytest.mark.fast
@each_preset
def test_a_preset_is_chosen_on_the_command_line(path):
    assert load([f"adapter={path.stem}"]).adapter == OmegaConf.to_container(OmegaConf.load(path))


@pytest.mark.fast
def test_its_options_can_be_overridden():
    config = load(["adapter=vera", "adapter.options.r=4", "adapter.options.target_modules=[q_proj,v_proj]"])
    assert build(config.adapter).options == {"r": 4, "target_modules": ("q_proj", "v_proj"), "d_initial": 0.1}
