"""A run's folder: config, manifest, ledger, checkpoints, adapter. What is written once is written whole."""

import fcntl
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from fedpeft.config import Config, ConfigError, app_folder, load, shown
from fedpeft.ledger import Ledger, write_text

LOCK = "lock"  # file that whoever writes into the folder holds; its text says who that was
GLANCE = 1.0  # seconds after which nobody is only looking whether it is held
PACKAGES = ("fedpeft", "torch", "transformers", "peft", "flwr", "numpy", "hydra-core")


@dataclass(frozen=True)
class Folder:
    """The folder of one run."""

    path: Path

    @property
    def ledger(self) -> Ledger:
        """One line per round."""
        return Ledger(self.path / "ledger.jsonl")

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints lie."""
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        """Where the adapter is exported to."""
        return self.path / "adapter"

    def manifest(self) -> dict[str, Any]:
        """What was recorded when the run began; `ConfigError` if this is no run's folder."""
        try:
            made: dict[str, Any] = json.loads((self.path / "manifest.json").read_text())
        except (OSError, json.JSONDecodeError) as fault:
            raise ConfigError(f"{self.path} is not the folder of a run: its manifest.json cannot be read ({fault})") from None
        return made

    def note(self, facts: Mapping[str, Any]) -> None:
        """Adds facts to the manifest."""
        write_text(self.path / "manifest.json", json.dumps(self.manifest() | dict(facts), indent=2) + "\n")

    def write(self, name: str, value: object) -> None:
        """Writes a JSON file."""
        write_text(self.path / name, json.dumps(value, indent=2) + "\n")


def create(path: Path, config: Config, overrides: Sequence[str]) -> Folder:
    """A new run's folder; `ConfigError` if there is a run already."""
    if (path / "manifest.json").exists():
        raise ConfigError(f"run.dir={path} holds a run already; continue it with `fedpeft run --resume {path}`, or choose another run.dir")
    path.mkdir(parents=True, exist_ok=True)
    folder = Folder(path)
    write_text(path / "config.yaml", shown(config))
    folder.write(
        "manifest.json",
        {
            "overrides": list(overrides),
            "seed": config.seed,
            "choices": dict(config.choices),
            "versions": versions(),
            "python": platform.python_version(),
            "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
            "commit": _commit(),
            "command": " ".join(Path(word).name if i == 0 else word for i, word in enumerate(sys.argv)),
            "measured": {},
        },
    )
    return folder


def reopen(path: Path) -> tuple[Folder, Config]:
    """The folder and config of an earlier run, to be resumed. `ConfigError` if the presets have changed since."""
    folder = Folder(path)
    config = load([str(text) for text in folder.manifest()["overrides"]])
    if not (path / "config.yaml").exists() or (path / "config.yaml").read_text() != shown(config):
        raise ConfigError(
            f"{path / 'config.yaml'} differs from what its overrides mean today; resume with the version of fedpeft that began the run"
        )
    return folder, config


@contextmanager
def alone(path: Path, sitting: str) -> Iterator[None]:
    """Nobody else writes into the run's folder meanwhile; `ConfigError` if somebody does. A process that is killed lets go of it.

    `sitting` says who it was, for `last_sitting`.
    """
    path.mkdir(parents=True, exist_ok=True)
    lock = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        until = time.monotonic() + GLANCE
        while not _taken(lock, fcntl.LOCK_EX):
            if time.monotonic() > until:
                raise ConfigError(f"{path}: this run goes on in another process; follow it there, or end that before you resume it")
            time.sleep(0.05)
        os.ftruncate(lock, 0)
        os.write(lock, sitting.encode())
        yield
    finally:
        os.close(lock)


def held(path: Path) -> bool:
    """True if somebody writes into the run's folder."""
    try:
        lock = os.open(path / LOCK, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        return not _taken(lock, fcntl.LOCK_SH)
    finally:
        os.close(lock)


def last_sitting(path: Path) -> str:
    """Who wrote into the run's folder last; "" if nobody did."""
    try:
        return (path / LOCK).read_text()
    except FileNotFoundError:
        return ""


def _taken(lock: int, how: int) -> bool:
    try:
        fcntl.flock(lock, how | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def versions() -> dict[str, str | None]:
    """Versions of the packages that may change a result."""
    return {name: _version(name) for name in PACKAGES}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    root = app_folder()
    if not (root / ".git").exists():
        return None
    found = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or None
