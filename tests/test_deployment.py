"""What both files of a deployment have in common."""

import subprocess
import sys
from pathlib import Path

import pytest

from fedpeft.config import ConfigError
from fedpeft.deployment import PIECES, environment, host_and_port, is_loopback, state_folder


@pytest.mark.fast
@pytest.mark.parametrize(
    ("host", "answer"),
    [("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False),
     ("10.0.0.5", False), ("localhost.example.org", False), ("fl.example.org", False)],
)  # fmt: skip
def test_only_this_machine_is_loopback(host: str, answer: bool) -> None:
    assert is_loopback(host) is answer


@pytest.mark.fast
def test_an_address_is_host_and_port() -> None:
    assert host_and_port("127.0.0.1:9092", "fleet") == ("127.0.0.1", 9092)
    assert host_and_port("[::1]:9092", "fleet") == ("::1", 9092)
    for wrong in ("127.0.0.1", ":9092", "a:b", "a:0", "a:70000"):
        with pytest.raises(ConfigError, match="fleet="):
            host_and_port(wrong, "fleet")


@pytest.mark.fast
def test_the_state_folder_is_closed_to_others(tmp_path: Path) -> None:
    assert state_folder(tmp_path / "a" / "b").stat().st_mode & 0o077 == 0


@pytest.mark.fast
def test_flower_keeps_its_files_there_and_tells_nobody(tmp_path: Path) -> None:
    variables = environment(tmp_path, poll=0.1)
    assert variables["FLWR_HOME"] == str(tmp_path / "flwr")
    assert variables["FLWR_TELEMETRY_ENABLED"] == "0"
    assert 0.01 <= float(variables["FLWR_SUPEREXEC_TASK_POLL_INTERVAL"]) <= 60  # what Flower takes


@pytest.mark.fast
def test_messages_go_in_small_pieces_unless_the_operator_says_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PIECES:
        monkeypatch.delenv(name, raising=False)
    asks = "from flwr.common.constant import *; from flwr.supercore.constant import *; print({})".format(", ".join(sorted(PIECES)))
    said = subprocess.run([sys.executable, "-c", asks], env=environment(tmp_path, poll=0.1), capture_output=True, text=True, check=True)
    assert said.stdout.split() == [PIECES[name] for name in sorted(PIECES)], "Flower has these settings no more"
    for name in PIECES:
        monkeypatch.setenv(name, "7")
    assert [environment(tmp_path, poll=0.1)[name] for name in PIECES] == ["7"] * len(PIECES)
