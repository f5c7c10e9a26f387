"""Table: plays drills and says what came of each."""

import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from experiments.drill.declared import DEPLOYED, DRILLS
from experiments.drill.deployed import Deployed
from experiments.drill.event import Drill, Result, play
from experiments.drill.simulation import Simulation
from fedpeft.config import ConfigError


def drill(names: Sequence[str], say: Callable[[str], None] = print, *, grpc: bool = False, markdown: bool = False) -> int:
    """Plays the drills of these names, or all, and says what came of each, as a line or as a row of a Markdown table; 1 if one came out
    otherwise than declared.

    With `grpc` on real processes; an adapter is compared with the simulation's.
    """
    chosen = _chosen(names, grpc)
    if markdown:
        say("| drill | what was done | declared outcome | what happened | seconds | |")
        say("|---|---|---|---|---|---|")
    tell = partial(_row if markdown else _line, say=say)
    with tempfile.TemporaryDirectory() as folder:
        simulation = Simulation(Path(folder))
        if not grpc:
            made = [tell(play(one, simulation)) for one in chosen]
        else:
            (Path(folder) / "deployed").mkdir()
            with Deployed(Path(folder) / "deployed") as deployed:
                made = [tell(play(one, deployed, simulation)) for one in chosen]
    return 0 if all(made) else 1


def listed(names: Sequence[str], say: Callable[[str], None] = print, *, grpc: bool = False) -> None:
    """Says what the drills of these names, or all, do, and what each must come to."""
    for one in _chosen(names, grpc):
        say(f"{one.name:<13} {one.done}: {one.declared}")


def _chosen(names: Sequence[str], grpc: bool) -> list[Drill]:
    known = {one.name: one for one in (DEPLOYED if grpc else DRILLS)}
    if unknown := [name for name in names if name not in known]:
        raise ConfigError(f"{unknown[0]}: there is no such drill; there are {', '.join(known)}")
    return [known[name] for name in names or known]


def _line(made: Result, say: Callable[[str], None]) -> bool:
    """Says a drill in two lines; True if it came out as declared."""
    say(f"{'differs' if made.wrong else 'ok':<8} {made.drill.name:<13} {made.seconds:6.1f} s  {made.drill.done}")
    say(f"{'':<33}{'differs: ' + '; '.join(made.wrong) + '; it was: ' if made.wrong else ''}{_flat(made.happened)}")
    return not made.wrong


def _row(made: Result, say: Callable[[str], None]) -> bool:
    """The same as a row."""
    verdict = "differs: " + "; ".join(made.wrong) if made.wrong else "as declared"
    one: Drill = made.drill
    cells = (one.name, one.done, one.declared, made.happened, f"{made.seconds:.1f}", verdict)
    say(f"| {' | '.join(_flat(text).replace('|', '/') for text in cells)} |")
    return not made.wrong


def _flat(text: str) -> str:
    return text.replace("\n", " ")
