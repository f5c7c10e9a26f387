"""A wave against the reference trainer, one client at a time, in float64: the engine changes speed and nothing else."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from clients.engine import Engine
from clients.plan import Plan
from clients.prefix import plain, shortcut
from clients.stack import Stack
from clients.train import Job, batches, train
from clients.wave import Private, Wave, poisson
from fedpeft.adapters.base import Adapted
from fedpeft.adapters.inplace import InPlace
from fedpeft.adapters.lora import Lora
from fedpeft.adapters.lora_sb import LoraSB
from fedpeft.adapters.tuner import Tuner
from fedpeft.config import Options, Training
from fedpeft.lowrank import LowRank
from fedpeft.messages import Broadcast
from fedpeft.models.base import Base, Examples, Images
from fedpeft.models.load import quiet, tokens
from fedpeft.models.score import losses, score
from fedpeft.strategy import Phase
from fedpeft.tensors import Tensors, is_a, is_head, not_a, not_b

KINDS = ["bert", "roberta", "vit", "gpt2", "gpt2_classifier", "llama", "llama_classifier"]
QV = {"bert": ("query", "value"), "roberta": ("query", "value"), "vit": ("q_proj", "v_proj"), "gpt2": ("c_attn",)} | {
    "gpt2_classifier": ("c_attn",), "llama": ("q_proj", "v_proj"), "llama_classifier": ("q_proj", "v_proj")
}  # fmt: skip
PLAIN = Phase()
WORK = Training(steps=5, batch=3, lr=5e-3, weight_decay=0.01, clip=1.0)
OWN = [torch.tensor([0, 3, 5, 7, 8]), torch.tensor([1]), torch.tensor([2, 4, 6, 9]), torch.tensor([10, 11])]  # rows of four clients


def apart(tensors: Tensors, client: int) -> Tensors:
    """A start of each client's own, with a B that is not zero."""
    rng = torch.Generator().manual_seed(client)
    return {name: t + 0.1 * torch.randn(t.shape, generator=rng, dtype=torch.float64).to(t.dtype) for name, t in tensors.items()}


def jobs(start: Tensors, work: Training = WORK, **more: Any) -> list[Job]:
    return [
        Job(client, Broadcast(apart(start, client)), rows, work, torch.Generator().manual_seed(client), **more)
        for client, rows in enumerate(OWN)
    ]


def wave(adapted: Adapted, examples: Examples, *, short: bool = True, **more: Any) -> Wave:
    """Small micro-batches, so that each step has several, with several clients in each."""
    stack = Stack(adapted)
    whole = plain(stack, examples)
    way = shortcut(stack, examples, memory=1 << 30, disk=0, folder=None) if short else whole
    return Wave(way, whole, Plan(6, 40, 8), **more)


def farthest(got: list[Any], want: list[Any]) -> float:
    assert all(not isinstance(one, ValueError) for one in got), got
    far = 0.0
    for (update, kept), (other, other_kept) in zip(got, want, strict=True):
        assert update.client == other.client
        assert update.weight == other.weight
        assert update.metrics["steps"] == other.metrics["steps"]
        assert update.metrics["loss"] == pytest.approx(other.metrics["loss"], abs=1e-11)
        for mine, theirs in ((update.tensors, other.tensors), (kept, other_kept)):
            assert mine.keys() == theirs.keys()
            far = max([far, *(float((mine[name] - theirs[name]).abs().max()) for name in mine)])
    return far


def check(adapted: Adapted, examples: Examples, phase: Phase = PLAIN, work: Training = WORK, bound: float = 1e-10, **more: Any) -> None:
    """The wave ends where the reference ends, and both moved."""
    start = adapted.read()
    want = [train(adapted, phase, examples, job, round=0) for job in jobs(start, work, **more)]
    made = wave(adapted, examples)
    got = made.train(phase, jobs(start, work, **more), round=0)
    assert farthest(got, want) < bound
    moved = [float((update.tensors[n] - job.start[n]).abs().max()) for (update, _), job in zip(want, jobs(start), strict=True)
             for n in update.tensors if phase.trains(n)]  # fmt: skip
    assert max(moved, default=1.0) > 1e-4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("targets", ["all-linear", "q,v"])
