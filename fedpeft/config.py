"""Config: a run's settings as frozen dataclasses, composed by Hydra from presets and overrides.

Presets lie in `experiments/conf`: `strategy=ffa` chooses the file `strategy/ffa.yaml`, `train.lr=0.01` a value inside. All faults that can
be seen before anything is loaded are reported at once.
"""

import difflib
import importlib
import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from fedpeft.casts import alike, cast
from fedpeft.devices import devices

FAMILIES = ("strategy", "adapter", "model", "data", "codec", "downlink", "privacy", "select", "mean")
PACKAGES = ("fedpeft", "strategies")  # what a preset's _target_ may name
Spec = Mapping[str, Any]


class ConfigError(ValueError):
    """One or more faults in what the user asked for; exit code 2."""


@dataclass(frozen=True)
class Training:
    """What one client does in one round."""

    steps: int | None = 5  # optimizer steps a round; None: epochs
    epochs: float | None = None  # passes over the client's data a round; None: steps
    batch: int = 8  # examples a step
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: float = 5e-3  # of the adapter
    head_lr: float | None = None  # of the task head; None: three times lr
    schedule: Literal["constant", "cosine"] = "constant"  # of both rates over the rounds; cosine ends near zero
    momentum: float = 0.0  # of sgd
    weight_decay: float = 0.0
    clip: float | None = None  # largest gradient norm of a step


@dataclass(frozen=True)
class Evaluation:
    """When the model is measured on the test set."""

    every: int = 5  # rounds between two evaluations; the last round is always evaluated
    batch: int = 128  # examples a forward pass
    personal: int | None = 200  # test examples that a client's own model is scored on, drawn for each client; None: all
    head_only: bool = True  # also run the federated head-only baseline


@dataclass(frozen=True)
class Run:
    """Where a run goes and what it runs on."""

    dir: str | None = None  # default: runs/<time>-<strategy>
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    threads: int = 1  # of each process; two spinning threads on a busy machine are ten times slower
    keep: int = 2  # checkpoints kept


@dataclass(frozen=True)
class Options:
    """How the clients of one machine are trained: many at once. Speed, not results, up to rounding; what is None is measured."""

    stacked: bool = True  # False: one client at a time by the reference trainer
    wave: int | None = None  # clients trained at once
    lanes: int | None = None  # processes side by side; None: one per core, one in all on a GPU
    cache: float = 1.0  # GB of memory for the output of frozen layers
    disk: float = 4.0  # GB of a file for it, if memory is not enough
    bf16: bool | None = None  # frozen products in bfloat16: faster where the processor has it, not exact; None: on a GPU
    checkpointing: bool = False  # recompute layers in the backward pass: less memory, more time


@dataclass(frozen=True)
class Config:
    """Everything a run is made of. The families hold their preset's `_target_` and its arguments."""

    rounds: int
    clients: int
    cohort: int  # clients a round
    seed: int
    min_clients: int  # answers a round needs
    deadline: float | None  # seconds from broadcast to the last accepted update; None: no limit
    feedback: bool  # what a lossy codec leaves out of a client's update is added to its next
    weights: Literal["examples", "uniform"] | None  # what a client's update counts: its examples, or one; None: one if the run is private
    devices: Any  # ranks of the clients' devices, see fedpeft/devices.py; None: all have the adapter's
    run: Run
    train: Training
    evaluate: Evaluation
    engine: Options
    strategy: Spec
    adapter: Spec
    model: Spec
    data: Spec
    codec: Spec
    downlink: Spec
    privacy: Spec
    select: Spec
    mean: Spec
    choices: Mapping[str, str] = field(default_factory=dict)  # the preset chosen in each family

    @property
    def private(self) -> bool:
        """True if the run hides an example or a client."""
        return self.choices.get("privacy", "none") != "none"


def app_folder() -> Path:
    """The folder that holds `strategies`, `clients`, `server` and `experiments`: in the wheel inside fedpeft, in a checkout beside it."""
    inside = Path(__file__).resolve().parent / "_app"
    return inside if inside.is_dir() else inside.parent.parent


