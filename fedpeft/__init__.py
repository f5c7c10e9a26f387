"""fedpeft: federated parameter-efficient fine-tuning. The data stay, adapters travel.

Names are loaded when first used, so that `import fedpeft` needs neither torch nor Flower.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedpeft.adapters.base import Adapted, Adapter
    from fedpeft.adapters.load import load_adapter
    from fedpeft.aggregate import Mean, median, trimmed_mean, weighted_mean
    from fedpeft.codecs.base import Codec, Payload
    from fedpeft.config import Config, ConfigError, load
    from fedpeft.data.partition import Split, partition
    from fedpeft.data.table import Dataset, Table
    from fedpeft.lowrank import LowRank
    from fedpeft.messages import Broadcast, Update
    from fedpeft.models.base import Base
    from fedpeft.setting import Setting, open_setting
    from fedpeft.simulation import InProcessGrid
    from fedpeft.strategy import Phase, Strategy
    from fedpeft.tensors import Tensors

_HOMES = {
    "Adapted": "adapters.base",
    "Adapter": "adapters.base",
    "Base": "models.base",
    "Broadcast": "messages",
    "Codec": "codecs.base",
    "Config": "config",
    "ConfigError": "config",
    "Dataset": "data.table",
    "InProcessGrid": "simulation",
    "LowRank": "lowrank",
    "Mean": "aggregate",
    "Payload": "codecs.base",
    "Phase": "strategy",
    "Setting": "setting",
    "Split": "data.partition",
    "Strategy": "strategy",
    "Table": "data.table",
    "Tensors": "tensors",
    "Update": "messages",
    "load": "config",
    "load_adapter": "adapters.load",
    "median": "aggregate",
    "open_setting": "setting",
    "partition": "data.partition",
    "trimmed_mean": "aggregate",
    "weighted_mean": "aggregate",
}

__all__ = [
    "Adapted",
    "Adapter",
    "Base",
    "Broadcast",
    "Codec",
    "Config",
    "ConfigError",
    "Dataset",
    "InProcessGrid",
    "LowRank",
    "Mean",
    "Payload",
    "Phase",
    "Setting",
    "Split",
    "Strategy",
    "Table",
    "Tensors",
    "Update",
    "load",
    "load_adapter",
    "median",
    "open_setting",
    "partition",
    "trimmed_mean",
    "weighted_mean",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'fedpeft' has no attribute {name!r}")
    return getattr(import_module(f"fedpeft.{_HOMES[name]}"), name)