def test_five_steps_of_four_unequal_clients_equal_one_at_a_time(kind: str, targets: str, tiny, examples) -> None:
    base: Base = tiny(kind)
    adapted = Lora(rank=3, targets=QV[kind] if targets == "q,v" else targets).attach(base, seed=0)
    check(adapted, examples(base))


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_layers_below_the_lowest_adapter_are_kept_and_the_last_is_cut(kind: str, layer: int, tiny, examples) -> None:
    base: Base = tiny(kind)
    path = {"bert": "bert.encoder.layer", "roberta": "roberta.encoder.layer", "vit": "vit.layers"}.get(
        kind, "transformer.h" if "gpt2" in kind else "model.layers"
    )
    adapted = Lora(rank=3, targets=rf"{path.replace('.', '[.]')}[.]{layer}[.].*({'|'.join(QV[kind])})").attach(base, seed=0)
    made = wave(adapted, examples(base))
    assert made.way.below == layer
    assert made.way.tail == (base.task != "language")
    check(adapted, examples(base))


@pytest.fixture
def adapted(tiny: Callable[..., Base]) -> Adapted:
    return Lora(rank=3).attach(tiny("bert"), seed=0)


@pytest.fixture
def texts(adapted: Adapted, examples: Callable[..., Examples]) -> Examples:
    return examples(adapted.base)


@pytest.mark.parametrize(
    "phase",
    [
        Phase(trains=not_a, shares=not_a),
        Phase(trains=not_b, shares=not_b),
        Phase(shares=is_a, keeps=not_a),
        Phase(trains=is_head),
        Phase(loss=lambda now, start: 0.3 * sum((t - start[n]).square().sum() for n, t in now.items())),
        Phase(finish=lambda now, start, steps: {n: (t - start[n]) / steps for n, t in now.items()}),
        Phase(work="gradient"),
    ],
    ids=["ffa", "rolora", "fedsa", "head", "fedprox", "finish", "gradient"],
)
def test_every_kind_of_phase_gives_what_the_reference_gives(phase: Phase, adapted: Adapted, texts: Examples) -> None:
    check(adapted, texts, phase)


@pytest.mark.parametrize(
    "work",
    [
        Training(steps=4, batch=2, optimizer="sgd", lr=0.05, momentum=0.9, weight_decay=0.1),
        Training(steps=4, batch=2, optimizer="sgd", lr=0.05, head_lr=0.01),
        Training(steps=None, epochs=1.5, batch=2, lr=5e-3, clip=0.3),  # other numbers of steps: 4, 2, 3, 2
        Training(steps=3, batch=3, lr=5e-3, weight_decay=0.3),
    ],
    ids=["momentum", "sgd", "epochs", "decay"],
)
def test_every_optimizer_gives_what_the_reference_gives(work: Training, adapted: Adapted, texts: Examples) -> None:
    check(adapted, texts, work=work)


@pytest.mark.parametrize("kind", ["bert", "vit", "gpt2", "llama_classifier"])
def test_dropout_is_each_clients_own_and_the_same_in_a_wave(kind: str, tiny, examples) -> None:
    base: Base = tiny(kind)
    adapted, data = Lora(rank=3, dropout=0.3).attach(base, seed=0), examples(base)
    start, inputs = adapted.read(), data.batch(torch.arange(4))[0]
    check(adapted, data)
    adapted.fill(apart(start, 0))
    assert torch.equal(adapted.logits(inputs), adapted.logits(inputs))  # nothing is dropped outside of training
    (job,) = jobs(start)[:1]
    with_it, _ = train(adapted, PLAIN, data, job, round=0)
    adapted.undo()
    without, _ = train(Lora(rank=3).attach(base, seed=0), PLAIN, data, jobs(start)[0], round=0)
    assert max(float((with_it.tensors[n] - t).abs().max()) for n, t in without.tensors.items()) > 1e-4


