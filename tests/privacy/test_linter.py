"""Every setting that would void a guarantee is refused before anything is trained."""

import pytest
from torch import nn

from fedpeft.config import ConfigError, load
from fedpeft.privacy.linter import RULES, Facts, faults
from fedpeft.setting import open_setting, privacy_of, strategy_of

SMALL = ["clients=4", "cohort=2", "rounds=4", "train.steps=1", "model.epochs=1"]


def found(words: list[str], sizes: tuple[int, ...] = (50, 60, 70, 80), module: nn.Module | None = None) -> list[str]:
    config = load([*SMALL, *words])
    unit = privacy_of(config)
    assert unit is not None
    return faults(Facts(config, unit, strategy_of(config), sizes, module or nn.Linear(2, 2)))


VOID: list[tuple[str, list[str], str]] = [
    ("weights", ["privacy=client", "weights=examples"], "count for more than the clip allows"),
    ("weights", ["privacy=example", "weights=examples"], "how many examples it has"),
    ("selection", ["privacy=client", "select=krum"], "before they are clipped"),
    ("mean", ["privacy=client", "mean=median"], "is no sum"),
    ("mean", ["privacy=client", "mean=trimmed"], "is no sum"),
    ("strategy", ["privacy=client", "strategy=flora"], "by more than their mean"),
    ("strategy", ["privacy=client", "strategy=lora_fair"], "by more than their mean"),
    ("control variates", ["privacy=client", "strategy=scaffold", "train.optimizer=sgd"], "control variates"),
    ("personal models", ["privacy=example", "strategy=fedsa"], "keeps tensors at the clients"),
    ("personal models", ["privacy=client", "strategy=fedsa"], "keeps tensors at the clients"),
    ("gradient rounds", ["privacy=example", "strategy=fed_sb", "strategy.start=gradient"], "full gradients of the data in round 0"),
    ("gradient rounds", ["privacy=example", "privacy.query_noise_multiplier=3"], "no round of this run is one of gradients"),
    ("signs of gradients", ["privacy=example", "strategy=fed_sb", "strategy.start=sign"], "every weight of a layer"),
    ("delta", ["privacy=example", "privacy.delta=0.02"], "more than 1/80"),
    ("delta", ["privacy=client", "privacy.delta=0.3"], "more than 1/4"),
    ("dropout", ["privacy=example", "adapter.dropout=0.1"], "from the run's seed"),
    ("redrawn cohorts", ["privacy=client", "privacy.sampling=poisson", "min_clients=2"], "would decide whom"),
    ("redrawn cohorts", ["privacy=client", "min_clients=2"], "would decide whom"),
    ("public data", ["privacy=client", "data=tinyshakespeare", "data.public_small_groups=true", "model=tiny_llama"], "base model"),
    ("one client", ["privacy=client", "clients=1", "cohort=1"], "nobody to hide"),
    ("mixed ranks", ["privacy=client", "strategy=flexlora", "devices=[2,4]"], "other shapes"),
    ("batch clip", ["privacy=example", "train.clip=1"], "bounds no single example"),
    ("backend", ["privacy=example", "privacy.backend=wave", "engine.stacked=false"], "needs engine.stacked=true"),
]


@pytest.mark.fast
@pytest.mark.parametrize(("rule", "words", "match"), VOID, ids=lambda value: value if isinstance(value, str) and " " not in value else None)
def test_what_voids_a_guarantee_is_refused_with_its_reason(rule: str, words: list[str], match: str) -> None:
    said = found(words)
    assert any(match in line for line in said), said
    assert all(line.startswith("privacy=") for line in said)


@pytest.mark.fast
def test_rules_that_need_more_than_words() -> None:
    norm = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    assert "normalizes over the batch" in found(["privacy=example"], module=norm)[0]
    assert found(["privacy=client"], module=norm) == []  # one client's batches are its own
    assert "to hide it is to hide the client" in found(["privacy=example"], sizes=(1, 1, 1, 1))[0]


@pytest.mark.fast
def test_every_rule_has_a_case() -> None:
    elsewhere = {"batch norm", "one example"}
    assert {rule for rule, _, _ in VOID} | elsewhere == set(RULES)
    assert len(RULES) >= 12


@pytest.mark.fast
@pytest.mark.parametrize(
    "words",
    [
        ["privacy=example"],
        ["privacy=example", "strategy=ffa", "codec=ternary"],  # after the noise: free
        ["privacy=example", "strategy=flora", "select=krum"],  # functions of what was noised already
        ["privacy=example", "strategy=fed_sb"],
        ["privacy=example", "strategy=fed_sb", "strategy.start=gradient", "privacy.query_noise_multiplier=8"],
        ["privacy=example", "strategy=fedsvd"],
        ["privacy=example", "strategy=rolora"],
        ["privacy=client"],
        ["privacy=client", "strategy=fed_sb", "codec=ternary"],  # decoded, then clipped again
        ["privacy=client", "strategy=fedopt", "privacy.sampling=poisson", "privacy.adversary=outsider"],
    ],
)
def test_what_is_sound_is_not_refused(words: list[str]) -> None:
    assert found(words) == []


def test_a_run_says_all_of_it_at_once_and_begins_nothing() -> None:
    with pytest.raises(ConfigError) as told:
        open_setting(load([*SMALL, "privacy=example", "weights=examples", "train.clip=1"]))
    assert len(str(told.value).splitlines()) == 2
