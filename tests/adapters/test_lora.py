import json
import math

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, AutoModelForSequenceClassification

from fedpeft.adapters.lora import Lora

pytestmark = [
    pytest.mark.fast,
    # stock peft loading an adapter: nothing that we call
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False but the target module is .Conv1D:UserWarning"),
]
AUTO = {"text": AutoModelForSequenceClassification, "language": AutoModelForCausalLM, "image": AutoModelForImageClassification}
KINDS = ("bert", "gpt2_classifier", "gpt2", "llama", "vit")
MLP = {"bert": "intermediate.dense", "gpt2_classifier": "c_fc", "gpt2": "c_fc", "llama": "up_proj", "vit": "fc1"}
VARIANTS = {
    "plain": lambda kind: Lora(rank=4, alpha=10),
    "rslora": lambda kind: Lora(rank=3, alpha=5, rslora=True),
    "patterns": lambda kind: Lora(rank=4, alpha=10, rank_pattern={MLP[kind]: 7}, alpha_pattern={MLP[kind]: 3}),
}
each_kind = pytest.mark.parametrize("kind", KINDS)
each_variant = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())


def random(adapted, seed=0):
    """Random tensors about as large as a trained adapter's."""
    rng = torch.Generator().manual_seed(seed)
    return {name: tensor + 0.2 * torch.randn(tensor.shape, generator=rng).to(tensor.dtype) for name, tensor in adapted.read().items()}


def merged(base, tensors):
    """The base with `+ B @ A` in its own weights and the head's tensors in its head: what an adapter on the boundary means."""
    for name, tensor in tensors.items():
        if name.endswith(".B"):
            inner = base.module.get_submodule(name[:-2])
            product = tensor @ tensors[name[:-2] + ".A"]
            rows = type(inner).__name__ in ("Conv1D", "Embedding")  # weight stored in x out
            inner.weight = nn.Parameter(inner.weight + (product.T if rows else product))  # a new one: a tied layer keeps its own
        elif name.startswith("head."):
            base.module.get_parameter(name.removeprefix("head.")).data.copy_(tensor)
    return base


@each_variant
@each_kind
def test_the_model_is_the_base_with_b_times_a_added(kind, variant, tiny, batch):
    adapted = variant(kind).attach(tiny(kind), seed=0)
    tensors = random(adapted)
    adapted.write(tensors)
    slow = merged(tiny(kind), tensors)
    assert torch.allclose(adapted.logits(batch(adapted.base)), slow.module(**batch(slow)).logits, atol=1e-10, rtol=0)


@pytest.mark.parametrize(
    ("kind", "targets"),
    [("bert", ("word_embeddings", "query")), ("gpt2", ("wte", "wpe", "c_attn")), ("llama", ("embed_tokens", "lm_head"))],
)
def test_embeddings_are_adapted_too_even_tied_ones(kind, targets, tiny, batch):
    adapted = Lora(rank=4, targets=targets).attach(tiny(kind), seed=0)
    tensors = random(adapted)
    adapted.write(tensors)
    slow = merged(tiny(kind), tensors)
    assert {name[:-2].rpartition(".")[2] for name in tensors if name.endswith(".B")} == set(targets)
    assert torch.allclose(adapted.logits(batch(adapted.base)), slow.module(**batch(slow)).logits, atol=1e-10, rtol=0)


@each_kind
def test_every_linear_layer_but_the_output_has_a_pair_under_its_own_name(kind, tiny):
    base = tiny(kind)
    linear = {
        name: (inner.nx, inner.nf) if type(inner).__name__ == "Conv1D" else (inner.in_features, inner.out_features)
        for name, inner in base.module.named_modules()
        if type(inner).__name__ in ("Linear", "Conv1D") and name not in ("classifier", "score", "lm_head")
    }
    tensors = Lora(rank=4).attach(base, seed=0).read()
    expected = {}
    for name, (inputs, outputs) in linear.items():
        expected |= {f"{name}.A": (4, inputs), f"{name}.B": (outputs, 4)}
    expected |= {f"head.{name}": tuple(base.start[name].shape) for name in base.head}
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == expected


