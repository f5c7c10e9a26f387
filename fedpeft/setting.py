"""Setting: what server and clients build alike from the same config: data, base model, adapter, and who owns which example."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from fedpeft import seeds
from fedpeft.adapters.base import Adapted, Adapter
from fedpeft.aggregate import weighted_mean
from fedpeft.codecs.base import Codec
from fedpeft.config import Config, ConfigError, app_folder, build, load, presets_of
from fedpeft.data.partition import Split, owned_by, partition
from fedpeft.data.table import Dataset, Source
from fedpeft.devices import Device, devices
from fedpeft.lowrank import rank_of
from fedpeft.models.base import Base, Examples, ModelSource
from fedpeft.passport import Passport, passport
from fedpeft.privacy import linter
from fedpeft.privacy.unit import Unit
from fedpeft.strategy import Federation, Strategy
from fedpeft.tensors import Tensors, is_b


@dataclass(eq=False)
class Setting:
    """A data set, encoded for a base model, and the adapters of a run, of which one lies on that model at a time.

    Examples are encoded when first asked for.
    """

    config: Config
    dataset: Dataset
    base: Base
    adapters: Mapping[str, Adapter]  # "main" and the strategy's own
    names: tuple[str, ...]  # of those that some round's phase uses, in order of use
    _present: tuple[str, Adapted] | None = None

    def on(self, name: str) -> Adapted:
        """The base with the adapter `name` on it; the one before is taken off."""
        if self._present is None or self._present[0] != name:
            self.off()
            self._present = (name, self.adapters[name].attach(self.base, self.config.seed))
        return self._present[1]

    def off(self) -> None:
        """Takes the adapter off the base."""
        if self._present is not None:
            self._present[1].undo()
        self._present = None

    @property
    def adapted(self) -> Adapted:
        """The base with the adapter of the first round."""
        return self.on(self.names[0])

    def starts(self) -> dict[str, Tensors]:
        """The tensors that each adapter in `names` begins with; the first lies on the base then."""
        return {name: self.on(name).read() for name in reversed(self.names)}

    @cached_property
    def _alike(self) -> Passport:
        return passport(self.base, self.starts(), self.dataset.train.inputs, self.dataset.classes, _asks(self.config))

    def passport(self, client: int) -> Passport:
        """What a client's process and the server must have alike, and the rank that `client` is sent."""
        return self._alike if self.devices is None else replace(self._alike, rank=self.devices[client].rank)

    @cached_property
    def devices(self) -> tuple[Device, ...] | None:
        """Each client's device; None if all train the adapter's rank."""
        return devices(self.config.devices, clients=self.config.clients, seed=self.config.seed)

    def scales(self, client: int, adapted: Adapted) -> Mapping[str, float] | None:
        """What a client's B factors are scaled by, where its device has a rank of its own; None: as the adapter's."""
        if self.devices is None:
            return None
        device = self.devices[client]
        if device.alpha is None:
            return adapted.scales
        scale = device.alpha / (device.rank**0.5 if self.config.adapter.get("rslora") else device.rank)
        return {name: scale if is_b(name) else factor for name, factor in adapted.scales.items()}

    @cached_property
    def train(self) -> Examples:
        """All clients' training examples."""
        return self.base.encode(self.dataset.train)

    @cached_property
    def test(self) -> Examples:
        """The test examples."""
        return self.base.encode(self.dataset.test)

    @cached_property
    def split(self) -> Split:
        """Which rows of `train` each client owns."""
        data, table = self.config.data, self.dataset.train
        return partition(
            table.labels,
            table.groups,
            clients=self.config.clients,
            seed=self.config.seed,
            min_examples=int(data["min_examples"]),
            **data["partition"],
        )

    @cached_property
    def data_digest(self) -> str:
        """Digest of the examples and of who owns which."""
        made = hashlib.blake2b(digest_size=12)
        for table in (self.dataset.train, self.dataset.test):
            made.update(table.inputs.numpy().tobytes() if isinstance(table.inputs, Tensor) else repr(table.inputs).encode())
            made.update(table.labels.numpy().tobytes())
        for rows in self.split.clients:
            made.update(rows.numpy().tobytes() + b"/")
        return made.hexdigest()

    def steps(self, client: int) -> int:
        """Examples that a client's work of one round passes over, about."""
        work, own = self.config.train, len(self.split.clients[client])
        return max(1, round(work.epochs * own)) if work.steps is None and work.epochs else (work.steps or 1) * min(work.batch, own)

    def judged(self, client: int) -> tuple[Tensor, Tensor]:
        """Test rows that `client`'s own model is scored on, and a weight for every test row.

        The weights give the test set the label proportions of the client's data; of the rows with weight `evaluate.personal` are drawn.
        """
        weights = self.resembling(client) if self.dataset.task != "language" else torch.ones(len(self.test))
        rows, most = weights.nonzero()[:, 0], self.config.evaluate.personal
        if not len(rows):
            raise ValueError("no test example has a label that this client holds; give the data more test rows")
        if most is not None and len(rows) > most:
            rng = seeds.generator(self.config.seed, client=client, purpose="personal evaluation")
            rows = rows[torch.randperm(len(rows), generator=rng)[:most].sort().values]
        return rows, weights

    def resembling(self, client: int) -> Tensor:
        """(test examples,) weights that give the test set the label proportions of `client`."""
        classes = max(len(self.dataset.classes), 1)
        own = torch.bincount(self.dataset.train.labels[self.split.clients[client]], minlength=classes).double()
        there = torch.bincount(self.dataset.test.labels, minlength=classes).double().clamp(min=1)
        return (own / own.sum() / there)[self.dataset.test.labels]

    @cached_property
    def owned(self) -> Tensor:
        """(test examples,) weights of one test set that stands for all clients' own, each by its examples; they add up to 1."""
        whole = torch.zeros(len(self.dataset.test.labels), dtype=torch.float64)
        for client, own in enumerate(self.split.clients):
            whole += len(own) * self.resembling(client)
        return whole / whole.sum()


