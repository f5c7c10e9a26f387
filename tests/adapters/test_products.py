import json
import math
import re
from types import SimpleNamespace

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, AutoModelForSequenceClassification, BertConfig
from transformers import BertForSequenceClassification as Bert

from fedpeft.adapters.lora import Lora
from fedpeft.adapters.lora_sb import LoraSB
from fedpeft.adapters.products import merged, save_merged, save_products, with_rank
from fedpeft.lowrank import LowRank
from fedpeft.models.base import Base

pytestmark = [
    pytest.mark.fast,
    # stock peft loading an adapter: nothing that we call
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]
AUTO = {"text": AutoModelForSequenceClassification, "language": AutoModelForCausalLM, "image": AutoModelForImageClassification}
KINDS = ("bert", "roberta", "gpt2", "gpt2_classifier", "llama", "llama_classifier", "vit")
EMBEDDING = {"bert": "bert.embeddings.word_embeddings", "gpt2": "transformer.wte", "llama": "model.embed_tokens"}
QUERY = "model.layers.1.self_attn.q_proj"
each_kind = pytest.mark.parametrize("kind", KINDS)
each_embedding = pytest.mark.parametrize("kind", EMBEDDING)


def rows(inner):
    """True for a weight stored in x out."""
    return type(inner).__name__ in ("Conv1D", "Embedding")


def drawn(module, ranks, seed=0):
    """A random product of each rank, about as large as a trained adapter's, of the weights' dtype."""
    rng = torch.Generator().manual_seed(seed)
    made = {}
    for path, rank in ranks.items():
        inner = module.get_submodule(path)
        out, into = reversed(inner.weight.shape) if rows(inner) else inner.weight.shape
        b, a = 0.2 * torch.randn(out, rank, generator=rng), torch.randn(rank, into, generator=rng)
        made[path] = LowRank(b.to(inner.weight.dtype), a.to(inner.weight.dtype))
    return made


def mixed(base, seed=0):
    """A product for every linear layer but the head and the output: ranks 1, 2, 3, ... and once all there is."""
    head = {name.rpartition(".")[0] for name in base.head} | {"lm_head"}
    paths = [path for path, inner in base.module.named_modules() if type(inner).__name__ in ("Linear", "Conv1D") and path not in head]
    ranks = {path: 1 + i % 7 for i, path in enumerate(paths)}
    ranks[paths[1]] = min(base.module.get_submodule(paths[1]).weight.shape)
    return drawn(base.module, ranks, seed)


def shake_head(base):
    """A head that is not the checkpoint's."""
    rng = torch.Generator().manual_seed(7)
    for name in base.head:
        parameter = base.module.get_parameter(name)
        parameter.data += torch.randn(parameter.shape, generator=rng).to(parameter.dtype)


def slow(base, products):
    """W0 + B A by hand, in the base itself; a new weight, so that a tied layer keeps its own."""
    for path, product in products.items():
        inner = base.module.get_submodule(path)
        dense = product.B @ product.A
        inner.weight = nn.Parameter(inner.weight + (dense.T if rows(inner) else dense))
    return base.module


def stock(folder, task, dtype):
    facts = json.loads((folder / "adapter_config.json").read_text())
    fresh = AUTO[task].from_pretrained(facts["base_model_name_or_path"], dtype=dtype)
    return peft.PeftModel.from_pretrained(fresh, folder).eval()


@pytest.fixture
def saved(tiny, tmp_path):
    """A base whose checkpoint lies on disk."""

    def make(kind, dtype=torch.float64):
        source = tmp_path / "base"
        tiny(kind, dtype).module.save_pretrained(source)
        return tiny(kind, dtype, str(source))

    return make


# One LoRA adapter


@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-10), (torch.float32, 1e-4)], ids=["float64", "float32"])
@each_kind
def test_stock_peft_loads_the_base_with_each_product_added_and_the_head(kind, dtype, close, saved, batch, tmp_path):
    base = saved(kind, dtype)
    shake_head(base)
    products = mixed(base)
    save_products(base, products, tmp_path / "adapter")
    inputs = batch(base)
    theirs, before = stock(tmp_path / "adapter", base.task, dtype)(**inputs).logits, base.module(**inputs).logits
    ours = slow(base, products)(**inputs).logits
    assert theirs.dtype == dtype
    assert torch.allclose(theirs, ours, atol=close, rtol=0)
    assert (ours - before).abs().max() > 0.01


