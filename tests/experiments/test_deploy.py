"""What `server up`, `client up` and `server run --resume` look at before they start anything."""

import shutil
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import cast

import pytest

from experiments import cli, deploy
from fedpeft.config import load
from server import certs, launch
from server.control import Control, Node, Run, key_of
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
    with alone(place, "5"):
        assert resumed(tmp_path, place, monkeypatch) == 1
    assert (
        "no SuperLink answers at control=127.0.0.1:9 ([Errno 111] Connection refused): does `fedpeft server up` run"
        in capsys.readouterr().err
    )
    assert not list((tmp_path / "s").glob("run.toml"))


@dataclass
class Link:
    """A control port whose answers are given; `control_of` in its place gives it."""

    told: list[Run]  # one for each time that runs are asked for, the last again and again
    online: int = 1
    asked: list[int] = field(default_factory=list)

    @contextmanager
    def of(self, _: object) -> Iterator["Link"]:
        yield self

    def runs(self) -> list[Run]:
        return self.told[:1]

    def run(self, number: int) -> Run:
        self.asked.append(number)
        return self.told.pop(0) if len(self.told) > 1 else self.told[0]

    def nodes(self) -> list[Node]:
        return [Node(1, "a", "online", b"")] * self.online + [Node(2, "b", "offline", b"")]


def refused(*_: object) -> int:
    raise AssertionError("another run was begun")


def test_a_run_that_goes_on_is_followed_again_and_ctrl_c_leaves_it_going_and_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    begun(place := tmp_path / "s" / "runs" / "one", f"run.dir={place}")
    (tmp_path / "linked").symlink_to(tmp_path / "s")
    monkeypatch.setattr(launch, "submit", refused)
    monkeypatch.setattr(launch, "control_of", Link([Run(5, "running", "", place)]).of)
    monkeypatch.setattr(deploy, "_follow", stopped)
    goes_on = f"run 5 goes on, in {place}\n"
    assert resumed(tmp_path, place, monkeypatch) == 0
    said = capsys.readouterr().out
    assert said.startswith(goes_on), "its ServerApp has not come so far as to write there"
    server = f"-c {tmp_path / 'server.yaml'}"
    assert f"`fedpeft server run --resume {place} {server}` follows it again, `fedpeft server stop {server}` ends it" in said
    with alone(place, "5"):
        for folder in (place, tmp_path / "linked" / "runs" / "one"):
            assert resumed(tmp_path, folder, monkeypatch) == 0
            assert capsys.readouterr().out.startswith(goes_on)
        monkeypatch.setattr(launch, "control_of", Link([Run(5, "running", "", tmp_path)]).of)
        assert resumed(tmp_path, place, monkeypatch) == 2
        assert "this run goes on in another process" in capsys.readouterr().err
    monkeypatch.setattr(launch, "control_of", Link([Run(5, "running", "", place)]).of)
    monkeypatch.setattr(launch, "submit", lambda *_: 7)
    assert resumed(tmp_path, place, monkeypatch) == 0
    assert capsys.readouterr().out.startswith(f"run 7, in {place}\n"), "5 has ended, which the SuperLink has not heard"


def test_a_run_that_has_not_begun_to_write_is_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(deploy, "_follow", lambda *_: None)
    place = tmp_path / "s" / "runs" / "one"
    for run, code, said in (
        (Run(5, "pending", "", place), 0, f"run 5 goes on, in {place}"),
        (Run(5, "finished:failed", "", place), 2, "is not the folder of a run"),
    ):
        monkeypatch.setattr(launch, "control_of", Link([run]).of)
        assert resumed(tmp_path, place, monkeypatch) == code
        out = capsys.readouterr()
        assert said in out.out + out.err


def test_stop_ends_what_goes_on_and_waits_until_nobody_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "server.yaml").write_text("state: s\nclients: 1\ninsecure: true\nfleet: 127.0.0.1:9\ncontrol: 127.0.0.1:9\n")
    monkeypatch.setattr(deploy, "ENDS", 0.3)
    place, ended = tmp_path / "s" / "runs" / "one", list[int]()
    other = place.with_name("two")  # where nobody writes
    for run, words, expected, waited in (
        (Run(5, "running", "", place), f"stopped: run 5, in {place}\n", [5], True),
        (Run(5, "running", "", other), f"stopped: run 5, in {other}\n", [5], False),
        (Run(5, "finished:failed", "", place), "no run goes on\n", [], False),
    ):
        link = Link([run])
        monkeypatch.setattr(link, "stop", ended.append, raising=False)
        monkeypatch.setattr(launch, "control_of", link.of)
        monkeypatch.setattr(sys, "argv", ["fedpeft", "server", "stop", "-c", str(tmp_path / "server.yaml")])
        began = time.monotonic()
        with alone(place, "5"), pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == 0
        assert (time.monotonic() - began >= 0.3) >= waited
        assert capsys.readouterr().out == words
        assert ended == expected
        assert ("has not ended within" in caplog.text) == waited
        ended.clear()
        caplog.clear()


def test_who_begins_a_run_beside_another_is_warned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    begun(place := tmp_path / "s" / "runs" / "one", f"run.dir={place}")
    monkeypatch.setattr(launch, "submit", lambda *_: 7)
    monkeypatch.setattr(deploy, "_follow", lambda *_: None)
    for status, warned in (("running", True), ("finished:failed", False)):
        caplog.clear()
        monkeypatch.setattr(launch, "control_of", Link([Run(5, status, "", tmp_path / "other")]).of)
        assert resumed(tmp_path, place, monkeypatch) == 0
        assert ("run 5 goes on at the same time" in caplog.text) == warned


