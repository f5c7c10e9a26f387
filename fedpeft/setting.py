"""Setting: what server and clients build alike from the same config: data, base model, adapter, and who owns which example."""

import hashlib
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fedpeft import seeds
from fedpeft.adapters.base import Adapted, Adapter
from fedpeft.config import Config, ConfigError, build
from fedpeft.data.partition import Split, partition
from fedpeft.data.table import Dataset, Source
from fedpeft.models.base import Base, Examples, ModelSource


@dataclass(eq=False)
class Setting:
    """A data set, encoded for a base model, and an adapter on that model. Examples are encoded when first asked for."""

    config: Config
    dataset: Dataset
    base: Base
    adapted: Adapted

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


def open_setting(config: Config, *, base: Base | None = None) -> Setting:
    """Reads the data, loads the model and attaches the adapter. Raises `ConfigError` for what the config asks and the data cannot give."""
    try:
        torch.set_num_threads(config.run.threads)
        source, model = _built(config)
        dataset: Dataset = source.read(config.seed)
        if base is None:
            base = model.load(dataset, seed=config.seed, device=device(config.run.device))
        _ = base.fingerprint  # of the bare base, before any adapter's tensors lie in it
        made = Setting(config, dataset, base, attach(config, base))
        _ = made.split
        build(config.strategy).init(made.adapted.read())  # a strategy that cannot use this adapter says so before anything is written
        return made
    except (ValueError, FileNotFoundError, ImportError) as fault:
        raise ConfigError(str(fault)) from fault


def _built(config: Config) -> tuple[Source, ModelSource]:
    """The data and model sources; a preset of any family that refuses its fields is reported together with all others."""
    faults: list[str] = []
    made: dict[str, Any] = {}
    for family in ("data", "model", "adapter", "strategy", "codec", "mean"):
        try:
            made[family] = build(getattr(config, family), leaves_out=("partition", "min_examples"))
        except ConfigError as fault:
            faults.append(f"{family}={config.choices[family]}: {fault}")
    if faults:
        raise ConfigError("\n".join(faults))
    return made["data"], made["model"]


def attach(config: Config, base: Base) -> Adapted:
    """The run's adapter on the base."""
    adapter: Adapter = build(config.adapter)
    return adapter.attach(base, config.seed)


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
