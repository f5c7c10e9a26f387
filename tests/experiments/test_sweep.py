"""A study: its runs, what goes on after a stop, its table and picture."""

import json
from pathlib import Path

import pytest

from experiments.cli import app
from experiments.sweep import STUDIES, Found, _cells, pareto, read_study, sweep, table
from fedpeft.config import ConfigError, load

TINY = [
    "study=aggregation", "seeds=[0,1]", "methods=[head only,fedavg]", "partitions=[iid]", "late=[1,2]",
    "common=[clients=4,cohort=2,rounds=2,train.steps=1,evaluate.every=1,model.epochs=1,data.partition.scheme=iid]",
]  # fmt: skip


@pytest.mark.fast
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["study=nothing"], "study=nothing: there is no such study; there are aggregation, compression"),
        (["study=aggregation", "task=chess"], "task=chess: there is no such task; there are digits"),
        (["study=aggregation", "methods=[fedavg,magic]"], "there is no magic"),
        (["study=aggregation", "rounds=3"], "a study takes task, seeds"),
        (["study=aggregation", "partitions=[iid,shards]"], "partitions: there is no shards; there are iid, dirichlet 0.1"),
        (["study=aggregation", "seeds=3"], r"seeds=3: needed is a list, as in seeds=\[...\]"),
        ([], "there is no such study"),
    ],
)
def test_what_a_study_does_not_have_is_said_with_what_there_is(words, said):
    with pytest.raises(ConfigError, match=said):
        read_study(words)


@pytest.mark.fast
def test_fields_are_those_of_the_task_in_whatever_order_they_are_given():
    for words in (["task=sick", "common=[data.path=x]"], ["common=[data.path=x]", "task=sick"]):
        _, study = read_study(["study=aggregation", *words])
        assert study["tasks"]["sick"]["common"][-1] == "data.path=x"
        assert "data.path=x" not in study["tasks"]["digits"]["common"]


@pytest.mark.fast
def test_every_method_of_the_study_has_as_many_rates_as_any_other():
    _, study = read_study(["study=aggregation"])
    assert len({len(rates) for rates in study["rates"].values()}) == 1
    assert study["tune_seed"] not in study["seeds"]
    assert len(study["seeds"]) >= 3


@pytest.mark.fast
def test_a_table_shows_means_with_intervals_and_failures_with_their_reason():
    part = {"rate": 0.1, "faults": [], "accuracy": [0.5, 0.25], "own": [0.75, 0.0], "up": 2000, "down": 3000, "seconds": 1.25,
            "error": 1e-9,
            "zero_shot": 0.125}  # fmt: skip
    rows = [{"method": "a", "iid": part}, {"method": "b", "iid": {"rate": 0.1, "faults": ["ValueError: no"], "runs": []}}]
    text = table(rows, ["iid"])
    assert "| a | 0.500 ± 0.250 | 0.750 ± 0.000 | 0.1 | 2 | 3 | 1.2 | 0 |" in text
    assert "| b | failed: ValueError: no |" in text
    assert "Before training (no adapter): 0.125." in text


@pytest.mark.fast
@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_word_of_a_study_is_one_that_a_run_takes(path: Path) -> None:
    _, study = read_study([f"study={path.stem}"])
    cells = {cell.method: cell for cell in _cells(study, [0])}  # each method once
    for task in study["tasks"]:  # and each task
        _, chosen = read_study([f"study={path.stem}", f"task={task}"])
        cells[task] = _cells(chosen, [0])[-1]
        assert load(cells[task].overrides).rounds >= max(chosen["tasks"][task]["late"])
    for cell in cells.values():
        load(cell.overrides)


@pytest.mark.fast
def test_accuracy_is_drawn_against_bytes(tmp_path: Path) -> None:
    rows = [{"method": f"m{up}", "iid": {"accuracy": [0.5 + up / 100, 0.1], "up": 1000.0 * up}} for up in (3, 1, 2)]
    pareto(rows, ["iid"], tmp_path / "p.svg")
    assert all(f"m{up}" in (tmp_path / "p.svg").read_text() for up in (1, 2, 3))


@pytest.mark.slow
def test_a_study_runs_tunes_and_goes_on_where_it_was(tmp_path: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    folder = sweep(TINY, tmp_path, processes=2, watch=lambda done, whole, what: seen.append((done, whole, what)))
    runs = [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]
    assert len(runs) == len(seen) == 2 * 3 + 2 * 2  # three rates on one seed, then the best of them on two
    assert [done for done, _, _ in seen] == list(range(1, 11))
    assert {whole for _, whole, _ in seen} == {10}
    rows = json.loads((folder / "table.json").read_text())["rows"]
    fedavg = rows[1]["iid"]
    finals = [Found(**run["found"]) for run in runs if run["method"] == "fedavg" and run["seed"] != 100]
    assert fedavg["accuracy"][0] == pytest.approx(sum(found.accuracy for found in finals) / 2, abs=1e-4)
    tuned = {run["rate"]: run["found"]["accuracy"] for run in runs if run["method"] == "fedavg" and run["seed"] == 100}
    assert tuned[fedavg["rate"]] == max(tuned.values())
    assert (folder / "picture.svg").read_text().startswith("<?xml")
    lines = (folder / "runs.jsonl").read_text().splitlines()
    (folder / "runs.jsonl").write_text("\n".join(lines[:-1]) + "\n")  # as if stopped before the last run
    seen.clear()
    sweep(TINY, tmp_path, processes=1, watch=lambda done, whole, what: seen.append((done, whole, what)))
    assert [done for done, _, _ in seen] == [10]


@pytest.mark.slow
def test_a_run_that_fails_is_a_line_and_not_the_end(tmp_path: Path) -> None:
    words = [*TINY[:1], "seeds=[0]", "methods=[fedavg]", "partitions=[iid]", "late=[2]", "common=[rounds=2,clients=4,cohort=9]"]
    folder = sweep(words, tmp_path, processes=2, watch=lambda *_: None)
    assert all("cohort=9 is more than clients=4" in json.loads(line)["fault"] for line in (folder / "runs.jsonl").read_text().splitlines())
    assert "fedavg" in (folder / "table.md").read_text()


@pytest.mark.fast
def test_the_command_is_there() -> None:
    assert {command.name or command.callback.__name__ for command in app.registered_commands} >= {"sweep", "export"}
