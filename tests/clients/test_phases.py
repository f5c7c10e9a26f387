"""Phases with a term of their own, tensors of a strategy's, or products added to the base, in waves: against the reference, in float64."""

from dataclasses import replace

import pytest
import torch

from clients.engine import Engine, _by_base
from clients.train import rates, train
from clients.wave import Wave
from fedpeft.adapters.lora import Lora
from fedpeft.config import Options, Training
from fedpeft.lowrank import LowRank, cut
from fedpeft.messages import Broadcast
from fedpeft.records import Packer, unpack_broadcast
from fedpeft.strategy import Federation, Phase
from fedpeft.tensors import is_own, targets
from strategies.fedprox import fedprox
from strategies.hetlora import hetlora
from strategies.scaffold import scaffold

RANKS = (3, 5, 3, 2)  # of the four clients: three groups of equal shapes
SGD = Training(steps=4, batch=2, optimizer="sgd", lr=0.05)
KNOWN = {"fixed": 8, "tokens": 64, "wave": 4}
each_kind = pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "vit"])


@pytest.fixture
def mixed(tiny, examples, jobs):
    """A LoRA of rank 5, examples, and what makes jobs of unequal ranks and scales, generators at their beginning."""

    def make(kind):
        base = tiny(kind)
        adapted = Lora(rank=5, alpha=3.0).attach(base, seed=0)
        start = adapted.read()

        def some(*work):
            return [
                replace(job, broadcast=Broadcast(cut(job.broadcast.tensors, rank)), scales=dict.fromkeys(adapted.scales, 4.0 / (rank + 1)))
                for job, rank in zip(jobs(start, *work), RANKS, strict=True)
            ]

        return adapted, examples(base), some

    return make


def counted(phase):
    """The phase, and a list that grows with each call of its loss."""
    calls = []
    return replace(phase, loss=lambda now, start: calls.append(1) or phase.loss(now, start)), calls


@each_kind
def test_fedprox_with_unequal_ranks_is_one_call_for_each_group_of_equal_shapes(kind, mixed, wave, farthest) -> None:
    adapted, data, some = mixed(kind)
    phase, calls = counted(fedprox(mu=3.0).phase(0))
    want = [train(adapted, phase, data, job, round=0) for job in some()]
    without = [train(adapted, Phase(), data, job, round=0) for job in some()]
    assert len(calls) == 4 * 5
    calls.clear()
    assert farthest(wave(adapted, data).train(phase, some(), round=0), want) < 1e-10
    assert len(calls) == 3 * 5
    assert any((u.tensors[n] - v.tensors[n]).abs().max() > 1e-4 for (u, _), (v, _) in zip(want, without, strict=True) for n in u.tensors)


@each_kind
def test_hetlora_with_unequal_ranks_prunes_as_the_reference_does(kind, mixed, wave, farthest) -> None:
    """From a fresh B too, where the norm of the last rows is zero and has no slope."""
    adapted, data, some = mixed(kind)
    phase, fresh = hetlora(Federation(), penalty=0.5, gamma=0.7).phase(0), adapted.read()

    def jobs():
        return [replace(job, broadcast=Broadcast(fresh)) if job.client == 1 else job for job in some()]

    want = [train(adapted, phase, data, job, round=0) for job in jobs()]
    assert farthest(wave(adapted, data).train(phase, jobs(), round=0), want) < 1e-10
    layer = targets(fresh)[0]
    ranks = [len(update.tensors[f"{layer}.A"]) for update, _ in want]
    assert ranks[1] == 5  # what was zero has grown
    assert ranks[0] == ranks[2] == 2
    assert ranks[3] == 1


@each_kind
def test_scaffold_with_scales_of_their_own_and_a_client_that_comes_for_the_first_time(kind, mixed, wave, farthest) -> None:
    adapted, data, some = mixed(kind)
    phase = scaffold(Federation(optimizer="sgd")).phase(0)

    def jobs():
        made = []
        for job in some(SGD):
            rng = torch.Generator().manual_seed(100 + job.client)
            tensors = job.broadcast.tensors
            control, mine = (
                {f"{owner}/{n}": 0.1 * torch.randn(t.shape, generator=rng, dtype=t.dtype) for n, t in tensors.items()}
                for owner in ("control", "mine")
            )
            memory = rates(adapted, SGD, job.scales) | (mine if job.client != 2 else {})
            made.append(replace(job, broadcast=Broadcast(tensors | control), memory=memory))
        return made

    want = [train(adapted, phase, data, job, round=0) for job in jobs()]
    assert farthest(wave(adapted, data).train(phase, jobs(), round=0), want) < 1e-10
    for update, kept in want:
        names = {name for name in update.tensors if not is_own(name)}
        assert set(kept) == {f"mine/{name}" for name in names}
        assert set(update.tensors) == names | {f"control/{name}" for name in names}


