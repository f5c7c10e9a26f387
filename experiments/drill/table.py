"""Table: plays drills and says what came of each."""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from experiments.drill.declared import DEPLOYED, DRILLS
from experiments.drill.deployed import Deployed
from experiments.drill.event import Drill, Result, play
from experiments.drill.simulation import Simulation
from fedpeft.config import ConfigError


def drill(names: Sequence[str], say: Callable[[str], None] = print, *, grpc: bool = False) -> int:
    """Plays the drills of these names, or all, as lines of a Markdown table; 1 if one came out otherwise than declared.

    With `grpc` on real processes; an adapter is compared with the simulation's.
    """
    known = {one.name: one for one in (DEPLOYED if grpc else DRILLS)}
    if unknown := [name for name in names if name not in known]:
        raise ConfigError(f"{unknown[0]}: there is no such drill; there are {', '.join(known)}")
    chosen = [known[name] for name in names or known]
    say("| drill | what was done | declared outcome | what happened | seconds | |")
    say("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        simulation = Simulation(Path(folder))
        if not grpc:
            made = [_said(play(one, simulation), say) for one in chosen]
        else:
            (Path(folder) / "deployed").mkdir()
            with Deployed(Path(folder) / "deployed") as deployed:
                made = [_said(play(one, deployed, simulation), say) for one in chosen]
    return 0 if all(made) else 1


def _said(made: Result, say: Callable[[str], None]) -> bool:
    """Says a drill's line; True if it came out as declared."""
    verdict = "differs: " + "; ".join(made.wrong) if made.wrong else "as declared"
    one: Drill = made.drill
    cells = (one.name, one.done, one.declared, made.happened, f"{made.seconds:.1f}", verdict)
    say(f"| {' | '.join(text.replace('|', '/').replace(chr(10), ' ') for text in cells)} |")
    return not made.wrong
