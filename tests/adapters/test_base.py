import pytest
import torch
from torch import nn

from fedpeft.adapters.bottleneck import Bottleneck
from fedpeft.adapters.inplace import InPlace
from fedpeft.adapters.lora import Lora
from fedpeft.adapters.lora_sb import LoraSB
from fedpeft.adapters.ravan import Ravan
from fedpeft.adapters.sparse import Sparse
from fedpeft.adapters.tuner import Tuner
from fedpeft.adapters.visual_prompt import VisualPrompt
from fedpeft.lowrank import LowRank
from fedpeft.tensors import is_a, is_head, not_a

pytestmark = pytest.mark.fast
KINDS = ("bert", "gpt2_classifier", "gpt2", "llama", "vit")
ADAPTERS = {
    "head": InPlace("head"),
    "bias": InPlace("bias"),
    "full": InPlace("full"),
    "lora": Lora(rank=4),
    "dora": Lora(rank=4, dora=True),
    "lora_sb": LoraSB(rank=4),
    "xs": LoraSB(rank=4, start="xs"),
    "ravan": Ravan(rank=3, heads=2),
    "sparse": Sparse(like=2),
    "biases too": Tuner("LORA", {"r": 4, "target_modules": "all-linear", "bias": "all"}),
    "ia3": Tuner("IA3", {"target_modules": "all-linear", "feedforward_modules": ["fc2"]}),
    "vera": Tuner("VERA", {"target_modules": "all-linear", "r": 8}),
    "bottleneck": Bottleneck(width=5),
    "visual_prompt": VisualPrompt(tokens=3),
}
each_adapter = pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS.keys())