def test_scaffolds_correction_is_a_constant_added_to_each_gradient(mixed, wave) -> None:
    """One plain step: now = start - rate (g + c - c_i), and the client's new variate is g itself (option II)."""
    adapted, data, some = mixed("bert")
    phase, one = scaffold(Federation(optimizer="sgd")).phase(0), replace(SGD, steps=1, batch=8)
    jobs = []
    for job in some(one):
        tensors = job.broadcast.tensors
        drawn = {f"control/{n}": torch.full_like(t, 0.3) for n, t in tensors.items()}
        mine = {f"mine/{n}": torch.full_like(t, -0.2) for n, t in tensors.items()}
        jobs.append(replace(job, broadcast=Broadcast(tensors | drawn), memory=rates(adapted, one, job.scales) | mine))
    slopes = wave(adapted, data).train(Phase(work="gradient"), some(one), round=0)
    for job, (update, kept), (slope, _) in zip(jobs, wave(adapted, data).train(phase, jobs, round=0), slopes, strict=True):
        for name, start in job.broadcast.tensors.items():
            if is_own(name):
                continue
            gradient = start - slope.tensors[name]
            rate = job.memory[f"rate/{name}"]
            torch.testing.assert_close(update.tensors[name], start - rate * (gradient + 0.5), rtol=0, atol=1e-12)
            torch.testing.assert_close(kept[f"mine/{name}"], gradient, rtol=0, atol=1e-10)
            torch.testing.assert_close(update.tensors[f"control/{name}"], 0.3 + gradient + 0.2, rtol=0, atol=1e-10)


def stacked(tensors, seed=0):
    """What FLoRA adds to the base: a chunk with a product for every layer."""
    rng = torch.Generator().manual_seed(seed)
    made = {}
    for layer in targets(tensors):
        (m, _), n = tensors[f"{layer}.B"].shape, tensors[f"{layer}.A"].shape[1]
        made[layer] = LowRank(
            0.1 * torch.randn(m, 4, generator=rng, dtype=torch.float64), torch.randn(4, n, generator=rng, dtype=torch.float64)
        )
    return made


def shared(jobs, chunks):
    """The jobs as a wave gets them: each broadcast unpacked alone, what they have in common the same tensors."""
    same, packer = {}, Packer()
    sent = [Broadcast(job.broadcast.tensors, chunks) for job in jobs]
    got = [unpack_broadcast(packer.pack(one).payload, same, same) for one in sent]
    return [replace(job, broadcast=one) for job, one in zip(jobs, got, strict=True)]


@each_kind
def test_floras_clients_of_unequal_rank_on_one_base_make_one_wave(kind, mixed, farthest, monkeypatch) -> None:
    adapted, data, some = mixed(kind)
    chunks = (stacked(adapted.read(), 0), stacked(adapted.read(), 1))
    want = [train(adapted, Phase(), data, job, round=1) for job in shared(some(), chunks)]
    without = [train(adapted, Phase(), data, job, round=1) for job in some()]
    engine, sizes, real = Engine(adapted, data, Options(), known=KNOWN), [], Wave.train
    monkeypatch.setattr(Wave, "train", lambda self, phase, jobs, *, round: sizes.append(len(jobs)) or real(self, phase, jobs, round=round))
    jobs = shared(some(), chunks)
    assert len({id(part) for job in jobs for part in job.broadcast.base_delta[0].values()}) == 4 * len(chunks[0])
    assert farthest(engine.train(Phase(), jobs, round=1), want) < 1e-10
    assert sizes == [4]
    assert all(abs(u.metrics["loss"] - v.metrics["loss"]) > 1e-3 for (u, _), (v, _) in zip(want, without, strict=True))


def test_jobs_on_unequal_bases_are_apart(mixed, farthest) -> None:
    """One client has none yet, one lacks the last chunk, one has the same chunks in another order: each is a base of its own."""
    adapted, data, some = mixed("bert")
    a, b = stacked(adapted.read(), 0), stacked(adapted.read(), 1)
    chunks = ((a, b), (a,), (), (b, a))

    def jobs():
        return [replace(job, broadcast=Broadcast(job.broadcast.tensors, mine)) for job, mine in zip(some(), chunks, strict=True)]

    assert [len(group) for group in _by_base(jobs())] == [1, 1, 1, 1]
    assert [len(group) for group in _by_base([jobs()[k] for k in (0, 0, 1, 2, 2)])] == [2, 1, 2]
    want = [train(adapted, Phase(), data, job, round=1) for job in jobs()]
    engine = Engine(adapted, data, Options(), known=KNOWN)
    assert farthest(engine.train(Phase(), jobs(), round=1), want) < 1e-10
