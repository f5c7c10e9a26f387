"""The command line: what it prints, how it ends, and what it says of bad input."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

SMALL = ["rounds=2", "clients=5", "cohort=3", "train.steps=1", "model.epochs=1", "evaluate.every=1"]


def test_json_has_the_stable_keys_and_nothing_else_is_printed(
    call: Callable[..., int], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert call("run", *SMALL, f"run.dir={tmp_path / 'run'}", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert {"zero_shot", "head_only", "final"} <= set(result["accuracy"])
    assert all(isinstance(result["accuracy"][name], float) for name in ("zero_shot", "head_only", "final"))
    assert result["bytes"]["up"] > 0
    assert result["bytes"]["down"] > 0
    assert result["seconds"] > 0
    assert result["epsilon"] is None
    assert result["run_dir"] == str(tmp_path / "run")


def test_the_run_folder_holds_what_the_architecture_names(call: Callable[..., int], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert call("run", *SMALL, f"run.dir={folder}", "--quiet") == 0
    for name in ("config.yaml", "ledger.jsonl", "manifest.json", "report.html", "result.json", "checkpoints", "adapter/README.md",
                 "adapter/adapter_config.json", "adapter/adapter_model.safetensors"):  # fmt: skip
        assert (folder / name).exists(), name
    manifest = json.loads((folder / "manifest.json").read_text())
    assert {"seed", "versions", "fingerprint", "commit"} <= set(manifest)
    page = (folder / "report.html").read_text()
    assert page.count("<svg") == 3
    assert "payloads up" in page
    assert "http" not in page.replace("http://www.w3.org", "").replace("https://matplotlib.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )


def test_not_on_a_terminal_plain_lines_tell_round_loss_accuracy_and_bytes(
    call: Callable[..., int], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert call("run", *SMALL, f"run.dir={tmp_path / 'run'}", "evaluate.head_only=false") == 0
    lines = capsys.readouterr().out.splitlines()
    rounds = [line for line in lines if line.startswith("run: round")]
    assert rounds[0].startswith("run: round 1/2  loss ")
    assert "accuracy" in rounds[0]
    assert "up " in rounds[0]
    assert "s left" in rounds[0]
    assert "\x1b" not in "\n".join(lines)


def test_two_runs_of_one_config_give_the_same_bytes(call: Callable[..., int], tmp_path: Path) -> None:
    for name in ("one", "two"):
        assert call("run", *SMALL, f"run.dir={tmp_path / name}", "--quiet", "evaluate.head_only=false") == 0
    file = "adapter/adapter_model.safetensors"
    assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_a_finished_run_resumes_to_its_result_and_writes_the_report_again(
    call: Callable[..., int], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    assert call("run", *SMALL, f"run.dir={folder}", "--json") == 0
    first = json.loads(capsys.readouterr().out)
    (folder / "report.html").unlink()
    assert call("run", "--resume", str(folder), "--json") == 0
    again = json.loads(capsys.readouterr().out)
    assert again["accuracy"] == first["accuracy"]
    assert again["bytes"] == first["bytes"]
    assert (folder / "report.html").exists()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["strategy=fedagv"], ["no such strategy", "fedavg"]),
        (["model=bert"], ["no such model", "minilm", "model.id="]),
        (["roundz=3"], ["no such key", "rounds"]),
        (["cohort=20", "clients=10"], ["cohort=20", "clients=10"]),
        (["adapter.rank=65"], ["adapter.rank=65", "larger than the layer", "64 x 64"]),
        (["clients=400"], ["600", "clients=400", "min_examples"]),
        (["data=files", "data.path=nowhere"], ["data.path", "nowhere"]),
        (["run.device=tpu0"], ["run.device=tpu0"]),
        (["model=minilm"], ["model=minilm", "image"]),
        (["strategy=ffa", "adapter=bottleneck"], ["low-rank", "adapter=lora"]),
        (["train.steps=null"], ["train.steps", "train.epochs"]),
        (["strategy._target_=os.system"], ["_target_", "installed presets"]),
    ],
)
def test_what_the_user_can_fix_ends_with_code_2_and_one_sentence(
    overrides: list[str], said: list[str], call: Callable[..., int], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    small = [text for text in SMALL if text.partition("=")[0] not in {o.partition("=")[0] for o in overrides}]
    if any(text.startswith(("model=", "data=")) for text in overrides):
        small = [text for text in small if not text.startswith("model.")]
    assert call("run", *small, f"run.dir={tmp_path / 'run'}", *overrides) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("fedpeft: ")
    assert "Traceback" not in shown
    for words in said:
        assert words in shown


def test_all_config_faults_are_reported_at_once(call: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert call("run", "strategy=no", "roundz=1", "cohort=9", "clients=3", "train.lr=-1") == 2
    assert len(capsys.readouterr().err.splitlines()) >= 2


def test_a_run_that_fails_keeps_what_is_written_and_ends_with_code_1(
    call: Callable[..., int], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    assert call("run", *SMALL, "train.lr=1e38", "train.steps=3", f"run.dir={folder}", "evaluate.head_only=false") == 1
    shown = capsys.readouterr().err
    assert "the loss became nan" in shown
    assert "lower train.lr" in shown
    assert "--resume" in shown
    assert (folder / "manifest.json").exists()


def test_a_corrupt_checkpoint_is_named_with_its_remedy(
    call: Callable[..., int], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    assert call("run", *SMALL, f"run.dir={folder}", "--quiet", "evaluate.head_only=false") == 0
    whole = (folder / "adapter" / "adapter_model.safetensors").read_bytes()
    newest = sorted((folder / "checkpoints").glob("round-*"))[-1]
    raw = bytearray(newest.read_bytes())
    raw[len(raw) // 2] ^= 1
    newest.write_bytes(raw)
    assert call("run", "--resume", str(folder)) == 1
    assert "corrupt" in (shown := capsys.readouterr().err)
    assert "delete it" in shown
    newest.unlink()
    assert call("run", "--resume", str(folder), "--quiet") == 0
    assert (folder / "adapter" / "adapter_model.safetensors").read_bytes() == whole


def test_a_folder_that_holds_a_run_is_not_overwritten(call: Callable[..., int], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert call("run", *SMALL, f"run.dir={folder}", "--quiet", "evaluate.head_only=false") == 0
    before = (folder / "ledger.jsonl").read_bytes()
    assert call("run", *SMALL, f"run.dir={folder}", "--quiet") == 2
    assert "--resume" in capsys.readouterr().err
    assert (folder / "ledger.jsonl").read_bytes() == before


def test_data_with_one_class_is_refused(call: Callable[..., int], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("text,label\n" + "".join(f"word{i},only\n" for i in range(40)))
    assert call("run", "data=files", f"data.path={tmp_path}", "model=tiny_llama", "clients=4", "cohort=2") == 2
    assert "two classes" in capsys.readouterr().err


def test_a_column_that_is_not_there_is_named_with_those_that_are(
    call: Callable[..., int], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "train.csv").write_text("sentence,label\n" + "".join(f"word{i},{i % 2}\n" for i in range(40)))
    assert call("run", "data=files", f"data.path={tmp_path}", "model=tiny_llama", "clients=4", "cohort=2") == 2
    shown = capsys.readouterr().err
    for words in ("data.text", "sentence", "label"):
        assert words in shown


def test_the_exit_code_of_a_command_is_the_programs(call: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experiments.doctor._memory", lambda: 1_000_000)
    assert call("doctor") == 1


def test_presets_that_refuse_their_fields_are_reported_together(call: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    words = "codec=half codec.dtype=fp8 downlink=ternary downlink.density=2 strategy=fedprox strategy.mu=-1 mean=trimmed mean.trim=2"
    assert call("run", *words.split()) == 2
    shown = capsys.readouterr().err
    for words in ("codec=half: Half: dtype=fp8", "downlink=ternary: Ternary: density=2", "strategy.mu=-1", "mean.trim=2"):
        assert words in shown


def test_a_clients_memory_that_cannot_be_read_ends_the_run_instead_of_changing_its_result(
    call: Callable[..., int], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    run = [*SMALL, "cohort=5", "strategy=fedsa", f"run.dir={folder}", "evaluate.head_only=false"]
    assert call("run", *[text for text in run if text != "cohort=3"], "--quiet") == 0
    for path in sorted((folder / "checkpoints").glob("*"))[1:]:
        path.unlink()
    for broken in (folder / "memory" / "000000").iterdir():
        broken.write_bytes(broken.read_bytes()[:100])
    assert call("run", "--resume", str(folder), "--quiet") == 1
    assert "memory cannot be read" in capsys.readouterr().err


def test_a_run_does_not_go_on_with_other_data(call: Callable[..., int], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    rows = "text,label\n" + "".join(f"word{i} again,{i % 2}\n" for i in range(40))
    (tmp_path / "train.csv").write_text(rows)
    run = [
        "data=files",
        f"data.path={tmp_path}",
        "data.text=text",
        "data.label=label",
        "model=tiny_llama",
        "model.width=32",
        "clients=4",
        "cohort=2",
    ]
    folder = tmp_path / "run"
    assert call("run", *run, "rounds=1", "train.steps=1", f"run.dir={folder}", "--quiet") == 0
    (tmp_path / "train.csv").write_text(rows.replace("word7", "other"))
    assert call("run", "--resume", str(folder)) == 2
    assert "began with data" in capsys.readouterr().err


def test_help_teaches_the_families_and_examples(call: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert call("run", "--help") == 0
    shown = capsys.readouterr().out
    for words in ("strategy=", "fedavg", "adapter=", "lora", "--resume", "data.path"):
        assert words in shown


def test_doctor_reports_versions_and_room(call: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert call("doctor") == 0
    shown = capsys.readouterr().out
    for words in ("torch", "flwr", "free memory", "free disk", "clients that fit"):
        assert words in shown


@pytest.mark.fast
@pytest.mark.parametrize("words", [(), ("privacy",), ("compress", "--help")])
def test_help_is_plain_text(words: tuple[str, ...], call: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert call(*words) == 0
    said = capsys.readouterr()
    assert said.out.lstrip().startswith("Usage: fedpeft")
    assert "\\[" not in said.out
    assert said.err == ""
