"""Processes: what a deployment started and left running, one file of pid and start time for each.

A pid is used again once its process has ended, so the start time is compared before anything is ended: a stranger never is.
"""

import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fedpeft.ledger import write_text

PATIENCE = 20.0  # seconds a process gets to end by itself before it is killed


@dataclass(frozen=True)
class Processes:
    """The processes of the state folder `folder`: `<name>.pid` says who runs, `<name>.log` what it said."""

    folder: Path

    def running(self, name: str) -> int | None:
        """The pid of the process `name`, if it runs."""
        pid, born = self._noted(name)
        return pid if born is not None and _born(pid) == born else None

    def start(self, name: str, command: Sequence[str], environment: Mapping[str, str]) -> bool:
        """Starts `command` in this folder, in a session of its own, unless it runs; True if it was started."""
        if self.running(name) is not None:
            return False
        self.stop(name)  # what one that ended by itself has left
        with self.log(name).open("a") as log:
            made = subprocess.Popen(
                command, cwd=self.folder, env=dict(environment), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        made.returncode = 0  # it is left running on purpose; Popen would warn of that
        write_text(self.folder / f"{name}.pid", json.dumps({"pid": made.pid, "born": _born(made.pid), "command": list(command)}) + "\n")
        return True

    def stop(self, name: str) -> bool:
        """Ends the process `name`, by force if it does not end within `PATIENCE`, and then all that it started; True if it ran."""
        pid, born = self._noted(name)
        ran = self.running(name) is not None
        if ran:
            os.kill(pid, signal.SIGTERM)
            self._gone(name, PATIENCE)
        if ran or (born is not None and _born(pid, ended=True) == born):  # nobody else has this number while it is there
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)  # it leads a session of its own
            self._gone(name, PATIENCE)
        (self.folder / f"{name}.pid").unlink(missing_ok=True)
        return ran

    def names(self) -> list[str]:
        """Of all processes that were started here and not stopped."""
        return sorted(path.stem for path in self.folder.glob("*.pid"))

    def log(self, name: str) -> Path:
        """What the process wrote."""
        return self.folder / f"{name}.log"

    def said(self, name: str, since: int = 0) -> bytes:
        """What stands in its log after the first `since` bytes."""
        try:
            with self.log(name).open("rb") as log:
                log.seek(since)
                return log.read()
        except FileNotFoundError:
            return b""

    def last_words(self, name: str, lines: int = 6) -> str:
        """The end of its log, for an error message."""
        return "\n".join([f"{self.log(name)} ends with", *self.said(name).decode(errors="replace").splitlines()[-lines:]])

    def _noted(self, name: str) -> tuple[int, str | None]:
        """(pid, when it began) of the process `name` when it was started; (0, None) if it was not."""
        try:
            noted = json.loads((self.folder / f"{name}.pid").read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return 0, None
        return int(noted["pid"]), noted["born"]

    def _gone(self, name: str, seconds: float) -> bool:
        until = time.monotonic() + seconds
        while self.running(name) is not None:
            if time.monotonic() > until:
                return False
            time.sleep(0.05)
        return True


def _born(pid: int, *, ended: bool = False) -> str | None:
    """When the process began, in words that no other process of this pid shares; None if it is not there, or no longer than for whoever
    started it to look (unless `ended`).
    """
    stat = Path(f"/proc/{pid}/stat")
    if not stat.parent.parent.joinpath("self").exists():  # no Linux: to the second
        found = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)
        return found.stdout.strip() or None
    try:
        fields = stat.read_text().rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except (FileNotFoundError, ProcessLookupError):
        return None
    if fields[0] in "ZX" and not ended:  # a zombie has ended; who started it has not looked yet
        return None
    return f"{boot} {fields[19]}"  # ticks since boot
