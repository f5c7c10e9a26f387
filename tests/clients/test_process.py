"""A ClientApp does not outlive the process that started it."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest

from fedpeft.config import app_folder

CHILD = f"""
import sys, time
sys.path.insert(0, {str(app_folder())!r})
from clients.process import end_with_parent
end_with_parent()
print("ready", flush=True)
time.sleep(600)
"""
PARENT = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {CHILD!r}]).wait()"


@pytest.mark.slow
def test_it_ends_when_its_parent_is_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, start_new_session=True) as parent:
        assert parent.stdout is not None
        try:
            assert parent.stdout.readline() == b"ready\n"
            parent.kill()
            began = time.monotonic()
            assert parent.stdout.read() == b""  # its end of the pipe closes when the child has ended
            assert time.monotonic() - began < 60
        finally:
            with suppress(ProcessLookupError):
                os.killpg(parent.pid, signal.SIGKILL)
