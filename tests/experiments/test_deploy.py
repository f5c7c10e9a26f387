"""What `server up`, `client up` and `server run --resume` look at before they start anything."""

import shutil
import socket
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from experiments import cli, deploy
from fedpeft.config import load
from server import certs, launch
from server.folder import alone, create

SERVER = "state: s\nclients: 1\nfleet: 127.0.0.1:{port}\ncontrol: 127.0.0.1:{port}\n"
TLS = "tls: {ca: certs/ca.crt, cert: certs/server.pem, key: certs/server.key}\n"
SITE = "client: 0\nstate: s\ntls: {ca: certs/ca.crt, key: certs/north}\n"


def up(folder: Path, side: str, text: str, monkeypatch: pytest.MonkeyPatch) -> int:
    (folder / "said.yaml").write_text(text)
    monkeypatch.setattr(sys, "argv", ["fedpeft", side, "up", "-c", str(folder / "said.yaml")])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not list((folder / "s").glob("*.pid")), "nothing was started"
    return int(str(stop.value.code))


@pytest.mark.fast
@pytest.mark.parametrize(
    ("side", "age", "words"),
    [
        ("server", 366, "server.pem ended on 20"),
        ("server", 3651, "ca.crt ended on 20"),
        ("client", 3651, "ca.crt ended on 20"),
    ],
)
def test_a_certificate_that_has_ended_starts_nothing_and_the_fault_says_what_to_do(
    side: str, age: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    certs.create(tmp_path / "certs", ["localhost"], now=datetime.now(UTC) - timedelta(days=age))
    certs.make_client(tmp_path / "certs", "north")
    text = SERVER.format(port=9) + TLS if side == "server" else SITE
    assert up(tmp_path, side, text, monkeypatch) == 2
    said = capsys.readouterr().err
    assert words in said
    assert ("`fedpeft certs init --force`" if age > 3650 else "`fedpeft certs renew`") in said


@pytest.mark.fast
def test_one_that_ends_within_a_month_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launch, "FREED", 0.1)
    certs.create(tmp_path / "certs", ["localhost"], now=datetime.now(UTC) - timedelta(days=340))
    with socket.socket() as other:  # a stranger at the port: nothing is started here either
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert up(tmp_path, "server", SERVER.format(port=port) + TLS, monkeypatch) == 2
        said = capsys.readouterr().err
    assert "WARNING: " in said
    assert "server.pem ends in 24 days" in said
    assert f"control: another process listens at 127.0.0.1:{port} already" in said


def resumed(folder: Path, run: Path, monkeypatch: pytest.MonkeyPatch, clients: int = 1) -> int:
    ports = "fleet: 127.0.0.1:9\ncontrol: 127.0.0.1:9\n"  # nobody listens there: nothing may come so far
    (folder / "server.yaml").write_text(f"state: s\nclients: {clients}\ninsecure: true\n{ports}")
    monkeypatch.setattr(sys, "argv", ["fedpeft", "server", "run", "--resume", str(run), "-c", str(folder / "server.yaml")])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(str(stop.value.code))


def begun(place: Path, *words: str) -> Path:
    said = ["clients=1", "cohort=1", "rounds=2", *words]
    return create(place, load(said), said).path


def test_what_cannot_go_on_is_told_before_anything_is_handed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "s" / "runs" / "one"
    begun(place, f"run.dir={place}")
    shutil.copytree(place, tmp_path / "moved")
    shutil.copytree(place, other := tmp_path / "other")
    (other / "config.yaml").write_text("rounds: 3\n")
    for run, words, clients in (
        (tmp_path / "nothing", "nothing is not the folder of a run", 1),
        (tmp_path / "moved", f"move it back to {place}", 1),
        (begun(tmp_path / "simulated"), "holds a simulation; go on with `fedpeft run --resume", 1),
        (other, "differs from what its overrides mean today", 1),
        (place, "server.yaml has clients: 2", 2),
    ):
        assert resumed(tmp_path, run, monkeypatch, clients) == 2
        assert words in capsys.readouterr().err
    with alone(place):
        assert resumed(tmp_path, place, monkeypatch) == 2
    assert "this run goes on in another process" in capsys.readouterr().err
    assert not list((tmp_path / "s").glob("run.toml"))


def test_ctrl_c_leaves_the_run_going_and_says_where_to_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    begun(place := tmp_path / "s" / "runs" / "one", f"run.dir={place}")
    monkeypatch.setattr(launch, "submit", lambda *_: 7)
    monkeypatch.setattr(deploy, "_follow", stopped)
    assert resumed(tmp_path, place, monkeypatch) == 0
    said = capsys.readouterr().out
    assert "the run goes on: `fedpeft status -c" in said
    assert f"`fedpeft report {place}`" in said


@pytest.mark.parametrize("there", [0, 1, 2])
def test_who_follows_a_run_hears_of_nodes_that_it_waits_for(
    there: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    states = iter([("running", ""), ("finished:failed", "over")])
    monkeypatch.setattr(deploy, "QUIET", 0.0)
    monkeypatch.setattr(launch, "state_of", lambda *_: next(states))
    monkeypatch.setattr(launch, "nodes", lambda _: [{"status": "online"}] * there + [{"status": "offline"}])
    with pytest.raises(OSError, match="over"):
        deploy._follow(launch.ServerFile(tmp_path, 2), 7, tmp_path)
    assert ("nodes are connected" in capsys.readouterr().out) == (there < 2)