@each_embedding
def test_stock_peft_loads_a_product_of_an_embedding_even_a_tied_one(kind, saved, batch, tmp_path):
    base = saved(kind)
    embedding = EMBEDDING[kind]
    products = mixed(base) | drawn(base.module, {embedding: 5})
    width, words = products[embedding].shape
    save_products(base, products, tmp_path / "adapter")
    held = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert held[f"base_model.model.{embedding}.lora_embedding_A"].shape == (5, words) == (5, 64)
    assert held[f"base_model.model.{embedding}.lora_embedding_B"].shape == (width, 5) == (24, 5)
    theirs = stock(tmp_path / "adapter", base.task, torch.float64)(**batch(base)).logits
    assert torch.allclose(theirs, slow(base, products)(**batch(base)).logits, atol=1e-10, rtol=0)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True but the target module is .torch.nn.Linear:UserWarning")
def test_both_kinds_of_linear_layers_in_one_model_load_with_peft_s_warning(saved, batch, tmp_path):
    base = saved("gpt2")
    products = drawn(base.module, {"transformer.h.0.attn.c_attn": 24, "transformer.h.1.mlp.c_proj": 2, "lm_head": 3})
    save_products(base, products, tmp_path / "adapter")
    with pytest.warns(UserWarning, match="tied layer is part of the adapter"):
        model = stock(tmp_path / "adapter", base.task, torch.float64)
    assert torch.allclose(model(**batch(base)).logits, slow(base, products)(**batch(base)).logits, atol=1e-10, rtol=0)


def test_transformers_own_loader_reads_it_too(saved, batch, tmp_path):
    base = saved("llama")
    products = mixed(base)
    save_products(base, products, tmp_path / "adapter")
    model = AutoModelForCausalLM.from_pretrained(base.source, dtype=torch.float64)
    model.load_adapter(str(tmp_path / "adapter"))
    assert torch.allclose(model(**batch(base)).logits, slow(base, products)(**batch(base)).logits, atol=1e-10, rtol=0)


def test_peft_merges_it_into_the_same_model(tiny, batch, tmp_path):
    base = tiny("llama")
    products = mixed(base)
    save_products(base, products, tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny("llama").module, tmp_path).merge_and_unload()
    assert torch.allclose(theirs(**batch(base)).logits, slow(base, products)(**batch(base)).logits, atol=1e-10, rtol=0)


def test_every_scale_is_one_and_every_target_a_whole_path(tiny, tmp_path):
    base = tiny("vit")
    products = drawn(base.module, {"vit.layers.0.mlp.fc1": 3, "vit.layers.1.mlp.fc1": 24, "vit.layers.1.mlp.fc2": 3})
    save_products(base, products, tmp_path)
    facts = json.loads((tmp_path / "adapter_config.json").read_text())
    ranks = {r"^vit\.layers\.0\.mlp\.fc1": 3, r"^vit\.layers\.1\.mlp\.fc2": 3}
    assert (facts["r"], facts["lora_alpha"], facts["rank_pattern"], facts["alpha_pattern"]) == (24, 24, ranks, ranks)
    assert facts["target_modules"] == sorted(products)
    assert (facts["use_rslora"], facts["use_dora"], facts["fan_in_fan_out"], facts["exclude_modules"]) == (False, False, False, None)
    assert (facts["modules_to_save"], facts["base_model_name_or_path"], facts["task_type"]) == (["classifier"], "nowhere", None)
    assert facts["auto_mapping"]["base_model_class"] == "ViTForImageClassification"
    model = peft.PeftModel.from_pretrained(tiny("vit").module, tmp_path)
    wrapped = {path: inner for path, inner in model.named_modules() if isinstance(inner, peft.tuners.lora.LoraLayer)}
    assert {path.removeprefix("base_model.model."): inner.r["default"] for path, inner in wrapped.items()} == {
        path: product.rank for path, product in products.items()
    }
    assert all(inner.scaling["default"] == 1.0 for inner in wrapped.values())


def test_layer_1_is_not_taken_for_layer_11(batch, tmp_path):
    def made():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            sizes = {"hidden_size": 8, "num_hidden_layers": 12, "num_attention_heads": 2, "intermediate_size": 12, "vocab_size": 64}
            return Base(Bert(BertConfig(**sizes, num_labels=3)).double(), "text", ("classifier.weight", "classifier.bias"), None, "nowhere")

    base = made()
    ranks = {f"bert.encoder.layer.{i}.attention.self.query": 1 + i % 6 for i in (1, 11, 2, 10)}
    products = drawn(base.module, ranks)
    save_products(base, products, tmp_path)
    model = peft.PeftModel.from_pretrained(made().module, tmp_path)
    assert torch.allclose(model(**batch(base)).logits, slow(base, products)(**batch(base)).logits, atol=1e-10, rtol=0)


