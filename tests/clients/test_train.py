"""Local training against steps worked out by hand, on a model of one linear layer and a head (behind a frozen lens)."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clients.train import HEAD_RATE, Job, at_round, batches, train
from fedpeft.adapters.base import Adapted
from fedpeft.config import Training
from fedpeft.lowrank import LowRank
from fedpeft.messages import Broadcast, Update
from fedpeft.models.base import Base, Images
from fedpeft.strategy import Phase
from fedpeft.tensors import Tensors, is_head

pytestmark = pytest.mark.fast
SGD = Training(steps=1, batch=6, optimizer="sgd", lr=0.1, head_lr=0.1)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lens = nn.Linear(3, 3, bias=False, dtype=torch.float64)
        nn.init.eye_(self.lens.weight)
        self.body, self.head = nn.Linear(3, 4, dtype=torch.float64), nn.Linear(4, 2, dtype=torch.float64)

    def forward(self, pixel_values: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(torch.tanh(self.body(self.lens(pixel_values.flatten(1))))))


@pytest.fixture
def adapted() -> Adapted:
    base = Base(Two(), "image", ("head.weight", "head.bias"), lambda table: Images(torch.empty(0), table.labels), "nowhere")
    names = dict(base.module.named_parameters())
    parameters = {"body.weight": names["body.weight"], "head.head.weight": names["head.weight"], "head.head.bias": names["head.bias"]}
    return Adapted(base, parameters, undo=lambda: None, save=lambda folder: None, scales={"body.weight": 4.0})


@pytest.fixture
def examples() -> Images:
    rng = torch.Generator().manual_seed(1)
    return Images(torch.randn(10, 1, 1, 3, generator=rng, dtype=torch.float64), torch.randint(2, (10,), generator=rng))


def go(adapted: Adapted, examples: Images, phase: Phase, work: Training = SGD, memory: Tensors | None = None) -> tuple[Update, Tensors]:
    start = Broadcast({name: tensor.clone() for name, tensor in adapted.read().items()})
    job = Job(3, start, torch.arange(6), work, torch.Generator().manual_seed(0), memory or {})
    return train(adapted, phase, examples, job, round=2)


def gradients(adapted: Adapted, examples: Images, extra: Callable[[dict[str, Tensor]], Tensor] | None = None) -> dict[str, Tensor]:
    """Of the mean loss over the first six examples, in live (not boundary) values, by a forward pass written out."""
    live = {name: p.detach().clone().requires_grad_() for name, p in adapted.parameters.items()}
    bias = adapted.base.module.body.bias.detach()
    hidden = torch.tanh(examples.pixels[:6].flatten(1) @ live["body.weight"].T + bias)
    loss = F.cross_entropy(hidden @ live["head.head.weight"].T + live["head.head.bias"], examples.labels[:6])
    (loss + (extra(live) if extra else 0)).backward()
    return {name: tensor.grad for name, tensor in live.items()}


def test_one_sgd_step_is_the_one_worked_out_by_hand(adapted: Adapted, examples: Images) -> None:
    before, slopes = adapted.read(), gradients(adapted, examples)
    update, kept = go(adapted, examples, Phase())
    assert kept == {}
    assert update.client == 3
    assert update.weight == 6.0
    for name, scale in (("body.weight", 4.0), ("head.head.weight", 1.0), ("head.head.bias", 1.0)):
        torch.testing.assert_close(update.tensors[name], before[name] - 0.1 * scale * slopes[name], rtol=0, atol=1e-14)


def test_the_head_learns_three_times_as_fast_unless_told_otherwise(adapted: Adapted, examples: Images) -> None:
    before, slopes = adapted.read(), gradients(adapted, examples)
    update, _ = go(adapted, examples, Phase(), Training(steps=1, batch=6, optimizer="sgd", lr=0.1))
    change = update.tensors["head.head.bias"] - before["head.head.bias"]
    torch.testing.assert_close(change, -0.1 * HEAD_RATE * slopes["head.head.bias"], rtol=0, atol=1e-14)


def test_only_what_the_phase_trains_moves_and_only_what_it_shares_is_sent(adapted: Adapted, examples: Images) -> None:
    before = adapted.read()
    update, kept = go(adapted, examples, Phase(trains=is_head, shares=lambda name: name == "body.weight", keeps=is_head))
    assert set(update.tensors) == {"body.weight"}
    assert torch.equal(update.tensors["body.weight"], before["body.weight"])
    assert set(kept) == {"head.head.weight", "head.head.bias"}
    assert not torch.equal(kept["head.head.weight"], before["head.head.weight"])


def test_what_a_client_keeps_is_laid_over_the_broadcast(adapted: Adapted, examples: Images) -> None:
    mine = {"head.head.bias": torch.tensor([5.0, -5.0], dtype=torch.float64)}
    update, _ = go(adapted, examples, Phase(trains=lambda name: name == "body.weight"), memory=mine)
    assert torch.equal(update.tensors["head.head.bias"], mine["head.head.bias"])


def test_a_gradient_phase_changes_boundary_values_by_minus_the_full_gradient(adapted: Adapted, examples: Images) -> None:
    before, slopes = adapted.read(), gradients(adapted, examples)
    update, _ = go(adapted, examples, Phase(work="gradient"), Training(steps=9, batch=4))
    for name, scale in (("body.weight", 4.0), ("head.head.bias", 1.0)):
        torch.testing.assert_close(update.tensors[name] - before[name], -slopes[name] / scale, rtol=0, atol=1e-14)
    assert update.metrics["steps"] == 1


def test_the_phase_term_sees_boundary_values_and_adds_its_gradient(adapted: Adapted, examples: Images) -> None:
    phase = Phase(loss=lambda now, start: sum((tensor - 1).square().sum() for tensor in now.values()))
    before = adapted.read()
    slopes = gradients(adapted, examples, lambda live: (live["body.weight"] * 4 - 1).square().sum())
    update, _ = go(adapted, examples, phase)
    torch.testing.assert_close(update.tensors["body.weight"], before["body.weight"] - 0.1 * 4 * slopes["body.weight"], rtol=0, atol=1e-13)


def test_finish_gets_where_it_is_where_it_began_and_the_steps(adapted: Adapted, examples: Images) -> None:
    seen = []

    def finish(now: Tensors, start: Tensors, steps: int) -> Tensors:
        seen.append(steps)
        return {"body.weight": now["body.weight"] - start["body.weight"]}

    update, _ = go(adapted, examples, Phase(finish=finish), Training(steps=3, batch=2, optimizer="sgd", lr=0.1))
    assert seen == [3]
    assert 0 < float(update.tensors["body.weight"].norm()) < 10


def test_the_base_delta_is_there_while_training_and_gone_after(adapted: Adapted, examples: Images) -> None:
    delta = LowRank(torch.ones(3, 1, dtype=torch.float64), torch.ones(1, 3, dtype=torch.float64))
    weight = adapted.base.module.lens.weight
    plain = float(go(adapted, examples, Phase(trains=is_head))[0].metrics["loss"])
    adapted.base.module.head.load_state_dict({"weight": adapted.base.start["head.weight"], "bias": adapted.base.start["head.bias"]})
    before = weight.detach().clone()
    start = Broadcast(adapted.read(), ({"lens": delta},))
    update, _ = train(adapted, Phase(trains=is_head), examples, Job(0, start, torch.arange(6), SGD, torch.Generator()), round=0)
    assert update.metrics["loss"] != pytest.approx(plain)
    assert torch.equal(weight, before)


def test_a_loss_that_is_not_finite_names_client_round_step_and_what_to_do(adapted: Adapted, examples: Images) -> None:
    broken = Images(examples.pixels.clone(), examples.labels)
    broken.pixels[2] = float("nan")
    with pytest.raises(ValueError, match=r"client 3, round 2: the loss became nan at local step 0; lower train\.lr"):
        go(adapted, broken, Phase())


def test_clipping_bounds_the_step(adapted: Adapted, examples: Images) -> None:
    before = adapted.read()
    work = Training(steps=1, batch=6, optimizer="sgd", lr=1.0, head_lr=1.0, clip=1e-3)
    update, _ = go(adapted, examples, Phase(), work)
    live = {"body.weight": 4.0, "head.head.weight": 1.0, "head.head.bias": 1.0}
    moved = sum(float(((update.tensors[name] - before[name]) / scale).square().sum()) for name, scale in live.items()) ** 0.5
    assert moved == pytest.approx(1e-3, rel=1e-3)


def test_a_cosine_schedule_starts_at_the_peak_is_half_at_half_time_and_ends_near_zero() -> None:
    work = Training(lr=0.2, head_lr=0.6, schedule="cosine")
    assert at_round(work, 0, 10) == work
    assert at_round(work, 5, 10).lr == pytest.approx(0.1)
    assert at_round(work, 5, 10).head_lr == pytest.approx(0.3)
    assert 0 < at_round(work, 9, 10).lr < 0.006
    assert at_round(Training(), 9, 10) == Training()


def test_batches_take_every_row_once_a_pass_and_never_twice() -> None:
    rows = torch.tensor([3, 5, 8, 9, 11, 12, 20])
    got = list(batches(rows, Training(steps=5, batch=3), torch.Generator().manual_seed(0)))
    assert [len(batch) for batch in got] == [3] * 5
    for first, second in ((0, 1), (2, 3)):
        both = torch.cat([got[first], got[second]]).tolist()
        assert len(set(both)) == 6
        assert set(both) <= set(rows.tolist())


def test_epochs_count_passes_with_the_rest_as_a_smaller_batch() -> None:
    got = list(batches(torch.arange(7), Training(steps=None, epochs=2, batch=3), torch.Generator().manual_seed(0)))
    assert [len(batch) for batch in got] == [3, 3, 1, 3, 3, 1]
    assert sorted(torch.cat(got[:3]).tolist()) == list(range(7))


def test_part_of_an_epoch_is_at_least_one_step() -> None:
    assert len(list(batches(torch.arange(4), Training(steps=None, epochs=0.1, batch=4), torch.Generator()))) == 1


def test_a_client_with_fewer_rows_than_a_batch_uses_them_all_each_step() -> None:
    got = list(batches(torch.arange(2), Training(steps=3, batch=8), torch.Generator()))
    assert [sorted(batch.tolist()) for batch in got] == [[0, 1]] * 3
