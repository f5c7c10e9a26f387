"""`fedpeft run`: server and clients in this process, joined by the in-process grid; with the federated head-only baseline beside it."""

import itertools
import logging
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from clients.lanes import Lanes
from clients.memory import Memory
from clients.site import Site, lane_on_gpu, serve, site_of
from fedpeft import checkpoint
from fedpeft.config import Config, ConfigError, load
from fedpeft.data.partition import describe, histogram
from fedpeft.privacy.unit import Example
from fedpeft.setting import Setting, open_setting, privacy_of
from fedpeft.simulation import InProcessGrid
from server.app import Outcome, federate
from server.canaries import Canaries
from server.folder import Folder, create, reopen

log = logging.getLogger("fedpeft")
FEW = 50  # examples of a client that are too few to hide one among
BASELINE = "head_only"  # the folder of the baseline inside a run's
Watch = Callable[[str, Config, dict[str, Any]], None]  # (what runs, its config, ledger entry) after each round
Begin = Callable[[str, int, int], None]  # (what runs, how many rounds it has, how many it will have) before its first


@dataclass(frozen=True)
class Summary:
    """What the user asked for: a run, and its baselines."""

    folder: Path
    outcome: Outcome
    head_only: Outcome | None


def simulate(
    overrides: Sequence[str], *, resume: Path | None = None, watch: Watch = lambda what, config, entry: None,
    begin: Begin = lambda what, done, rounds: None, canaries: Canaries | None = None,
) -> Summary:  # fmt: skip
    """Runs what `overrides` describe, or goes on with the run in folder `resume`; `canaries` join the rounds of a client-private run."""
    if resume is not None and overrides:
        raise ConfigError(f"--resume takes the config of {resume} as it is; leave out {' '.join(overrides)}, or begin another run")
    if resume is not None:
        folder, config = reopen(resume)
        overrides = [str(text) for text in folder.manifest()["overrides"]]
    else:
        config = load(overrides)
        folder = None
    if config.deadline is not None:
        raise ConfigError(
            f"deadline={config.deadline}: a simulation has no network to wait for, and clients' turns are not time; leave it null"
        )
    setting = open_setting(config)
    if folder is None:
        folder = create(Path(config.run.dir) if config.run.dir else _unused(config.choices["strategy"]), config, overrides)
    if not (folder.path / "split.json").exists():
        folder.write("split.json", _split(setting))
    if few := _few(setting):
        log.warning(few)
    begin("run", _next_round(folder, config), config.rounds)
    main = _drive("run", config, setting, folder, watch, canaries)
    head_only = None
    if config.evaluate.head_only and not config.private and setting.base.head and config.choices["adapter"] != "head":
        head_only = _baseline(overrides, setting, folder, watch, begin)
    return Summary(folder.path, main, head_only)


def _baseline(overrides: Sequence[str], setting: Setting, folder: Folder, watch: Watch, begin: Begin) -> Outcome:
    """The same federation with only the head trained, by plain FedAvg."""
    own = ("strategy", "adapter", "codec", "downlink", "privacy", "select", "mean", "devices", "run.dir")
    kept = [text for text in overrides if not text.startswith(own)]
    kept += ["strategy=fedavg", "adapter=head", "evaluate.head_only=false"]
    config, place = load(kept), folder.path / BASELINE
    setting.off()
    there = reopen(place)[0] if (place / "manifest.json").exists() else create(place, config, kept)
    begin("head-only baseline", _next_round(there, config), config.rounds)
    return _drive("head-only baseline", config, open_setting(config, base=setting.base), there, watch)


def _unused(strategy: str) -> Path:
    """runs/<time>-<strategy>, with a number if that is taken."""
    name = f"{datetime.now():%Y-%m-%d-%H%M%S}-{strategy}"
    candidates = (Path("runs") / (name if count == 1 else f"{name}-{count}") for count in itertools.count(1))
    return next(place for place in candidates if not place.exists())


def _drive(what: str, config: Config, setting: Setting, folder: Folder, watch: Watch, canaries: Canaries | None = None) -> Outcome:
    known: dict[str, Any] = folder.manifest()["measured"]
    memory = Memory(folder.path / "memory", replies=config.private)  # what was spent on a reply is not spent twice
    site = site_of(setting, memory, known=known)
    measured = site.prepare(_next_round(folder, config))
    if not known:
        folder.note({"measured": measured})
    nodes = {InProcessGrid.FIRST + client: client for client in range(config.clients)}
    with _lanes(site, folder, setting) as lanes:
        grid = InProcessGrid(serve(site, nodes, lanes), config.clients)
        accounts = None if site.budget is None else site.budget.spent
        steps: Generator[dict[str, Any], None, Outcome] = federate(
            config, setting, grid, folder, look=site.examined, canaries=canaries, accounts=accounts
        )
        while True:
            try:
                watch(what, config, next(steps))
            except StopIteration as end:
                outcome: Outcome = end.value
                return outcome


def _few(setting: Setting) -> str | None:
    """What to expect where single examples are hidden among next to none."""
    half = int(median(len(rows) for rows in setting.split.clients))
    if half >= FEW or not isinstance(privacy_of(setting.config), Example):
        return None
    return (
        f"privacy={setting.config.choices['privacy']}: half of the clients have at most {half} examples; noise that hides one of so few "
        "hides most of what they teach. With some hundreds each, or with privacy=client and many clients, more of it is left"
    )


def _next_round(folder: Folder, config: Config) -> int:
    """The first round that a run in `folder` has not yet."""
    saved = checkpoint.found(folder.checkpoints)
    return min(checkpoint.round_of(saved[-1]), config.rounds) if saved else 0


def _lanes(site: Site, folder: Folder, setting: Setting) -> Lanes:
    if setting.base.device.type != "cuda" or site.lanes == 1:
        return Lanes(lambda lane: site.work, site.lanes)
    facts = folder.manifest()
    return Lanes(partial(lane_on_gpu, facts["overrides"], site.memory.folder, facts["measured"]), site.lanes, fresh=True)


def _split(setting: Setting) -> dict[str, Any]:
    labels, classes = setting.dataset.train.labels, max(len(setting.dataset.classes), 1)
    sizes = [len(rows) for rows in setting.split.clients]
    if setting.config.private:  # how many of each label a client has is a fact of its examples; how many examples is public
        return {"sizes": sizes, "names": list(setting.split.names)}
    return {
        "sizes": sizes,
        "describe": describe(setting.split, labels, classes),
        "classes": list(setting.dataset.classes),
        "names": list(setting.split.names),
        "histogram": histogram(setting.split, labels, classes).tolist(),
    }
