"""`fedpeft privacy plan`: of budget, noise, rounds and sampling rate, the one that was left out, before anything is trained."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fedpeft.config import ConfigError, Training
from fedpeft.privacy.accountant import COARSE, FINE, LEAST_DELTA, Event, count_for, epsilon, noise_for, rate_for

PICTURES = (".svg", ".png", ".pdf")
NOT_COVERED = (
    "settings chosen by looking at other runs on the same data",
    "accuracy and loss measured on the clients' data",
    "how many examples each client has (N_k)",
)


@dataclass(frozen=True)
class Asked:
    """What the user gave; None: left out."""

    unit: str = "example"
    epsilon: float | None = None
    delta: float | None = None  # None: min(1e-5, 1 / (10 N)), N the examples or the clients
    noise: float | None = None  # multiplier of the clipping norm
    rounds: int | None = None
    steps: int | None = None  # a round, of unit example; None: what a run has
    batch: int | None = None  # expected, of unit example
    examples: int | None = None
    clients: int | None = None
    cohort: int | None = None  # expected, of unit client
    poisson: bool = False  # of unit client: secret coins decide who takes part


@dataclass(frozen=True)
class Plan:
    """A setting whose numbers fit together; `sample` is the expected number of examples or clients in one noisy sum, None if not told."""

    unit: str
    solved: str
    noise: float
    q: float
    rounds: int
    steps: int  # a round
    sample: int | None
    units: int
    delta: float
    epsilon: float
    epsilon_rdp: float
    target: float | None
    relation: str
    sampling: str
    not_covered: tuple[str, ...] = NOT_COVERED

    def events(self, rounds: int) -> list[Event]:
        """What `rounds` rounds release."""
        return [Event(self.noise, self.q, rounds * self.steps)]

    def curve(self, points: int, *, step: float = FINE) -> list[tuple[int, float]]:
        """The first round and `points` more, evenly spaced to the last, and epsilon after each, by PLD."""
        some = sorted({1} | {math.ceil(self.rounds * (i + 1) / points) for i in range(points)})
        return [(rounds, epsilon(self.events(rounds), self.delta, step=step)) for rounds in some]


def plan(asked: Asked) -> Plan:
    """Solves for what was left out. Raises `ConfigError` with all faults that can be seen before."""
    if faults := _faults(asked):
        raise ConfigError("\n".join(faults))
    try:
        return _solved(asked, _left_out(asked)[0])
    except ConfigError:
        raise
    except ValueError as fault:
        raise ConfigError(str(fault)) from fault


def show(found: Plan, console: Console) -> None:
    """The plan as two small tables."""
    table = Table(show_header=False, box=None, padding=(0, 2))
    name = "batch" if found.unit == "example" else "cohort"
    rows = {
        "hidden": found.relation,
        "sampling": found.sampling,
        "q": f"{found.q:.6g}" + (f"  ({name} {found.sample} of {found.units})" if found.q < 1 and found.sample else ""),
        "rounds": f"{found.rounds:,}",
        "steps in all": f"{found.rounds * found.steps:,}",
        "noise multiplier (sigma)": f"{found.noise:.6g}",
        "noise in a mean": f"{found.noise / found.sample:.3g} of the clip, in each coordinate" if found.sample else "depends on --cohort",
        "delta": f"{found.delta:.3g}",
        "epsilon (PLD)": f"{found.epsilon:.4f}",
        "epsilon (RDP, looser)": f"{found.epsilon_rdp:.4f}",
        "not covered": "; ".join(found.not_covered),
    }
    for label, text in rows.items():
        mark = "[bold]" if label.startswith("epsilon (PLD") or label.split()[0] == found.solved else ""
        table.add_row(label, f"{mark}{text}")
    console.print(table)
    steps = Table("rounds", "epsilon", box=None, padding=(0, 2))
    for rounds, spent in found.curve(5):
        steps.add_row(f"{rounds:,}", f"{spent:.4f}")
    console.print(steps)


def as_dict(found: Plan) -> dict[str, Any]:
    """The plan with its curve."""
    return {**asdict(found), "steps_in_all": found.rounds * found.steps, "curve": found.curve(5)}


def draw(found: Plan, to: Path) -> None:
    """Draws epsilon over rounds into the picture `to`, whose ending names the format."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axis = figure.subplots()
    axis.plot(*zip(*found.curve(30, step=COARSE), strict=True), "o-", ms=2, color="C0")
    if found.target is not None:
        axis.axhline(found.target, color="C1", lw=1, ls="--")
    axis.set(
        xlabel="rounds", ylabel=f"epsilon at delta {found.delta:.2g}", title=f"noise {found.noise:.4g}, q {found.q:.4g}: one {found.unit}"
    )
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(to, dpi=150, metadata={"Date": None} if to.suffix == ".svg" else None)