class Names(nn.Module):
    """Paths that are ends of each other, and one that is another as a pattern."""

    def __init__(self):
        super().__init__()
        self.q = nn.Linear(6, 6)
        self.xq = nn.Linear(6, 6)
        self.a = nn.ModuleDict({"q": nn.Linear(6, 6), "a": nn.ModuleDict({"q": nn.Linear(6, 6)})})
        self.a_q = nn.Linear(6, 6)
        self.z = nn.ModuleDict({"q": nn.Linear(6, 6)})
        self.many = nn.ModuleList([nn.Linear(6, 6) for _ in range(30)])

    def forward(self, x):
        for inner in (self.q, self.xq, self.a["q"], self.a["a"]["q"], self.a_q, self.z["q"], *self.many):
            x = torch.tanh(inner(x))
        return SimpleNamespace(logits=x)


@pytest.mark.parametrize(
    "ranks",
    [
        {"q": 1, "xq": 2, "a.q": 3, "a.a.q": 4, "a_q": 5, "z.q": 4, "many.1": 6, "many.11": 2},
        {"a.a.q": 1, "a_q": 2, "a.q": 3, "q": 4},
        {"q": 2},
        {"a.q": 2, "xq": 6},
        {"q": 4, "a.a.q": 3},
        {"q": 2, "a_q": 3},
        {"q": 4} | {f"many.{i}": 1 + i % 3 for i in range(29)},  # so many that peft shortens the list
    ],
    ids=["all", "longest first", "shortest", "middle", "both ends", "a pattern", "many"],
)
def test_a_layer_whose_path_is_the_end_of_another_s_has_its_own_product(ranks, tmp_path):
    def made():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return Base(Names().double(), "image", (), None, "nowhere")

    base = made()
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    products = drawn(base.module, ranks)
    save_products(base, products, tmp_path)
    model = peft.PeftModel.from_pretrained(made().module, tmp_path)
    assert torch.allclose(model(x).logits, slow(base, products)(x).logits, atol=1e-12, rtol=0)
    found = [path for path, inner in model.named_modules() if isinstance(inner, peft.tuners.lora.LoraLayer)]
    assert {path.removeprefix("base_model.model.") for path in found} == set(ranks)


@pytest.mark.parametrize("adapter", [Lora(rank=2), Lora(rank=2, dora=True), LoraSB(rank=2)], ids=["lora", "dora", "lora_sb"])
@pytest.mark.parametrize("kind", ["roberta", "gpt2_classifier", "vit"])
def test_an_adapter_on_the_base_does_not_show_in_the_files(kind, adapter, tiny, tmp_path):
    base = tiny(kind)
    products = mixed(base)
    save_products(base, products, tmp_path / "bare")
    adapter.attach(base, seed=0)
    save_products(base, products, tmp_path / "wrapped")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "bare" / file).read_bytes() == (tmp_path / "wrapped" / file).read_bytes()


def test_the_same_products_are_the_same_bytes_in_any_order(tiny, tmp_path):
    base = tiny("bert")
    products = mixed(base)
    save_products(base, products, tmp_path / "one")
    save_products(base, dict(reversed(products.items())), tmp_path / "two")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


