"""Clients of unequal ranks and scales in one wave, cores and heads between frozen factors: against the reference, in float64."""

from dataclasses import replace

import pytest
import torch

from clients.evaluate import evaluate
from clients.train import Job, train
from fedpeft.adapters.lora import Lora
from fedpeft.adapters.lora_sb import LoraSB
from fedpeft.adapters.ravan import Ravan
from fedpeft.config import Training
from fedpeft.messages import Broadcast
from fedpeft.strategy import Federation, Phase
from fedpeft.tensors import is_a, is_b, is_factor, not_factor
from strategies.fed_sb import PRINT, fed_sb, fingerprint
from strategies.ravan import ravan

PLAIN = Phase()
RANKS, ALPHAS = (1, 5, 2, 3), (7.0, 2.5, 7.0, 12.0)  # of the four clients
KINDS = ["bert", "gpt2", "llama", "vit"]
each_kind = pytest.mark.parametrize("kind", KINDS)
WORKS = {
    "adamw": Training(steps=5, batch=3, lr=5e-3, weight_decay=0.3, clip=0.5),
    "momentum": Training(steps=5, batch=3, optimizer="sgd", lr=0.05, momentum=0.9, weight_decay=0.1, clip=1.0),
    "unequal steps": Training(steps=None, epochs=1.5, batch=2, lr=5e-3, clip=0.3),
}


@pytest.fixture
def mixed(tiny, apart, own):
    """Makes four jobs, and each client's LoRA of its own rank and alpha alone on a base of that kind."""

    def make(kind, work):
        alone = [Lora(rank=rank, alpha=alpha).attach(tiny(kind), seed=0) for rank, alpha in zip(RANKS, ALPHAS, strict=True)]
        jobs = [
            Job(k, Broadcast(apart(one.read(), k)), own[k], work, torch.Generator().manual_seed(k), scales=one.scales)
            for k, one in enumerate(alone)
        ]
        return jobs, alone

    return make


def again(jobs):
    """The same jobs with their generators where they began."""
    return [replace(job, rng=torch.Generator().manual_seed(job.client)) for job in jobs]


def is_zero(tensor, name, rank):
    """True if all that lies beyond `rank` is zero."""
    return not any(tensor.narrow(axis, rank, tensor.shape[axis] - rank).any() for axis in ((0,) if is_a(name) else (1,)))


@pytest.mark.parametrize("work", WORKS.values(), ids=WORKS.keys())
@each_kind
def test_ranks_and_scales_of_their_own_equal_an_adapter_of_that_rank_and_scale(
    kind, work, mixed, tiny, examples, wave, farthest
) -> None:  # fmt: skip
    jobs, alone = mixed(kind, work)
    want = [train(one, PLAIN, examples(one.base), job, round=0) for one, job in zip(alone, jobs, strict=True)]
    base = tiny(kind)
    adapted, data = Lora(rank=5, alpha=3.0).attach(base, seed=0), examples(base)
    start, scales = adapted.read(), dict(adapted.scales)
    for job, done in zip(again(jobs), want, strict=True):  # the reference, on the server's adapter
        assert farthest([train(adapted, PLAIN, data, job, round=0)], [done]) < 1e-10
        for name, parameter in adapted.parameters.items():
            assert not is_factor(name) or is_zero(parameter, name, RANKS[job.client]), name
    assert adapted.scales == scales
    adapted.fill(start)
    made = wave(adapted, data)
    assert farthest(made.train(PLAIN, again(jobs), round=0), want) < 1e-10
    for name, value in made.way.stack.clients.values.items():
        assert not is_factor(name) or all(is_zero(value[k], name, rank) for k, rank in enumerate(RANKS)), name
    assert any(float((update.tensors[n] - jobs[1].start[n]).abs().max()) > 1e-3 for update, _ in want[1:2] for n in update.tensors)


@each_kind
def test_personal_models_of_unequal_ranks_are_scored_in_one_pass(kind, mixed, tiny, examples, wave) -> None:
    jobs, alone = mixed(kind, WORKS["adamw"])
    weights = [torch.rand(12, generator=torch.Generator().manual_seed(k), dtype=torch.float64) for k in range(4)]
    base = tiny(kind)
    adapted, data = Lora(rank=5, alpha=3.0).attach(base, seed=0), examples(base)
    got = wave(adapted, data).score(jobs, [weight[job.rows] for job, weight in zip(jobs, weights, strict=True)])
    for job, weight, one, found in zip(jobs, weights, alone, got, strict=True):
        chosen = torch.zeros(12, dtype=torch.float64)
        chosen[job.rows] = weight[job.rows]
        there = evaluate(adapted, job.broadcast, {}, data, weights=chosen, batch=5, scales=job.scales)
        own = evaluate(one, job.broadcast, {}, examples(one.base), weights=chosen, batch=5)
        assert found.loss == pytest.approx(own.loss, abs=1e-10)
        assert there.loss == pytest.approx(own.loss, abs=1e-10)
        assert found.accuracy == pytest.approx(own.accuracy, abs=1e-6)