def load(overrides: Sequence[str], presets: Path | None = None) -> Config:
    """The config of the installed presets (or those in folder `presets`) under `overrides`. Raises `ConfigError` with all faults."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    presets = presets or app_folder() / "experiments" / "conf"
    faults: list[str] = []
    kept = [text for text in overrides if not _refused(text, presets, faults)]
    with initialize_config_dir(str(presets.resolve()), version_base="1.3"):
        groups = [text for text in kept if _key(text) in FAMILIES]
        tree = compose("config", groups)
        if (codec := _codec(tree, kept, groups)) is not None:
            kept, groups = [codec, *kept], [codec, *groups]
            tree = compose("config", groups)
        known = [placed for text in kept if (placed := text if text in groups else _placed(tree, text, faults))]
        try:
            plain: Any = OmegaConf.to_container(compose("config", known), resolve=True)
        except Exception as fault:  # Hydra raises a dozen kinds; each says in words what it could not read
            raise ConfigError("\n".join([*faults, f"{' '.join(known)}: {_first_line(fault)}"])) from None
    usual: Any = OmegaConf.to_container(tree)
    chosen = {_key(text): text.partition("=")[2] for text in groups}
    config = _typed(plain, usual, {**_defaults(presets), **chosen}, faults)
    if config.clients < config.cohort and "cohort" not in map(_key, overrides):
        config = replace(config, cohort=max(config.clients, 1))
    if config.weights is None:
        config = replace(config, weights="uniform" if config.private else "examples")
    faults += check(config)
    if faults:
        raise ConfigError("\n".join(dict.fromkeys(faults)))
    return config


def check(config: Config) -> list[str]:
    """Faults that span fields, or that a type cannot say; one sentence each."""
    faults = []
    for name in ("rounds", "clients", "cohort", "min_clients"):
        if getattr(config, name) < 1:
            faults.append(f"{name}={getattr(config, name)}: needed is at least 1")
    if config.cohort > config.clients:
        faults.append(
            f"cohort={config.cohort} is more than clients={config.clients}: a round cannot draw more clients than there are; lower cohort"
        )
    if config.min_clients > config.cohort:
        faults.append(f"min_clients={config.min_clients} is more than cohort={config.cohort}: no round could succeed; lower min_clients")
    train = config.train
    if (train.steps is None) == (train.epochs is None):
        faults.append(
            f"train.steps={train.steps} and train.epochs={train.epochs}: set one and make the other null, "
            "for instance train.steps=null train.epochs=1"
        )
    if train.steps is not None and train.steps < 1:
        faults.append(f"train.steps={train.steps}: needed is at least 1")
    if train.epochs is not None and not train.epochs > 0:
        faults.append(f"train.epochs={train.epochs}: needed is more than 0")
    if train.batch < 1:
        faults.append(f"train.batch={train.batch}: needed is at least 1")
    if train.optimizer not in get_args(Training.__annotations__["optimizer"]):
        faults.append(f"train.optimizer={train.optimizer}: needed is adamw or sgd")
    if train.schedule not in get_args(Training.__annotations__["schedule"]):
        faults.append(f"train.schedule={train.schedule}: needed is constant or cosine")
    for name in ("lr", "head_lr", "clip"):
        value = getattr(train, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            faults.append(f"train.{name}={value}: needed is a positive number")
    if not 0 <= train.momentum < 1:
        faults.append(f"train.momentum={train.momentum}: needed is a number in [0, 1)")
    elif train.momentum and train.optimizer == "adamw":
        faults.append(f"train.momentum={train.momentum}: adamw has none; set train.optimizer=sgd")
    if not (train.weight_decay >= 0 and math.isfinite(train.weight_decay)):
        faults.append(f"train.weight_decay={train.weight_decay}: needed is a number of at least 0")
    if config.evaluate.every < 1 or config.evaluate.batch < 1:
        faults.append(f"evaluate.every={config.evaluate.every}, evaluate.batch={config.evaluate.batch}: needed is at least 1")
    faults += _of_engine(config)
    if config.weights not in ("examples", "uniform"):
        faults.append(f"weights={config.weights}: needed is examples or uniform")
    faults += _of_devices(config)
    if config.run.threads < 1 or config.run.keep < 1:
        faults.append(f"run.threads={config.run.threads}, run.keep={config.run.keep}: needed is at least 1")
    if config.deadline is not None and not config.deadline > 0:
        faults.append(f"deadline={config.deadline}: needed is a positive number of seconds, or null")
    least = config.data.get("min_examples", 1)
    if not isinstance(least, int):
        faults.append(f"data.min_examples={least}: needed is a whole number")
    elif least < 1:
        faults.append(f"data.min_examples={least}: needed is at least 1")
    return faults


def _of_devices(config: Config) -> list[str]:
    try:
        each = devices(config.devices, clients=max(config.clients, 1), seed=config.seed)
    except ValueError as fault:
        return [str(fault)]
    rank = config.adapter.get("rank")
    if each is None:
        return []
    if not isinstance(rank, int):
        return [
            f"devices={config.devices}: adapter={config.choices.get('adapter')} has no rank that clients could differ in; set adapter=lora"
        ]
    if (most := max(device.rank for device in each)) > rank:
        return [f"devices={config.devices}: rank {most} is more than adapter.rank={rank}, which the server keeps; raise adapter.rank"]
    return []


def _of_engine(config: Config) -> list[str]:
    engine, faults = config.engine, []
    for name in ("wave", "lanes"):
        value = getattr(engine, name)
        if value is not None and value < 1:
            faults.append(f"engine.{name}={value}: needed is at least 1, or null to have it measured")
    for name in ("cache", "disk"):
        value = getattr(engine, name)
        if not (value >= 0 and math.isfinite(value)):
            faults.append(f"engine.{name}={value}: needed is a number of gigabytes, 0 for none")
    personal = config.evaluate.personal
    if personal is not None and personal < 1:
        faults.append(f"evaluate.personal={personal}: needed is at least 1 test example, or null for all")
    if not engine.stacked:
        faults += [f"engine.{name}=true needs engine.stacked=true" for name in ("bf16", "checkpointing") if getattr(engine, name)]
    return faults


def build(spec: Spec, *, leaves_out: Iterable[str] = (), run: object = None) -> Any:
    """The object a preset describes: its `_target_` called with its other fields, and with `run` if it has a parameter of that name.

    `_target_` comes only from installed presets (an override that names it is refused) and only from fedpeft's own packages.
    Raises `ConfigError` for what the object refuses.
    """
    target = str(spec["_target_"])
    if target.split(".")[0] not in PACKAGES:
        raise ConfigError(f"_target_ {target} is not one of fedpeft's own; presets may name only {' and '.join(PACKAGES)}")
    module, _, name = target.rpartition(".")
    arguments = {key: _frozen(value) for key, value in spec.items() if key != "_target_" and key not in set(leaves_out)}
    make = getattr(importlib.import_module(module), name)
    if run is not None and "run" in inspect.signature(make).parameters:
        arguments["run"] = run
    try:
        return make(**arguments)
    except (TypeError, ValueError) as fault:
        raise ConfigError(f"{name}: {fault}") from fault


def shown(config: Config) -> str:
    """The resolved config as YAML, for people; presets are named, their targets left out."""
    from omegaconf import OmegaConf

    plain = {name: _plain(value) for name, value in asdict(config).items()}
    plain["run"] = {name: value for name, value in plain["run"].items() if name != "dir"}
    return OmegaConf.to_yaml(OmegaConf.create(plain))


def presets_of(family: str, presets: Path) -> list[str]:
    """The names that `family=` takes."""
    return sorted(path.stem for path in (presets / family).glob("*.yaml"))


def _refused(text: str, presets: Path, faults: list[str]) -> bool:
    key, sign, value = text.partition("=")
    before = len(faults)
    if not sign:
        faults.append(f"{text}: needed is key=value, for instance rounds=20 or strategy=ffa")
    elif key.startswith(("+", "~")):
        faults.append(f"{text}: keys cannot be added or removed; `fedpeft run --help` lists them")
    elif "_target_" in text:
        faults.append(f"{text}: _target_ is read only from the installed presets; choose a preset by name instead")
    elif "${" in text:  # the same words would mean another thing on each machine, and a server could ask for a client's environment
        faults.append(f"{text}: needed is a plain value, not one that stands elsewhere")
    elif key in FAMILIES and value not in presets_of(key, presets):
        close = difflib.get_close_matches(value, presets_of(key, presets), 1)
        hint = f"did you mean {key}={close[0]}? " if close else ""
        inside = f" An id or a path goes inside: {key}.id=... or {key}.path=..." if key in ("model", "data") else ""
        faults.append(f"{text}: there is no such {key}; {hint}There are {', '.join(presets_of(key, presets))}.{inside}")
    elif why := _unreadable(text):
        faults.append(f"{text}: {why}; quote a value that holds one of , = [ ] {{ }}, as in {key}=\"...\" inside '...'")
    return len(faults) > before


def _unreadable(text: str) -> str | None:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        return "one value is needed, not several" if OverridesParser.create().parse_override(text).is_sweep_override() else None
    except HydraException as fault:
        return _first_line(fault)


def _placed(tree: Any, text: str, faults: list[str]) -> str | None:
    """The override as Hydra takes it; None, and a fault, if there is no such key. A free mapping (an empty one in a preset) takes any."""
    from omegaconf import OmegaConf

    at = tree
    path = _key(text).split(".")
    for depth, part in enumerate(path):
        names = [str(name) for name in at] if OmegaConf.is_dict(at) else []
        if part in names:
            at = at[part]
            continue
        if OmegaConf.is_dict(at) and not names:
            return f"++{text}"
        close = difflib.get_close_matches(part, names, 1)
        where = ".".join(path[:depth])
        hint = f"did you mean {'.'.join([*path[:depth], close[0]])}? " if close else ""
        there = ", ".join(n for n in names if n != "_target_") or "no fields"
        faults.append(f"{_key(text)}: there is no such key; {hint}{where or 'The config'} has {there}")
        return None
    return f"++{text}" if OmegaConf.is_dict(at) and not at else text


def _typed(plain: Spec, usual: Spec, choices: Mapping[str, str], faults: list[str]) -> Config:
    """The config. A value of a wrong type is a fault, and the usual one takes its place so that all others can be checked too."""
    parts = {"run": Run, "train": Training, "evaluate": Evaluation, "engine": Options}
    made: dict[str, Any] = {}
    for name, value in alike(plain, usual, "", faults).items():
        if name in parts:
            made[name] = parts[name](**{k: cast(parts[name], k, v, usual[name][k], f"{name}.{k}", faults) for k, v in value.items()})
        elif name == "devices":
            made[name] = value
        elif name in FAMILIES:
            made[name] = alike(value, usual[name], f"{name}.", faults)
        else:
            made[name] = cast(Config, name, value, usual[name], name, faults)
    return Config(**made, choices={family: choices[family] for family in FAMILIES})


def _codec(tree: Any, kept: Iterable[str], groups: Iterable[str]) -> str | None:
    """The codec of a run that says none, if it is another than the usual: texts were as accurate by 34 times fewer bytes (README)."""
    chosen = {_key(text): text.partition("=")[2] for text in groups}
    task = {_key(text): text.partition("=")[2] for text in kept}.get("data.task", tree.data.get("task"))
    return "codec=ternary" if task == "text" and "codec" not in chosen and chosen.get("privacy", "none") == "none" else None


def _defaults(presets: Path) -> dict[str, str]:
    from omegaconf import OmegaConf

    rows: Any = OmegaConf.to_container(OmegaConf.load(presets / "config.yaml"))["defaults"]  # type: ignore[call-overload,index]  # a mapping
    return {str(k): str(v) for row in rows if isinstance(row, dict) for k, v in row.items()}


def _key(text: str) -> str:
    return text.partition("=")[0]


def _frozen(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_frozen(item) for item in value)
    return {k: _frozen(v) for k, v in value.items()} if isinstance(value, dict) else value


def _first_line(fault: Exception) -> str:
    return next(iter(str(fault).splitlines()), type(fault).__name__)


def _plain(value: Any) -> Any:
    return {key: _plain(item) for key, item in value.items() if key != "_target_"} if isinstance(value, Mapping) else value
