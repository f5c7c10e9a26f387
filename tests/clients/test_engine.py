"""What the engine does around waves: shortcuts, precision, scores, and what it checks before it uses any of them."""

from dataclasses import replace

import pytest
import torch
import transformers

from clients.engine import Engine
from clients.plan import Plan
from clients.prefix import plain, shortcut
from clients.stack import Stack
from clients.train import Job, train
from clients.wave import Wave
from fedpeft.adapters.base import Adapted
from fedpeft.adapters.lora import Lora
from fedpeft.adapters.tuner import Tuner
from fedpeft.config import Options
from fedpeft.lowrank import LowRank
from fedpeft.messages import Broadcast
from fedpeft.models.base import Base, Examples
from fedpeft.models.load import quiet, tokens
from fedpeft.models.score import examined, score
from fedpeft.strategy import Phase
from fedpeft.tensors import not_a, targets

PLAIN = Phase()


def test_models_that_only_look_like_a_family_get_no_shortcut(apart, farthest, work) -> None:
    """Layers without positions, normed queries, sliding windows: their last rows are computed another way."""
    common = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 40,
              "vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_labels": 3}  # fmt: skip
    for config, known in (
        (transformers.SmolLM3Config(**common), False),
        (transformers.Qwen3Config(**common, head_dim=6), False),
        (transformers.Qwen2Config(**common, use_sliding_window=True, sliding_window=3, max_window_layers=0), False),
        (transformers.Qwen2Config(**common), True),
        (transformers.LlamaConfig(**common), True),
    ):
        with quiet():
            module = transformers.AutoModelForSequenceClassification.from_config(config).double()
        base = Base(module, "text", ("score.weight",), lambda table: table, "nowhere")
        adapted = Lora(rank=2, targets=r".*layers[.]1[.].*q_proj").attach(base, seed=0)
        data = tokens([[5, 9, 11], [7, 3, 8, 4, 9, 30]], torch.tensor([0, 1]), padding=0)
        way = shortcut(Stack(adapted), data, memory=1 << 30, disk=0, folder=None)
        assert (way.below, way.tail) == ((1, True) if known else (0, False))
        job = Job(0, Broadcast(apart(adapted.read(), 0)), torch.arange(2), work, torch.Generator().manual_seed(0))
        engine = Engine(adapted, data, Options(), known={"fixed": 8, "tokens": 64, "wave": 4})
        (got,) = engine.train(PLAIN, [job], round=0)
        want = train(adapted, PLAIN, data, replace(job, rng=torch.Generator().manual_seed(0)), round=0)
        assert farthest([got], [want]) < 1e-10


@pytest.mark.parametrize("kind", ["bert", "vit", "llama_classifier"])
def test_a_base_in_half_precision_is_stacked_too(kind: str, tiny, examples, caplog, jobs, query_value) -> None:
    base: Base = tiny(kind, torch.bfloat16)
    adapted, data = Lora(rank=3, targets=rf".*[.]1[.].*({'|'.join(query_value[kind])})").attach(base, seed=0), examples(base)
    engine = Engine(adapted, data, Options(), known={"fixed": 8, "tokens": 64, "wave": 4})
    assert engine.wave == 4
    assert not caplog.records
    for done in engine.train(PLAIN, jobs(adapted.read()), round=0):
        assert not isinstance(done, ValueError)


def test_the_store_has_the_same_bits_whoever_comes_first(tiny, examples) -> None:
    base: Base = tiny("bert", torch.float32)
    adapted = Lora(rank=3, targets=r".*layer[.]1[.].*query").attach(base, seed=0)
    stack, ends = Stack(adapted), []
    for order in ([[0, 3, 5], [3, 9], [1, 5]], [[1, 5], [0, 3, 5], [3, 9]]):
        data = examples(base)  # a store of its own
        way = shortcut(stack, data, memory=1 << 30, disk=0, folder=None, groups=[torch.tensor([0, 3, 5, 9]), torch.tensor([1])])
        with stack.on():
            for rows in order:
                way.fill(torch.tensor(rows))
        assert way.store is not None
        ends.append(way.store.padded(torch.tensor([0, 1, 3, 5, 9]), 8, left=False).clone())
    assert torch.equal(*ends)


