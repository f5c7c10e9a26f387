"""Private training of one client: three ways to the gradients of single examples, and what is made of them."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from clients.private import Backend, _fault, _loop, _nowhere_zero, choose, clipped_sums, per_example, train_private
from clients.stacked import Unstackable
from clients.train import Job, Private, batches, poisson, train
from fedpeft.adapters.base import Adapted
from fedpeft.adapters.lora import Lora
from fedpeft.adapters.lora_sb import LoraSB
from fedpeft.adapters.ravan import Ravan
from fedpeft.adapters.sparse import Sparse
from fedpeft.config import Training, build
from fedpeft.lowrank import cut
from fedpeft.messages import Broadcast
from fedpeft.models.base import Base, Examples, Images
from fedpeft.models.score import losses
from fedpeft.privacy.noise import Secret, SeededInsecure
from fedpeft.strategy import Phase
from fedpeft.tensors import Tensors, is_a, is_b
from strategies.fedprox import fedprox

# torch, of SHiRA's first forward
pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled:UserWarning")
ROOT = Path(__file__).parents[2]
PLAIN, SGD = Phase(), Training(steps=1, batch=4, optimizer="sgd", lr=1.0, head_lr=1.0)
MODELS = ("bert", "gpt2", "llama", "vit")
each_model = pytest.mark.parametrize("kind", MODELS)
each_way = pytest.mark.parametrize("way", ["hooks", "vmap", "loop"])

# What gives each adapter's gradients on BERT, GPT-2, Llama and ViT, beside the loop: waves, hooks, vmap, or l for none; a dash: not on it.
SUPPORT = {
    "adalora": "v v v v", "bias": "whv whv - whv", "boft": "v - v v", "bottleneck": "l l l l", "c3a": "l - l l", "dora": "v v v v",
    "fourierft": "v v v v", "full": "v v hv hv", "head": "whv - - whv", "hra": "v - v v", "ia3": "v v v v", "ln_tuning": "whv whv whv whv",
    "loha": "l - l l", "lokr": "v - v v", "lora": "whv whv whv whv", "lora_sb": "whv whv whv whv", "miss": "v - v v", "oft": "v - v v",
    "p_tuning": "v v v -", "peft": "v v v -", "prefix": "hv hv hv -", "prompt": "v v v -", "randlora": "l l l l",
    "rslora": "whv whv whv whv", "shira": "l - l l", "vblora": "v v v v", "vera": "v v v v", "visual_prompt": "- - - l",
    "ravan": "whv whv whv whv", "sparse": "hv hv hv hv", "lora on embeddings": "wv wv wv -",
}  # fmt: skip
SMALL = {  # of the presets' options, for layers of 12, 24 and 40
    "c3a": {"block_size": 4}, "oft": {"oft_block_size": 4}, "miss": {"r": 4}, "vblora": {"vector_length": 4, "num_vectors": 16},
    "fourierft": {"n_frequency": 100}, "p_tuning": {"num_virtual_tokens": 4, "encoder_hidden_size": 16},
    "prompt": {"num_virtual_tokens": 4}, "prefix": {"num_virtual_tokens": 4},
}  # fmt: skip
OTHERS = {
    "ravan": Ravan(rank=2, heads=3),
    "sparse": Sparse(),
    "lora on embeddings": Lora(rank=4, targets=r".*(word_embeddings|wte|embed_tokens)"),
}


def table() -> str:
    """SUPPORT as docs/privacy_backends.md shows it."""
    words = {"w": "waves, ", "h": "hooks, ", "v": "vmap, ", "l": ""}
    rows = [["adapter", "BERT", "GPT-2", "Llama", "ViT"], ["---"] * 5]
    for name, cells in SUPPORT.items():
        rows.append([f"`{name}`", *("-" if cell == "-" else "".join(map(words.get, cell)) + "loop" for cell in cells.split())])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def adapter(name: str):
    if name in OTHERS:
        return OTHERS[name]
    content = OmegaConf.to_container(OmegaConf.load(ROOT / "experiments" / "conf" / "adapter" / f"{name}.yaml"))
    return build(content | ({"options": content["options"] | SMALL[name]} if name in SMALL else {}))


def far(got: Tensors, want: Tensors) -> float:
    """The largest distance of an example's gradient of one tensor, over the norm of that and of the example's whole gradient."""
    whole = sum(part.flatten(1).square().sum(1) for part in want.values()).sqrt()
    return max(float(((got[n] - w).flatten(1).norm(dim=1) / (w.flatten(1).norm(dim=1) + whole)).max()) for n, w in want.items())


# The three ways


@pytest.mark.fast
def test_the_docs_show_this_table_and_every_preset_is_in_it() -> None:
    presets = {path.stem for path in (ROOT / "experiments" / "conf" / "adapter").glob("*.yaml")}
    assert presets | OTHERS.keys() == SUPPORT.keys()
    assert table() in (ROOT / "docs" / "privacy_backends.md").read_text()


@pytest.mark.parametrize("name", SUPPORT)
def test_each_way_agrees_with_the_loop_or_is_reported(name: str, tiny, examples, jobs, wave) -> None:
    for kind, cell in zip(MODELS, SUPPORT[name].split(), strict=True):
        base: Base = tiny(kind, torch.float32)
        if cell == "-":
            with pytest.raises(ValueError, match=r"adapter|peft cannot put"):
                adapter(name).attach(base, seed=0)
            continue
        adapted, data, rows = adapter(name).attach(base, seed=0), examples(base), torch.arange(12)
        moving = adapted.select(lambda name: True)
        with _nowhere_zero(adapted):
            want, theirs = per_example(adapted, data, rows, moving, "loop")
            for way in ("hooks", "vmap"):
                if way[0] in cell:
                    got, mine = per_example(adapted, data, rows, moving, way)
                    assert far(got, want) < 1e-5
                    assert torch.allclose(mine, theirs, rtol=1e-5)
                else:
                    pair = rows[data.lengths().argsort()][[0, -1]]
                    assert _fault(adapted, data, pair, moving, way, _loop(adapted, data, pair, moving)[0])
                    with pytest.raises(ValueError, match=rf"privacy.backend={way} cannot do this adapter: {way}: \w+"):
                        choose(adapted, data, rows, PLAIN, way)
        taken = choose(adapted, data, rows, PLAIN, "auto")
        assert taken == "loop" if cell == "l" else taken[0] in cell
        if "w" not in cell:
            with pytest.raises(Unstackable):
                wave(adapted, data)
        else:
            job = replace(jobs(adapted.read(), SGD)[0], rows=rows, private=kept(lambda rows: [rows], clip=1.0))
            (done,) = wave(adapted, data).train(PLAIN, [job], round=0)
            assert apart(done[0].tensors, train_private(adapted, PLAIN, data, job, round=0, backend="loop")[0].tensors) < 1e-5
        adapted.undo()


def test_gradients_that_are_no_numbers_test_no_way(adapted: Adapted, texts: Examples, jobs, monkeypatch) -> None:
    (job, *_) = (replace(one, private=kept(lambda rows: [rows], noise=1.0)) for one in jobs(adapted.read(), SGD))
    broken = Broadcast({name: torch.full_like(tensor, torch.nan) for name, tensor in job.start.items()})
    monkeypatch.setattr("clients.private._hooks", lambda *_: pytest.fail("hooks were used untested"))
    train_private(adapted, PLAIN, texts, replace(job, broadcast=broken), round=0)
    monkeypatch.setattr("clients.private._hooks", lambda adapted, examples, rows, moving: _zeroed(_loop(adapted, examples, rows, moving)))
    monkeypatch.setattr("clients.private._vmap", lambda adapted, examples, rows, moving: _zeroed(_loop(adapted, examples, rows, moving)))
    adapted.fill(job.start)
    assert choose(adapted, texts, job.rows, PLAIN, "auto") == "loop"  # after a good broadcast they are tested, and found wrong
    (update, _) = train_private(adapted, PLAIN, texts, replace(job, private=kept(lambda rows: [rows], clip=1e9)), round=1)
    (want, _) = train_private(adapted, PLAIN, texts, replace(job, private=kept(lambda rows: [rows], clip=1e9)), round=1, backend="loop")
    assert apart(update.tensors, want.tensors) == 0.0


def _zeroed(made: tuple[Tensors, torch.Tensor]) -> tuple[Tensors, torch.Tensor]:
    return {name: torch.zeros_like(part) for name, part in made[0].items()}, made[1]


def test_a_mistake_that_shows_only_where_b_is_not_zero_is_found_out(tiny, examples) -> None:
    """A's gradient is zero at the start."""
    base: Base = tiny("vit")
    adapted, data = Lora(rank=3).attach(base, seed=0), examples(base)
    for inner in base.module.modules():
        if hasattr(inner, "lora_A"):
            inner.lora_A["default"].register_forward_hook(lambda module, inputs, out: out * len(out))
    start = adapted.read()
    with pytest.raises(ValueError, match=r"its gradient of \S+\.A is not the loop's"):
        choose(adapted, data, torch.arange(12), Phase(trains=is_a), "hooks")
    assert all(torch.equal(tensor, start[name]) for name, tensor in adapted.read().items())


