"""Runs whose phases use two adapters: stopped in any round and resumed, and in any number of lanes, they end with the same bits."""

import json
from pathlib import Path

import pytest

import fedpeft.checkpoint
from clients.engine import Engine
from experiments.simulate import Summary, simulate

pytestmark = pytest.mark.slow
RUN = ["rounds=4", "clients=6", "cohort=3", "train.steps=2", "evaluate.every=2", "evaluate.head_only=false", "model.epochs=1"]
STRATEGIES = {  # both begin their second adapter after round 1
    "slora": ["strategy=slora", "strategy.sparse_rounds=2"],
    "fed_sb": ["strategy=fed_sb", "strategy.start=gradient"],
}
ADAPTER = "adapter/adapter_model.safetensors"


class Killed(BaseException):
    """Nothing on the way catches it, so what lies on the disk is what a kill would leave there."""


@pytest.fixture(scope="module", params=STRATEGIES)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """The words of a run in one process, and the folder in which it ran without a stop."""
    words = [*RUN, *STRATEGIES[request.param], "engine.lanes=1"]
    folder = tmp_path_factory.mktemp("whole") / "run"
    simulate([*words, f"run.dir={folder}"])
    return words, folder


def stopped(words: list[str], folder: Path, after: int) -> None:
    """The run, stopped when the ledger and the checkpoint of round `after` are written."""

    def watch(what: str, config: object, entry: dict[str, object]) -> None:
        if entry["round"] == after:
            raise Killed

    with pytest.raises(Killed):
        simulate([*words, f"run.dir={folder}"], watch=watch)


def assert_goes_on(folder: Path, whole: Path) -> None:
    simulate([], resume=folder)
    assert (folder / ADAPTER).read_bytes() == (whole / ADAPTER).read_bytes()
    assert kept(folder) == kept(whole)


def kept(folder: Path) -> list[dict[str, object]]:
    """The ledger without seconds, and without bytes down: who was restarted holds nothing and is sent the whole."""
    lines = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
    odd = ("seconds", "down", "bytes_by_client", "bytes_evaluation")
    return [{name: value for name, value in line.items() if not any(word in name for word in odd)} for line in lines]


@pytest.mark.parametrize("round", [0, 1, 2])
def test_stopped_after_a_round(round: int, whole: tuple[list[str], Path], tmp_path: Path) -> None:
    words, there = whole
    stopped(words, tmp_path / "run", round)
    assert_goes_on(tmp_path / "run", there)


@pytest.mark.parametrize("at", [0, 1, 2, 3])
def test_stopped_while_clients_train(at: int, whole: tuple[list[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words, there = whole
    real = Engine.train

    def train(self, phase, jobs, *, round):
        if round == at:
            raise Killed
        return real(self, phase, jobs, round=round)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "train", train)
        with pytest.raises(Killed):
            simulate([*words, f"run.dir={tmp_path / 'run'}"])
    assert_goes_on(tmp_path / "run", there)


def test_stopped_before_the_checkpoint_that_begins_the_second_adapter(
    whole: tuple[list[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words, there = whole
    real = fedpeft.checkpoint.save

    def save(made, folder, *, keep):
        if made.round == 2:
            raise Killed
        real(made, folder, keep=keep)

    with monkeypatch.context() as patch:
        patch.setattr(fedpeft.checkpoint, "save", save)
        with pytest.raises(Killed):
            simulate([*words, f"run.dir={tmp_path / 'run'}"])
    assert_goes_on(tmp_path / "run", there)


def test_two_lanes_give_the_bits_of_one_and_go_on_after_a_stop(whole: tuple[list[str], Path], tmp_path: Path) -> None:
    """In waves of one, for else two lanes cut a round into other waves."""
    words = [word for word in whole[0] if "lanes" not in word]
    ends: list[Summary] = [
        simulate([*words, f"engine.lanes={lanes}", "engine.wave=1", f"run.dir={tmp_path / f'lanes{lanes}'}"]) for lanes in (1, 2)
    ]
    one, two = (end.folder for end in ends)
    assert (one / ADAPTER).read_bytes() == (two / ADAPTER).read_bytes()
    assert kept(one) == kept(two)
    stopped([*words, "engine.lanes=2", "engine.wave=1"], tmp_path / "run", 1)
    assert_goes_on(tmp_path / "run", two)