def test_b_carries_the_scale(tiny):
    for lora, scale, wide in [
        (Lora(rank=4, alpha=10), 10 / 4, 10 / 4),
        (Lora(rank=3, alpha=5, rslora=True), 5 / math.sqrt(3), 5 / math.sqrt(3)),
        (Lora(rank=4, alpha=10, rank_pattern={"fc1": 7}), 10 / 4, 10 / 7),
        (Lora(rank=4, alpha=10, rank_pattern={"layers.1.mlp.fc1": 7}, alpha_pattern={"fc1": 3}), 10 / 4, 3 / 7),
        (Lora(rank=4, alpha=10, rank_pattern={"fc1": 7}, alpha_pattern={"fc1": 3}, rslora=True), 10 / 2, 3 / math.sqrt(7)),
    ]:
        adapted = lora.attach(tiny("vit"), seed=0)
        adapted.write({name: torch.ones_like(tensor) for name, tensor in adapted.read().items()})
        for name, expected in (("vit.layers.1.mlp.fc2", scale), ("vit.layers.1.mlp.fc1", wide)):
            assert torch.allclose(adapted.parameters[f"{name}.B"] * expected, torch.ones(1, dtype=torch.float64))
            assert torch.equal(adapted.value(f"{name}.A"), adapted.parameters[f"{name}.A"])
            assert torch.equal(adapted.value(f"{name}.B"), adapted.read()[f"{name}.B"])


@pytest.mark.parametrize("dora", [False, True])
@each_kind
def test_it_starts_as_the_base(kind, dora, tiny, batch):
    base = tiny(kind)
    logits = base.module(**batch(base)).logits
    adapted = Lora(rank=4, dora=dora).attach(base, seed=0)
    assert torch.allclose(adapted.logits(batch(base)), logits, atol=1e-10, rtol=0)
    assert all((adapted.read()[name] == 0).all() for name in adapted.parameters if name.endswith(".B"))


def test_dora_turns_each_row_of_the_weight_to_its_own_length(tiny, batch):
    adapted = Lora(rank=4, alpha=10, dora=True).attach(tiny("vit"), seed=0)
    tensors = random(adapted)
    adapted.write(tensors)
    slow = merged(tiny("vit"), tensors)
    for name, magnitude in tensors.items():
        if name.endswith(".magnitude"):
            weight = slow.module.get_submodule(name.removesuffix(".magnitude")).weight
            weight.data = magnitude[:, None] * weight / weight.norm(dim=1, keepdim=True)
    assert torch.allclose(adapted.logits(batch(adapted.base)), slow.module(**batch(slow)).logits, atol=1e-10, rtol=0)


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), r".*\.(q|v)_proj"])
def test_targets_are_names_or_a_pattern(targets, tiny):
    tensors = Lora(rank=4, targets=targets).attach(tiny("llama"), seed=0).read()
    assert {name.split(".")[-2] for name in tensors} == {"q_proj", "v_proj"}


def test_without_targets_peft_chooses(tiny):
    assert {name.split(".")[-2] for name in Lora(rank=4, targets=None).attach(tiny("llama"), seed=0).read()} == {"q_proj", "v_proj"}


@pytest.mark.parametrize(
    ("kind", "lora", "message"),
    [
        ("llama", Lora(rank=13), r"rank=13 is larger than the layer model\.layers\.0\.self_attn\.k_proj \(12 x 24\); needed is at most 12"),
        ("gpt2", Lora(rank=25), r"rank=25 is larger than the layer transformer\.h\.0\.attn\.c_attn \(24 x 72\); needed is at most 24"),
        ("llama", Lora(rank=4, rank_pattern={"up_proj": 25}), r"rank=25 is larger than the layer .*up_proj.* by adapter\.rank_pattern"),
        ("llama", Lora(rank=0), r"adapter\.rank=0: needed is at least 1"),
        ("llama", Lora(rank=4, rank_pattern={"up_proj": 0}), r"adapter\.rank_pattern\.up_proj=0: needed is at least 1"),
        ("llama", Lora(alpha=0), r"adapter\.alpha=0: needed is more than 0"),
        ("llama", Lora(rank=4, alpha_pattern={"up_proj": -1}), r"adapter\.alpha_pattern\.up_proj=-1: needed is more than 0"),
        ("llama", Lora(rank=4, targets=("query",)), "no layer is called query; its layers .*adapter.targets.* are down_proj, .*v_proj"),
        ("llama", Lora(rank=4, targets=("q_proj", "qproj")), "no layer is called qproj"),
        ("llama", Lora(rank=4, targets="query"), r"Target modules query not found.*; its layers .*are down_proj"),
        ("vit", Lora(rank=4, targets=None), r"specify `target_modules`.*for adapter\.targets.* are classifier, fc1"),
        ("vit", Lora(rank=4, targets=r".*projection"), r"adapter\.targets reaches vit\.embeddings\.patch_embeddings\.projection"),
        ("llama", Lora(rank=4, rank_pattern={"query": 2}), r"rank_pattern names query, which fits no adapted layer; there are .*q_proj"),
        ("llama", Lora(rank=4, alpha_pattern={"x": 2}), r"alpha_pattern names x, which fits no adapted layer"),
    ],
)
def test_what_does_not_fit_the_model_is_said_and_the_base_stays_clean(kind, lora, message, tiny, batch):
    base = tiny(kind)
    state = {name: tensor.clone() for name, tensor in base.module.state_dict().items()}
    modules = list(base.module.modules())
    logits = base.module(**batch(base)).logits
    with pytest.raises(ValueError, match=message):
        lora.attach(base, seed=0)
    assert list(base.module.modules()) == modules
    assert state.keys() == base.module.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in base.module.state_dict().items())
    assert torch.equal(base.module(**batch(base)).logits, logits)
    Lora(rank=2).attach(base, seed=0)