@pytest.mark.parametrize("preset", ["lora", "dora", "sparse", "ravan", "vblora"])
def test_the_model_is_left_as_it_was(preset: str, tiny, examples) -> None:
    base: Base = tiny("llama", torch.float32)
    adapted, data, root = adapter(preset).attach(base, seed=0), examples(base), list(logging.getLogger().handlers)
    moving = adapted.select(lambda name: True)

    def facts():
        modules = [
            (sorted(vars(inner)), inner.training, len(inner._forward_hooks), len(inner._backward_hooks)) for inner in base.module.modules()
        ]
        own = [(id(parameter), sorted(vars(parameter))) for parameter in base.module.parameters()]
        return modules, own, [parameter.grad for parameter in moving.values()]

    before = facts()
    for way in ("hooks", "vmap"):
        if preset in ("dora", "vblora") and way == "hooks":
            with pytest.raises((TypeError, ValueError)):  # DoRA halfway through a forward pass
                per_example(adapted, data, torch.arange(3), moving, way)
        else:
            per_example(adapted, data, torch.arange(3), moving, way)
        assert facts() == before
    assert logging.getLogger().handlers == root


# Clipped sums


@pytest.fixture
def vit(tiny) -> Adapted:
    """Rank 2 with a scale of 1, in float32: boundary values are the parameters."""
    return Lora(rank=2, alpha=2.0).attach(tiny("vit", torch.float32), seed=0)


