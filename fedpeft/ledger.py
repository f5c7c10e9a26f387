"""Ledger: what happened, one JSON line per round, appended and never edited while a run goes on."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

Entry = Mapping[str, object]


@dataclass(frozen=True)
class Ledger:
    """The lines of `path`. Each has `round`; what could not be measured is null, never a guess."""

    path: Path

    def append(self, entry: Entry) -> None:
        """Adds one line, written through to the file."""
        with self.path.open("a") as file:
            file.write(json.dumps({key: _plain(value) for key, value in entry.items()}) + "\n")
            file.flush()

    def entries(self) -> list[dict[str, object]]:
        """All complete lines; a line cut short by a crash is not one."""
        if not self.path.exists():
            return []
        whole = self.path.read_text().rpartition("\n")[0]
        return [json.loads(line) for line in whole.splitlines() if line]

    def rewind(self, rounds: int) -> None:
        """Drops the lines of round `rounds` and later: a resumed run writes them again."""
        kept = [entry for entry in self.entries() if int(str(entry["round"])) < rounds]
        write_text(self.path, "".join(json.dumps(entry) + "\n" for entry in kept))


def write_text(path: Path, text: str) -> None:
    """Writes a file in one atomic step: readers see the old text or the new, also after a crash."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _plain(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value
