"""The same code on Flower's own simulation engine: `flwr run`, a SuperLink on loopback, Ray actors as clients."""

import subprocess
import sys
from pathlib import Path

import pytest

from fedpeft.config import app_folder

BIN = Path(sys.executable).parent
# A Ray actor trains one client at a time.
RUN = "engine.wave=1 rounds=2 clients=4 cohort=4 train.steps=2 model.epochs=1 evaluate.head_only=false"


@pytest.mark.slow
def test_flwr_run_gives_the_adapter_of_fedpeft_run(superlink: tuple[dict[str, str], Path], tmp_path: Path) -> None:
    environment, neutral = superlink
    there, here = tmp_path / "flower", tmp_path / "own"
    flower = subprocess.run(
        [str(BIN / "flwr"), "run", str(app_folder()), "sim", "--stream", "--federation-config", "num-supernodes=4",
         "--run-config", f"overrides='{RUN} run.dir={there}'"],
        cwd=neutral, env=environment, capture_output=True, text=True, check=False, timeout=400,
    )  # fmt: skip
    assert (there / "adapter" / "adapter_model.safetensors").exists(), flower.stdout + flower.stderr
    own = subprocess.run(
        [str(BIN / "fedpeft"), "run", *RUN.split(), f"run.dir={here}", "--quiet"],
        env=environment, capture_output=True, text=True, check=False, timeout=400,
    )  # fmt: skip
    assert own.returncode == 0, own.stderr
    name = "adapter/adapter_model.safetensors"
    assert (there / name).read_bytes() == (here / name).read_bytes()
