"""What holds for every adapter that wraps linear layers itself, on every way to store a weight; what only one does stands beside it."""

import pytest
import torch
from torch import nn

from fedpeft.adapters.lora import Lora
from fedpeft.adapters.lora_sb import LoraSB
from fedpeft.adapters.ravan import Ravan
from fedpeft.adapters.sparse import Sparse
from fedpeft.adapters.wrapped import fitting
from fedpeft.lowrank import product
from fedpeft.tensors import is_head

pytestmark = pytest.mark.fast
KINDS = ("bert", "gpt2", "gpt2_classifier", "llama", "vit")  # GPT-2 stores weights in x out, Llama's keys and values are 12 x 24
ADAPTERS = {
    "lora_sb": lambda **more: LoraSB(rank=3, **more),
    "xs": lambda **more: LoraSB(rank=3, start="xs", **more),
    "ravan": lambda **more: Ravan(rank=2, heads=3, **more),
    "sparse": lambda **more: Sparse(like=2, **more),
}
START = {"lora_sb": ".R", "xs": ".R", "ravan": ".H", "sparse": ".values"}  # what has a gradient while the model is still the base
each_kind = pytest.mark.parametrize("kind", KINDS)
each_adapter = pytest.mark.parametrize("name", ADAPTERS)


def is_transposed(inner):
    return type(inner).__name__ == "Conv1D"


def random(tensors):
    rng = torch.Generator().manual_seed(1)
    return {name: torch.randn(tensor.shape, generator=rng).to(tensor.dtype) * 0.3 for name, tensor in tensors.items()}


def layers(tensors):
    return {name.rpartition(".")[0] for name in tensors if not is_head(name)}


