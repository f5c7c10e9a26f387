"""Private runs from end to end: they train, keep their budget, say what it means, stop when it ends, and resume where they were."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from clients.faults import Fault
from clients.site import Site
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
    released = [json.loads(row)["round"] for row in (summary.folder / "privacy.jsonl").read_text().splitlines()]
    assert set(released) == {0, 1, 2}  # so that a run goes on only if no round is missing


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


def stopped(folder: Path, words: list[str], after: int) -> Path:
    """A run that was cut off after so many rounds."""

    class Stop(Exception):
        pass

    def stops(what: str, config: Any, entry: dict[str, Any]) -> None:
        if entry["round"] + 1 == after:
            raise Stop

    with pytest.raises(Stop):
        ended(folder, words, watch=stops)
    return folder


@pytest.mark.parametrize("left", [0, 1])
def test_a_run_whose_ledger_has_less_than_its_checkpoint_goes_on_nowhere(left: int, tmp_path: Path) -> None:
    ledger = stopped(tmp_path / "run", CLIENT, 2) / "privacy.jsonl"
    lines = ledger.read_text().splitlines(keepends=True)
    ledger.write_text("".join(lines[:left])) if left else ledger.unlink()
    with pytest.raises(ConfigError, match=rf"privacy.jsonl has nothing of round {left + 1} and {1 - left} more, which the checkpoint has"):
        simulate([], resume=tmp_path / "run")
    ledger.write_text("".join(lines))
    assert simulate([], resume=tmp_path / "run").outcome.rounds == 3


def test_clients_whose_ledgers_are_gone_go_on_nowhere(tmp_path: Path) -> None:
    folder = stopped(tmp_path / "run", EXAMPLE, 2)
    shutil.rmtree(folder / "memory")
    with pytest.raises(
        ConfigError, match=r"the checkpoint says that a client has spent epsilon \d\.\d+, the clients' ledgers .* say 0\.000"
    ):
        simulate([], resume=folder)


def test_epsilon_counts_what_was_spent_on_replies_that_never_came(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client that spends most trains, and its replies are lost."""
    words = [*EXAMPLE, "privacy.epsilon=inf", "privacy.noise_multiplier=1"]
    whole = ended(tmp_path / "whole", words)
    sizes = json.loads((whole.folder / "split.json").read_text())["sizes"]
    smallest = sizes.index(min(sizes))
    trained = Site._trained

    def lost(self: Site, *some: Any) -> Any:
        return ((ask, Fault("lost", "lost") if ask.client == smallest else made) for ask, made in trained(self, *some))

    monkeypatch.setattr(Site, "_trained", lost)
    summary = ended(tmp_path / "run", words)
    assert [line["answers"] for line in entries(summary)] == [5] * 3
    assert summary.outcome.epsilon == whole.outcome.epsilon
    assert f"epsilon {whole.outcome.epsilon:.3f}" in summary.outcome.stated[1]


@pytest.mark.parametrize("words", [EXAMPLE, CLIENT], ids=["example", "client"])
def test_nothing_in_the_manifest_tells_who_guesses_the_data_that_he_is_right(words: list[str], tmp_path: Path) -> None:
    manifest = json.loads((stopped(tmp_path / "run", words, 1) / "manifest.json").read_text())
    assert "data" not in manifest
    assert manifest["fingerprint"]
