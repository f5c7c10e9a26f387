"""Progress of a run: a bar on a terminal, plain lines elsewhere, nothing when silent."""

import math
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

from fedpeft.config import Config
from fedpeft.ledger import Ledger

LINES = 10  # plain lines a run prints besides its evaluations


class Progress:
    """Shows ledger entries as they come."""

    def __init__(self, *, silent: bool) -> None:
        self._console = Console()
        self._bar: Bar | None = None
        self._silent, self._tasks, self._accuracy = silent, dict[str, TaskID](), dict[str, float]()
        if not silent and self._console.is_terminal:
            self._bar = Bar(
                TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[facts]}"),
                TimeRemainingColumn(), console=self._console,
            )  # fmt: skip

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
            self._tasks["loading"] = self._bar.add_task("loading model and data", total=None, facts="")
        elif not self._silent:
            print("loading model and data", flush=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def begin(self, what: str, done: int, rounds: int) -> None:
        """A part of the run begins, of whose rounds some may be there from before."""
        if self._silent:
            return
        if self._bar:
            self._loaded()
            self._tasks[what] = self._bar.add_task(what, total=rounds, facts="", completed=done)
        elif what != "run" or done:
            print(f"{what}: " + (f"{rounds} rounds" if not done else f"{done} of {rounds} rounds are there"), flush=True)

    def watch(self, what: str, config: Config, entry: dict[str, Any]) -> None:
        """One finished round."""
        if self._silent:
            return
        if entry["accuracy"] is not None:
            self._accuracy[what] = entry["accuracy"]
        for fault in entry["faults"]:
            print(f"fedpeft: round {entry['round'] + 1}, client {fault['client']}: {fault['reason']}", file=sys.stderr)
        done, total = entry["round"] + 1, config.rounds
        if self._bar:
            self._loaded()
            if what not in self._tasks:
                self._tasks[what] = self._bar.add_task(what, total=total, facts="", completed=entry["round"])
            self._bar.update(self._tasks[what], completed=done, facts=self._facts(what, entry))
        elif done == total or done % max(1, math.ceil(total / LINES)) == 0 or entry["accuracy"] is not None:
            left = f"  {entry['seconds'] / done * (total - done):.0f} s left" if done < total else ""
            print(f"{what}: round {done}/{total}  {self._facts(what, entry)}{left}", flush=True)

    def finish(self, result: dict[str, Any]) -> None:
        """The result as a small table."""
        accuracy, table = result["accuracy"], Table(show_header=False, box=None, padding=(0, 2))
        table.add_row("accuracy before training (zero-shot)", f"{accuracy['zero_shot']:.3f}")
        if accuracy["head_only"] is not None:
            table.add_row("federated, head only (one model for all)", f"{accuracy['head_only']:.3f}")
        note = " (clients' own models, on labels like their own)" if accuracy["measure"] == "personal" else ""
        table.add_row("federated, adapter and head", f"[bold]{accuracy['final']:.3f}[/bold]{note}")
        for name, text in payloads(Ledger(Path(result["run_dir"]) / "ledger.jsonl").entries()):
            table.add_row(name, text)
        if result["epsilon"] is not None:
            table.add_row("epsilon", f"{result['epsilon']:.3f}")
        table.add_row("seconds", f"{result['seconds']:.1f}")
        self._console.print(table)
        for name in ("", "/report.html"):  # in lines of their own: a table cuts what is too long
            self._console.print(f"  {result['run_dir']}{name}", soft_wrap=True, highlight=False, markup=False)
        if result["privacy"] and accuracy["head_only"] is None:
            self._console.print("- no head-only baseline: it would spend budget, too", highlight=False)
        for line in result["privacy"]:
            self._console.print(f"- {line}", highlight=False)

    def _loaded(self) -> None:
        if self._bar and "loading" in self._tasks:
            self._bar.remove_task(self._tasks.pop("loading"))

    def _facts(self, what: str, entry: dict[str, Any]) -> str:
        seen = self._accuracy.get(what)
        loss = "loss    -" if entry["loss"] is None else f"loss {entry['loss']:.3f}"
        accuracy = "" if seen is None else f"  accuracy {seen:.3f}"
        accuracy += "" if entry["epsilon"] is None else f"  epsilon {entry['epsilon']:.2f}"
        return f"{loss}{accuracy}  up {size(entry['total_up'])}  down {size(entry['total_down'])}"


def payloads(entries: Iterable[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """What a run's rounds sent, each way, against the same tensors as they are (raw) and, where its codec has one, the entropy bound."""
    rows, held = [], list(entries)
    for way in ("up", "down"):
        sent, raw, least = (sum(entry.get(f"{what}_{way}") or 0 for entry in held) for what in ("bytes", "bytes_raw", "entropy"))
        facts = [f"{sent / raw:.3g} x raw"] if sent and raw else []
        facts += [f"{sent / least:.3g} x entropy"] if least else []
        rows.append((f"payloads {way}", size(sent) + (f" ({', '.join(facts)})" if facts else "")))
    return rows


def crossed(entries: Iterable[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """What crossed the clients' connections while rounds went on, against the payloads of those rounds that have the figure."""
    rows, held = [], list(entries)
    for way in ("up", "down"):
        known = [entry for entry in held if entry.get(f"socket_{way}") is not None]
        sent, whole = (sum(entry.get(f"{what}_{way}") or 0 for entry in known) for what in ("bytes", "socket"))
        facts = [f"{whole / sent:.3g} x payload"] if sent else []
        facts += [f"{len(known)} of {len(held)} rounds"] if len(known) < len(held) else []
        rows.append((f"at the socket {way}", size(whole) + (f" ({', '.join(facts)})" if facts else "") if known else "not measured"))
    return rows


def size(count: float) -> str:
    """A number of bytes for people, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


class Count:
    """Runs of a study as they end: a bar on a terminal, plain lines elsewhere."""

    def __init__(self, name: str) -> None:
        console = Console()
        self._bar = (
            Bar(TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[facts]}"),
                TimeRemainingColumn(), console=console)
            if console.is_terminal
            else None
        )  # fmt: skip
        self._task = self._bar.add_task(name, total=None, facts="") if self._bar else None

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def watch(self, done: int, whole: int, what: str) -> None:
        """One more run has ended."""
        if self._bar and self._task is not None:
            self._bar.update(self._task, completed=done, total=whole, facts=what)
        else:
            print(f"{done}/{whole} {what}", flush=True)
