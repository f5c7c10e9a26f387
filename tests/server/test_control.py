"""The control port: what its answers mean. That a real SuperLink gives them, tests/e2e/test_register.py says."""

from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
from flwr.proto.run_pb2 import Run as FlowerRun
from flwr.proto.run_pb2 import RunStatus
from flwr.proto.transport_pb2 import Scalar
from flwr.supercore.primitives.asymmetric import bytes_to_public_key, public_key_to_bytes

from fedpeft.config import ConfigError
from server.certs import make_client, read_public_key
from server.control import _run, control, key_of


@pytest.mark.fast
@pytest.mark.parametrize("overrides", ["rounds=2 'run.dir=/a b/c'", "run.dir=/x run.dir='/a b/c'"])
def test_a_run_is_known_by_its_folder(overrides: str) -> None:
    status = RunStatus(status="finished", sub_status="failed", details="ServerApp failed with exception: client 1 does not fit")
    run = _run(FlowerRun(run_id=7, status=status, override_config={"overrides": Scalar(string=overrides)}))
    assert (run.number, run.status, run.why, run.folder) == (7, "finished:failed", "client 1 does not fit", Path("/a b/c"))
    assert not run.live


@pytest.mark.fast
def test_another_apps_run_has_no_folder_and_is_live_until_it_has_finished() -> None:
    for status, more in (("pending", {}), ("starting", {"overrides": Scalar(string="don't")}), ("running", {"lr": Scalar(double=1.0)})):
        run = _run(FlowerRun(run_id=7, status=RunStatus(status=status), override_config=more))
        assert (run.status, run.why, run.folder, run.live) == (status, "", None, True)


@pytest.mark.fast
def test_keys_are_compared_as_flower_holds_them(tmp_path: Path) -> None:
    make_client(tmp_path, "north")
    key = key_of(tmp_path / "north.pub")
    assert key == public_key_to_bytes(read_public_key(tmp_path / "north.pub"))
    assert bytes_to_public_key(key) == read_public_key(tmp_path / "north.pub")


@pytest.mark.parametrize("secured", [False, True])
def test_nobody_at_the_port_is_told_with_what_to_look_at(secured: bool, tmp_path: Path) -> None:
    from datetime import UTC, datetime

    from server.certs import CA, create

    create(tmp_path, ["localhost"], now=datetime.now(UTC))
    with control("127.0.0.1:9", tmp_path / CA if secured else None) as link, pytest.raises(ConnectionError) as fault:
        link.nodes()
    assert "no SuperLink answers at control=127.0.0.1:9 ([Errno 111] Connection refused): does `fedpeft server up` run" in str(fault.value)
    assert (f"signed by {tmp_path / CA}" in str(fault.value)) == secured


@pytest.mark.fast
@pytest.mark.parametrize("address", ["localhost:abc", "localhost", "::1"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match=r"control=.*: needed is host:port"), control(address, None):
        pass


def test_another_server_at_the_port_is_told_as_such() -> None:
    class Page(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>")

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Page) as server:
        Thread(target=server.handle_request, daemon=True).start()
        address = f"127.0.0.1:{server.server_port}"
        with control(address, None) as link, pytest.raises(OSError, match=f"what answers at control={address} is no SuperLink"):
            link.nodes()