def images(more: torch.Tensor | None = None) -> Images:
    pixels = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    pixels = pixels if more is None else torch.cat([pixels, more])
    return Images(pixels, torch.arange(len(pixels)) % 3)


def norm(tensors: Tensors) -> float:
    return float(torch.stack([tensor.double().square().sum() for tensor in tensors.values()]).sum().sqrt())


@each_model
@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
def test_the_clipped_sum_is_that_of_opacus_own_optimizer(kind: str, tiny, examples) -> None:
    from opacus.grad_sample import GradSampleModule
    from opacus.optimizers import DPOptimizer

    base: Base = tiny(kind)
    adapted, data, rows = Lora(rank=3).attach(base, seed=0), examples(base), torch.arange(7)
    moving = adapted.select(lambda name: True)
    sums = clipped_sums(adapted, data, rows, moving, "vmap", clip=0.05, batch=3)
    hooked = GradSampleModule(adapted.module, loss_reduction="sum")
    for inner in adapted.module.modules():
        inner.training = any(p.requires_grad for p in inner.parameters(recurse=False))  # attention drops by its own mode
    made = DPOptimizer(
        torch.optim.SGD(moving.values(), lr=1.0), noise_multiplier=0.0, max_grad_norm=0.05, expected_batch_size=1, loss_reduction="sum"
    )
    inputs, targets = data.batch(rows)
    losses(base.task, hooked(**inputs).logits, targets).sum().backward()
    made.pre_step()
    assert max(float((p.grad - sums[name]).abs().max()) for name, p in moving.items()) < 1e-10
    hooked.to_standard_module()