@pytest.mark.parametrize("there", [0, 1, 2])
def test_who_follows_a_run_hears_of_nodes_that_it_waits_for(
    there: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(deploy, "QUIET", 0.0)
    link = Link([Run(7, "running", "", tmp_path), Run(7, "finished:failed", "over", tmp_path)], online=there)
    with pytest.raises(OSError, match="over"):
        deploy._follow(launch.ServerFile(tmp_path, 2), cast("Control", link), 7, tmp_path)
    assert ("nodes are connected" in capsys.readouterr().out) == (there < 2)


@pytest.mark.parametrize(("status", "words"), [("stopped", "`fedpeft server stop` ended it"), ("failed", "it gave no reason")])
def test_how_a_run_ended_is_told_with_where_its_log_is(status: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deploy, "QUIET", 0.0)
    link = Link([Run(7, f"finished:{status}", "", tmp_path)])
    with pytest.raises(OSError, match=f"{words}\nthe run ended as finished:{status}; .* flwr log 7 local --show"):
        deploy._follow(launch.ServerFile(tmp_path, 1), cast("Control", link), 7, tmp_path)
    assert link.asked == [7]


def shown(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str = "server.yaml", *, code: int = 0) -> None:
    monkeypatch.setattr(sys, "argv", ["fedpeft", "status", "-c", str(folder / name)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == code


def test_status_shows_a_run_before_its_first_round_and_one_that_was_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "server.yaml").write_text("state: s\nclients: 2\ninsecure: true\nfleet: 127.0.0.1:9\ncontrol: 127.0.0.1:10\n")
    shown(tmp_path, monkeypatch)
    said = capsys.readouterr().out
    assert "running     none\n" in said
    assert f"advice: nothing runs here; `fedpeft server up -c {tmp_path / 'server.yaml'}` starts it" in said
    monkeypatch.setattr(deploy, "_running", lambda _: {"superlink": 5})
    place = tmp_path / "s" / "runs" / "one"
    for run, words in (
        (Run(7, "running", "", place), "state       running\nround       0\n"),
        (
            Run(7, "finished:failed", "client 1 does not fit", place),
            "state       finished:failed\nreason      client 1 does not fit\nround       0",
        ),
    ):
        monkeypatch.setattr(launch, "control_of", Link([run]).of)
        shown(tmp_path, monkeypatch)
        said = capsys.readouterr().out
        assert f"running     superlink 5\nnodes       1\nclients     2\nonline      a\noffline     b\nrun         {place}\n{words}" in said


def test_status_says_that_the_superlink_does_not_answer_and_shows_what_lies_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "server.yaml").write_text("state: s\nclients: 2\ninsecure: true\nfleet: 127.0.0.1:9\ncontrol: 127.0.0.1:9\n")
    monkeypatch.setattr(deploy, "_running", lambda _: {"superlink": 5})
    for name in ("1", "2"):
        begun(tmp_path / "s" / "runs" / name)
    (tmp_path / "s" / "runs" / "1" / "report.html").touch()
    (tmp_path / "s" / "runs" / "notes").touch()
    shown(tmp_path, monkeypatch)
    said = capsys.readouterr().out
    assert "unreachable no SuperLink answers at control=127.0.0.1:9" in said
    assert f"run         {tmp_path / 's' / 'runs' / '2'}\nround       0\n" in said


def test_who_is_shut_out_is_named_by_the_key_or_the_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    certs.create(tmp_path / "certs", ["localhost"], now=datetime.now(UTC))
    for name in ("a", "b"):
        certs.make_client(tmp_path / "certs", name)
    public = tmp_path / "certs" / "a.pub"
    (tmp_path / "server.yaml").write_text(SERVER.format(port=9) + TLS + "keys: [certs/a.pub]")
    old, new, other = Node(1, "a", "offline", b""), Node(2, "a", "online", key_of(public)), Node(3, "b", "registered", b"")

    def unregister(*names: str, nodes: Sequence[Node]) -> tuple[int, str, list[int]]:
        link, shut = Link([]), list[int]()
        monkeypatch.setattr(link, "unregister", shut.append, raising=False)
        monkeypatch.setattr(link, "nodes", lambda: list(nodes))
        monkeypatch.setattr(launch, "control_of", link.of)
        monkeypatch.setattr(sys, "argv", ["fedpeft", "server", "unregister", *names, "-c", str(tmp_path / "server.yaml")])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out = capsys.readouterr()
        return int(str(stop.value.code)), out.out + out.err, shut

    gone = f"a: shut out, node 2\ntake {public} away, else `server up` warns of it\n"
    assert unregister("a", "3", "b", "2", nodes=[new, other]) == (0, f"{gone}b: shut out, node 3\n", [2, 3])
    assert unregister("a", "c", nodes=[new, other]) == (2, "fedpeft: c is not let in; there are a, b\n", [])
    code, said, shut = unregister("a", nodes=[old, new])
    assert (code, shut) == (2, [])
    assert said == f"fedpeft: a is the name of several nodes, say which by its number: 1 (offline), 2 (online, {public})\n"
    assert unregister("c", nodes=[old, new])[1] == "fedpeft: c is not let in; there are a (1), a (2)\n"
    assert unregister("1", nodes=[old, new])[2] == [1]