def test_clients_with_their_own_rates_step_at_their_own_rates(adapted: Adapted, texts: Examples) -> None:
    start = adapted.read()
    some = [replace(job, work=replace(WORK, lr=1e-3 * (job.client + 1), head_lr=None)) for job in jobs(start)]
    want = [train(adapted, PLAIN, texts, job, round=0) for job in some]
    again = [replace(job, rng=torch.Generator().manual_seed(job.client)) for job in some]
    assert farthest(wave(adapted, texts).train(PLAIN, again, round=0), want) < 1e-10


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("adapter", [InPlace("head"), InPlace("bias")], ids=["head", "bias"])
def test_heads_and_biases_are_stacked_too(adapter: Any, kind: str, tiny, examples) -> None:
    base: Base = tiny(kind)
    if not (base.head if adapter.trains == "head" else "llama" not in kind):
        pytest.skip(f"{kind} has no {adapter.trains}")
    check(adapter.attach(base, seed=0), examples(base))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trained", ["R", "all"])
def test_cores_between_frozen_factors(trained: str, kind: str, tiny, examples) -> None:
    base: Base = tiny(kind)
    phase = Phase(trains=lambda name: name.endswith(".R") or is_head(name)) if trained == "R" else PLAIN
    check(LoraSB(rank=3).attach(base, seed=0), examples(base), phase)


@pytest.mark.parametrize("kind", ["llama", "bert", "gpt2"])
def test_norms_are_stacked(kind: str, tiny, examples) -> None:
    base: Base = tiny(kind)
    adapted = Tuner("LN_TUNING", {"target_modules": {"llama": ["norm", "input_layernorm"], "bert": ["LayerNorm"], "gpt2": ["ln_1"]}[kind]})
    made = adapted.attach(base, seed=0)
    check(made, examples(base))


@pytest.mark.parametrize(
    ("kind", "targets"), [("bert", ("word_embeddings", "query")), ("gpt2", ("wte", "c_fc")), ("llama", ("embed_tokens", "lm_head"))]
)
def test_embeddings_and_the_language_head(kind: str, targets: tuple[str, ...], tiny, examples) -> None:
    base: Base = tiny(kind)
    check(Lora(rank=3, targets=targets).attach(base, seed=0), examples(base))


def test_ranks_padded_with_zeros_equal_each_rank_alone(tiny, examples) -> None:
    ranks, want, some = [1, 5, 2, 3], [], []
    for client, rank in enumerate(ranks):
        base = tiny("bert")
        alone = Lora(rank=rank, alpha=7.0).attach(base, seed=0)
        job = Job(
            client, Broadcast(apart(alone.read(), client)), OWN[client], WORK, torch.Generator().manual_seed(client), scales=alone.scales
        )
        want.append(train(alone, PLAIN, examples(base), job, round=0))
        some.append(replace(job, rng=torch.Generator().manual_seed(client)))
    base = tiny("bert")
    made = wave(Lora(rank=4, alpha=7.0).attach(base, seed=0), examples(base))
    assert farthest(made.train(PLAIN, some, round=0), want) < 1e-10
    for name, value in made.way.stack.clients.values.items():
        if name.endswith((".A", ".B")):
            tails = [value[k].narrow(0 if is_a(name) else 1, rank, 5 - rank) for k, rank in enumerate(ranks)]
            assert all(not tail.any() for tail in tails)


@pytest.mark.parametrize("kind", ["bert", "gpt2_classifier"])
def test_products_added_to_the_base_count_and_are_taken_off(kind: str, tiny, examples) -> None:
    base: Base = tiny(kind)
    texts = examples(base)
    path = "bert.encoder.layer.1.attention.self.query" if kind == "bert" else "transformer.h.1.attn.c_attn"
    adapted = Lora(rank=3, targets=rf"{path.replace('.', '[.]')}").attach(base, seed=0)
    start = adapted.read()
    out = start[f"{path}.B"].shape[0]
    below = path.replace(".1.", ".0.")
    for target in (path, below):  # at the adapter, and in a layer that would be kept
        rng = torch.Generator().manual_seed(5)
        product = LowRank(torch.randn(out, 2, generator=rng, dtype=torch.float64), torch.randn(2, 24, generator=rng, dtype=torch.float64))
        some = [replace(job, broadcast=Broadcast(job.broadcast.tensors, ({target: product},))) for job in jobs(start)]
        want = [train(adapted, PLAIN, texts, job, round=0) for job in some]
        again = [replace(job, rng=torch.Generator().manual_seed(job.client)) for job in some]
        made = wave(adapted, texts)
        assert made.way.below == 1
        assert farthest(made.train(PLAIN, again, round=0), want) < 1e-10
        without = [train(adapted, PLAIN, texts, job, round=0) for job in jobs(start)]
        assert farthest(made.train(PLAIN, jobs(start), round=1), without) < 1e-10


