"""`fedpeft audit --run`: an ordinary client-private run with canaries in every round, and the noise that they saw against the claim."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console
from rich.table import Table as Columns

from experiments.simulate import Watch, simulate
from fedpeft.config import ConfigError, load
from fedpeft.privacy.accountant import gaussian_epsilon
from fedpeft.privacy.unit import Client
from fedpeft.setting import privacy_of
from server.canaries import FEWEST, Canaries

ALLOWED = 3.0  # standard errors above the claim: one right run in 740 is beyond


def audit_run(console: Console, overrides: Sequence[str], *, canaries: int | None, watch: Watch) -> int:
    """Prints what canaries in the run that `overrides` describe saw; gives the exit code, 1 if it is more than the claim allows.

    The run's folder is thrown away: its model is mostly canaries.
    """
    config = load(overrides)
    unit = privacy_of(config)
    if not isinstance(unit, Client):
        what = "nothing is hidden in it" if unit is None else "its noise is the clients' own, which `fedpeft audit` without --run checks"
        raise ConfigError(f"privacy={config.choices['privacy']}: {what}; --run needs privacy=client")
    if canaries is not None and canaries < FEWEST:
        raise ConfigError(f"--canaries {canaries}: needed are at least {FEWEST}; fewer say nothing")
    if config.run.dir is not None:
        raise ConfigError(f"run.dir={config.run.dir}: the model of an audited run is mostly canaries and is not kept; leave run.dir out")
    seen = Canaries(config.seed, canaries)
    with TemporaryDirectory() as folder:
        outcome = simulate([*overrides, f"run.dir={Path(folder) / 'run'}"], watch=watch, canaries=seen).outcome
    delta, found, claimed = unit.delta_for(config.clients), seen.estimate, seen.claimed
    assert outcome.epsilon is not None

    def epsilon(mu: float) -> float:
        return gaussian_epsilon(max(mu, 0.0), delta)

    _say(console, f"{seen.rounds} rounds of about {config.cohort} clients; {seen.many} canaries in each, along directions of their own")
    table = Columns("", "mu", f"epsilon at {delta:.2g}", "", box=None)
    table.add_row("claimed", f"{claimed:.3f}", f"{epsilon(claimed):.3f}", "accountant, a client in every round")
    low, high = epsilon(found.mu - 2 * found.error), epsilon(found.mu + 2 * found.error)
    table.add_row("estimated", f"{found.mu:.3f}", f"{epsilon(found.mu):.3f}", f"{low:.3f} to {high:.3f}: two standard errors")
    console.print(table)
    _say(console, f"the run itself claims epsilon {outcome.epsilon:.3f}: {_credit(unit)}")
    above = (found.mu - claimed) / found.error
    if above > ALLOWED:
        _say(
            console,
            f"there is LESS noise than claimed, or a client counts for more than the clip: the estimate is {above:.1f} standard errors "
            f"above the claim, and {ALLOWED:g} are allowed (one right run in 740 has more)",
        )
        return 1
    _say(
        console,
        f"estimate, not a bound: no violation found ({above:+.1f} standard errors of {found.error:.3f} from the claim). As far as "
        f"{seen.many} directions show, what was released hides a client no worse than claimed; it is low where clients and canaries are "
        "not small beside the noise, and no other attack was tried.",
    )
    return 0


def _credit(unit: Client) -> str:
    if unit.adversary == "outsider":
        return "it takes credit for the secret coins that leave a client out, which no canary has; `claimed` takes none"
    return "of the client that was in most rounds; its budget does not count the canaries"


def _say(console: Console, text: str) -> None:
    console.print(text, soft_wrap=True, highlight=False, markup=False)