@pytest.mark.parametrize("kind", ["bert", "vit", "llama_classifier", "gpt2"])
def test_personal_models_are_scored_in_one_pass(kind: str, tiny, examples, jobs, wave) -> None:
    base: Base = tiny(kind)
    adapted, data = Lora(rank=3).attach(base, seed=0), examples(base)
    some = jobs(adapted.read())
    weights = [torch.rand(12, generator=torch.Generator().manual_seed(k), dtype=torch.float64) for k in range(4)]
    want = []
    for job, weight in zip(some, weights, strict=True):
        adapted.fill(job.start)
        chosen = torch.zeros(12, dtype=torch.float64)
        chosen[job.rows] = weight[job.rows]
        want.append(score(adapted.logits, base.task, data, weights=chosen))
    for found, one in zip(wave(adapted, data).score(some, [w[j.rows] for j, w in zip(some, weights, strict=True)]), want, strict=True):
        assert not isinstance(found, ValueError)
        assert found.loss == pytest.approx(one.loss, abs=1e-10)
        assert found.accuracy == pytest.approx(one.accuracy, abs=1e-6)


def test_what_frozen_layers_give_is_computed_once_for_all_rounds_and_strategies(tiny, examples, jobs) -> None:
    base: Base = tiny("bert")
    data, calls = examples(base), []
    base.module.bert.embeddings.register_forward_hook(lambda *_: calls.append(1))
    known = {"fixed": 8, "tokens": 64, "wave": 4}
    for phase in (PLAIN, Phase(trains=not_a, shares=not_a)):
        adapted = Lora(rank=3, targets=r".*layer[.]1[.].*query").attach(base, seed=0)
        engine, start = Engine(adapted, data, Options(), known=known), adapted.read()
        assert engine.wave == 4
        engine.train(phase, jobs(start)[:2], round=0)  # what the check put in is computed again, in its final company
        before = len(calls)
        engine.train(phase, jobs(start)[:2], round=1)
        assert len(calls) == before
        adapted.undo()
    engine = Engine(Lora(rank=2, targets=r".*layer[.]1[.].*value").attach(base, seed=0), data, Options(), known=known)
    assert engine.wave == 4
    before = len(calls)
    engine.train(PLAIN, jobs(engine.adapted.read())[1:2], round=0)
    assert len(calls) == before


@pytest.mark.parametrize("memory", [1 << 30, 0])
def test_kept_layers_equal_the_whole_model_to_rounding(memory: int, tiny, examples, tmp_path, apart) -> None:
    """From memory and from a file; and with neither, nothing is kept."""
    base: Base = tiny("bert")
    adapted, data = Lora(rank=3, targets=r".*layer[.]1[.].*query").attach(base, seed=0), examples(base)
    stack, rows = Stack(adapted), torch.tensor([3, 9, 4, 0, 11])
    whole, way = plain(stack, data), shortcut(stack, data, memory=memory, disk=1 << 20, folder=tmp_path)
    assert way.below == 1
    assert shortcut(stack, data, memory=0, disk=0, folder=tmp_path).below == 0
    with stack.on():
        way.fill(rows)
        stack.load([apart(adapted.read(), 1), apart(adapted.read(), 2)])
        stack.clients.seat(torch.tensor([0, 1, 1, 0, 1]))
        want = stack.logits(whole.batch(rows)[0])
        with way.on():
            got = stack.logits(way.batch(rows)[0])
    assert float((got - want).abs().max()) < 1e-12


@pytest.mark.parametrize("kind", ["bert", "vit", "gpt2", "llama_classifier"])
def test_recomputed_layers_give_the_same_and_are_really_recomputed(kind: str, tiny, examples, jobs, farthest, query_value) -> None:
    base: Base = tiny(kind)
    adapted, data = Lora(rank=3).attach(base, seed=0), examples(base)
    start = adapted.read()
    want = [train(adapted, PLAIN, data, job, round=0) for job in jobs(start)]
    calls = {False: 0, True: 0}
    for checkpointing in (False, True):
        way = plain(Stack(adapted, checkpointing=checkpointing), data)
        query = query_value[kind][0]  # a layer's last are not run again
        first = next(inner for path, inner in way.stack.layers.items() if path.endswith(query))
        first.register_forward_hook(lambda *_, on=checkpointing: calls.update({on: calls[on] + 1}))
        assert farthest(Wave(way, way, Plan(6, 40, 8)).train(PLAIN, jobs(start), round=0), want) < 1e-10
    assert calls[True] == 2 * calls[False]
    assert not any(inner.training for inner in base.module.modules())