def random(tensors, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return {name: torch.randn(tensor.shape, generator=rng, dtype=tensor.dtype) * 0.3 for name, tensor in tensors.items()}


def same(some, others):
    return some.keys() == others.keys() and all(torch.equal(some[name], others[name]) for name in some)


def snapshot(base):
    """Everything one can see of a base: tensors with their names and places, modules, attributes, hooks, config."""
    module = base.module
    tensors = {name: (tensor.clone(), tensor.data_ptr()) for name, tensor in module.state_dict(keep_vars=False).items()}
    facts = [(name, type(inner), id(inner), sorted(vars(inner)), inner.training, len(inner._forward_hooks), len(inner._forward_pre_hooks))
             for name, inner in module.named_modules()]  # fmt: skip
    return tensors, facts, module.config.to_dict(), [(name, id(p), p.requires_grad) for name, p in module.named_parameters()]


def assert_restored(base, before):
    tensors, facts, config, parameters = snapshot(base)
    assert tensors.keys() == before[0].keys()
    for name, (tensor, place) in before[0].items():
        assert torch.equal(tensors[name][0], tensor), name
        assert tensors[name][1] == place, name
    assert facts == before[1]
    assert config == before[2]
    assert parameters == before[3]


@each_adapter
def test_what_is_written_is_read_back_bit_for_bit(adapter, tiny):
    adapted = adapter.attach(tiny("vit"), seed=0)
    tensors = random(adapted.read())
    adapted.write(tensors)
    assert same(adapted.read(), tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_was_read_is_read_again_bit_for_bit_for_any_scale(dtype, tiny):
    adapted = Lora(rank=6, alpha=7, rslora=True).attach(tiny("bert", dtype), seed=0)  # a scale of 7 / sqrt(6): products round
    for seed in range(5):
        adapted.write(random(adapted.read(), seed))
        read = adapted.read()
        adapted.write(read)
        assert same(adapted.read(), read)


def test_reading_gives_copies(tiny):
    adapted = Lora(rank=4).attach(tiny("vit"), seed=0)
    read = adapted.read()
    for tensor in read.values():
        tensor.add_(1)
    assert not any(torch.equal(tensor, read[name]) for name, tensor in adapted.read().items())


def test_writing_skips_a_strategys_own_tensors(tiny):
    adapted = Lora(rank=4).attach(tiny("vit"), seed=0)
    before = adapted.read()
    adapted.write({"control/q.A": torch.ones(3)})
    assert same(adapted.read(), before)


def test_a_name_or_a_shape_of_another_adapter_is_refused_and_nothing_is_written(tiny):
    adapted = Lora(rank=4).attach(tiny("vit"), seed=0)
    before = adapted.read()
    good = {name: tensor + 1 for name, tensor in before.items()}
    first = "vit.layers.0.attention.k_proj.A"
    with pytest.raises(
        ValueError, match=r"other\.A is not a tensor of this adapter; do server and client use the same adapter= and model="
    ):
        adapted.write({**good, "other.A": torch.zeros(4, 24)})
    with pytest.raises(ValueError, match=rf"{first} is \(3, 24\), the adapter here has \(4, 24\); do server and client use the same rank"):
        adapted.write({**good, first: torch.zeros(3, 24)})
    assert same(adapted.read(), before)


@each_adapter
def test_the_same_seed_gives_the_same_bits_and_the_global_generator_stays_where_it_was(adapter, tiny):
    one, two = tiny("vit"), tiny("vit")
    before = torch.random.get_rng_state()
    first = adapter.attach(one, seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(99)
    second = adapter.attach(two, seed=3)
    assert same(first.read(), second.read())
    frozen = {**dict(first.base.module.named_parameters()), **dict(first.base.module.named_buffers())}
    others = {**dict(second.base.module.named_parameters()), **dict(second.base.module.named_buffers())}
    assert same(frozen, others)


@pytest.mark.parametrize("name", ["lora", "dora", "lora_sb", "ravan", "vera", "bottleneck", "visual_prompt"])
def test_another_seed_gives_another_start(name, tiny):
    one, two = (ADAPTERS[name].attach(tiny("vit"), seed=seed) for seed in (3, 4))
    everything = [{**adapted.read(), **dict(adapted.base.module.named_buffers())} for adapted in (one, two)]
    assert not same(*everything)
    assert same({n: t for n, t in one.read().items() if is_head(n)}, {n: t for n, t in two.read().items() if is_head(n)})


@each_adapter
def test_undo_puts_the_base_back_as_it_was(adapter, tiny, batch):
    base = tiny("vit")
    before, logits = snapshot(base), base.module(**batch(base)).logits
    adapted = adapter.attach(base, seed=0)
    adapted.write(random(adapted.read()))
    names = list(adapted.select(lambda name: True))
    adapted.logits(batch(base)).sum().backward()
    assert names
    assert not torch.equal(adapted.logits(batch(base)), logits)
    adapted.undo()
    assert_restored(base, before)
    assert torch.equal(base.module(**batch(base)).logits, logits)
    assert all(parameter.grad is None for parameter in base.module.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_follow_each_other_on_one_base(kind, tiny, batch):
    base = tiny(kind)
    before = snapshot(base)
    chain = [
        Lora(rank=4), Bottleneck(width=5), Sparse(density=1.0), Lora(rank=4), LoraSB(rank=4, start="xs"), Ravan(rank=2, heads=3),
        Tuner("LORA", {"r": 4, "bias": "all", "target_modules": "all-linear"}),
    ]  # fmt: skip
    if base.head:
        chain.insert(0, InPlace("head"))
    if base.task == "text":
        chain.append(Tuner("PREFIX_TUNING", {"num_virtual_tokens": 2}))
    seen = []
    for adapter in [*chain, chain[0]]:
        adapted = adapter.attach(base, seed=0)
        seen.append(adapted.logits(batch(base)).detach())
        adapted.write(random(adapted.read()))
        adapted.undo()
        assert_restored(base, before)
    assert torch.equal(seen[0], seen[-1])


@each_adapter
def test_gradients_reach_what_is_selected_and_nothing_else(adapter, tiny, batch):
    base = tiny("vit")
    adapted = adapter.attach(base, seed=0)
    adapted.write(random(adapted.read()))
    chosen = adapted.select(is_head)
    adapted.logits(batch(base)).square().sum().backward()
    assert set(chosen) == {"head.classifier.weight", "head.classifier.bias"}
    ids = {id(parameter) for parameter in chosen.values()}
    for name, parameter in (adapted.module or base.module).named_parameters():
        assert (parameter.grad is not None) == (id(parameter) in ids), name
    rest = adapted.select(lambda name: not is_head(name))
    assert all(parameter.grad is None for parameter in adapted.parameters.values())
    assert set(rest) == adapted.parameters.keys() - chosen.keys()
    if rest:
        adapted.logits(batch(base)).square().sum().backward()
    assert not any(parameter.grad is not None for name, parameter in adapted.parameters.items() if is_head(name))


def test_names_choose_factors(tiny):
    adapted = Lora(rank=4).attach(tiny("llama"), seed=0)
    assert all(is_a(name) for name in adapted.select(is_a))
    assert len(adapted.select(is_a)) == len(adapted.select(not_a)) == 14


TARGETS = {
    "bert": ["bert.encoder.layer.0.intermediate.dense", "bert.encoder.layer.1.attention.self.query", "bert.embeddings.word_embeddings"],
    "gpt2_classifier": ["transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj"],
    "gpt2": ["transformer.h.0.mlp.c_fc", "transformer.wte"],
    "llama": ["model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"],
    "vit": ["vit.layers.0.mlp.fc1", "vit.layers.1.mlp.fc2"],
}


def stored_in_rows(inner):
    """True for x out weights, found by hand for these models."""
    return type(inner).__name__ in ("Conv1D", "Embedding")


def products(base, kind, seed):
    rng = torch.Generator().manual_seed(seed)
    made = {}
    for target in TARGETS[kind]:
        inner = base.module.get_submodule(target)
        shape = inner.weight.shape[::-1] if stored_in_rows(inner) else inner.weight.shape
        made[target] = LowRank(torch.randn(shape[0], 2, generator=rng).double(), torch.randn(2, shape[1], generator=rng).double())
    return made


@pytest.mark.parametrize("lora", [False, True], ids=["alone", "under lora"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_base_delta_is_added_to_the_frozen_weights_and_taken_off_again(kind, lora, tiny, batch):
    base, plain = tiny(kind), tiny(kind)
    chunks = (products(base, kind, 0), products(base, kind, 1))
    for chunk in chunks:
        for target, product in chunk.items():
            inner = plain.module.get_submodule(target)
            dense = product.B @ product.A
            inner.weight = nn.Parameter(inner.weight + (dense.T if stored_in_rows(inner) else dense))  # alone, where it was tied
    adapter = Lora(rank=4) if lora else Bottleneck(width=5)
    adapted, other = adapter.attach(base, seed=0), adapter.attach(plain, seed=0)
    adapted.write(random(adapted.read()))
    other.write(adapted.read())
    before = {name: (parameter, parameter.data_ptr(), parameter.clone()) for name, parameter in base.module.named_parameters()}
    unshifted = adapted.logits(batch(base))
    with adapted.shifted(chunks):
        assert torch.allclose(adapted.logits(batch(base)), other.logits(batch(base)), atol=1e-10, rtol=0)
    assert not torch.allclose(unshifted, other.logits(batch(base)))
    after = dict(base.module.named_parameters())
    assert after.keys() == before.keys()
    for name, (parameter, place, value) in before.items():
        assert after[name] is parameter
        assert parameter.data_ptr() == place
        assert torch.equal(parameter, value)
    assert torch.equal(adapted.logits(batch(base)), unshifted)


def test_the_weights_come_back_when_the_body_raises(tiny, batch):
    base = tiny("llama")
    adapted = Lora(rank=4).attach(base, seed=0)
    before, logits = snapshot(base), adapted.logits(batch(base))
    with pytest.raises(KeyError), adapted.shifted((products(tiny("llama"), "llama", 0),)):
        raise KeyError
    assert_restored(base, before)
    assert torch.equal(adapted.logits(batch(base)), logits)


def test_a_base_delta_that_does_not_fit_is_refused_and_nothing_stays_shifted(tiny):
    base = tiny("llama")
    adapted = Lora(rank=4).attach(base, seed=0)
    before = snapshot(base)
    good = products(tiny("llama"), "llama", 0)
    pair = LowRank(torch.ones(24, 1), torch.ones(1, 24))
    faults = {
        "model.layers.7.mlp.up_proj": "which this model lacks",
        "model.layers.0.mlp": "has no frozen weight here",
        "model.layers.0.mlp.up_proj": r"is \(24, 24\), the weight here \(40, 24\)",
    }
    for target, message in faults.items():
        with pytest.raises(ValueError, match=message), adapted.shifted(({**good, target: pair},)):
            pass
        assert_restored(base, before)


def test_a_base_delta_of_a_trained_weight_is_refused(tiny):
    adapted = InPlace("full").attach(tiny("llama"), seed=0)
    with pytest.raises(ValueError, match="this strategy needs adapter=lora"), adapted.shifted((products(tiny("llama"), "llama", 0),)):
        pass


def test_a_half_precision_base_is_shifted_with_one_rounding(tiny):
    base = tiny("llama", torch.bfloat16)
    target = "model.layers.0.mlp.up_proj"
    weight = base.module.get_submodule(target).weight
    parts = [LowRank(torch.full((40, 1), 2.0**-13), torch.ones(1, 24)) for _ in range(32)]  # each alone is lost in bfloat16
    adapted = Bottleneck(width=5).attach(base, seed=0)
    with adapted.shifted([{target: part} for part in parts]):
        assert torch.equal(base.module.get_submodule(target).weight, (weight.float() + 2.0**-8).to(torch.bfloat16))