@pytest.mark.parametrize(
    ("path", "shape", "message"),
    [
        (
            "model.layers.2.self_attn.q_proj",
            (24, 2, 24),
            r"name model\.layers\.2\.self_attn\.q_proj, which this Llama.* lacks; .*down_proj",
        ),
        ("model.norm", (24, 2, 24), r"name model\.norm, a LlamaRMSNorm; needed is a linear layer or an embedding"),
        ("model.layers.0.self_attn", (24, 2, 24), r"a LlamaAttention; needed is a linear layer"),
        ("model.layers.0.self_attn.k_proj", (24, 2, 12), r"k_proj is \(24, 12\), needed is \(12, 24\)"),
        ("model.embed_tokens", (64, 2, 24), r"embed_tokens is \(64, 24\), needed is \(24, 64\)"),
        (QUERY, (24, 0, 24), r"q_proj has rank 0, needed is at least 1; leave out"),
    ],
)
@pytest.mark.parametrize("save", [save_products, save_merged])
def test_what_does_not_fit_the_model_is_said_and_nothing_written(save, path, shape, message, tiny, tmp_path):
    m, r, n = shape
    base = tiny("llama_classifier")
    weight = base.module.get_submodule(QUERY).weight
    products = drawn(base.module, {QUERY: 2}) | {path: LowRank(torch.ones(m, r), torch.ones(r, n))}
    with pytest.raises(ValueError, match=message):
        save(base, products, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert base.module.get_submodule(QUERY).weight is weight


def test_a_product_of_the_head_and_none_at_all_are_refused(tiny, tmp_path):
    base = tiny("roberta")
    with pytest.raises(ValueError, match=r"name classifier\.dense, which lies in the task head \(classifier\); .*leave it out"):
        save_products(base, drawn(base.module, {"classifier.dense": 2}), tmp_path)
    with pytest.raises(ValueError, match="there are no products; needed is one layer"):
        save_products(base, {}, tmp_path)


# The whole model


@each_kind
def test_stock_transformers_loads_the_merged_model_and_the_base_keeps_its_bits(kind, tiny, batch, tmp_path):
    base = tiny(kind)
    shake_head(base)
    before = {name: (tensor, tensor.clone()) for name, tensor in base.module.named_parameters(remove_duplicate=False)}
    config = base.module.config.to_dict()
    products = mixed(base)
    save_merged(base, products, tmp_path)
    after = dict(base.module.named_parameters(remove_duplicate=False))
    assert all(after[name] is tensor and torch.equal(tensor, copy) for name, (tensor, copy) in before.items())
    assert base.module.config.to_dict() == config
    theirs = AUTO[base.task].from_pretrained(tmp_path, dtype=torch.float64)
    with merged(base, products) as module:
        ours = module(**batch(base)).logits
    assert torch.allclose(theirs(**batch(base)).logits, ours, atol=1e-12, rtol=0)
    assert torch.allclose(slow(base, products)(**batch(base)).logits, ours, atol=1e-10, rtol=0)


@pytest.mark.parametrize("path", ["transformer.wte", "lm_head"])
def test_a_product_on_one_of_two_tied_layers_unties_the_files_alone(path, tiny, batch, tmp_path):
    base = tiny("gpt2")
    products = mixed(base) | drawn(base.module, {path: 5})
    save_merged(base, products, tmp_path)
    assert base.module.lm_head.weight is base.module.transformer.wte.weight
    assert base.module.config.tie_word_embeddings
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert not theirs.config.tie_word_embeddings
    assert torch.allclose(theirs(**batch(base)).logits, slow(base, products)(**batch(base)).logits, atol=1e-10, rtol=0)


def test_without_such_a_product_tied_layers_stay_tied(tiny, tmp_path):
    base = tiny("gpt2")
    save_merged(base, mixed(base), tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.tie_word_embeddings


@pytest.mark.parametrize("adapter", [Lora(rank=2), LoraSB(rank=2)], ids=["lora", "lora_sb"])
def test_a_base_with_an_adapter_is_not_merged(adapter, tiny, tmp_path):
    base = tiny("bert")
    products = mixed(base)
    adapted = adapter.attach(base, seed=0)
    with pytest.raises(ValueError, match=re.escape("more carry an adapter, needed is the bare base; call Adapted.undo() first")):
        save_merged(base, products, tmp_path / "out")
    adapted.undo()
    save_merged(base, products, tmp_path / "out")


def test_a_fault_inside_leaves_the_base_as_it_was(tiny):
    base = tiny("llama")
    weight = base.module.get_submodule(QUERY).weight

    def fail():
        with merged(base, drawn(base.module, {QUERY: 2})) as module:
            assert module.get_submodule(QUERY).weight is not weight
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fail()
    assert base.module.get_submodule(QUERY).weight is weight


# A smaller rank


def test_the_error_of_a_smaller_rank_is_joint_over_all_layers():
    first = LowRank(torch.eye(3, dtype=torch.float64), torch.diag(torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64)))
    second = LowRank(torch.ones(2, 1), torch.ones(1, 2))  # norm 2
    cut, error = with_rank({"a": first, "b": second}, 1)
    assert torch.allclose(cut["a"].dense(), torch.diag(torch.tensor([4.0, 0.0, 0.0], dtype=torch.float64)))
    assert cut["b"] is second
    assert error == pytest.approx(math.sqrt((4 + 1) / (16 + 4 + 1 + 4)), abs=1e-14)


def test_a_rank_that_is_enough_loses_nothing():
    product = LowRank(torch.ones(4, 3), torch.ones(3, 5))
    assert with_rank({"a": product}, 3) == ({"a": product}, 0.0)
    cut, error = with_rank({"a": product, "b": product}, 1)  # of rank 1, but for its factors
    assert {path: part.rank for path, part in cut.items()} == {"a": 1, "b": 1}
    assert error < 1e-6
    assert with_rank({"a": LowRank(torch.zeros(4, 3), torch.zeros(3, 5))}, 1)[1] == 0.0


def test_rank_0_is_refused():
    with pytest.raises(ValueError, match="rank 0: needed is at least 1"):
        with_rank({}, 0)


def test_the_cut_products_are_an_adapter_of_one_rank(tiny, tmp_path):
    base = tiny("llama")
    cut, error = with_rank(mixed(base), 2)
    save_products(base, cut, tmp_path)
    assert 0 < error < 1
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 2
