"""`fedpeft privacy report`: what a run has spent, read from what was written down before each release."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fedpeft.config import Config, ConfigError
from fedpeft.privacy.accountant import Event, epsilon
from fedpeft.privacy.spending import Spending
from fedpeft.privacy.statement import statement
from fedpeft.privacy.unit import Client
from fedpeft.setting import privacy_of
from server.folder import reopen

ROWS = 10  # clients shown: those that spent most


@dataclass(frozen=True)
class Spent:
    """What one client has spent, by both accountants; `client` None: every client alike."""

    client: int | None
    examples: int | None
    rounds: int
    delta: float
    epsilon: float
    epsilon_rdp: float


def spent(run_dir: Path) -> tuple[Config, list[Spent]]:
    """The run's config and its clients, those first that spent most. Raises `ConfigError` for a run without privacy."""
    folder, config = reopen(run_dir)
    unit = privacy_of(config)
    if unit is None:
        raise ConfigError(f"{run_dir} was run with privacy=none: nothing was noised and there is no epsilon to report")
    if isinstance(unit, Client):
        lines = Spending(folder.path / "privacy.jsonl").lines()
        named = (
            sorted({client for line in lines for client in line.get("clients", ())}) if any("clients" in line for line in lines) else [None]
        )
        rows = [_row(client, None, [line for line in lines if client is None or client in line["clients"]]) for client in named]
    else:
        sizes = _sizes(folder.path)
        places = sorted((folder.path / "memory").glob("*/privacy.jsonl"))
        rows = [_row(int(place.parent.name), sizes[int(place.parent.name)], Spending(place).lines()) for place in places]
    if not any(row.rounds for row in rows):
        raise ConfigError(f"{run_dir} has released nothing yet")
    return config, sorted(rows, key=lambda row: -row.epsilon)


def show(run_dir: Path, *, as_json: bool = False, picture: Path | None = None) -> None:
    """Prints what was spent and what it means."""
    config, rows = spent(run_dir)
    unit, worst = privacy_of(config), rows[0]
    assert unit is not None, "`spent` would have raised"
    sizes = _sizes(run_dir)
    said = statement(
        unit, epsilon=worst.epsilon, delta=max(row.delta for row in rows), sizes=sizes, cohort=config.cohort, batch=config.train.batch
    )
    if as_json:
        print(json.dumps({"epsilon": worst.epsilon, "clients": [vars(row) for row in rows], "statement": said}))
        return
    console, table = Console(), Table(box=None, padding=(0, 2))
    for name in ("client", "examples", "rounds", "delta", "epsilon", "by RDP"):
        table.add_column(name, justify="right")
    for row in rows[:ROWS]:
        who = "every" if row.client is None else str(row.client)
        many = "" if row.examples is None else str(row.examples)
        table.add_row(who, many, str(row.rounds), f"{row.delta:.2g}", f"{row.epsilon:.3f}", f"{row.epsilon_rdp:.3f}")
    console.print(table)
    if len(rows) > ROWS:
        console.print(f"and {len(rows) - ROWS} clients that spent less", highlight=False)
    for line in said:
        console.print(f"- {line}", highlight=False)
    if picture is not None:
        _draw(run_dir, picture)
        console.print(str(picture), highlight=False)


def _row(client: int | None, examples: int | None, lines: Sequence[Mapping[str, Any]]) -> Spent:
    events = [Event(**event) for line in lines for event in line["events"]]
    delta = float(lines[0]["delta"]) if lines else 1e-5
    return Spent(client, examples, len(lines), delta, epsilon(events, delta), epsilon(events, delta, accountant="rdp"))


def _sizes(run_dir: Path) -> list[int]:
    try:
        sizes: list[int] = json.loads((run_dir / "split.json").read_text())["sizes"]
    except (OSError, ValueError, KeyError) as fault:
        raise ConfigError(f"{run_dir}/split.json cannot be read ({fault}): the clients' sizes are not known") from None
    return sizes


def _draw(run_dir: Path, to: Path) -> None:
    """Epsilon of the client that spent most, over the rounds."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib.figure import Figure

    from fedpeft.ledger import Ledger

    entries: list[Any] = Ledger(run_dir / "ledger.jsonl").entries()
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axis = figure.add_subplot()
    axis.plot([entry["round"] + 1 for entry in entries], [entry["epsilon"] for entry in entries], "o-", ms=3)
    axis.set(xlabel="round", ylabel="epsilon of the client that spent most")
    axis.set_ylim(0)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(to, dpi=150, metadata={"Date": None} if to.suffix == ".svg" else None)
