"""`fedpeft presets`: every preset says what it is, and every field that it names can be set."""

import pytest

from experiments.cli import CONF
from experiments.presets import described
from fedpeft.config import FAMILIES, ConfigError, load, presets_of

ALL = [(family, name) for family in FAMILIES for name in presets_of(family, CONF)]


@pytest.mark.fast
def test_every_preset_is_listed_with_what_it_is() -> None:
    lines = described([], CONF).splitlines()
    said = [line.split(maxsplit=1) for line in lines if line.startswith("  ")]
    assert [pair[0] for pair in said] == [name for _, name in ALL]
    assert all(len(pair) == 2 for pair in said), [pair for pair in said if len(pair) != 2]


@pytest.mark.fast
@pytest.mark.parametrize(("family", "name"), ALL)
def test_every_field_of_a_preset_is_one_of_the_config(family: str, name: str) -> None:
    title, *fields = described([f"{family}={name}"], CONF).splitlines()
    assert title.startswith(f"{family}={name}  # ")
    shown = [line.strip().partition(":")[0] for line in fields if line.startswith(f"  {family}.")]
    config = load([f"{family}={name}", *(["codec=raw"] if family != "codec" else [])])
    assert shown == [f"{family}.{field}" for field in getattr(config, family) if field != "_target_"]


@pytest.mark.fast
def test_a_family_is_all_its_presets_and_a_wrong_name_is_told_with_the_right_ones() -> None:
    assert described(["mean"], CONF) == "\n\n".join(described([f"mean={name}"], CONF) for name in presets_of("mean", CONF))
    for words, fault in (
        (["strategies"], "strategies: there is no family strategies; did you mean strategy?"),
        (["strategy=fedopts"], "strategy=fedopts: there is no such strategy; did you mean fedopt?"),
    ):
        with pytest.raises(ConfigError) as raised:
            described(words, CONF)
        assert str(raised.value).startswith(fault)