def _asks(config: Config) -> str:
    """What the words of a run came to here, but for what may differ from host to host: the chosen presets, and a digest of all fields."""
    hosts = ("data", "model", "engine", "run")
    plain = {name: value for name, value in asdict(config).items() if name not in hosts}
    plain["choices"] = chosen = {family: choice for family, choice in sorted(config.choices.items()) if family not in hosts}
    digest = hashlib.blake2b(json.dumps(plain, sort_keys=True, default=str).encode(), digest_size=6).hexdigest()
    return " ".join([*(f"{family}={choice}" for family, choice in chosen.items()), digest])


def open_setting(config: Config, *, base: Base | None = None, whole: int | None = None) -> Setting:
    """Reads the data, loads the model and attaches the adapter; all training rows are the client's `whole`, if one is named.

    Raises `ConfigError` for what the config asks and the data cannot give.
    """
    try:
        torch.set_num_threads(config.run.threads)
        source, model, adapter, strategy = _built(config)
        dataset: Dataset = source.read(config.seed)
        if base is None:
            base = model.load(dataset, seed=config.seed, device=device(config.run.device))
        _ = base.fingerprint  # of the bare base, before any adapter's tensors lie in it
        names = tuple(dict.fromkeys(strategy.phase(round).adapter for round in range(config.rounds + 1)))
        adapters = {"main": adapter} | {name: strategy.adapters[name](adapter) for name in names if name != "main"}
        made = Setting(config, dataset, base, adapters, names)
        if whole is not None:
            made.split = owned_by(whole, len(dataset.train), config.clients)
        sizes = [len(rows) for rows in made.split.clients]
        unit = privacy_of(config)
        if unit is not None and (found := linter.faults(linter.Facts(config, unit, strategy, sizes, base.module))):
            raise ConfigError("\n".join(found))
        _ = made._alike  # before a round's adapter lies ready, which would be taken off
        starts = made.starts()
        try:
            check_ranks(config, strategy, strategy.init(starts))  # what cannot be says so before anything is written
        except ValueError:
            made.off()
            raise
        return made
    except (ValueError, FileNotFoundError, ImportError) as fault:
        raise ConfigError(str(fault)) from fault


def strategy_of(config: Config) -> Strategy[Any]:
    """The strategy of a config, which may know the federation it serves."""
    each = devices(config.devices, clients=config.clients, seed=config.seed)
    run = Federation(
        config.rounds, config.clients, config.cohort, config.seed, None if each is None else tuple(one.rank for one in each),
        config.train.optimizer, config.train.momentum, config.train.clip, config.train.lr, config.train.steps,
    )  # fmt: skip
    made: Strategy[Any] = build(config.strategy, run=run)
    return made


