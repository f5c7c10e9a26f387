"""A run killed at any moment and resumed ends with the same adapter, bit for bit, as one that was never stopped."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
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


# Runs are forks of one process that has imported all they need: what is killed is a process of its own, which did not take 8 s to begin.
FORKS = """
import json, os, signal, sys
from fedpeft.config import app_folder
sys.path.insert(0, str(app_folder()))
import clients.engine, experiments.progress, experiments.report, experiments.simulate, experiments.cli, fedpeft.cli
import hydra, matplotlib.backends.backend_svg, sklearn.datasets, transformers.models.vit.modeling_vit
for line in sys.stdin:
    arguments, before, said, errors = json.loads(line)
    child = os.fork()
    if not child:
        signal.alarm(300)  # seconds: one that hangs is killed
        for number, path in ((1, said), (2, errors)):
            os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY), number)
        sys.argv = ["fedpeft", *arguments]
        exec(before)
        fedpeft.cli.main()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@dataclass(frozen=True)
class Fedpeft:
    """The command, run in a process of its own each time."""

    forks: "subprocess.Popen[str]"
    folder: Path

    def __call__(self, *arguments: str, before: str = "") -> tuple[int, str]:
        """Its exit code, and what it wrote to stderr; `before` is run before it."""
        assert self.forks.stdin
        assert self.forks.stdout
        said, errors = (Path(tempfile.mkdtemp(dir=self.folder)) / name for name in ("stdout", "stderr"))
        self.forks.stdin.write(json.dumps([arguments, before, str(said), str(errors)]) + "\n")
        self.forks.stdin.flush()
        return int(self.forks.stdout.readline()), errors.read_text()

    def begin(self, folder: Path, strategy: str, *, before: str = "") -> tuple[int, str]:
        return self("run", *RUN, f"strategy={strategy}", f"run.dir={folder}", "--quiet", before=before)

    def goes_on(self, folder: Path, whole: Path) -> None:
        """Resumed, the run in `folder` ends with the adapter and the ledger of the one in `whole`."""
        code, errors = self("run", "--resume", str(folder), "--quiet")
        assert code == 0, errors
        name = "adapter/adapter_model.safetensors"
        assert (folder / name).read_bytes() == (whole / name).read_bytes()
        assert [kept(line) for line in lines(folder)] == [kept(line) for line in lines(whole)]


@pytest.fixture(scope="module")
def fedpeft(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fedpeft]:
    environment = os.environ | {"FEDPEFT_CACHE": str(tmp_path_factory.mktemp("cache")), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", FORKS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as forks:
        yield Fedpeft(forks, tmp_path_factory.mktemp("said"))


@pytest.fixture(scope="module", params=["fedsa", "fedopt"])
def uninterrupted(request: pytest.FixtureRequest, fedpeft: Fedpeft, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """FedSA has state at the clients, FedOpt at the server."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    code, errors = fedpeft.begin(folder, request.param)
    assert code == 0, errors
    return request.param, folder


@pytest.mark.slow
@pytest.mark.parametrize("moment", KILLS)
def test_a_killed_run_resumes_to_the_same_bits(moment: str, uninterrupted: tuple[str, Path], fedpeft: Fedpeft, tmp_path: Path) -> None:
    strategy, whole = uninterrupted
    code, errors = fedpeft.begin(tmp_path / "run", strategy, before=KILLS[moment])
    assert code == -signal.SIGKILL, errors
    fedpeft.goes_on(tmp_path / "run", whole)


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
    before: str, words: str, uninterrupted: tuple[str, Path], fedpeft: Fedpeft, tmp_path: Path
) -> None:
    strategy, whole = uninterrupted
    code, errors = fedpeft.begin(tmp_path / "run", strategy, before=before)
    assert code == 1
    assert words in errors
    assert "Traceback" not in errors
    fedpeft.goes_on(tmp_path / "run", whole)


def lines(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]


def kept(line: dict[str, object]) -> dict[str, object]:
    """What must be equal: not seconds, and not bytes down, since a restarted client holds nothing and is sent the whole again."""
    odd = ("seconds", "down", "bytes_by_client", "bytes_evaluation")  # who resumed is sent the whole again
    return {name: value for name, value in line.items() if not any(part in name for part in odd)}
