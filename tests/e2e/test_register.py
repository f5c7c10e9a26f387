"""`fedpeft certs register` with a real SuperLink on loopback, with TLS and keys made by `fedpeft certs`."""

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import grpc
import pytest

from server.certs import CA, SERVER, SERVER_KEY, create, make_client
from server.control import control as open_control
from server.control import key_of

BIN = Path(sys.executable).parent


@pytest.fixture
def superlink(tmp_path: Path) -> Iterator[tuple[Path, int, int]]:
    """A SuperLink that knows no client yet; yields the folder of its certificates, its control port and its fleet port."""
    create(tmp_path / "certs", ["127.0.0.1"], now=datetime.now(UTC))
    with socket.socket() as one, socket.socket() as two:
        for probe in (one, two):
            probe.bind(("127.0.0.1", 0))
        control, fleet = one.getsockname()[1], two.getsockname()[1]
    command = [
        BIN / "flower-superlink", "--ssl-ca-certfile", tmp_path / "certs" / CA, "--ssl-certfile", tmp_path / "certs" / SERVER,
        "--ssl-keyfile", tmp_path / "certs" / SERVER_KEY, "--enable-supernode-auth", "--disable-runtime-dependency-installation",
        "--port", control, "--fleet-api-address", f"127.0.0.1:{fleet}", "--database", tmp_path / "superlink.db",
    ]  # fmt: skip
    environment = os.environ | {
        "FLWR_HOME": str(tmp_path / "home"), "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1",
        "PATH": f"{BIN}:{os.environ['PATH']}",
    }  # fmt: skip
    with (tmp_path / "superlink.log").open("w") as log:
        process = subprocess.Popen(list(map(str, command)), cwd=tmp_path, env=environment, stdout=log, stderr=log)
        try:
            until = time.monotonic() + 60
            while not all(listening(port) for port in (control, fleet)):
                assert process.poll() is None, (tmp_path / "superlink.log").read_text()
                assert time.monotonic() < until, (tmp_path / "superlink.log").read_text()
                time.sleep(0.1)
            yield tmp_path / "certs", control, fleet
        finally:
            process.terminate()
            process.wait(30)


def listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def register(folder: Path, *names: str, control: int) -> tuple[int, str]:
    """Exit code of the command, and what it said."""
    command = [BIN / "fedpeft", "certs", "register", folder, *names, "--control", f"127.0.0.1:{control}"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, timeout=60)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_clients_are_let_in_once_and_only_by_who_trusts_the_server(superlink: tuple[Path, int, int], tmp_path: Path) -> None:
    folder, control, fleet = superlink
    for name in ("north", "south"):
        make_client(folder, name)
    code, said = register(folder, "north", control=control)
    assert code == 0, said
    assert re.fullmatch(r"north: registered, node \d+\n", said)
    code, said = register(folder, "north", "south", control=control)
    assert code == 0, said
    assert re.fullmatch(r"north: registered before, node \d+\nsouth: registered, node \d+\n", said)
    with open_control(f"127.0.0.1:{control}", folder / CA) as link:
        north, south = sorted(link.nodes(), key=lambda node: node.name)
        assert [(node.name, node.status, node.key) for node in (north, south)] == [
            (name, "registered", key_of(folder / f"{name}.pub")) for name in ("north", "south")
        ]
        link.unregister(north.number)
        assert {node.name: node.status for node in link.nodes()} == {"north": "unregistered", "south": "registered"}
        with pytest.raises(OSError, match=r"the SuperLink at control=.*code"):
            link.register(folder / "north.pub")
        assert link.runs() == []
        with pytest.raises(OSError, match=r"the SuperLink at control=.*code"):
            link.run(5)
    code, said = register(folder, "north", control=control)
    assert code == 2
    assert "north was shut out, and its key stays out" in said

    create(tmp_path / "stranger", ["127.0.0.1"], now=datetime.now(UTC))
    make_client(tmp_path / "stranger", "east")
    code, said = register(tmp_path / "stranger", "east", control=control)
    assert code == 1
    assert f"no SuperLink answers at control=127.0.0.1:{control}" in said
    assert "was its certificate signed by" in said

    for ca, trusted in ((folder / CA, True), (tmp_path / "stranger" / CA, False)):
        assert connects(fleet, ca) == trusted


def connects(fleet: int, ca: Path) -> bool:
    """Whether gRPC, as a SuperNode uses it, trusts the server by this authority."""
    with grpc.secure_channel(f"127.0.0.1:{fleet}", grpc.ssl_channel_credentials(ca.read_bytes())) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=5)
        except grpc.FutureTimeoutError:
            return False
        return True