def test_a_layer_smaller_than_the_rank_can_have_its_own(tiny):
    tensors = Lora(rank=13, rank_pattern={"k_proj": 12, "v_proj": 5}).attach(tiny("llama"), seed=0).read()
    assert {len(tensors[f"model.layers.0.self_attn.{name}.A"]) for name in ("k_proj",)} == {12}
    assert len(tensors["model.layers.1.self_attn.v_proj.A"]) == 5
    assert len(tensors["model.layers.0.self_attn.q_proj.A"]) == 13


EXPORTED = {**VARIANTS, "dora": lambda kind: Lora(rank=4, dora=True), "named": lambda kind: Lora(rank=4, targets=(MLP[kind],))}


@pytest.mark.parametrize("variant", EXPORTED.values(), ids=EXPORTED.keys())
@each_kind
def test_stock_peft_loads_the_export_with_the_same_tensors_and_logits(kind, variant, tiny, batch, tmp_path):
    source = tmp_path / "base"
    tiny(kind, torch.float32).module.save_pretrained(source)
    adapted = variant(kind).attach(tiny(kind, torch.float32, str(source)), seed=0)
    tensors = random(adapted)
    adapted.export(tensors, tmp_path / "adapter")

    facts = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    fresh = AUTO[adapted.base.task].from_pretrained(facts["base_model_name_or_path"])
    stock = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    inputs = batch(adapted.base)
    assert torch.allclose(stock(**inputs).logits, adapted.logits(inputs), atol=1e-6, rtol=0)

    held = {name.replace(".default", "").replace(".modules_to_save", ""): p for name, p in stock.named_parameters()}
    for name, parameter in adapted.parameters.items():
        layer, _, part = name.rpartition(".")
        theirs = {"A": "lora_A.weight", "B": "lora_B.weight", "magnitude": "lora_magnitude_vector.weight"}
        path = name.removeprefix("head.") if name.startswith("head.") else f"{layer}.{theirs[part]}"
        assert torch.equal(held[f"base_model.model.{path}"], parameter), name


def test_the_same_adapter_is_exported_as_the_same_bytes(tiny, tmp_path):
    for name in ("one", "two"):
        adapted = Lora(rank=4).attach(tiny("llama"), seed=0)
        adapted.export(random(adapted), tmp_path / name)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    facts = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    assert facts["target_modules"] == sorted(facts["target_modules"])


def test_a_merged_export_is_the_same_model(tiny, batch, tmp_path):
    adapted = Lora(rank=4, rank_pattern={"k_proj": 3}).attach(tiny("llama"), seed=0)
    adapted.export(random(adapted), tmp_path)
    merged_by_peft = peft.PeftModel.from_pretrained(tiny("llama").module, tmp_path).merge_and_unload()
    inputs = batch(adapted.base)
    assert torch.allclose(merged_by_peft(**inputs).logits, adapted.logits(inputs), atol=1e-10, rtol=0)


def test_the_export_holds_the_tensors_given_not_those_of_the_last_client(tiny, tmp_path):
    adapted = Lora(rank=4, alpha=8).attach(tiny("vit"), seed=0)
    tensors = random(adapted, seed=1)
    adapted.write(random(adapted, seed=2))
    adapted.export(tensors, tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert torch.equal(saved["base_model.model.vit.layers.0.mlp.fc1.lora_B.weight"] * 2, tensors["vit.layers.0.mlp.fc1.B"])
    assert torch.equal(saved["base_model.model.classifier.weight"], tensors["head.classifier.weight"])
