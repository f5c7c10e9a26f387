"""A site counts what its clients release before they train, says nothing else of their examples, and stops at the budget."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from clients.engine import Engine
from clients.memory import Memory
from clients.site import Site, site_of
from fedpeft.config import load
from fedpeft.messages import Broadcast
from fedpeft.privacy.accountant import Event, epsilon
from fedpeft.records import Packer, to_records
from fedpeft.setting import Setting, open_setting

SMALL = ["clients=4", "cohort=4", "train.steps=3", "train.batch=8", "model.epochs=1", "rounds=3", "privacy=example", "privacy.epsilon=4"]


@pytest.fixture(scope="module")
def setting() -> Setting:
    return open_setting(load(SMALL))


@pytest.fixture
def site(setting: Setting, tmp_path: Path) -> Callable[..., Site]:
    def made(*words: str) -> Site:
        config = load([*SMALL, *words])
        return site_of(Setting(config, setting.dataset, setting.base, setting.adapters, setting.names, setting._present), Memory(tmp_path))

    return made


def message(setting: Setting, round: int, size: float = 0.0) -> Any:
    tensors = {name: tensor + size for name, tensor in setting.adapted.read().items()}
    packed = Packer().pack(Broadcast(tensors))
    return to_records(packed.payload, {"round": round, "digest": packed.digest})


def test_a_reply_holds_no_loss_no_accuracy_and_no_count(setting: Setting, site: Callable[..., Site]) -> None:
    reply = site().answer(1, "train", message(setting, 0))
    said = dict(reply["metrics"])
    assert said.keys() == {"weight", "steps", "epsilon", "delta"}
    assert (said["weight"], said["steps"]) == (1.0, 3.0)
    with pytest.raises(ValueError, match="without noise"):
        site().answer(1, "evaluate", message(setting, 1))


def test_rounds_are_on_the_disk_before_anything_is_trained(
    setting: Setting, site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = site()
    assert here.budget is not None
    spending, real, seen = here.budget.spending(2), Engine.train, []

    def train(self: Engine, *args: Any, **more: Any) -> Any:
        seen.append(len(spending.lines()))
        return real(self, *args, **more)

    monkeypatch.setattr(Engine, "train", train)
    for round in range(3):
        said = here.answer(2, "train", message(setting, round, 0.01 * round))["metrics"]
    assert seen == [1, 2, 3]
    terms = here.budget.terms(2)
    assert said["epsilon"] == pytest.approx(epsilon([Event(terms.sigma, terms.rate, 9)], terms.delta, step=1e-3), abs=1e-9)
    assert epsilon([Event(terms.sigma, terms.rate, 9)], terms.delta) <= 4.0


def test_the_round_after_the_last_that_the_budget_pays_is_refused_and_trains_nothing(
    setting: Setting, site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = site()
    for round in range(3):
        here.answer(0, "train", message(setting, round, 0.01 * round))
    monkeypatch.setattr(Engine, "train", lambda self, phase, jobs, **_: pytest.fail("it trained") if jobs else [])
    with pytest.raises(
        ValueError, match=r"the privacy budget is spent: epsilon 3\.\d+ of 4 at delta 1e-05, another round would make it 4\."
    ):
        here.answer(0, "train", message(setting, 2, 0.5))
    assert here.budget is not None
    assert len(here.budget.spending(0).lines()) == 3


def test_the_same_broadcast_again_costs_nothing_and_gives_the_same_bytes(setting: Setting, site: Callable[..., Site]) -> None:
    first = site().answer(3, "train", message(setting, 0))
    again = site().answer(3, "train", message(setting, 0))
    assert first["payload"]["data"].data == again["payload"]["data"].data
    budget = site().budget
    assert budget is not None
    assert len(budget.spending(3).lines()) == 1


def test_a_round_that_was_lost_between_spending_and_sending_is_spent(
    setting: Setting, site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(*_: Any, **__: Any) -> None:
        raise OSError("the disk is full")

    here = site()
    with monkeypatch.context() as broken:
        broken.setattr(Memory, "store", dies)
        with pytest.raises(OSError, match="disk"):
            here.answer(1, "train", message(setting, 0))
    said = site().answer(1, "train", message(setting, 0))["metrics"]  # trained again, with new noise
    assert here.budget is not None
    terms = here.budget.terms(1)
    assert len(here.budget.spending(1).lines()) == 2
    assert said["epsilon"] == pytest.approx(epsilon([Event(terms.sigma, terms.rate, 6)], terms.delta, step=1e-3), abs=1e-9)


def test_secret_noise_differs_from_run_to_run_and_seeded_noise_does_not(setting: Setting, tmp_path: Path) -> None:
    def sent(folder: str, noise: str) -> bytes:
        config = load([*SMALL, f"privacy.noise={noise}"])
        same = Setting(config, setting.dataset, setting.base, setting.adapters, setting.names, setting._present)
        reply = site_of(same, Memory(tmp_path / folder)).answer(0, "train", message(setting, 0))
        return bytes(reply["payload"]["data"].data)

    assert sent("a", "os") != sent("b", "os")
    assert sent("c", "seeded-insecure") == sent("d", "seeded-insecure")


def test_a_client_of_few_examples_takes_all_of_them(setting: Setting, site: Callable[..., Site]) -> None:
    here = site("train.batch=5000")
    assert here.budget is not None
    terms, phase = here.budget.terms(0), here.strategy.phase(0)
    assert terms.rate == 1.0
    rows = setting.split.clients[0]
    private = here.budget.private(0, 0, phase)
    assert private.expected == len(rows)
    assert all(torch.equal(batch, rows) for batch in private.draw(rows))


def test_what_divides_is_the_expected_batch_whatever_was_drawn(setting: Setting, site: Callable[..., Site]) -> None:
    here = site()
    assert here.budget is not None
    private, rows = here.budget.private(0, 0, here.strategy.phase(0)), setting.split.clients[0]
    assert private.expected == pytest.approx(8.0)
    assert len({len(batch) for _ in range(20) for batch in private.draw(rows)}) > 3


def test_a_budget_whose_file_is_gone_pays_nothing_more(setting: Setting, site: Callable[..., Site]) -> None:
    here = site()
    here.answer(0, "train", message(setting, 0))
    assert here.budget is not None
    here.budget.spending(0).path.unlink()
    with pytest.raises(OSError, match="what was spent is not known"):
        here.answer(0, "train", message(setting, 1, 0.1))


def test_a_fault_in_private_training_says_nothing_of_the_examples(
    setting: Setting, site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Engine, "train", lambda self, phase, jobs, **_: [ValueError("example 7 has label 9") for _ in jobs])
    with pytest.raises(ValueError, match="training failed; the reason stands in the client's log"):
        site().answer(0, "train", message(setting, 0))
