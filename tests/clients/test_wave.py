"""A wave against the reference trainer, one client at a time, in float64: the engine changes speed and nothing else."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from clients.train import batches, train
from fedpeft.adapters.base import Adapted
from fedpeft.adapters.inplace import InPlace
from fedpeft.adapters.lora import Lora
from fedpeft.adapters.lora_sb import LoraSB
from fedpeft.adapters.tuner import Tuner
from fedpeft.config import Training
from fedpeft.lowrank import LowRank
from fedpeft.messages import Broadcast
from fedpeft.models.base import Base, Examples
from fedpeft.models.load import tokens
from fedpeft.strategy import Phase
from fedpeft.tensors import is_a, is_head, not_a, not_b

KINDS = ["bert", "roberta", "vit", "gpt2", "gpt2_classifier", "llama", "llama_classifier"]
PLAIN = Phase()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("targets", ["all-linear", "q,v"])
def test_five_steps_of_four_unequal_clients_equal_one_at_a_time(kind: str, targets: str, tiny, examples, check, query_value) -> None:
    base: Base = tiny(kind)
    adapted = Lora(rank=3, targets=query_value[kind] if targets == "q,v" else targets).attach(base, seed=0)
    check(adapted, examples(base))


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_layers_below_the_lowest_adapter_are_kept_and_the_last_is_cut(kind, layer, tiny, examples, wave, check, query_value) -> None:
    base: Base = tiny(kind)
    path = {"bert": "bert.encoder.layer", "roberta": "roberta.encoder.layer", "vit": "vit.layers"}.get(
        kind, "transformer.h" if "gpt2" in kind else "model.layers"
    )
    adapted = Lora(rank=3, targets=rf"{path.replace('.', '[.]')}[.]{layer}[.].*({'|'.join(query_value[kind])})").attach(base, seed=0)
    made = wave(adapted, examples(base))
    assert made.way.below == layer
    assert made.way.tail == (base.task != "language")
    check(adapted, examples(base))


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
def test_every_kind_of_phase_gives_what_the_reference_gives(phase: Phase, adapted: Adapted, texts: Examples, check) -> None:
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
def test_every_optimizer_gives_what_the_reference_gives(work: Training, adapted: Adapted, texts: Examples, check) -> None:
    check(adapted, texts, work=work)


@pytest.mark.parametrize("kind", ["bert", "vit", "gpt2", "llama_classifier"])
def test_dropout_is_each_clients_own_and_the_same_in_a_wave(kind: str, tiny, examples, apart, jobs, check) -> None:
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


def test_clients_with_their_own_rates_step_at_their_own_rates(adapted: Adapted, texts: Examples, jobs, wave, farthest, work) -> None:
    start = adapted.read()
    some = [replace(job, work=replace(work, lr=1e-3 * (job.client + 1), head_lr=None)) for job in jobs(start)]
    want = [train(adapted, PLAIN, texts, job, round=0) for job in some]
    again = [replace(job, rng=torch.Generator().manual_seed(job.client)) for job in some]
    assert farthest(wave(adapted, texts).train(PLAIN, again, round=0), want) < 1e-10


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("adapter", [InPlace("head"), InPlace("bias")], ids=["head", "bias"])
def test_heads_and_biases_are_stacked_too(adapter: Any, kind: str, tiny, examples, check) -> None:
    base: Base = tiny(kind)
    if not (base.head if adapter.trains == "head" else "llama" not in kind):
        pytest.skip(f"{kind} has no {adapter.trains}")
    check(adapter.attach(base, seed=0), examples(base))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trained", ["R", "all"])
def test_cores_between_frozen_factors(trained: str, kind: str, tiny, examples, check) -> None:
    base: Base = tiny(kind)
    phase = Phase(trains=lambda name: name.endswith(".R") or is_head(name)) if trained == "R" else PLAIN
    check(LoraSB(rank=3).attach(base, seed=0), examples(base), phase)


@pytest.mark.parametrize("kind", ["llama", "bert", "gpt2"])
def test_norms_are_stacked(kind: str, tiny, examples, check) -> None:
    base: Base = tiny(kind)
    adapted = Tuner("LN_TUNING", {"target_modules": {"llama": ["norm", "input_layernorm"], "bert": ["LayerNorm"], "gpt2": ["ln_1"]}[kind]})
    made = adapted.attach(base, seed=0)
    check(made, examples(base))


@pytest.mark.parametrize(
    ("kind", "targets"), [("bert", ("word_embeddings", "query")), ("gpt2", ("wte", "c_fc")), ("llama", ("embed_tokens", "lm_head"))]
)
def test_embeddings_and_the_language_head(kind: str, targets: tuple[str, ...], tiny, examples, check) -> None:
    base: Base = tiny(kind)
    check(Lora(rank=3, targets=targets).attach(base, seed=0), examples(base))


@pytest.mark.parametrize("kind", ["bert", "gpt2_classifier"])
def test_products_added_to_the_base_count_and_are_taken_off(kind: str, tiny, examples, jobs, wave, farthest) -> None:
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


def test_changing_one_clients_data_changes_no_other_client_at_all(adapted: Adapted, texts: Examples, jobs, wave, own) -> None:
    start, phase = adapted.read(), Phase(work="gradient")
    made = wave(adapted, texts, short=False)
    first = made.train(phase, jobs(start), round=0)
    assert isinstance(texts.labels, Tensor)
    texts.labels[own[0]] = (texts.labels[own[0]] + 1) % 3
    second = made.train(phase, jobs(start), round=0)
    for client, (one, other) in enumerate(zip(first, second, strict=True)):
        assert not isinstance(one, ValueError)
        assert not isinstance(other, ValueError)
        same = all(torch.equal(tensor, other[0].tensors[name]) for name, tensor in one[0].tensors.items())
        assert same == (client != 0)


def test_a_client_that_breaks_is_named_and_the_others_go_on(adapted: Adapted, texts: Examples, jobs, wave, farthest) -> None:
    some = jobs(adapted.read())
    name = next(iter(some[1].broadcast.tensors))
    some[1].broadcast.tensors[name][:] = float("inf")
    some[2].broadcast.tensors.pop(name)
    want = [train(adapted, PLAIN, texts, job, round=3) for job in jobs(adapted.read()) if job.client in (0, 3)]
    got = wave(adapted, texts).train(PLAIN, some, round=3)
    assert "client 1, round 3: the loss became nan at local step 0" in str(got[1])
    assert f"{name} was neither sent nor kept" in str(got[2])
    assert farthest([got[0], got[3]], want) < 1e-10


def test_other_tensors_than_the_adapters_are_refused(adapted: Adapted, texts: Examples, jobs, wave) -> None:
    some = jobs(adapted.read())
    some[0].broadcast.tensors["stranger.A"] = torch.zeros(1)
    some[1].broadcast.tensors["head.classifier.bias"] = torch.zeros(9)
    got = wave(adapted, texts).train(PLAIN, some, round=0)
    assert "stranger.A is not a tensor of this adapter" in str(got[0])
    assert "head.classifier.bias is (9,) torch.float32, the adapter here has (3,) torch.float64" in str(got[1])
    assert not isinstance(got[2], ValueError)


def test_tensors_that_do_not_fit_one_another_are_refused_and_the_others_go_on(adapted: Adapted, texts: Examples, jobs, wave) -> None:
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


def test_a_round_that_trains_nothing_and_a_base_that_does_not_fit_are_said(adapted: Adapted, texts: Examples, jobs, wave) -> None:
    made, start = wave(adapted, texts), adapted.read()
    assert all("this round trains no tensor" in str(one) for one in made.train(Phase(trains=lambda name: False), jobs(start), round=0))
    product = LowRank(torch.zeros(3, 1), torch.zeros(1, 3))
    some = [replace(job, broadcast=Broadcast(job.broadcast.tensors, ({"bert.nowhere": product},))) for job in jobs(start)]
    assert all("base_delta names the layer bert.nowhere" in str(one) for one in made.train(PLAIN, some, round=0))
    assert not any(isinstance(one, ValueError) for one in made.train(PLAIN, jobs(start), round=0))


def test_padding_teaches_an_adapter_of_embeddings_nothing(tiny, check) -> None:
    base: Base = tiny("bert")
    adapted = Lora(rank=3, targets=("word_embeddings", "query")).attach(base, seed=0)
    rows = [[5, 0, 7, 9], [3, 4], [0, 8, 6], [11, 12, 13]]  # 0 is the padding's word
    data = tokens(rows * 3, torch.arange(12) % 3, padding=0)
    check(adapted, data)


def test_waves_of_every_kind_give_the_same_bits_again(adapted: Adapted, texts: Examples, jobs, wave) -> None:
    ends = []
    for _ in range(2):
        (done,) = wave(adapted, texts).train(PLAIN, jobs({n: torch.zeros_like(t) for n, t in adapted.read().items()})[2:3], round=0)
        assert not isinstance(done, ValueError)
        ends.append(done[0].tensors)
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_a_wave_of_one_has_the_batches_of_the_reference(adapted: Adapted, texts: Examples, jobs, wave, farthest) -> None:
    start = adapted.read()
    for job, other in zip(jobs(start), jobs(start), strict=True):
        assert [b.tolist() for b in batches(job.rows, job.work, job.rng)] == [
            b.tolist() for b in batches(other.rows, other.work, other.rng)
        ]
        want = train(adapted, PLAIN, texts, jobs(start)[job.client], round=0)
        assert farthest(wave(adapted, texts).train(PLAIN, [jobs(start)[job.client]], round=0), [want]) < 1e-10
