"""Every strategy's preset, and other settings of it, as the tests for all of them take them."""

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from fedpeft.config import build
from fedpeft.strategy import Federation

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "experiments" / "conf" / "strategy"
PRESETS = {path.stem: OmegaConf.to_container(OmegaConf.load(path)) for path in sorted(FOLDER.glob("*.yaml"))}
RUN = Federation(rounds=4, clients=4, cohort=3, optimizer="sgd")
MIXED = Federation(rounds=4, clients=4, cohort=3, optimizer="sgd", ranks=(1, 3, 2, 3))

# Other settings of a preset that are another algorithm: they keep the same.
VARIANTS: dict[str, dict[str, Any]] = {
    "fed_sb gradient": {"start": "gradient"},
    "fed_sb sign": {"start": "sign", "step": 0.1},
    "fedex cut": {"residual": 1},
    "fedopt momentum": {"optimizer": "momentum"},
    "hetlora examples": {"weights": "examples", "penalty": 0.0},
    "hetlora rankwise": {"weights": "examples", "penalty": 0.0, "rankwise": True},
    "lora_fair ridge": {"solver": "ridge"},
    "lora_fair A": {"residual": "A"},
    "lora_fair ridge both": {"solver": "ridge", "residual": "both"},
    "slora without": {"share": 0.0},
}
NAMES = [*PRESETS, *VARIANTS]

# Values under which a client alone, or among its likes, gets its own update back.
OWN_UPDATE: dict[str, dict[str, Any]] = {
    "fedopt": {"optimizer": "momentum", "lr": 1.0, "beta1": 0.0},  # any other server optimizer takes another step along the change
    "fedopt momentum": {"lr": 1.0, "beta1": 0.0},
    "hetlora": {"penalty": 0.0},  # a client that prunes itself sends less than it trained
    "florist": {"energy": 1.0},
}


def strategy(name: str, run: Federation = RUN, **more: Any) -> Any:
    return build(PRESETS[name.partition(" ")[0]] | VARIANTS.get(name, {}) | more, run=run)


def assert_same(got, want, distance, within=1e-12):
    """RAVAN's scales go into its heads, where they stay one."""
    got, want = ({n: t for n, t in model.items() if not n.endswith(".s")} for model in (got, want))
    assert distance(got, want) <= within
