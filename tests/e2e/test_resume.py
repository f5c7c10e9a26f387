"""A run killed at any moment and resumed ends with the same adapter, bit for bit, as one that was never stopped."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

RUN = [
    "engine.lanes=2",
    "rounds=4",
    "clients=6",
    "cohort=3",
    "train.steps=2",
    "evaluate.every=2",
    "model.epochs=2",
    "evaluate.head_only=false",
]

# Each is put before the command in the child process and kills it there with SIGKILL: nothing gets a chance to clean up.
KILLS = {
    "while a client of the third round trains": """
import multiprocessing, time
from clients.engine import Engine
real = Engine.train
def train(self, phase, jobs, *, round):
    done = real(self, phase, jobs, round=round)
    if round == 2:  # in a lane: its parent goes, and then it must go too
        os.kill(os.getppid() if multiprocessing.parent_process() else os.getpid(), signal.SIGKILL)
        time.sleep(60)
    return done
Engine.train = train
""",
    "while the third checkpoint is being written": """
import fedpeft.checkpoint as place
real, calls = place.save_file, []
def save_file(tensors, path, metadata):
    real(tensors, path, metadata)
    if "checkpoints" in str(path): calls.append(0)
    if "checkpoints" in str(path) and len(calls) == 3:
        with open(path, "r+b") as file: file.truncate(os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
place.save_file = save_file
""",
    "between the ledger line and the checkpoint": """
import fedpeft.checkpoint as place
real, calls = place.save, []
def save(*args, **kwargs):
    calls.append(0)
    if len(calls) == 2: os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **kwargs)
place.save = save
""",
    "before anything but the manifest is there": """
import server.app as place
def connect(*args, **kwargs): os.kill(os.getpid(), signal.SIGKILL)
place.connect = connect
""",
}


LANE_DIES = KILLS["while a client of the third round trains"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module", params=["fedsa", "fedopt"])
def uninterrupted(request: pytest.FixtureRequest, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """FedSA has state at the clients, FedOpt at the server."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert begin(cache, folder, request.param).returncode == 0
    return request.param, folder


@pytest.mark.slow
@pytest.mark.parametrize("moment", KILLS)
def test_a_killed_run_resumes_to_the_same_bits(moment: str, uninterrupted: tuple[str, Path], cache: Path, tmp_path: Path) -> None:
    strategy, whole = uninterrupted
    killed = begin(cache, tmp_path / "run", strategy, before=KILLS[moment])
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert_goes_on(cache, tmp_path / "run", whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "words"),
    [
        (
            LANE_DIES.replace("os.getppid() if multiprocessing.parent_process() else os.getpid()", "os.getpid()"),
            "a lane ended with exit code -9",
        ),
        (
            "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))",
            "Free disk space",
        ),  # bytes: a checkpoint has 90,000
    ],
    ids=["a lane is killed", "the disk is full"],
)
def test_a_run_that_ends_says_why_in_one_sentence_and_goes_on(
    before: str, words: str, uninterrupted: tuple[str, Path], cache: Path, tmp_path: Path
) -> None:
    strategy, whole = uninterrupted
    assert_said(begin(cache, tmp_path / "run", strategy, before=before), words)
    assert_goes_on(cache, tmp_path / "run", whole)


def begin(cache: Path, folder: Path, strategy: str, *, before: str = "") -> subprocess.CompletedProcess[str]:
    return fedpeft(cache, ["run", *RUN, f"strategy={strategy}", f"run.dir={folder}", "--quiet"], before=before)


def assert_said(stopped: subprocess.CompletedProcess[str], words: str) -> None:
    assert stopped.returncode == 1
    assert words in stopped.stderr
    assert "Traceback" not in stopped.stderr


def assert_goes_on(cache: Path, folder: Path, whole: Path) -> None:
    """Resumed, the run in `folder` ends with the adapter and the ledger of the one in `whole`."""
    resumed = fedpeft(cache, ["run", "--resume", str(folder), "--quiet"])
    assert resumed.returncode == 0, resumed.stderr
    name = "adapter/adapter_model.safetensors"
    assert (folder / name).read_bytes() == (whole / name).read_bytes()
    assert [kept(line) for line in lines(folder)] == [kept(line) for line in lines(whole)]


def fedpeft(cache: Path, arguments: list[str], before: str = "") -> subprocess.CompletedProcess[str]:
    program = f"import os, signal, sys\nfrom fedpeft.config import app_folder\nsys.path.insert(0, str(app_folder()))\n{before}\n"
    program += f"sys.argv = ['fedpeft', *{arguments!r}]\nfrom fedpeft.cli import main\nmain()\n"
    environment = os.environ | {"FEDPEFT_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, env=environment, timeout=300)


def lines(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]


def kept(line: dict[str, object]) -> dict[str, object]:
    """What must be equal: not seconds, and not bytes down, since a restarted client holds nothing and is sent the whole again."""
    odd = ("seconds", "down", "bytes_by_client", "bytes_evaluation")  # who resumed is sent the whole again
    return {name: value for name, value in line.items() if not any(part in name for part in odd)}