def check_picture(to: Path | None) -> None:
    """Raises `ConfigError` for a picture that cannot be drawn."""
    if to is not None and to.suffix not in PICTURES:
        raise ConfigError(f"--picture {to}: needed is a file that ends in {', '.join(PICTURES)}")


def _left_out(asked: Asked) -> list[str]:
    """What is there to solve for."""
    sample = ["batch"] if asked.unit == "example" else ["cohort"] if asked.poisson else []
    return [name for name in ("epsilon", "noise", "rounds", *sample) if getattr(asked, name) is None]


def _faults(asked: Asked) -> list[str]:
    if asked.unit not in ("example", "client"):
        return [f"--unit {asked.unit}: needed is example (one example of one client is hidden) or client (all of a client's data)"]
    whole, theirs = (
        ("examples", ("clients", "cohort", "poisson")) if asked.unit == "example" else ("clients", ("examples", "batch", "steps"))
    )
    faults = [f"--{name} has no meaning with --unit {asked.unit}; leave it out" for name in theirs if getattr(asked, name)]
    for name in ("rounds", "steps", "batch", "examples", "clients", "cohort"):
        if (value := getattr(asked, name)) is not None and value < 1:
            faults.append(f"--{name} {value}: needed is at least 1")
    for name in ("epsilon", "noise"):
        if (value := getattr(asked, name)) is not None and not (value > 0 and math.isfinite(value)):
            faults.append(f"--{name} {value}: needed is a positive number; without noise nobody is hidden")
    left = _left_out(asked)
    if len(left) != 1:
        every = "epsilon, noise, rounds, " + ("batch" if asked.unit == "example" else "with --poisson cohort")
        got = f"{' and '.join(f'--{name}' for name in left)} are left out" if left else "none is left out"
        faults.append(f"the plan solves for one of {every}: give all but one; {got}")
    units = getattr(asked, whole)
    if units is None:
        faults.append(f"--{whole} is missing: delta and the sampling rate depend on it")
        return faults
    if asked.cohort is not None and asked.unit == "client" and asked.cohort > units:
        faults.append(f"--cohort {asked.cohort}: needed is at most --clients {units}")
    if asked.delta is not None and not LEAST_DELTA <= asked.delta <= 1 / max(units, 1):
        faults.append(
            f"--delta {asked.delta}: needed is a number from {LEAST_DELTA} to 1/{units}; to publish one of {units} {whole} at random "
            f"would be private with more. Leave it out for {_delta(units):.2g}"
        )
    return faults


def _solved(asked: Asked, left: str) -> Plan:
    example = asked.unit == "example"
    units = (asked.examples if example else asked.clients) or 0
    sample = asked.batch if example else asked.cohort
    steps = (asked.steps or Training().steps or 1) if example else 1
    delta = _delta(units) if asked.delta is None else asked.delta
    amplified = example or asked.poisson
    target, noise, rounds = asked.epsilon or 0.0, asked.noise or 0.0, asked.rounds or 0  # the one that is left out follows
    q = min(1.0, sample / units) if amplified and sample else 1.0
    if left == "noise":
        noise = _up(noise_for(target, delta, lambda sigma: [Event(sigma, q, rounds * steps)]))
    elif left == "rounds":
        rounds = count_for(target, delta, noise, q) // steps
    elif left in ("batch", "cohort"):
        sample = math.floor(rate_for(target, delta, noise, rounds * steps) * units)
        q = sample / units
    if not rounds or (amplified and not sample):
        least = epsilon([Event(noise, q or 1 / units, steps * max(rounds, 1))], delta)
        what = "one round" if left == "rounds" else f"a {left} of one"
        raise ConfigError(f"{what} costs epsilon {least:.4g} and --epsilon is {target:g}: needed is more noise, or a larger epsilon")
    events = [Event(noise, q, rounds * steps)]
    return Plan(
        asked.unit, left, noise, q, rounds, steps, sample, units, delta, epsilon(events, delta), epsilon(events, delta, accountant="rdp"),
        asked.epsilon, f"add or remove one {'example of one client' if example else 'client with all its data'}", _sampling(asked, q),
    )  # fmt: skip


def _sampling(asked: Asked, q: float) -> str:
    if asked.unit == "example":
        rounds = "no credit for rounds that its client sits out"
        if q == 1:
            return f"none: every example is in every step; {rounds}"
        return f"Poisson: a secret coin decides for each example whether it is in a step (no shuffled batches of one size); {rounds}"
    if asked.poisson:
        return (
            "Poisson: a secret coin decides for each client whether it is in a round; holds against who sees models, and not who took part"
        )
    return "none: a round in which the client takes part counts in full, and it takes part in all rounds at most"


def _delta(units: int) -> float:
    return min(1e-5, 1 / (10 * units))


def _up(sigma: float) -> float:
    """`sigma` rounded up to five digits: what is printed and typed again keeps the budget."""
    digits = 4 - math.floor(math.log10(sigma))
    return math.ceil(sigma * 10.0**digits) / 10.0**digits
