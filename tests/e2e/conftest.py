"""A SuperLink for tests that run on Flower's own simulation engine."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

BIN = Path(sys.executable).parent


@pytest.fixture
def superlink(tmp_path: Path) -> Iterator[tuple[dict[str, str], Path]]:
    """A SuperLink of our own, started in a neutral folder and ended by its pid; yields the environment of `flwr` and that folder."""
    port = free_port()
    home, neutral = tmp_path / "home", tmp_path / "neutral"
    home.mkdir()
    neutral.mkdir()
    (home / "config.toml").write_text(f'[superlink]\ndefault = "sim"\n[superlink.sim]\naddress = "127.0.0.1:{port}"\ninsecure = true\n')
    environment = os.environ | {
        "FLWR_HOME": str(home), "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "FEDPEFT_CACHE": str(tmp_path / "cache"),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1", "OMP_NUM_THREADS": "1", "PATH": f"{BIN}:{os.environ['PATH']}",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }  # fmt: skip
    command = [
        str(BIN / "flower-superlink"), "--insecure", "--simulation", "--isolation", "subprocess",
        "--host", "127.0.0.1", "--port", str(port), "--disable-runtime-dependency-installation",
    ]  # fmt: skip
    with (tmp_path / "superlink.log").open("w") as log:
        process = subprocess.Popen(command, cwd=neutral, env=environment, stdout=log, stderr=log)
        try:
            until = time.monotonic() + 60
            while not listening(port):
                assert process.poll() is None, (tmp_path / "superlink.log").read_text()
                assert time.monotonic() < until, (tmp_path / "superlink.log").read_text()
                time.sleep(0.1)
            yield environment, neutral
        finally:
            process.terminate()
            process.wait(30)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