def codec_of(config: Config) -> tuple[Codec, bool]:
    """The codec of the way up, and whether what it leaves out is added to the next update."""
    made: Codec = build(config.codec)
    feedback = config.feedback and not made.lossless
    if feedback and not getattr(made, "contracts", True):
        raise ConfigError(
            f"feedback=true adds what codec={config.choices['codec']} leaves out to the next update, and with these fields may leave out "
            "more than it was given: the sum would grow without end; set feedback=false"
        )
    return made, feedback


def downlink_of(config: Config) -> Codec:
    """The codec of the way down."""
    made: Codec = build(config.downlink)
    return made


def privacy_of(config: Config) -> Unit | None:
    """Whose presence the run hides; None: nobody's."""
    made: Unit | None = build(config.privacy)
    return made


def check_ranks(config: Config, strategy: Strategy[Any], state: Any) -> None:
    """Raises `ValueError` if clients' ranks differ and the strategy sends them another than theirs."""
    each = devices(config.devices, clients=config.clients, seed=config.seed)
    if each is None:
        return
    first = strategy.phase(0).adapter
    for client in {one.rank: client for client, one in reversed(list(enumerate(each)))}.values():
        sent = rank_of(strategy.broadcast(state, 0, client).tensors)
        if first != "main" or sent > each[client].rank:
            what = f"sends it rank {sent}" if first == "main" else f"trains an adapter of its own ({first})"
            raise ValueError(
                f"client {client} has a device of rank {each[client].rank}, strategy={config.choices['strategy']} {what}: it "
                f"cannot mix ranks. Those that can: {', '.join(_that_mix())}"
            )


@lru_cache(maxsize=1)
def _that_mix() -> list[str]:
    """The strategies whose presets cut what they send to a client's rank."""
    found = []
    probe = {"q.A": torch.zeros(4, 8), "q.B": torch.zeros(8, 4)}
    for name in presets_of("strategy", app_folder() / "experiments" / "conf"):
        spec = load([f"strategy={name}"]).strategy
        try:
            made = build(spec, run=Federation(clients=1, ranks=(2,), optimizer="sgd"))
            if made.phase(0).adapter == "main" and rank_of(made.broadcast(made.init({"main": probe}), 0, 0).tensors) == 2:
                found.append(name)
        except (ConfigError, ValueError, KeyError):
            continue
    return found


def _built(config: Config) -> tuple[Source, ModelSource, Adapter, Strategy[Any]]:
    """Sources of data and model, adapter, strategy; a preset of any family that refuses its fields is reported together with all others."""
    faults: list[str] = []
    made: dict[str, Any] = {}
    for family in ("data", "model", "adapter", "strategy", "codec", "downlink", "privacy", "select", "mean"):
        try:
            spec = getattr(config, family)
            made[family] = strategy_of(config) if family == "strategy" else build(spec, leaves_out=("partition", "min_examples"))
        except ConfigError as fault:
            faults.append(f"{family}={config.choices[family]}: {fault}")
    if faults:
        raise ConfigError("\n".join(faults))
    if made["mean"] is not weighted_mean and not made["strategy"].mean_only:
        raise ConfigError(
            f"mean={config.choices['mean']} works per coordinate, strategy={config.choices['strategy']} combines clients' products itself; "
            "set mean=weighted, and select=krum or select=norm_bound against hostile clients"
        )
    return made["data"], made["model"], made["adapter"], made["strategy"]


def device(name: str) -> torch.device:
    """The device of `run.device`; auto takes the first GPU if there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ConfigError(f"run.device={name}: needed is auto, cpu, cuda or cuda:N")
    found = torch.device(name)
    if found.type == "cuda":
        if (found.index or 0) >= torch.cuda.device_count():
            raise ConfigError(
                f"run.device={name}: torch {torch.__version__} sees {torch.cuda.device_count()} GPUs here; use run.device=cpu"
            )
        torch.use_deterministic_algorithms(True, warn_only=True)  # the same bytes again, where torch has a way to give them
    return found