def added(adapted, tensors, path):
    """The (out, in) change of a layer's weight, written out."""
    if f"{path}.values" not in tensors:
        return product(tensors, path).dense()
    inner = adapted.base.module.get_submodule(path)
    weight = inner.base_layer.weight
    change = torch.zeros_like(weight.T if is_transposed(inner.base_layer) else weight)
    for place, value in zip(inner.places.tolist(), tensors[f"{path}.values"], strict=True):
        change[place // change.shape[1], place % change.shape[1]] = value
    return change


@each_adapter
@each_kind
def test_the_model_starts_unchanged_to_the_bit(kind, name, tiny, batch):
    base = tiny(kind)
    logits = base.module(**batch(base)).logits
    assert torch.equal(ADAPTERS[name]().attach(base, seed=0).logits(batch(base)), logits)


@each_adapter
@each_kind
def test_the_model_is_the_base_with_the_product_added(kind, name, tiny, batch):
    adapted, slow = ADAPTERS[name]().attach(tiny(kind), seed=0), tiny(kind)
    tensors = random(adapted.read())
    adapted.write(tensors)
    for path in layers(tensors):
        inner, change = slow.module.get_submodule(path), added(adapted, tensors, path)
        inner.weight = nn.Parameter(inner.weight + (change.T if is_transposed(inner) else change))
    for head, tensor in tensors.items():
        if is_head(head):
            slow.module.get_parameter(head.removeprefix("head.")).data.copy_(tensor)
    assert torch.allclose(adapted.logits(batch(slow)), slow.module(**batch(slow)).logits, atol=1e-10, rtol=0)


@each_adapter
@each_kind
def test_gradients_begin_where_the_model_stands_still_and_then_reach_everything(kind, name, tiny, batch):
    adapted = ADAPTERS[name]().attach(tiny(kind), seed=0)
    for tensors, moves in ((adapted.read(), lambda each: each.endswith(START[name]) or is_head(each)), (None, lambda each: True)):
        adapted.write(tensors or random(adapted.read()))
        chosen = adapted.select(lambda each: True)
        adapted.logits(batch(adapted.base)).square().sum().backward()
        for each, parameter in chosen.items():
            assert bool(parameter.grad.any()) == moves(each), each


@each_adapter
@pytest.mark.parametrize(
    ("kind", "targets"),
    [
        *((kind, "all-linear") for kind in KINDS),
        ("bert", None), ("gpt2", None), ("llama", None),
        ("bert", ("query", "output.dense")), ("gpt2_classifier", ("c_attn", "mlp.c_proj")), ("vit", ("fc1",)),
        ("bert", r".*layer\.1\..*dense"), ("llama", r".*\.(q|v)_proj"), ("gpt2", r"transformer\.h\.0\..*\.c_.*"),
    ],
)  # fmt: skip
def test_targets_choose_the_layers_that_they_choose_for_lora(kind, targets, name, tiny):
    adapted = ADAPTERS[name](targets=targets).attach(tiny(kind), seed=0)
    lora = Lora(rank=2, targets=targets).attach(tiny(kind), seed=0)
    assert layers(adapted.parameters) == layers(lora.parameters) != set()
    assert {each for each in adapted.parameters if is_head(each)} == {each for each in lora.parameters if is_head(each)}


@each_adapter
@pytest.mark.parametrize(
    ("kind", "targets", "message"),
    [
        ("llama", ("q_proj", "query"), r"adapter\.targets: no layer's name ends in query; there are model\.layers\.0\.self_attn\.q_proj"),
        ("llama", "query", r"adapter\.targets: no layer's whole name fits query; there are model\.layers\.0\.self_attn\.q_proj"),
        ("llama", "q_proj", r"no layer's whole name fits q_proj"),  # as peft: text is a pattern, a list holds the ends of names
        ("llama", ("lm_head",), "no layer's name ends in lm_head"),
        ("bert", ("classifier",), "no layer's name ends in classifier"),
        ("bert", ("word_embeddings",), "no layer's name ends in word_embeddings"),
        ("vit", None, r"adapter\.targets=null: peft has no choice for a vit; set adapter\.targets=all-linear"),
    ],
)
def test_targets_that_reach_no_linear_layer_are_refused_and_the_base_stays_clean(kind, targets, message, name, tiny):
    base = tiny(kind)
    modules = list(base.module.modules())
    with pytest.raises(ValueError, match=message):
        ADAPTERS[name](targets=targets).attach(base, seed=0)
    assert list(base.module.modules()) == modules


@pytest.mark.parametrize(
    ("kind", "adapter", "message"),
    [
        (
            "llama",
            LoraSB(rank=13),
            r"adapter\.rank=13 is larger than the layer model\.layers\.0\.self_attn\.k_proj \(12 x 24\); .* most 12",
        ),
        ("gpt2", LoraSB(rank=25, start="xs"), r"adapter\.rank=25 is larger than the layer .*c_attn \(72 x 24\); needed is at most 24"),
        ("bert", LoraSB(rank=0), r"adapter\.rank=0: needed is at least 1"),
        ("bert", LoraSB(rank=0, capped=True), r"adapter\.rank=0: needed is at least 1"),
        ("llama", Ravan(rank=7, heads=2), r"strategy\.rank=7 is larger than the layer .*k_proj \(12 x 24\); needed is at most 6"),
        ("bert", Ravan(rank=0), r"strategy\.rank=0: needed is at least 1"),
        ("bert", Ravan(heads=0), r"strategy\.heads=0: needed is at least 1"),
        ("llama", Ravan(rank=1, heads=13, capped=True), r"strategy\.heads=13 .*k_proj has ranks \(12 x 24\); needed is at most 12"),
    ],
)
def test_a_rank_that_a_layer_has_not_is_refused_by_its_field_and_the_base_stays_clean(kind, adapter, message, tiny):
    base = tiny(kind)
    modules = list(base.module.modules())
    with pytest.raises(ValueError, match=message):
        adapter.attach(base, seed=0)
    assert list(base.module.modules()) == modules


def test_a_capped_rank_is_the_most_that_a_layer_has():
    inner = nn.Linear(5, 3)
    assert [fitting(rank, inner, "here", capped=True) for rank in (2, 3, 4)] == [2, 3, 3]
    assert fitting(4, inner, "here", capped=True, most=1) == 1
    with pytest.raises(ValueError, match=r"adapter\.rank=4 is larger than the layer here \(3 x 5\); needed is at most 3"):
        fitting(4, inner, "here", capped=False)


@each_adapter
def test_beside_half_precision_its_own_tensors_are_float32(name, tiny, batch):
    base = tiny("llama", torch.bfloat16)
    logits = base.module(**batch(base)).logits
    adapted = ADAPTERS[name]().attach(base, seed=0)
    assert {parameter.dtype for parameter in adapted.parameters.values()} == {torch.float32}
    assert torch.equal(adapted.logits(batch(base)), logits)
    assert logits.dtype == torch.bfloat16
