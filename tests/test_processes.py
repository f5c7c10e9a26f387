"""What was started is ended by its pid, and only if it is still the same process."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedpeft import processes
from fedpeft.processes import Processes

SLEEPS = [sys.executable, "-c", "import time; time.sleep(600)"]


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Processes]:
    made = Processes(tmp_path)
    yield made
    for name in made.names():
        made.stop(name)


@pytest.mark.fast
def test_a_process_is_started_once_found_again_and_ended(here: Processes) -> None:
    assert here.start("one", SLEEPS, os.environ)
    pid = here.running("one")
    assert pid is not None
    assert not Processes(here.folder).start("one", SLEEPS, os.environ)  # another command of another day
    assert Processes(here.folder).running("one") == pid
    assert here.names() == ["one"]
    assert here.stop("one")
    assert here.running("one") is None
    assert here.names() == []
    assert not here.stop("one")


@pytest.mark.fast
def test_a_stranger_that_has_the_pid_now_is_left_alone(here: Processes) -> None:
    with subprocess.Popen(SLEEPS) as stranger:
        try:
            (here.folder / "one.pid").write_text(json.dumps({"pid": stranger.pid, "born": "another time", "command": SLEEPS}))
            assert here.running("one") is None
            assert not here.stop("one")
            assert stranger.poll() is None
        finally:
            stranger.kill()


@pytest.mark.fast
def test_one_that_does_not_hear_is_killed_with_what_it_started(here: Processes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "PATIENCE", 0.5)
    deaf = f"import signal, subprocess, time; signal.signal({int(signal.SIGTERM)}, signal.SIG_IGN); "
    deaf += f"child = subprocess.Popen({SLEEPS!r}); print(child.pid, flush=True); time.sleep(600)"
    here.start("deaf", [sys.executable, "-c", deaf], os.environ)
    while not (said := here.log("deaf").read_text()):
        os.sched_yield()
    assert here.stop("deaf")
    until = time.monotonic() + 30  # a signal is sent, not heard, when `kill` returns
    while processes._born(int(said)) is not None:
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.fast
@pytest.mark.parametrize("again", [False, True])
def test_what_one_that_ended_by_itself_has_left_is_ended_too(here: Processes, again: bool) -> None:
    """Where nobody reaps dead processes, as in a container without an init, a child cannot tell that its parent is gone."""
    here.start("short", [sys.executable, "-c", f"import subprocess; print(subprocess.Popen({SLEEPS!r}).pid)"], os.environ)
    while here.running("short") is not None:
        os.sched_yield()
    child = int(here.log("short").read_text())
    assert processes._born(child) is not None
    if again:
        assert here.start("short", SLEEPS, os.environ)
    else:
        assert not here.stop("short")
    until = time.monotonic() + 30
    while processes._born(child) is not None:
        assert time.monotonic() < until
        time.sleep(0.01)
    assert (here.running("short") is not None) == again


@pytest.mark.fast
def test_one_that_ended_by_itself_runs_no_more_and_its_log_says_why(here: Processes) -> None:
    here.start("short", [sys.executable, "-c", "print('no such port')"], os.environ)
    while here.running("short") is not None:
        os.sched_yield()
    assert here.last_words("short").endswith("no such port")


@pytest.mark.fast
def test_what_a_process_started_ends_with_it_though_it_is_deaf_and_was_left_behind(here: Processes) -> None:
    child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(600)"
    made = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {child!r}]); print(p.pid, flush=True); p.wait()"
    here.start("one", [sys.executable, "-c", made], os.environ)
    while len(words := here.said("one").split()) < 2:
        time.sleep(0.02)
    pid = next(int(word) for word in words if word.isdigit())
    assert here.stop("one")
    until = time.monotonic() + 20
    while _lives(pid):
        assert time.monotonic() < until, "the child lives"
        time.sleep(0.02)


def _lives(pid: int) -> bool:
    return subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout.strip()[:1] not in (
        "",
        "Z",
    )
