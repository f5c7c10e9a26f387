"""`fedpeft privacy report`: what a run has spent, read from what was written down before each release.

Where clients have hosts of their own their ledgers lie there: the server's run has what they said in replies, and no more.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fedpeft.config import Config, ConfigError
from fedpeft.ledger import Ledger
from fedpeft.privacy.accountant import Event, epsilon
from fedpeft.privacy.spending import Spending
from fedpeft.privacy.statement import Spent, statement
from fedpeft.privacy.unit import Client, Example
from fedpeft.setting import privacy_of
from server.folder import reopen

ROWS = 10  # clients shown: those that spent most


@dataclass(frozen=True)
class Row:
    """What one client has spent, by both accountants; `client` None: every client alike."""

    client: int | None
    examples: int | None
    rounds: int
    delta: float
    epsilon: float
    epsilon_rdp: float


def spent(run_dir: Path) -> tuple[Config, list[Row], Spent]:
    """The run's config, its clients where their ledgers lie here, those first that spent most, and what they spent together.

    Raises `ConfigError` for a run without privacy.
    """
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
    elif (said := _heard(folder.path)) is not None:
        return config, [], said
    else:
        sizes = _sizes(folder.path)
        places = sorted((folder.path / "memory").glob("*/privacy.jsonl"))
        rows = [_row(int(place.parent.name), sizes[int(place.parent.name)], Spending(place).lines()) for place in places]
    if not any(row.rounds for row in rows):
        raise ConfigError(f"{run_dir} has released nothing yet")
    rows.sort(key=lambda row: -row.epsilon)
    return config, rows, Spent(rows[0].epsilon, max(row.delta for row in rows))


def show(run_dir: Path, *, as_json: bool = False, picture: Path | None = None) -> None:
    """Prints what was spent and what it means."""
    config, rows, most = spent(run_dir)
    unit = privacy_of(config)
    assert unit is not None, "`spent` would have raised"
    sizes = _sizes(run_dir) if isinstance(unit, Example) and not most.heard else [0] * config.clients
    said = statement(unit, spent=most, sizes=sizes, cohort=config.cohort, batch=config.train.batch)
    if as_json:
        print(json.dumps({"epsilon": most.epsilon, "clients": [vars(row) for row in rows], "statement": said}))
        return
    console, table = Console(), Table(box=None, padding=(0, 2))
    for name in ("client", "examples", "rounds", "delta", "epsilon", "by RDP"):
        table.add_column(name, justify="right")
    for row in rows[:ROWS]:
        who = "every" if row.client is None else str(row.client)
        many = "" if row.examples is None else str(row.examples)
        table.add_row(who, many, str(row.rounds), f"{row.delta:.2g}", f"{row.epsilon:.3f}", f"{row.epsilon_rdp:.3f}")
    if rows:
        console.print(table)
    if len(rows) > ROWS:
        console.print(f"and {len(rows) - ROWS} clients that spent less", highlight=False)
    for line in said:
        console.print(f"- {line}", highlight=False)
    if picture is not None:
        _draw(run_dir, picture)
        console.print(str(picture), highlight=False)


def _row(client: int | None, examples: int | None, lines: Sequence[Mapping[str, Any]]) -> Row:
    events = [Event(**event) for line in lines for event in line["events"]]
    delta = float(lines[0]["delta"]) if lines else 1e-5
    return Row(client, examples, len(lines), delta, epsilon(events, delta), epsilon(events, delta, accountant="rdp"))


def _heard(run_dir: Path) -> Spent | None:
    """What the server of clients on other hosts heard from them; None if clients keep their ledgers here."""
    if any((run_dir / "memory").glob("*")):
        return None
    said = [Spent(float(line["epsilon"]), float(line["delta"]), heard=True) for line in _lines(run_dir) if line["epsilon"] is not None]
    if not said:
        raise ConfigError(f"{run_dir} has released nothing yet, as far as its server heard")
    return reduce(Spent.most, said)


def _lines(run_dir: Path) -> list[Any]:
    return list(Ledger(run_dir / "ledger.jsonl").entries())


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

    entries = _lines(run_dir)
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axis = figure.add_subplot()
    axis.plot([entry["round"] + 1 for entry in entries], [entry["epsilon"] for entry in entries], "o-", ms=3)
    axis.set(xlabel="round", ylabel="epsilon of the client that spent most")
    axis.set_ylim(0)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(to, dpi=150, metadata={"Date": None} if to.suffix == ".svg" else None)