@each_way
def test_broken_examples_count_as_zero_and_huge_ones_are_clipped(way: str, vit: Adapted) -> None:
    data = images(torch.stack([torch.full((1, 8, 8), value) for value in (float("nan"), float("inf"), 1e30)]))
    moving = vit.select(lambda name: True)
    want = clipped_sums(vit, data, torch.arange(8), moving, way, clip=0.5)
    got = clipped_sums(vit, data, torch.arange(10), moving, way, clip=0.5)
    assert max(float((got[name] - want[name]).abs().max()) for name in want) < 1e-5
    with torch.no_grad():
        moving["head.classifier.weight"].mul_(1e10)  # gradients of the layers below are as large
    alone = [norm(clipped_sums(vit, data, torch.tensor([row]), moving, way, clip=0.5)) for row in range(11)]
    assert max(alone) <= 0.5 * (1 + 1e-6)
    assert sum(each > 0.5 * (1 - 1e-6) for each in alone) > 3


def test_one_more_example_changes_the_sum_by_no_more_than_the_clip(vit: Adapted) -> None:
    rng = torch.Generator().manual_seed(1)
    scales = 10 ** torch.linspace(-3, 38, 196).view(-1, 1, 1, 1)
    odd = torch.tensor([0.0, float("nan"), float("inf"), -1e38]).view(-1, 1, 1, 1).expand(-1, 1, 8, 8)
    data = images(torch.cat([scales * torch.randn(196, 1, 8, 8, generator=rng), odd]))
    changes = []
    moving = vit.select(lambda name: True)
    without = clipped_sums(vit, data, torch.arange(8), moving, "vmap", clip=0.3)
    for x in range(8, 208):
        both = clipped_sums(vit, data, torch.tensor([*range(8), x]), moving, "vmap", clip=0.3)
        changes.append(norm({name: both[name] - without[name] for name in both}))
    assert max(changes) <= 0.3 * (1 + 1e-5)
    assert sum(change > 0.299 for change in changes) > 50
    assert min(changes) < 1e-6  # what is no number


# Training


def kept(draw, *, noise: float = 0.0, clip: float = 0.5, expected: float = 4.0, seed: int | None = None) -> Private:
    return Private(clip, expected, noise, Secret() if seed is None else SeededInsecure(torch.Generator().manual_seed(seed)), draw)


def apart(got: Tensors, want: Tensors) -> float:
    assert got.keys() == want.keys()
    return max(float((got[name] - want[name]).abs().max()) for name in want)


@each_way
@pytest.mark.parametrize("phase", [PLAIN, fedprox(mu=0.5).phase(0), Phase(work="gradient")], ids=["plain", "fedprox", "gradient"])
def test_without_noise_and_clip_it_is_the_reference(way: str, phase: Phase, adapted: Adapted, texts: Examples, jobs, work) -> None:
    for job in jobs(adapted.read()):
        size = min(work.batch, len(job.rows)) if phase.work == "train" else len(job.rows)
        same = torch.Generator().manual_seed(job.client)
        drawn = list(batches(job.rows, work, same)) if phase.work == "train" else [job.rows]
        (want, _) = train(adapted, phase, texts, job, round=0)
        private = kept(lambda rows, drawn=drawn: drawn, clip=1e9, expected=size)
        (got, _) = train_private(adapted, phase, texts, replace(job, private=private), round=0, backend=way, batch=2)
        assert apart(got.tensors, want.tensors) < 1e-10
        assert got.weight == 1.0
        assert got.metrics == {"steps": want.metrics["steps"]}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_tensor_may_lie_in_memory_by_columns(optimizer: str, tiny, examples, jobs) -> None:
    """LoRA-SB's B comes so from its QR; a fused optimizer given a gradient by rows permutes it."""
    base: Base = tiny("vit")
    adapted, data = LoraSB(rank=3).attach(base, seed=0), examples(base)
    assert not any(p.is_contiguous() for name, p in adapted.parameters.items() if is_b(name))
    (job, *_) = jobs(adapted.read(), replace(SGD, optimizer=optimizer, lr=0.05, batch=5))
    (want, _) = train(adapted, PLAIN, data, job, round=0)
    job = replace(job, private=kept(lambda rows: [rows], clip=1e9, expected=5.0))
    assert apart(train_private(adapted, PLAIN, data, job, round=0)[0].tensors, want.tensors) < 1e-10