def test_changing_one_clients_data_changes_no_other_client_at_all(adapted: Adapted, texts: Examples) -> None:
    start, phase = adapted.read(), Phase(work="gradient")
    made = wave(adapted, texts, short=False)
    first = made.train(phase, jobs(start), round=0)
    assert isinstance(texts.labels, Tensor)
    texts.labels[OWN[0]] = (texts.labels[OWN[0]] + 1) % 3
    second = made.train(phase, jobs(start), round=0)
    for client, (one, other) in enumerate(zip(first, second, strict=True)):
        assert not isinstance(one, ValueError)
        assert not isinstance(other, ValueError)
        same = all(torch.equal(tensor, other[0].tensors[name]) for name, tensor in one[0].tensors.items())
        assert same == (client != 0)


def test_a_client_that_breaks_is_named_and_the_others_go_on(adapted: Adapted, texts: Examples) -> None:
    some = jobs(adapted.read())
    name = next(iter(some[1].broadcast.tensors))
    some[1].broadcast.tensors[name][:] = float("inf")
    some[2].broadcast.tensors.pop(name)
    want = [train(adapted, PLAIN, texts, job, round=3) for job in jobs(adapted.read()) if job.client in (0, 3)]
    got = wave(adapted, texts).train(PLAIN, some, round=3)
    assert "client 1, round 3: the loss became nan at local step 0" in str(got[1])
    assert f"{name} was neither sent nor kept" in str(got[2])
    assert farthest([got[0], got[3]], want) < 1e-10


def test_other_tensors_than_the_adapters_are_refused(adapted: Adapted, texts: Examples) -> None:
    some = jobs(adapted.read())
    some[0].broadcast.tensors["stranger.A"] = torch.zeros(1)
    some[1].broadcast.tensors["head.classifier.bias"] = torch.zeros(9)
    got = wave(adapted, texts).train(PLAIN, some, round=0)
    assert "stranger.A is not a tensor of this adapter" in str(got[0])
    assert "head.classifier.bias is (9,) torch.float32, the adapter here has (3,) torch.float64" in str(got[1])
    assert not isinstance(got[2], ValueError)


def test_tensors_that_do_not_fit_one_another_are_refused_and_the_others_go_on(adapted: Adapted, texts: Examples) -> None:
    some, name = jobs(adapted.read()), "bert.encoder.layer.0.attention.self.query"
    some[0].broadcast.tensors[f"{name}.A"] = torch.zeros(5, 24, dtype=torch.float64)
    some[1] = replace(some[1], scales=adapted.scales)
    some[1].broadcast.tensors[f"{name}.A"] = torch.zeros(5, 24, dtype=torch.float64)
    some[2].broadcast.tensors[f"{name}.B"] = torch.zeros(24, 3, dtype=torch.int32)
    got = wave(adapted, texts).train(PLAIN, some, round=0)
    assert f"{name}.A is (5, 24) torch.float64, the adapter here has (3, 24)" in str(got[0])
    assert f"the factors of {name} have ranks 3, 5; needed is one rank" in str(got[1])
    assert f"{name}.B is (24, 3) torch.int32" in str(got[2])
    assert not isinstance(got[3], ValueError)


def test_a_round_that_trains_nothing_and_a_base_that_does_not_fit_are_said(adapted: Adapted, texts: Examples) -> None:
    made, start = wave(adapted, texts), adapted.read()
    assert all("this round trains no tensor" in str(one) for one in made.train(Phase(trains=lambda name: False), jobs(start), round=0))
    product = LowRank(torch.zeros(3, 1), torch.zeros(1, 3))
    some = [replace(job, broadcast=Broadcast(job.broadcast.tensors, ({"bert.nowhere": product},))) for job in jobs(start)]
    assert all("base_delta names the layer bert.nowhere" in str(one) for one in made.train(PLAIN, some, round=0))
    assert not any(isinstance(one, ValueError) for one in made.train(PLAIN, jobs(start), round=0))


