"""Setting: of a run's adapters one lies on the base at a time, and the base is bare between them."""

import pytest
import torch

from fedpeft.config import ConfigError, load
from fedpeft.setting import Setting, open_setting
from fedpeft.tensors import Tensors

RUN = ["clients=4", "cohort=2", "model.epochs=1", "rounds=4"]


@pytest.fixture(scope="module")
def setting() -> Setting:
    return open_setting(load([*RUN, "strategy=fed_sb", "strategy.start=gradient"]))


def same(some: Tensors, others: Tensors) -> bool:
    return some.keys() == others.keys() and all(torch.equal(some[name], others[name]) for name in some)


def test_the_adapters_are_those_that_some_phase_uses_in_order_of_use(setting: Setting) -> None:
    assert setting.names == ("sketch", "core")
    assert set(setting.adapters) == {"main", "sketch", "core"}
    assert open_setting(load(RUN)).names == ("main",)


def test_an_adapter_that_is_on_stays_and_another_takes_its_place(setting: Setting) -> None:
    core = setting.on("core")
    assert setting.on("core") is core
    sketch = setting.on("sketch")
    assert setting.on("core") is not core
    names = {name for name, _ in setting.base.module.named_parameters() if "lora" in name}
    assert not names  # of the sketch nothing is left
    assert {name.rpartition(".")[2] for name in sketch.parameters if not name.startswith("head.")} == {"A", "B"}


def test_off_leaves_the_base_bare_and_may_be_said_twice(setting: Setting) -> None:
    setting.off()
    inputs, _ = setting.test.batch(torch.arange(4))
    bare, modules = setting.base.module(**inputs).logits, list(setting.base.module.modules())
    for name in setting.names:
        adapted = setting.on(name)
        adapted.write({key: tensor + 0.1 for key, tensor in adapted.read().items()})
        assert not torch.equal(adapted.logits(inputs), bare)
    setting.off()
    setting.off()
    assert torch.equal(setting.base.module(**inputs).logits, bare)
    assert list(setting.base.module.modules()) == modules


def test_starts_are_the_same_bits_whatever_was_trained_before_and_the_first_lies_on_the_base(setting: Setting) -> None:
    first = setting.starts()
    assert list(first) == ["core", "sketch"]  # whoever reads them goes by name
    assert same(setting.adapted.read(), first["sketch"])
    for name in setting.names:
        adapted = setting.on(name)
        adapted.write({key: tensor + 1 for key, tensor in adapted.read().items()})
    setting.off()
    second = setting.starts()
    assert all(same(first[name], second[name]) for name in first)


def test_a_setting_that_cannot_be_leaves_the_base_bare_for_another(setting: Setting) -> None:
    setting.off()
    with pytest.raises(ConfigError, match="cannot mix ranks"):
        open_setting(load([*RUN, "devices=[2,8]"]), base=setting.base)
    with pytest.raises(ConfigError, match=r"adapter\.rank=999 is larger than the layer"):
        open_setting(load([*RUN, "strategy=fed_sb", "strategy.rank=999"]), base=setting.base)
    assert not any(hasattr(inner, "base_layer") for inner in setting.base.module.modules())
    assert open_setting(load(RUN), base=setting.base).adapted.read()
