"""Clipped and noised sums of a wave against a loop over examples."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from clients.train import Job
from clients.wave import Private, Wave, poisson
from fedpeft.adapters.base import Adapted
from fedpeft.adapters.lora import Lora
from fedpeft.adapters.lora_sb import LoraSB
from fedpeft.adapters.ravan import Ravan
from fedpeft.config import Training
from fedpeft.models.base import Base, Examples, Images
from fedpeft.models.score import losses
from fedpeft.strategy import Phase
from fedpeft.tensors import Tensors

PLAIN = Phase()


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
    made = wave(adapted, data, private=Private(clip=0.1, expected=4.0), draw=lambda job: drawn[job.client])
    for done, end in zip(made.train(PLAIN, jobs(start, work), round=0), want, strict=True):
        assert not isinstance(done, ValueError)
        assert max(float((done[0].tensors[name] - tensor).abs().max()) for name, tensor in end.items()) < 1e-12


def test_noise_is_a_clients_own_and_scaled_by_the_clip(adapted: Adapted, texts: Examples, jobs, wave) -> None:
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
def test_clipped_sums_equal_those_of_opacus(tiny, examples, jobs, wave) -> None:
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


def test_non_finite_example_gradients_count_as_zero(tiny, jobs, wave, own) -> None:
    base: Base = tiny("vit")
    adapted = Lora(rank=2).attach(base, seed=0)
    pixels = torch.randn(12, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    broken = pixels.clone()
    broken[3] = float("nan")
    labels, work = torch.arange(12) % 3, Training(steps=1, batch=4, optimizer="sgd", lr=1.0)
    start, ends = adapted.read(), []
    for images, rows in ((broken, own[0]), (pixels, own[0][own[0] != 3])):
        made = wave(adapted, Images(images, labels), private=Private(clip=0.5, expected=4.0), draw=lambda job, rows=rows: [rows])
        (update, _) = train_one(made, jobs(start, work)[0])
        ends.append(update)
    assert all(torch.allclose(ends[0][name], ends[1][name], rtol=0, atol=1e-12) for name in start)


def train_one(made: Wave, job: Job) -> tuple[Tensors, Tensors]:
    """Ends of one job even where its loss is no number: what the sums were is seen in the stack."""
    made.train(PLAIN, [job], round=0)
    return made.way.stack.read(0, job.start), {}