def test_models_that_only_look_like_a_family_get_no_shortcut() -> None:
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
        job = Job(0, Broadcast(apart(adapted.read(), 0)), torch.arange(2), WORK, torch.Generator().manual_seed(0))
        engine = Engine(adapted, data, Options(), known={"fixed": 8, "tokens": 64, "wave": 4})
        (got,) = engine.train(PLAIN, [job], round=0)
        want = train(adapted, PLAIN, data, replace(job, rng=torch.Generator().manual_seed(0)), round=0)
        assert farthest([got], [want]) < 1e-10


@pytest.mark.parametrize("kind", ["bert", "vit", "llama_classifier"])
def test_a_base_in_half_precision_is_stacked_too(kind: str, tiny, examples, caplog) -> None:
    base: Base = tiny(kind, torch.bfloat16)
    adapted, data = Lora(rank=3, targets=rf".*[.]1[.].*({'|'.join(QV[kind])})").attach(base, seed=0), examples(base)
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


def test_padding_teaches_an_adapter_of_embeddings_nothing(tiny) -> None:
    base: Base = tiny("bert")
    adapted = Lora(rank=3, targets=("word_embeddings", "query")).attach(base, seed=0)
    rows = [[5, 0, 7, 9], [3, 4], [0, 8, 6], [11, 12, 13]]  # 0 is the padding's word
    data = tokens(rows * 3, torch.arange(12) % 3, padding=0)
    check(adapted, data)


@pytest.mark.parametrize("kind", ["bert", "vit", "gpt2", "llama_classifier"])
@pytest.mark.parametrize("targets", ["all-linear", "q,v"])
def test_clipped_sums_equal_a_loop_over_examples(kind: str, targets: str, tiny, examples) -> None:
    base: Base = tiny(kind)
    adapted, data = Lora(rank=3, targets=QV[kind] if targets == "q,v" else targets).attach(base, seed=0), examples(base)
    start, rate = adapted.read(), 0.02
    drawn = {0: [OWN[0][:3]], 1: [OWN[1][:0]], 2: [OWN[2]], 3: [OWN[3]]}  # the second client's draw is empty
    want = []
    for job in jobs(start):
        adapted.fill(job.start)
        moving = adapted.select(lambda name: True)
        total = {name: torch.zeros_like(p) for name, p in moving.items()}
        norms = []
        for row in drawn[job.client][0]:
            inputs, targets_ = data.batch(row.view(1))
            (loss,) = losses(base.task, adapted.logits(inputs), targets_)
            grads = dict(zip(moving, torch.autograd.grad(loss, list(moving.values())), strict=True))
            norms.append(float(torch.stack([g.square().sum() for g in grads.values()]).sum().sqrt()))
            for name, grad in grads.items():
                total[name] += grad * min(1.0, 0.1 / (norms[-1] + 1e-6))
        assert not norms or max(norms) > 0.1
        scales = {name: adapted.scales.get(name, 1.0) for name in moving}
        want.append({name: (moving[name].detach() - rate * total[name] / 4.0) * scales[name] for name in moving})
    work = Training(steps=1, batch=4, optimizer="sgd", lr=rate, head_lr=rate)
    made = wave(adapted, data, private=Private(clip=0.1, expected=4.0), draw=lambda job: drawn[job.client])
    for done, end in zip(made.train(PLAIN, jobs(start, work), round=0), want, strict=True):
        assert not isinstance(done, ValueError)
        assert max(float((done[0].tensors[name] - tensor).abs().max()) for name, tensor in end.items()) < 1e-12


