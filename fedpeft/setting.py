"""Setting: what server and clients build alike from the same config: data, base model, adapter, and who owns which example."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fedpeft.adapters.base import Adapted, Adapter
from fedpeft.config import Config, ConfigError, build
from fedpeft.data.partition import Split, partition
from fedpeft.data.table import Dataset
from fedpeft.models.base import Base, Examples


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

    def resembling(self, client: int) -> Tensor:
        """(test examples,) weights that give the test set the label proportions of `client`: how its own model is judged."""
        classes = max(len(self.dataset.classes), 1)
        own = torch.bincount(self.dataset.train.labels[self.split.clients[client]], minlength=classes).double()
        there = torch.bincount(self.dataset.test.labels, minlength=classes).double().clamp(min=1)
        return (own / own.sum() / there)[self.dataset.test.labels]


def open_setting(config: Config, *, base: Base | None = None) -> Setting:
    """Reads the data, loads the model and attaches the adapter. Raises `ConfigError` for what the config asks and the data cannot give."""
    try:
        torch.set_num_threads(config.run.threads)
        dataset: Dataset = build(config.data, leaves_out=("partition", "min_examples")).read(config.seed)
        if base is None:
            base = build(config.model).load(dataset, seed=config.seed, device=device(config.run.device))
        assert base is not None
        made = Setting(config, dataset, base, attach(config, base))
        _ = made.split
        build(config.codec), build(config.mean)
        build(config.strategy).init(made.adapted.read())  # a strategy that cannot use this adapter says so before anything is written
        return made
    except (ValueError, FileNotFoundError) as fault:
        raise ConfigError(str(fault)) from fault


def attach(config: Config, base: Base) -> Adapted:
    """The run's adapter on the base."""
    adapter: Adapter = build(config.adapter)
    return adapter.attach(base, config.seed)


def device(name: str) -> torch.device:
    """The device of `run.device`; auto takes the first GPU if there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"run.device={name}: needed is auto, cpu, cuda or cuda:N") from None
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"run.device={name}: torch {torch.__version__} sees no GPU here; use run.device=cpu")
    return found
