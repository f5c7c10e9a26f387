"""server.yaml: what it says is checked before anything starts, and what starts are Flower's own commands."""

import re
import shlex
from datetime import UTC, datetime
from pathlib import Path

import pytest

from fedpeft.config import ConfigError
from fedpeft.deployment import Tls
from fedpeft.processes import Processes
from server import launch
from server.certs import create
from server.launch import ServerFile, check, read, superexec, superlink, up, words_of

TLS = Tls(Path("/ca.crt"), Path("/server.pem"), Path("/server.key"))


def written(folder: Path, text: str) -> Path:
    (folder / "server.yaml").write_text(text)
    return folder / "server.yaml"


@pytest.mark.fast
def test_paths_begin_at_the_file_and_keys_are_those_of_the_folder(tmp_path: Path) -> None:
    for name in ("ca.crt", "server.pem", "server.key", "south.pub", "north.pub", "north"):
        (tmp_path / name).touch()
    server = read(
        written(tmp_path, "state: s\nclients: 2\ntls: {ca: ca.crt, cert: server.pem, key: server.key}\nkeys: [.]\nrun: [rounds=5]")
    )
    assert server.state == tmp_path / "s"
    assert [key.name for key in server.keys] == ["north.pub", "south.pub"]
    assert server.run == ("rounds=5",)
    assert (server.fleet, server.control) == ("0.0.0.0:9092", "127.0.0.1:8000")


@pytest.mark.fast
@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("state: s\nclients: 2", "tls.ca is missing: `fedpeft certs` makes it"),
        ("state: s\nclients: 2\ninsecure: true", "fleet=0.0.0.0:9092 can be reached from other machines"),
        ("state: s\nclients: 2\ninsecure: true\nfleet: 127.0.0.1:9092\ncontrol: 0.0.0.0:8000", "control=0.0.0.0:8000 can be reached"),
        ("state: s\nclients: 0\ninsecure: true\nfleet: 127.0.0.1:9092", "clients=0: needed is how many"),
        ("state: s\nclients: 2\nrun: rounds=5", "run=rounds=5: needed is a list"),
        ("state: s\nclients: 2\nkeys: [nobody.pub]", "nobody.pub is not there; a client makes it with `fedpeft certs client`"),
        ("clients: 2\nport: 9092", "port: there is no such field"),
    ],
)
def test_a_fault_names_the_field_and_the_next_step(tmp_path: Path, text: str, fault: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(fault)):
        read(written(tmp_path, text))


@pytest.mark.fast
def test_the_superlink_is_flowers_with_tls_node_keys_and_a_database() -> None:
    command = shlex.join(superlink(ServerFile(Path("/s"), 2, tls=TLS), Path("/s/secret")))
    for words in (
        "--ssl-ca-certfile /ca.crt --ssl-certfile /server.pem --ssl-keyfile /server.key --enable-supernode-auth",
        "--fleet-api-address 0.0.0.0:9092 --host 127.0.0.1 --port 8000",
        "--database /s/superlink.db",
        "--isolation process --superexec-auth-secret-file /s/secret",
        "--disable-runtime-dependency-installation",
    ):
        assert words in command
    assert "--insecure" not in command


@pytest.mark.fast
@pytest.mark.parametrize(("control", "called"), [("0.0.0.0:8000", "127.0.0.1:8000"), ("[::]:8000", "[::1]:8000"), ("10.0.0.5:8000",) * 2])
def test_a_server_calls_itself_by_an_address_that_its_certificate_has(control: str, called: str) -> None:
    command = superexec(ServerFile(Path("/s"), 2, control=control, tls=TLS), Path("/secret"))
    assert command[command.index("--runtime-api-address") + 1] == called


@pytest.mark.fast
def test_the_superexec_shares_the_secret_and_the_authority() -> None:
    command = shlex.join(superexec(ServerFile(Path("/s"), 2, tls=TLS), Path("/s/secret")))
    assert "--root-certificates /ca.crt --runtime-api-address 127.0.0.1:8000 --superexec-auth-secret-file /s/secret" in command


@pytest.mark.fast
@pytest.mark.parametrize(
    ("word", "fault"),
    [
        ("clients=3", "server.yaml has clients: 2"),
        ("rounds=0", "rounds=0: needed is at least 1"),
        ("strategy._target_=os.system", "_target_ is read only"),
        ("strategy=nothing", "there is no such strategy"),
    ],
)
def test_a_run_that_cannot_be_is_refused_before_it_is_handed_over(tmp_path: Path, word: str, fault: str) -> None:
    server = ServerFile(tmp_path, 2, tls=TLS)
    with pytest.raises(ConfigError, match=fault):
        check(server, words_of(server, [word], tmp_path / "run"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.fast
def test_all_clients_take_part_unless_the_run_says_otherwise() -> None:
    server = ServerFile(Path("/s"), 3, run=("rounds=5",))
    assert words_of(server, ["seed=1"], Path("/r")) == ["clients=3", "cohort=3", "rounds=5", "seed=1", "run.dir=/r"]
    assert words_of(server, ["cohort=2"], Path("/r")) == ["clients=3", "rounds=5", "cohort=2", "run.dir=/r"]


@pytest.mark.fast
def test_a_file_that_is_no_public_key_starts_nothing(tmp_path: Path) -> None:
    create(tmp_path / "certs", ["localhost"], now=datetime.now(UTC))
    (tmp_path / "north.pub").write_text("ssh-rsa nonsense")
    server = read(
        written(tmp_path, "state: s\nclients: 1\ntls: {ca: certs/ca.crt, cert: certs/server.pem, key: certs/server.key}\nkeys: [north.pub]")
    )
    with pytest.raises(ConfigError, match=r"keys: .*north\.pub holds no public key in OpenSSH's format"):
        up(server)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("ran", [True, False])
def test_up_in_a_loop_outlives_a_question_that_is_not_answered(
    ran: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """systemd's unit ends, with the run, once `up` fails."""
    monkeypatch.setattr(Processes, "running", lambda _, name: 5 if ran else None)
    monkeypatch.setattr(Processes, "start", lambda *_: False)
    monkeypatch.setattr(launch, "_wait", lambda *_: None)
    server = ServerFile(tmp_path / "s", 2, fleet="127.0.0.1:9", control="127.0.0.1:9")
    if ran:
        assert up(server) == ([], [])
        assert "no key was let in: no SuperLink answers" in caplog.text
    else:
        with pytest.raises(OSError, match="no SuperLink answers"):
            up(server)
