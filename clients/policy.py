"""Policy: what a site lets others do with its data and its machine, whatever the server asks."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedpeft.config import Config

# What is this site's own: where its data and models lie, what its machine does. A server that names them is not heard.
OWN = ("run.", "engine.", "data.", "model.id", "model.revision")
HEARD = ("data.partition.", "data.min_examples")  # who of several owners of one table owns what must be said alike to all
LARGEST_DELTA = 1e-5  # where a policy has an epsilon and says nothing of delta


@dataclass(frozen=True)
class Policy:
    """None allows all. A site that sets `epsilon` takes part in no run without differential privacy of its examples."""

    rounds: int | None = None  # most rounds of a run
    epsilon: float | None = None  # most that all runs together spend of an example's privacy, added up
    delta: float | None = None  # largest of a run, where epsilon is set; None: 1e-5
    strategies: tuple[str, ...] | None = None
    adapters: tuple[str, ...] | None = None
    fingerprints: tuple[str, ...] | None = None  # of base models


def refused(policy: Policy, config: Config, *, spent: float = 0.0) -> list[str]:
    """What `config` asks that the policy does not allow. `spent` is the epsilon of this site's other runs."""
    faults = []
    if policy.rounds is not None and config.rounds > policy.rounds:
        faults.append(f"rounds={config.rounds}: this site's policy allows {policy.rounds}")
    for family, allowed in (("strategy", policy.strategies), ("adapter", policy.adapters)):
        if allowed is not None and (chosen := config.choices[family]) not in allowed:
            faults.append(f"{family}={chosen}: this site's policy allows {', '.join(allowed) or 'none'}")
    if config.privacy.get("noise") == "seeded-insecure":
        faults.append("privacy.noise=seeded-insecure: whoever sent the seed could subtract the noise; it is for simulations alone")
    if policy.epsilon is not None:
        faults += _of_epsilon(policy, policy.epsilon, config, spent)
    return faults


def refused_base(policy: Policy, fingerprint: str) -> list[str]:
    """The fault that the base model, once loaded, is none that the policy names."""
    if policy.fingerprints is None or fingerprint in policy.fingerprints:
        return []
    return [f"the base model has fingerprint {fingerprint}: this site's policy allows {', '.join(policy.fingerprints) or 'none'}"]


def unnamed(config: Config, *, whole: bool) -> list[str]:
    """The fault that a site's classes would follow from its rows: how many there are is then no secret, and their numbers are its own."""
    data = config.data
    if not (whole or config.private) or data.get("class_names", "known") is not None or data.get("task") == "language":
        return []
    return [
        "this site's site.yaml does not say data.class_names: needed are all labels there may be, in the order that the server has them, "
        "whether a row has them or not"
    ]


def own(site: Mapping[str, str], asked: Sequence[str]) -> list[str]:
    """The overrides of a run as this site takes them: what the server says of `OWN` is left out, what `site` says of any key wins."""
    kept = [text for text in asked if not is_own(_key(text)) and _key(text) not in site]
    return kept + [f"{key}={value}" for key, value in site.items()]


def is_own(key: str) -> bool:
    """True if what the server says of `key` is not heard."""
    return not key.startswith(HEARD) and any(key == one or (one.endswith(".") and key.startswith(one)) for one in OWN)


def _of_epsilon(policy: Policy, most: float, config: Config, spent: float) -> list[str]:
    unit = config.choices["privacy"]
    if str(config.privacy.get("_target_", "")).rpartition(".")[2] != "Example" or config.privacy.get("published"):
        return [f"privacy={unit}: this site's policy allows epsilon {most:g} of an example; needed is privacy=example"]
    delta, largest = config.privacy.get("delta"), LARGEST_DELTA if policy.delta is None else policy.delta
    if delta is not None and float(delta) > largest:
        return [f"privacy.delta={delta}: this site's policy allows {largest:g}; leave it null"]
    asked = float(config.privacy["epsilon"])
    if math.isfinite(asked) and spent + asked <= most:
        return []
    return [f"privacy.epsilon={asked:g}: {spent:.3g} is spent by other runs, this site's policy allows {most:g} of all together"]


def _key(text: str) -> str:
    return text.partition("=")[0].lstrip("+~")
