"""Private runs from end to end: they train, keep their budget, say what it means, stop when it ends, and resume where they were."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from experiments.simulate import Summary, simulate
from fedpeft.config import ConfigError
from fedpeft.ledger import Ledger

BOTH = [
    "clients=6",
    "cohort=6",
    "rounds=3",
    "train.steps=3",
    "train.batch=16",
    "model.epochs=2",
    "evaluate.every=3",
    "train.lr=0.02",
    "engine.lanes=1",
]
EXAMPLE = [*BOTH, "privacy=example", "privacy.noise=seeded-insecure"]
CLIENT = [*BOTH, "privacy=client", "privacy.noise=seeded-insecure"]


def ended(folder: Path, words: list[str], **more: Any) -> Summary:
    return simulate([*words, f"run.dir={folder}"], **more)


def entries(summary: Summary) -> list[dict[str, Any]]:
    return Ledger(summary.folder / "ledger.jsonl").entries()


@pytest.mark.parametrize("strategy", ["fedavg", "ffa", "rolora", "fed_sb", "fedsvd", "flora"])
def test_examples_are_hidden_by_every_private_strategy(strategy: str, tmp_path: Path) -> None:
    summary = ended(tmp_path / "run", [*EXAMPLE, f"strategy={strategy}", "privacy.epsilon=5"])
    assert summary.head_only is None  # it would be a second release of the same data
    assert summary.outcome.epsilon is not None
    assert 4.0 < summary.outcome.epsilon <= 5.0 + 2e-3
    lines = entries(summary)
    assert [line["loss"] for line in lines] == [None] * 3
    assert all(line["epsilon"] <= 5.0 + 2e-3 for line in lines)
    assert [line["epsilon"] for line in lines] == sorted(line["epsilon"] for line in lines)
    assert summary.outcome.stated[0].startswith("NOT PRIVATE: privacy.noise=seeded-insecure")
    assert "add or remove one example of one client" in summary.outcome.stated[1]
    assert "with differential privacy" in (summary.folder / "adapter" / "README.md").read_text()


@pytest.mark.parametrize("strategy", ["fedavg", "ffa", "fed_sb", "fedsvd", "fedopt", "fedrot", "slora", "ravan"])
def test_clients_are_hidden_by_strategies_that_take_a_mean(strategy: str, tmp_path: Path) -> None:
    summary = ended(tmp_path / "run", [*CLIENT, f"strategy={strategy}", "privacy.epsilon=50"])
    assert summary.outcome.epsilon is not None
    assert 40 < summary.outcome.epsilon <= 50.0 + 2e-2
    (line, *_) = entries(summary)
    assert (line["loss"], line["aggregation"]["error"]) == (None, None)  # what only the clean updates tell
    assert "add or remove one client" in summary.outcome.stated[1]


def test_a_gradient_start_has_a_query_of_its_own(tmp_path: Path) -> None:
    words = [*EXAMPLE, "strategy=fed_sb", "strategy.start=gradient", "rounds=4"]
    with pytest.raises(ConfigError, match="full gradients of the data in round 0"):
        ended(tmp_path / "no", words)
    ended(tmp_path / "run", [*words, "privacy.query_noise_multiplier=20"])
    lines = [json.loads(line) for line in (tmp_path / "run" / "memory" / "000000" / "privacy.jsonl").read_text().splitlines()]
    assert [line["events"][0]["rate"] for line in lines[:2]] == [1.0, 1.0]
    assert [line["events"][0]["sigma"] for line in lines[:2]] == [20.0, 20.0]
    assert lines[2]["events"][0]["count"] == 3
    assert lines[-1]["epsilon"] <= 8.0 + 2e-3


@pytest.mark.parametrize("words", [EXAMPLE, CLIENT], ids=["example", "client"])
def test_waves_and_one_at_a_time_give_the_same_adapter(words: list[str], tmp_path: Path) -> None:
    ends = []
    for way in ("true", "false"):
        summary = ended(tmp_path / way, [*words, f"engine.stacked={way}", "train.optimizer=sgd", "train.lr=0.05", "rounds=2"])
        ends.append(load_file(summary.folder / "adapter" / "adapter_model.safetensors"))
    assert ends[0].keys() == ends[1].keys()
    assert max(float((ends[0][name] - ends[1][name]).abs().max()) for name in ends[0]) < 1e-4


@pytest.mark.parametrize(
    "words", [EXAMPLE, [*CLIENT, "privacy.quantile=0.5", "privacy.count_noise=20", "privacy.sampling=poisson"]], ids=["example", "client"]
)
def test_a_resumed_run_equals_one_that_was_never_stopped(words: list[str], tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stops(what: str, config: Any, entry: dict[str, Any]) -> None:
        if entry["round"] == 1:
            raise Stop

    whole = ended(tmp_path / "whole", words)
    with pytest.raises(Stop):
        ended(tmp_path / "halves", words, watch=stops)
    again = simulate([], resume=tmp_path / "halves")
    first, second = (load_file(one.folder / "adapter" / "adapter_model.safetensors") for one in (whole, again))
    assert all(bool((first[name] == second[name]).all()) for name in first)
    assert again.outcome.epsilon == whole.outcome.epsilon


def test_a_run_ends_with_its_budget_and_says_what_it_reached(tmp_path: Path) -> None:
    summary = ended(tmp_path / "run", [*CLIENT, "rounds=5", "privacy.noise_multiplier=2", "privacy.epsilon=4.6"])
    assert 0 < summary.outcome.rounds < 5
    assert summary.outcome.epsilon is not None
    assert summary.outcome.epsilon <= 4.6
    assert len(entries(summary)) == summary.outcome.rounds
    summary = ended(
        tmp_path / "other", [*EXAMPLE, "rounds=5", "privacy.noise_multiplier=1", "privacy.epsilon=4", "data.partition.scheme=iid"]
    )
    assert 0 < summary.outcome.rounds < 5
    assert (summary.folder / "adapter" / "adapter_model.safetensors").exists()


def test_compression_after_the_noise_costs_nothing(tmp_path: Path) -> None:
    plain, small = (ended(tmp_path / name, [*EXAMPLE, *more]) for name, more in (("raw", []), ("ternary", ["codec=ternary"])))
    assert small.outcome.epsilon == plain.outcome.epsilon
    assert small.outcome.bytes_up < plain.outcome.bytes_up / 5


def test_secret_noise_differs_from_run_to_run(tmp_path: Path) -> None:
    ends = [
        load_file(ended(tmp_path / name, [*EXAMPLE, "privacy.noise=os", "rounds=1"]).folder / "adapter" / "adapter_model.safetensors")
        for name in "ab"
    ]
    assert any(bool((ends[0][name] != ends[1][name]).any()) for name in ends[0])


def test_the_published_count_runs_and_is_labelled(tmp_path: Path) -> None:
    words = [*BOTH, "privacy=as-published", "strategy=fed_sb", "strategy.start=gradient", "rounds=4"]
    summary = ended(tmp_path / "run", words)
    assert summary.outcome.stated[0].startswith("NOT A VALID CLAIM")