def test_noise_is_a_clients_own_and_scaled_by_the_clip(adapted: Adapted, texts: Examples) -> None:
    asked: list[tuple[int, int]] = []

    def noise(client: int, size: int) -> Tensor:
        asked.append((client, size))
        return torch.full((size,), float(client), dtype=torch.float64)

    start, work = adapted.read(), Training(steps=1, batch=4, optimizer="sgd", lr=1.0, head_lr=1.0)
    common = {"draw": lambda job: [job.rows]}
    quiet = wave(adapted, texts, private=Private(clip=0.5, expected=4.0), **common).train(PLAIN, jobs(start, work), round=0)
    loud = wave(adapted, texts, private=Private(0.5, 4.0, 3.0, noise), **common).train(PLAIN, jobs(start, work), round=0)
    size = sum(t.numel() for t in start.values())
    assert asked == [(client, size) for client in range(4)]
    for client, (one, other) in enumerate(zip(quiet, loud, strict=True)):
        for name in start:
            want = -3.0 * 0.5 * client / 4.0 * adapted.scales.get(name, 1.0)
            torch.testing.assert_close(
                other[0].tensors[name] - one[0].tensors[name], torch.full_like(start[name], want), rtol=0, atol=1e-12
            )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
def test_clipped_sums_equal_those_of_opacus(tiny, examples) -> None:
    """Opacus' own hooks on stock peft, LoRA on linear layers and the head."""
    from opacus.grad_sample import GradSampleModule

    base: Base = tiny("bert")
    adapted, data = Lora(rank=3).attach(base, seed=0), examples(base)
    (job,) = jobs(adapted.read())[:1]
    work = Training(steps=1, batch=4, optimizer="sgd", lr=1.0, head_lr=1.0)
    made = wave(adapted, data, private=Private(clip=0.5, expected=4.0), draw=lambda job: [job.rows])
    (done,) = made.train(PLAIN, [replace(job, work=work)], round=0)
    assert not isinstance(done, ValueError)
    adapted.fill(job.start)
    moving = adapted.select(lambda name: True)
    for inner in base.module.modules():
        if isinstance(inner, nn.Dropout):
            inner.p = 0.0
    base.module.train()  # Opacus records in training mode only
    hooked = GradSampleModule(base.module, loss_reduction="sum", strict=False)
    inputs, targets = data.batch(job.rows)
    losses(base.task, hooked(**inputs).logits, targets).sum().backward()
    norm = torch.stack([p.grad_sample.flatten(1).square().sum(1) for p in moving.values()]).sum(0).sqrt()
    factor = (0.5 / (norm + 1e-6)).clamp(max=1.0)
    for name, p in moving.items():
        total = torch.einsum("n,n...->...", factor, p.grad_sample) / 4.0
        far = (done[0].tensors[name] - (p.detach() - total) * adapted.scales.get(name, 1.0)).abs().max()
        assert far < 1e-6
    hooked.to_standard_module()
    base.module.eval()


def test_poisson_batches_have_the_rate_and_may_be_empty() -> None:
    rows = torch.arange(100, 140)
    drawn = poisson(rows, 0.05, 2000, torch.Generator().manual_seed(0))
    sizes = torch.tensor([len(each) for each in drawn], dtype=torch.float64)
    assert abs(float(sizes.mean()) - 2.0) < 4 * (40 * 0.05 * 0.95 / 2000) ** 0.5
    assert 0 in sizes
    assert all(len(set(each.tolist())) == len(each) and set(each.tolist()) <= set(rows.tolist()) for each in drawn)


