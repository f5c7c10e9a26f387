"""The control port: what its answers mean. That a real SuperLink gives them, tests/e2e/test_register.py says."""

from pathlib import Path

import pytest
from flwr.proto.run_pb2 import Run as FlowerRun
from flwr.proto.run_pb2 import RunStatus
from flwr.proto.transport_pb2 import Scalar
from flwr.supercore.primitives.asymmetric import bytes_to_public_key, public_key_to_bytes

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
    for status in ("pending", "starting", "running"):
        run = _run(FlowerRun(run_id=7, status=RunStatus(status=status)))
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
    assert str(fault.value).startswith("no SuperLink answers at control=127.0.0.1:9: does `fedpeft server up` run")
    assert (f"signed by {tmp_path / CA}" in str(fault.value)) == secured