@each_model
@pytest.mark.parametrize("phase", [PLAIN, fedprox(mu=0.5).phase(0), Phase(work="gradient")], ids=["plain", "fedprox", "gradient"])
def test_it_ends_where_the_wave_ends(kind: str, phase: Phase, tiny, examples, jobs, wave) -> None:
    base: Base = tiny(kind)
    adapted, data = Lora(rank=3).attach(base, seed=0), examples(base)

    def some() -> list[Job]:
        made = []
        for job in jobs(adapted.read()):
            private = kept(None, noise=0.7, clip=0.05, seed=job.client)
            private = replace(private, draw=lambda rows, source=private.source: poisson(rows, 0.5, 4, source))
            if job.client == 2:
                start = Broadcast(cut(job.broadcast.tensors, 2))
                job = replace(job, broadcast=start, scales=dict.fromkeys(adapted.scales, 1.5))
            made.append(replace(job, private=private))
        return made

    ends = wave(adapted, data).train(phase, some(), round=0)
    for job, end in zip(some(), ends, strict=True):
        assert not isinstance(end, ValueError)
        (got, memory), (want, theirs) = train_private(adapted, phase, data, job, round=0), end
        assert apart(got.tensors, want.tensors) < 1e-10
        assert (got.weight, got.metrics["steps"], memory.keys()) == (want.weight, want.metrics["steps"], theirs.keys())


@pytest.mark.fast
@pytest.mark.parametrize("backend", ["auto", "hooks", "vmap", "loop"])
def test_an_empty_batch_is_a_step_of_noise_alone(backend: Backend, adapted: Adapted, texts: Examples, jobs) -> None:
    (job, *_) = jobs(adapted.read(), SGD)
    none = job.rows[:0]
    (update, _) = train_private(
        adapted, PLAIN, texts, replace(job, private=kept(lambda rows: [none] * 3, noise=2.0, seed=5)), round=0, backend=backend
    )
    assert update.metrics["steps"] == 3.0
    same, sizes = torch.Generator().manual_seed(5), {name: job.start[name].numel() for name in sorted(job.start)}
    noise = sum(torch.randn(sum(sizes.values()), generator=same, dtype=torch.float64) for _ in range(3)) * 2.0 * 0.5 / 4.0
    for name, part in zip(sizes, noise.split(list(sizes.values())), strict=True):
        want = job.start[name] - part.view(job.start[name].shape) * adapted.scales.get(name, 1.0)
        assert torch.allclose(update.tensors[name], want, rtol=0, atol=1e-12)


def test_noise_has_the_stated_deviation_where_all_gradients_are_zero(tiny, examples, jobs) -> None:
    """A alone is trained while B is zero."""
    base: Base = tiny("vit", torch.float32)
    adapted, data = Lora(rank=8).attach(base, seed=0), examples(base)
    start = adapted.read()
    (job, *_) = jobs(start, SGD)
    job = replace(job, broadcast=Broadcast(start), private=kept(lambda rows: [rows], noise=3.0, clip=0.5, expected=4.0))
    (update, _) = train_private(adapted, Phase(trains=is_a), data, job, round=0)
    parts = [(update.tensors[name] - start[name]).flatten().double() for name in start if is_a(name)]
    z = torch.cat(parts) / (3.0 * 0.5 / 4.0)
    assert len(z) > 2000
    assert abs(float(z.square().sum()) - len(z)) < 5.0 * (2 * len(z)) ** 0.5  # chi-square: one run in 10^6 is outside
    assert abs(float(z.sum())) < 5.0 * len(z) ** 0.5
    assert all(torch.equal(update.tensors[name], start[name]) for name in start if not is_a(name))


