"""`fedpeft audit --run` passes a run that keeps its claim, ends with 1 where half the noise is missing, and changes no other run."""

import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from experiments import cli
from experiments.simulate import simulate
from fedpeft.privacy.mechanism import add_noise
from fedpeft.privacy.noise import Source
from fedpeft.tensors import Tensors

Call = Callable[..., tuple[int, str, str]]
TINY = ("clients=6", "cohort=6", "rounds=3", "model.epochs=1", "train.steps=1", "engine.lanes=1", "evaluate.every=3")
CLIENT = ("privacy=client", "privacy.noise=seeded-insecure", *TINY)


@pytest.fixture
def call(told: Call) -> Call:
    """Exit code, output and errors of `fedpeft audit --run ARGUMENTS`."""
    return partial(told, "audit", "--run")


def numbers(out: str, row: str) -> list[float]:
    """mu and epsilon."""
    (line,) = re.findall(rf"^ *{row} .*$", out, re.MULTILINE)
    return [float(word) for word in line.split()[1:3]]


def adapter(folder: Path) -> bytes:
    summary = simulate([*CLIENT, "rounds=1", f"run.dir={folder}"])
    return (summary.folder / "adapter" / "adapter_model.safetensors").read_bytes()


def test_a_right_run_passes_and_other_runs_are_as_they_were(call: Call, tmp_path: Path) -> None:
    before = adapter(tmp_path / "before")
    code, out, _ = call(*CLIENT, "privacy.epsilon=8")
    assert code == 0
    (claimed, epsilon), (mu, estimated) = numbers(out, "claimed"), numbers(out, "estimated")
    assert epsilon == pytest.approx(8.0, abs=0.02)
    assert abs(mu - claimed) < 0.4  # 5 standard errors
    assert 5.0 < estimated < 10.5
    assert "3 rounds of about 6 clients; 200 canaries in each" in out
    assert "estimate, not a bound" in out
    assert max(len(line) for line in out.splitlines() if line.startswith(" ")) <= 80
    assert adapter(tmp_path / "after") == before


def test_half_the_noise_ends_with_1(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(sums: Tensors, std: float, source: Source) -> None:
        add_noise(sums, std / 2, source)

    monkeypatch.setattr("server.private.add_noise", half)
    code, out, _ = call(*CLIENT, "--canaries", "100")
    assert code == 1
    assert numbers(out, "estimated")[0] > 1.7 * numbers(out, "claimed")[0]
    assert "LESS noise than claimed" in out
    assert "100 canaries" in out


def test_an_outsiders_claim_stands_beside_that_of_every_round(call: Call) -> None:
    """What travels and the clip change from round to round, and cohorts may be empty."""
    code, out, _ = call(
        *CLIENT, "cohort=2", "min_clients=1", "strategy=rolora", "privacy.adversary=outsider", "privacy.sampling=poisson",
        "privacy.quantile=0.5", "privacy.count_noise=20",
    )  # fmt: skip
    assert code == 0
    claimed, found = numbers(out, "claimed"), numbers(out, "estimated")
    assert abs(found[0] - claimed[0]) < 0.25 * claimed[0]
    spent = float(re.findall(r"the run itself claims epsilon ([\d.]+): it takes credit", out)[0])
    assert spent < claimed[1] - 1


@pytest.mark.fast
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["privacy=none"], "privacy=none: nothing is hidden in it; --run needs privacy=client"),
        ([], "--run needs privacy=client"),
        (["privacy=example"], "its noise is the clients' own, which `fedpeft audit` without --run checks"),
        (["privacy=client", "--canaries", "3"], "--canaries 3: needed are at least 10"),
        (["privacy=client", "run.dir=kept"], "run.dir=kept: the model of an audited run is mostly canaries"),
        (["privacy=client", "--noise-multiplier", "2"], "--noise-multiplier says nothing of a run; set privacy.noise_multiplier="),
        (["privacy=client", "--leak"], "--leak says nothing of a run"),
        (["privacy=client", "rouns=3"], "rouns"),
    ],
)
def test_what_cannot_be_audited_is_said(call: Call, words: list[str], said: str) -> None:
    code, out, err = call(*words)
    assert code == 2
    assert said in err
    assert "Traceback" not in err + out


@pytest.mark.fast
def test_overrides_without_run_are_refused(call: Call, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["fedpeft", "audit", "privacy=client"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert "privacy=client: overrides describe a run; add --run" in capsys.readouterr().err
