"""`fedpeft certs`: what it prints, how it ends. Registering with a SuperLink is in e2e/test_register.py."""

import stat
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from server.certs import CA, SERVER, SERVER_KEY, create, hosts_of, read_certificate

pytestmark = pytest.mark.fast


def test_from_nothing_to_a_renewed_certificate(call: Callable[..., int], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = tmp_path / "certs"
    assert call("certs", "init", folder, "--host", "fl.example.org", "--host", "10.0.0.5", "--days", "20") == 0
    assert call("certs", "client", folder, "north") == 0
    said = capsys.readouterr().out
    assert "ca.crt  to every client" in said
    assert "north.pub  to the server: fedpeft certs register" in said
    assert call("certs", "show", folder) == 1
    table = capsys.readouterr().out
    assert "fl.example.org, 10.0.0.5, localhost" in table
    assert "server.pem ends in 19 days" in table
    assert "fedpeft authority" in table
    assert "644" in table
    assert call("certs", "renew", folder) == 0
    assert "clients need nothing new" in capsys.readouterr().out
    assert call("certs", "show", folder) == 0
    table = capsys.readouterr().out
    assert f"{datetime.now(UTC) + timedelta(days=365):%Y-%m}" in table
    assert "advice" not in table
    assert [line.split()[0] for line in table.splitlines()[1:]] == [CA, "ca.key", SERVER, SERVER_KEY, "north", "north.pub"]


def test_renewing_for_other_hosts(call: Callable[..., int], tmp_path: Path) -> None:
    create(tmp_path, ["old.example.org"], now=datetime.now(UTC))
    assert call("certs", "renew", tmp_path, "--host", "new.example.org") == 0
    assert hosts_of(read_certificate(tmp_path / SERVER))[0] == "new.example.org"


def test_show_lists_every_fault_and_ends_with_1(call: Callable[..., int], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    create(tmp_path, ["localhost"], now=datetime.now(UTC))
    (tmp_path / SERVER_KEY).chmod(stat.S_IRUSR | stat.S_IROTH)
    (tmp_path / SERVER).write_text("[nothing]")
    (tmp_path / "notes.txt").write_text("of somebody")
    assert call("certs", "show", tmp_path) == 1
    said = capsys.readouterr().out
    assert said.count("advice: ") == 2
    assert "no certificate in PEM" in said
    assert "(mode 404): `chmod 600" in said
    assert "notes.txt" not in said


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (("init", "FOLDER"), "needs a host"),
        (("init", "FOLDER", "--host", "https://fl.example.org"), "neither a name nor an address"),
        (("client", "FOLDER", "../north"), "names no file"),
        (("show", "FOLDER"), "holds neither certificates nor keys"),
        (("renew", "FOLDER"), "ca.crt is not there"),
        (("register", "FOLDER", "north"), "north.pub is not there"),
    ],
)
def test_what_the_user_can_set_right_is_said_with_exit_code_2(
    call: Callable[..., int], capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: tuple[str, ...], fault: str
) -> None:
    assert call("certs", *(tmp_path if word == "FOLDER" else word for word in arguments)) == 2
    said = capsys.readouterr().err
    assert fault in said
    assert "Traceback" not in said
    assert all(line.startswith("fedpeft: ") for line in said.splitlines())


def test_where_no_superlink_answers_registering_says_what_to_look_at(
    call: Callable[..., int], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    create(tmp_path, ["localhost"], now=datetime.now(UTC))
    assert call("certs", "client", tmp_path, "north") == 0
    assert call("certs", "register", tmp_path, "north", "--control", "127.0.0.1:9") == 1
    said = capsys.readouterr().err
    assert "no SuperLink answers at control=127.0.0.1:9 ([Errno 111] Connection refused): does `fedpeft server up` run" in said
    assert f"was its certificate signed by {tmp_path / 'ca.crt'}?" in said
