"""Clipped and noised sums of a wave against a loop over examples."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clients.train import Private, poisson
from fedpeft.adapters.base import Adapted
from fedpeft.adapters.lora import Lora
from fedpeft.adapters.lora_sb import LoraSB
from fedpeft.adapters.ravan import Ravan
from fedpeft.config import Training
from fedpeft.models.base import Base, Examples, Images
from fedpeft.models.score import losses
from fedpeft.privacy.noise import Secret, SeededInsecure
from fedpeft.strategy import Phase

PLAIN = Phase()


class Constant:
    """Noise of one number, as long as it was asked for."""

    def __init__(self, value: float) -> None:
        self.value, self.asked = value, list[int]()

    def normal(self, size: int) -> Tensor:
        """(size,) times the value."""
        self.asked.append(size)
        return torch.full((size,), self.value, dtype=torch.float64)

    def uniform(self, size: int) -> Tensor:
        """Never asked."""
        raise NotImplementedError


def private(clip: float, sigma: float = 0.0, source: Any = None, draw: Any = lambda rows: [rows]) -> Private:
    """Batches of four expected examples, without noise if `sigma` is 0."""
    return Private(clip, 4.0, sigma, source or Secret(), draw)


@pytest.mark.parametrize("kind", ["bert", "vit", "gpt2", "llama_classifier"])
@pytest.mark.parametrize("name", ["all-linear", "q,v", "lora_sb", "ravan"])
def test_clipped_sums_equal_a_loop_over_examples(kind: str, name: str, tiny, examples, jobs, wave, own, query_value) -> None:
    base: Base = tiny(kind)
    other = {"lora_sb": LoraSB(rank=3), "ravan": Ravan(rank=2, heads=3)}
    adapter = other.get(name) or Lora(rank=3, targets=query_value[kind] if name == "q,v" else name)
    adapted, data = adapter.attach(base, seed=0), examples(base)
    start, rate = adapted.read(), 0.02
    drawn = {0: [own[0][:3]], 1: [own[1][:0]], 2: [own[2]], 3: [own[3]]}  # the second client's draw is empty
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
    asked = [replace(job, private=private(0.1, draw=lambda rows, k=job.client: drawn[k])) for job in jobs(start, work)]
    for done, end in zip(wave(adapted, data).train(PLAIN, asked, round=0), want, strict=True):
        assert not isinstance(done, ValueError)
        assert max(float((done[0].tensors[name] - tensor).abs().max()) for name, tensor in end.items()) < 1e-12


def test_noise_is_a_clients_own_and_scaled_by_the_clip(adapted: Adapted, texts: Examples, jobs, wave) -> None:
    start, work = adapted.read(), Training(steps=1, batch=4, optimizer="sgd", lr=1.0, head_lr=1.0)
    sources = [Constant(float(client)) for client in range(4)]
    without = [replace(job, private=private(0.5)) for job in jobs(start, work)]
    with_it = [replace(job, private=private(0.5, 3.0, source)) for job, source in zip(jobs(start, work), sources, strict=True)]
    quiet, loud = (wave(adapted, texts).train(PLAIN, some, round=0) for some in (without, with_it))
    assert [source.asked for source in sources] == [[sum(t.numel() for t in start.values())]] * 4
    for client, (one, other) in enumerate(zip(quiet, loud, strict=True)):
        for name in start:
            want = -3.0 * 0.5 * client / 4.0 * adapted.scales.get(name, 1.0)
            torch.testing.assert_close(
                other[0].tensors[name] - one[0].tensors[name], torch.full_like(start[name], want), rtol=0, atol=1e-12
            )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
def test_clipped_sums_equal_those_of_opacus(tiny, examples, jobs, wave) -> None:
    """Opacus' own hooks on stock peft, LoRA on linear layers and the head."""
    from opacus.grad_sample import GradSampleModule

    base: Base = tiny("bert")
    adapted, data = Lora(rank=3).attach(base, seed=0), examples(base)
    (job,) = jobs(adapted.read())[:1]
    work = Training(steps=1, batch=4, optimizer="sgd", lr=1.0, head_lr=1.0)
    (done,) = wave(adapted, data).train(PLAIN, [replace(job, work=work, private=private(0.5))], round=0)
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
    drawn = poisson(rows, 0.05, 2000, SeededInsecure(torch.Generator().manual_seed(0)))
    sizes = torch.tensor([len(each) for each in drawn], dtype=torch.float64)
    assert abs(float(sizes.mean()) - 2.0) < 4 * (40 * 0.05 * 0.95 / 2000) ** 0.5
    assert 0 in sizes
    assert all(len(set(each.tolist())) == len(each) and set(each.tolist()) <= set(rows.tolist()) for each in drawn)


def test_non_finite_example_gradients_count_as_zero(tiny, jobs, wave, own) -> None:
    base: Base = tiny("vit")
    adapted = Lora(rank=2).attach(base, seed=0)
    pixels = torch.randn(12, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    broken = pixels.clone()
    broken[3] = float("nan")
    labels, work = torch.arange(12) % 3, Training(steps=1, batch=4, optimizer="sgd", lr=1.0)
    start, ends = adapted.read(), []
    for images, rows in ((broken, own[0]), (pixels, own[0][own[0] != 3])):
        job = replace(jobs(start, work)[0], rows=rows, private=private(0.5))
        (done,) = wave(adapted, Images(images, labels)).train(PLAIN, [job], round=0)
        assert not isinstance(done, ValueError)  # a fault would tell that the example is there
        ends.append(done[0].tensors)
    assert all(torch.allclose(ends[0][name], ends[1][name], rtol=0, atol=1e-12) for name in start)


def test_a_private_update_says_nothing_of_its_examples_but_their_noised_sum(adapted: Adapted, texts: Examples, jobs, wave) -> None:
    job = replace(jobs(adapted.read())[0], private=private(0.5, 1.0))
    (done,) = wave(adapted, texts).train(PLAIN, [job], round=0)
    assert done[0].weight == 1.0
    assert done[0].metrics == {"steps": 1.0}


def test_a_clients_rest_after_its_last_step_is_not_noised(adapted: Adapted, texts: Examples, jobs, wave) -> None:
    """A client whose steps are done while another of its wave goes on stays where it is."""
    sources = [Constant(1.0), Constant(1.0)]
    work, start = Training(steps=1, batch=4, optimizer="sgd", lr=1.0), adapted.read()
    made = [
        replace(job, private=private(0.5, 1.0, source, lambda rows, k=k: [rows] * (1 + k)))
        for k, (job, source) in enumerate(zip(jobs(start, work)[:2], sources, strict=True))
    ]
    wave(adapted, texts).train(PLAIN, made, round=0)
    assert [len(source.asked) for source in sources] == [1, 2]