@pytest.mark.parametrize("way", ["hooks", "loop"])
def test_a_tensor_that_no_example_reaches_gets_noise_too(way: str, adapted: Adapted, texts: Examples, jobs) -> None:
    more = replace(adapted, parameters={**adapted.parameters, "idle.weight": nn.Parameter(torch.zeros(5, dtype=torch.float64))})
    (job, *_) = jobs(more.read(), SGD)
    (update, _) = train_private(more, PLAIN, texts, replace(job, private=kept(lambda rows: [rows] * 2, noise=1.0)), round=0, backend=way)
    assert (update.tensors["idle.weight"] != job.start["idle.weight"]).all()


@pytest.mark.fast
def test_a_way_is_tested_once_for_the_tensors_it_trains_and_never_without_examples(adapted: Adapted, texts: Examples, jobs, caplog) -> None:
    caplog.set_level(logging.INFO, "fedpeft")
    first, second, *_ = (replace(job, private=kept(lambda rows: [rows], noise=1.0)) for job in jobs(adapted.read(), SGD))
    for job in (replace(first, rows=first.rows[:0]), first, second, second):
        train_private(adapted, PLAIN, texts, job, round=0)
    train_private(adapted, Phase(trains=is_a), texts, first, round=1)
    assert [record.getMessage() for record in caplog.records] == ["gradients of single examples by hooks"] * 2


@pytest.mark.fast
def test_what_does_not_move_is_an_error(adapted: Adapted, texts: Examples, jobs) -> None:
    (job, *_) = jobs(adapted.read(), replace(SGD, lr=0.0, head_lr=0.0))
    for noise in (0.0, 1.0):
        with pytest.raises(ValueError, match=r"client 0, round 7: nothing moved .* train\.lr"):
            train_private(adapted, PLAIN, texts, replace(job, private=kept(lambda rows: [rows] * 3, noise=noise)), round=7)
    still = replace(job, private=kept(lambda rows: [rows[:0]] * 3))  # nothing drawn and no noise: nothing to move by
    assert apart(train_private(adapted, PLAIN, texts, still, round=7)[0].tensors, job.start) < 1e-15


@pytest.mark.fast
def test_nothing_to_train_is_refused(adapted: Adapted, texts: Examples, jobs) -> None:
    (job, *_) = jobs(adapted.read(), private=kept(lambda rows: [rows]))
    with pytest.raises(ValueError, match="trains no tensor"):
        train_private(adapted, Phase(trains=lambda name: False), texts, job, round=0)


@each_model
@pytest.mark.parametrize("name", ["sparse", "dora", "ia3"])
def test_adapters_that_no_wave_has_train_by_what_auto_takes(kind: str, name: str, tiny, examples, jobs) -> None:
    base: Base = tiny(kind)
    adapted, data = adapter(name).attach(base, seed=0), examples(base)
    start, ends = adapted.read(), []
    for backend in ("auto", "loop"):
        private = kept(None, noise=0.5, clip=0.1, seed=3)
        private = replace(private, draw=lambda rows, source=private.source: poisson(rows, 0.6, 5, source))
        (job, *_) = jobs(start, replace(SGD, lr=0.1), private=private)
        ends.append(train_private(adapted, PLAIN, data, job, round=0, backend=backend)[0].tensors)
    assert apart(*ends) < 1e-8
    assert max(float((ends[0][n] - job.start[n]).abs().max()) for n in start) > 1e-3


if __name__ == "__main__":
    print(table())