@pytest.mark.parametrize("kind", ["bert", "llama_classifier"])
def test_bfloat16_products_are_near_and_only_where_asked(kind: str, tiny, examples, jobs) -> None:
    base: Base = tiny(kind, torch.float32)
    adapted, data = Lora(rank=3).attach(base, seed=0), examples(base)
    start, phase = adapted.read(), Phase(work="gradient")
    ends = []
    for half in (False, True):
        stack = Stack(adapted, half=half)
        way = plain(stack, data)
        (done,) = Wave(way, way, Plan()).train(phase, jobs(start)[:1], round=0)
        assert not isinstance(done, ValueError)
        begin = jobs(start)[0].start
        ends.append(torch.cat([(t - begin[n]).flatten() for n, t in done[0].tensors.items()]))
    cosine = float(torch.nn.functional.cosine_similarity(*ends, dim=0))
    assert 0.99 < cosine < 1 - 1e-9


def test_what_cannot_be_stacked_goes_to_the_reference_with_one_line_that_says_why(tiny, examples, caplog, jobs, farthest) -> None:
    base: Base = tiny("vit")
    adapted, data = (
        Tuner("IA3", {"target_modules": ["k_proj", "v_proj", "fc2"], "feedforward_modules": ["fc2"]}).attach(base, seed=0),
        examples(base),
    )
    engine = Engine(adapted, data, Options())
    start = adapted.read()
    want = [train(adapted, PLAIN, data, job, round=0) for job in jobs(start)]
    assert farthest(engine.train(PLAIN, jobs(start), round=0), want) == 0.0
    engine.train(PLAIN, jobs(start), round=1)
    assert [record.getMessage() for record in caplog.records] == [f"clients are trained one at a time: {caplog.records[0].args[0]}"]
    assert "of a ParameterDict, for which there is no stacked layer" in caplog.text


@pytest.mark.parametrize("stacked", [True, False])
def test_the_engine_leaves_the_model_as_it_was(stacked: bool, adapted: Adapted, texts: Examples, jobs) -> None:
    start, inputs = adapted.read(), texts.batch(torch.arange(6))[0]
    before = adapted.logits(inputs).detach()
    engine = Engine(adapted, texts, Options(stacked=stacked), known={"fixed": 8, "tokens": 64, "wave": 4})
    engine.train(PLAIN, jobs(start), round=0)
    engine.score(jobs(start), [torch.ones(12)] * 4, texts)
    adapted.fill(start)
    assert torch.equal(adapted.logits(inputs), before)


def test_the_engines_check_catches_a_model_that_does_something_else(adapted: Adapted, texts: Examples, monkeypatch, jobs, farthest) -> None:
    import clients.prefix as prefix
    from clients.tails import FAMILIES

    wrong = replace(FAMILIES[0], tail=lambda layer, hidden, row, more: hidden[:, :1] * 1.01)
    monkeypatch.setattr(prefix, "FAMILIES", (wrong,))
    engine = Engine(adapted, texts, Options(), known={"fixed": 8, "tokens": 64, "wave": 4})
    start = adapted.read()
    want = [train(adapted, PLAIN, texts, job, round=0) for job in jobs(start)]
    assert farthest(engine.train(PLAIN, jobs(start), round=0), want) < 1e-10  # by the whole model


@pytest.mark.parametrize("kind", ["bert", "vit", "gpt2", "llama", "llama_classifier"])
@pytest.mark.parametrize("changed", [False, True], ids=["adapter", "base too"])
def test_the_global_model_is_looked_at_with_what_frozen_layers_gave(kind: str, changed: bool, tiny, examples, query_value) -> None:
    base = tiny(kind)
    adapted, data = Lora(rank=2, targets=rf".*[.]1[.].*({'|'.join(query_value[kind])})").attach(base, seed=0), examples(base)
    rng = torch.Generator().manual_seed(0)
    tensors = {name: t + 0.1 * torch.randn(t.shape, generator=rng, dtype=torch.float64).to(t.dtype) for name, t in adapted.read().items()}
    layer = targets(tensors)[0]
    delta = ({layer: LowRank(tensors[f"{layer}.B"], tensors[f"{layer}.A"])},) if changed else ()
    adapted.fill(tensors)
    with adapted.shifted(delta):
        want = examined(adapted.logits, base.task, data, torch.arange(len(data)))
    made = Engine(adapted, data, Options())
    got = made.examined(Broadcast(tensors, delta), data, batch=4)
    assert made._tests is not None
    assert made._tests.way.below or made._tests.way.tail  # else there was nothing to test
    assert float((got - want).abs().max()) < 1e-10
    adapted.undo()