def test_a_later_wave_of_equal_scales_does_not_see_those_of_the_wave_before(mixed, tiny, examples, wave, farthest) -> None:
    jobs, _ = mixed("bert", WORKS["adamw"])
    base = tiny("bert")
    adapted, data = Lora(rank=5, alpha=3.0).attach(base, seed=0), examples(base)
    made = wave(adapted, data)
    made.train(PLAIN, jobs, round=0)
    whole = [replace(job, broadcast=Broadcast(adapted.read()), scales=None) for job in again(jobs)]
    want = [train(adapted, PLAIN, data, job, round=0) for job in whole]
    assert farthest(made.train(PLAIN, again(whole), round=0), want) < 1e-10


def test_a_scale_of_their_own_needs_an_adapter_that_has_scales(tiny, examples, jobs) -> None:
    base = tiny("vit")
    adapted = Lora(rank=3).attach(base, seed=0)
    adapted.set_scale = None
    (job,) = jobs(adapted.read())[:1]
    with pytest.raises(ValueError, match=r"one scale for all clients, not 9 for .*; set adapter=lora"):
        train(adapted, PLAIN, examples(base), replace(job, scales=dict.fromkeys(adapted.scales, 9.0)), round=0)


@pytest.mark.parametrize("trained", ["heads", "all"])
@each_kind
def test_heads_between_frozen_factors(kind, trained, tiny, examples, check) -> None:
    base = tiny(kind)
    phase = ravan(heads=3).phase(0) if trained == "heads" else PLAIN
    check(Ravan(rank=2, heads=3).attach(base, seed=0), examples(base), phase)


def test_heads_go_up_with_their_scales_folded_in_and_factors_stay(tiny, examples, jobs, wave) -> None:
    base = tiny("bert")
    adapted, phase = Ravan(rank=2, heads=3).attach(base, seed=0), ravan(heads=3).phase(0)
    some = jobs(adapted.read())
    sent = wave(adapted, examples(base)).train(phase, some, round=0)
    bare = wave(adapted, examples(base)).train(Phase(trains=not_factor), again(some), round=0)
    for (update, kept), (whole, _) in zip(sent, bare, strict=True):
        assert kept == {}
        assert not any(is_factor(name) or name.endswith(".s") for name in update.tensors)
        for name in update.tensors:
            if name.endswith(".H"):
                scales = whole.tensors[name[:-2] + ".s"]
                assert torch.equal(update.tensors[name], scales[:, None, None] * whole.tensors[name])
        start = some[update.client].start
        assert all(torch.equal(whole.tensors[name], start[name]) for name in start if is_factor(name))


def sealed(jobs):
    """The jobs under one B and A, with the server's fingerprint of them, as Fed-SB sends them."""
    factors = {name: tensor for name, tensor in jobs[0].broadcast.tensors.items() if is_factor(name)}
    made = []
    for job in jobs:
        tensors = job.broadcast.tensors | factors
        made.append(replace(job, broadcast=Broadcast(tensors | {PRINT: fingerprint(tensors)})))
    return made


@pytest.mark.parametrize("start", ["random", "xs"])
@each_kind
def test_cores_under_the_phase_of_fed_sb(kind, start, tiny, examples, jobs, wave, farthest) -> None:
    """With capped ranks: Llama's keys and values have 12 rows."""
    base = tiny(kind)
    adapted, data = LoraSB(rank=16, start=start, capped=True).attach(base, seed=0), examples(base)
    phase, work = fed_sb(Federation()).phase(0), WORKS["adamw"]
    some = sealed(jobs(adapted.read(), work))
    want = [train(adapted, phase, data, job, round=0) for job in some]
    assert farthest(wave(adapted, data).train(phase, again(some), round=0), want) < 1e-10
    for update, _ in want:
        assert {name.rpartition(".")[2] for name in update.tensors if not name.startswith("head.")} == {"R"}
        assert all((t - some[update.client].start[n]).abs().max() > 1e-5 for n, t in update.tensors.items())


def test_a_client_whose_factors_are_not_the_servers_is_refused_alone(tiny, examples, jobs, wave) -> None:
    base = tiny("bert")
    adapted, phase = LoraSB(rank=3).attach(base, seed=0), fed_sb(Federation()).phase(0)
    some = sealed(jobs(adapted.read()))
    name = next(name for name in adapted.parameters if is_b(name))
    some[2] = replace(some[2], memory={name: some[2].start[name] * (1 + 1e-15)})
    got = wave(adapted, examples(base)).train(phase, some, round=0)
    assert [isinstance(one, ValueError) for one in got] == [False, False, True, False]
    assert "its B and A are not those of the server" in str(got[2])