def test_non_finite_example_gradients_count_as_zero(tiny) -> None:
    base: Base = tiny("vit")
    adapted = Lora(rank=2).attach(base, seed=0)
    pixels = torch.randn(12, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    broken = pixels.clone()
    broken[3] = float("nan")
    labels, work = torch.arange(12) % 3, Training(steps=1, batch=4, optimizer="sgd", lr=1.0)
    start, ends = adapted.read(), []
    for images, rows in ((broken, OWN[0]), (pixels, OWN[0][OWN[0] != 3])):
        made = wave(adapted, Images(images, labels), private=Private(clip=0.5, expected=4.0), draw=lambda job, rows=rows: [rows])
        (update, _) = train_one(made, jobs(start, work)[0])
        ends.append(update)
    assert all(torch.allclose(ends[0][name], ends[1][name], rtol=0, atol=1e-12) for name in start)


def train_one(made: Wave, job: Job) -> tuple[Tensors, Tensors]:
    """Ends of one job even where its loss is no number: what the sums were is seen in the stack."""
    made.train(PLAIN, [job], round=0)
    return made.way.stack.read(0, job.start), {}


@pytest.mark.parametrize("kind", ["bert", "vit", "llama_classifier", "gpt2"])
def test_personal_models_are_scored_in_one_pass(kind: str, tiny, examples) -> None:
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


def test_what_frozen_layers_give_is_computed_once_for_all_rounds_and_strategies(tiny, examples) -> None:
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


def test_waves_of_every_kind_give_the_same_bits_again(adapted: Adapted, texts: Examples) -> None:
    ends = []
    for _ in range(2):
        (done,) = wave(adapted, texts).train(PLAIN, jobs({n: torch.zeros_like(t) for n, t in adapted.read().items()})[2:3], round=0)
        assert not isinstance(done, ValueError)
        ends.append(done[0].tensors)
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.parametrize("memory", [1 << 30, 0])
def test_kept_layers_equal_the_whole_model_to_rounding(memory: int, tiny, examples, tmp_path) -> None:
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
def test_recomputed_layers_give_the_same_and_are_really_recomputed(kind: str, tiny, examples) -> None:
    base: Base = tiny(kind)
    adapted, data = Lora(rank=3).attach(base, seed=0), examples(base)
    start = adapted.read()
    want = [train(adapted, PLAIN, data, job, round=0) for job in jobs(start)]
    calls = {False: 0, True: 0}
    for checkpointing in (False, True):
        way = plain(Stack(adapted, checkpointing=checkpointing), data)
        first = next(inner for path, inner in way.stack.layers.items() if path.endswith(QV[kind][0]))  # a layer's last are not run again
        first.register_forward_hook(lambda *_, on=checkpointing: calls.update({on: calls[on] + 1}))
        assert farthest(Wave(way, way, Plan(6, 40, 8)).train(PLAIN, jobs(start), round=0), want) < 1e-10
    assert calls[True] == 2 * calls[False]
    assert not any(inner.training for inner in base.module.modules())


@pytest.mark.parametrize("kind", ["bert", "llama_classifier"])
def test_bfloat16_products_are_near_and_only_where_asked(kind: str, tiny, examples) -> None:
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


def test_what_cannot_be_stacked_goes_to_the_reference_with_one_line_that_says_why(tiny, examples, caplog) -> None:
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
def test_the_engine_leaves_the_model_as_it_was(stacked: bool, adapted: Adapted, texts: Examples) -> None:
    start, inputs = adapted.read(), texts.batch(torch.arange(6))[0]
    before = adapted.logits(inputs).detach()
    engine = Engine(adapted, texts, Options(stacked=stacked), known={"fixed": 8, "tokens": 64, "wave": 4})
    engine.train(PLAIN, jobs(start), round=0)
    engine.score(jobs(start), [torch.ones(12)] * 4, texts)
    adapted.fill(start)
    assert torch.equal(adapted.logits(inputs), before)


def test_the_engines_check_catches_a_model_that_does_something_else(adapted: Adapted, texts: Examples, monkeypatch) -> None:
    import clients.prefix as prefix
    from clients.tails import FAMILIES

    wrong = replace(FAMILIES[0], tail=lambda layer, hidden, row, more: hidden[:, :1] * 1.01)
    monkeypatch.setattr(prefix, "FAMILIES", (wrong,))
    engine = Engine(adapted, texts, Options(), known={"fixed": 8, "tokens": 64, "wave": 4})
    start = adapted.read()
    want = [train(adapted, PLAIN, texts, job, round=0) for job in jobs(start)]
    assert farthest(engine.train(PLAIN, jobs(start), round=0), want) < 1e-10  # by the whole model


def test_a_wave_of_one_has_the_batches_of_the_reference(adapted: Adapted, texts: Examples) -> None:
    start = adapted.read()
    for job, other in zip(jobs(start), jobs(start), strict=True):
        assert [b.tolist() for b in batches(job.rows, job.work, job.rng)] == [
            b.tolist() for b in batches(other.rows, other.work, other.rng)
        ]
        want = train(adapted, PLAIN, texts, jobs(start)[job.client], round=0)
        assert farthest(wave(adapted, texts).train(PLAIN, [jobs(start)[job.client]], round=0), [want]) < 1e-10
