"""`fedpeft privacy plan`: the numbers of the table, whichever is left out, and what it says of bad input."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from experiments.privacy import Asked, plan
from fedpeft.config import ConfigError, Training
from fedpeft.privacy.accountant import Event, epsilon

SMALL = {"examples": 100, "batch": 10, "steps": 1, "delta": 1e-4}  # q = 0.1


# What is solved for


def test_the_noise_is_that_of_the_table_and_keeps_the_budget_as_it_is_printed() -> None:
    found = plan(Asked(epsilon=8, rounds=100, **SMALL))
    assert found.solved == "noise"
    assert found.noise == pytest.approx(0.8617, abs=2e-3)
    assert found.noise == float(f"{found.noise:.5g}")
    assert 7.9 < found.epsilon <= 8 < found.epsilon_rdp
    assert (found.q, found.rounds, found.steps, found.delta) == (0.1, 100, 1, 1e-4)


@pytest.mark.fast
def test_the_epsilon_is_that_of_the_table() -> None:
    found = plan(Asked(noise=4.0, rounds=40, steps=5, batch=25, examples=100, delta=1e-4))
    assert found.solved == "epsilon"
    assert found.epsilon == pytest.approx(3.4082, abs=1e-3)
    assert found.epsilon_rdp == pytest.approx(3.7634, abs=1e-3)


@pytest.mark.fast
def test_the_rounds_are_the_most_that_the_budget_holds() -> None:
    found = plan(Asked(epsilon=3.5, noise=4.0, steps=5, batch=25, examples=100, delta=1e-4))
    assert found.solved == "rounds"
    assert epsilon(found.events(found.rounds), 1e-4) == found.epsilon <= 3.5 < epsilon(found.events(found.rounds + 1), 1e-4)
    assert found.rounds >= 40


@pytest.mark.fast
def test_the_batch_is_the_largest_that_the_budget_holds() -> None:
    found = plan(Asked(epsilon=3.5, noise=4.0, rounds=40, steps=5, examples=100, delta=1e-4))
    assert (found.solved, found.sample, found.q) == ("batch", 25, 0.25)
    assert found.epsilon == pytest.approx(3.4082, abs=1e-3)
    assert epsilon([Event(4.0, 0.26, 200)], 1e-4) > 3.5


@pytest.mark.fast
def test_a_client_counts_in_full_in_every_round_unless_secret_coins_choose_the_cohort() -> None:
    found = plan(Asked("client", noise=5.0, rounds=50, clients=1000))
    assert found.q == 1
    assert found.delta == 1e-5
    assert found.epsilon == pytest.approx(6.573, abs=1e-3)
    assert found.relation == "add or remove one client with all its data"
    coins = plan(Asked("client", noise=5.0, rounds=50, clients=1000, cohort=100, poisson=True))
    assert coins.q == 0.1
    assert coins.epsilon < 1
    assert "not who took part" in coins.sampling
    assert plan(Asked("client", noise=5.0, rounds=50, clients=1000, cohort=100)).epsilon == found.epsilon


@pytest.mark.fast
def test_noise_rounds_and_cohort_of_unit_client() -> None:
    assert plan(Asked("client", epsilon=6.574, noise=5.0, clients=1000)).rounds == 50
    assert plan(Asked("client", epsilon=10, rounds=50, clients=1000)).noise == pytest.approx(3.5349, abs=2e-3)
    found = plan(Asked("client", epsilon=2.0, noise=4.0, rounds=50, clients=1000, poisson=True))
    assert found.solved == "cohort"
    assert found.epsilon <= 2.0 < epsilon([Event(4.0, (found.sample + 2) / 1000, 50)], found.delta)


@pytest.mark.fast
def test_what_is_not_given_is_as_in_a_run() -> None:
    found = plan(Asked(noise=20.0, rounds=2, batch=600, examples=500))
    assert found.q == 1
    assert found.steps == Training().steps
    assert found.delta == 1e-5
    assert plan(Asked(noise=20.0, rounds=2, batch=600, examples=50_000)).delta == pytest.approx(2e-6)


# What it says


def test_the_plan_names_relation_sampling_and_what_is_not_covered(
    call: Callable[..., int], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["--noise", "4", "--rounds", "40", "--steps", "5", "--batch", "25", "--examples", "100", "--delta", "1e-4"]
    assert call("privacy", "plan", *words, "--picture", str(tmp_path / "epsilon.svg")) == 0
    said = " ".join(capsys.readouterr().out.split())
    for part in (
        "add or remove one example of one client", "Poisson: a secret coin", "(batch 25 of 100)", "steps in all 200", "0.16 of the clip",
        "0.0001", "3.4082", "3.763", "settings chosen by looking at other runs", "accuracy and loss", "N_k", "rounds epsilon 1 ",
    ):  # fmt: skip
        assert part in said, part
    assert (tmp_path / "epsilon.svg").read_text().count("<svg") == 1


@pytest.mark.fast
def test_json_is_the_plan_and_its_curve(call: Callable[..., int], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = [
        "--unit",
        "client",
        "--noise",
        "5",
        "--rounds",
        "50",
        "--clients",
        "1000",
        "--json",
        "--picture",
        str(tmp_path / "epsilon.png"),
    ]
    assert call("privacy", "plan", *words) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["epsilon"] == pytest.approx(6.573, abs=1e-3)
    assert found["epsilon_rdp"] == pytest.approx(7.0774, abs=1e-3)
    assert (found["unit"], found["solved"], found["steps_in_all"], found["target"]) == ("client", "epsilon", 50, None)
    assert [rounds for rounds, _ in found["curve"]] == [1, 10, 20, 30, 40, 50]
    assert found["curve"][-1][1] == found["epsilon"]
    assert len(found["not_covered"]) == 3
    assert (tmp_path / "epsilon.png").read_bytes().startswith(b"\x89PNG")


# What it refuses


@pytest.mark.fast
@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (Asked("person", epsilon=8), "--unit person: needed is example"),
        (Asked(epsilon=8, noise=1, rounds=1, **SMALL), "give all but one; none is left out"),
        (Asked(epsilon=8, **SMALL), "give all but one; --noise and --rounds are left out"),
        (Asked(epsilon=8, rounds=1, batch=10), "--examples is missing: delta"),
        (Asked("client", epsilon=8, rounds=1), "--clients is missing: delta"),
        (Asked("client", epsilon=8, rounds=1, clients=10, poisson=True), "cohort: give all but one; --noise and --cohort are left out"),
        (Asked(noise=1, rounds=1, batch=10, examples=100, delta=0.02), "--delta 0.02: needed is a number from 1e-12 to 1/100"),
        (Asked("client", noise=1, rounds=1, clients=1000, delta=0.002), "--delta 0.002: needed is a number from 1e-12 to 1/1000"),
        (Asked(noise=1, rounds=1, batch=10, examples=100, delta=0.0), "--delta 0.0: needed"),
        (Asked(noise=0, rounds=1, **SMALL), "--noise 0: needed is a positive number; without noise nobody is hidden"),
        (Asked(epsilon=float("nan"), rounds=1, **SMALL), "--epsilon nan: needed"),
        (Asked(noise=1, rounds=0, **SMALL), "--rounds 0: needed is at least 1"),
        (Asked(noise=1, rounds=1, clients=5, **SMALL), "--clients has no meaning with --unit example"),
        (Asked(noise=1, rounds=1, poisson=True, **SMALL), "--poisson has no meaning with --unit example"),
        (Asked("client", noise=1, rounds=1, clients=5, steps=3), "--steps has no meaning with --unit client"),
        (Asked("client", noise=1, rounds=1, clients=5, cohort=6), "--cohort 6: needed is at most --clients 5"),
        (Asked("client", epsilon=1, noise=1, clients=50), "one round costs epsilon 4.377 and --epsilon is 1: needed is more noise"),
        (Asked(epsilon=0.1, noise=3.0, rounds=10, examples=5), "a batch of one costs epsilon"),
    ],
)
def test_bad_input_is_said(asked: Asked, said: str) -> None:
    with pytest.raises(ConfigError) as fault:
        plan(asked)
    assert said in str(fault.value)


@pytest.mark.fast
def test_all_faults_come_at_once_with_exit_code_2(call: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--noise", "-1", "--rounds", "0", "--batch", "10", "--examples", "100", "--delta", "0.5"]
    assert call("privacy", "plan", *words) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines] == ["--rounds", "--noise", "--delta"]
    assert call("privacy", "plan", "--noise", "1", "--picture", "epsilon.txt") == 2
    assert "--picture epsilon.txt: needed is a file that ends in .svg, .png, .pdf" in capsys.readouterr().err
