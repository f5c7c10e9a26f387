"""What must be alike is told apart, in words that say what to do."""

import re
from dataclasses import replace

import pytest
import torch

from fedpeft.config import load
from fedpeft.data.table import Table
from fedpeft.models.base import Base, Images
from fedpeft.models.load import tokens
from fedpeft.passport import Passport, passport, read_passport, size_class
from fedpeft.setting import open_setting

pytestmark = pytest.mark.fast

START = {f"layer.{k}.query.{part}": torch.zeros(shape) for k in range(3) for part, shape in (("A", (2, 5)), ("B", (4, 2)))}
PIXELS = torch.zeros(1, 1, 8, 8)


def image_base(*, dtype: torch.dtype = torch.float32, spread: float = 1.0) -> Base:
    module = torch.nn.Linear(2, 3).to(dtype)
    torch.nn.init.ones_(module.weight)
    torch.nn.init.zeros_(module.bias)
    return Base(module, "image", ("bias",), lambda table: Images(table.inputs * spread, table.labels), "nowhere")


def text_base(*, vocabulary: str = "", longest: int = 64) -> Base:
    def encode(table: Table):
        texts = ["".join(text) for text in table.inputs]
        return tokens([list(text.encode())[:longest] for text in texts], table.labels, 0)

    return replace(image_base(), task="text", encode=encode, vocabulary=vocabulary)


@pytest.fixture
def own() -> Passport:
    return passport(image_base(), {"main": START}, PIXELS)


def test_equal_processes_have_equal_passports(own: Passport) -> None:
    again = passport(image_base(), {"main": dict(reversed(START.items()))}, torch.rand(4, 1, 8, 8))
    assert own == again
    assert own.differences(again) == []


def test_other_classes_or_another_order_are_told_apart() -> None:
    one = passport(image_base(), {"main": START}, PIXELS, ("ham", "spam"))
    assert one == passport(image_base(), {"main": START}, PIXELS, ("ham", "spam"))
    for classes in (("spam", "ham"), ("ham", "spam", "eggs"), ("ham, spam", "")):
        (said,) = one.differences(passport(image_base(), {"main": START}, PIXELS, classes))
        assert re.search(r"classes: the server has 2 named \w{12}, it has \d named \w{12}; give both the same data.class_names", said)


def test_what_the_same_words_come_to_with_other_presets_is_told_apart() -> None:
    words = ["clients=4", "cohort=2", "model.epochs=1"]
    server = open_setting(load([*words, "codec=ternary"]))
    for more in (["codec=ternary"], ["codec=ternary", "engine.lanes=1", "run.keep=3"]):  # a host's own
        assert server.passport(0).differences(open_setting(load([*words, *more])).passport(0)) == []
    for more, shown in ((["codec=raw"], "codec=raw"), (["codec=ternary", "codec.density=0.1"], "codec=ternary")):
        (said,) = server.passport(0).differences(open_setting(load([*words, *more])).passport(0))
        assert said.startswith("asks: the server has adapter=lora codec=ternary ")
        assert f"it has adapter=lora {shown}" in said
        assert "install the same fedpeft at both" in said


def test_a_passport_crosses_a_message_as_it_is(own: Passport) -> None:
    assert read_passport({"client": 3, "header": "[]", **own.facts()}) == own


def test_layers_of_one_kind_are_named_once(own: Passport) -> None:
    assert own.modules == "main: layer.*.query.A float32 2x5 (3); main: layer.*.query.B float32 4x2 (3)"
    assert own.rank == 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"fedpeft": "0.9"}, "the server has .*, client 3 has 0.9; install the same fedpeft"),
        ({"wire": 7}, "wire: the server has 1, client 3 has 7; install the same fedpeft"),
        ({"base": "abc"}, "base: the server has [0-9a-f]{32}, client 3 has abc; give both the same model.id and model.revision"),
        ({"dtype": "bfloat16"}, "dtype: the server has float32, client 3 has bfloat16; set the same model.dtype"),
        ({"reads": "abc"}, "reads: .*model.max_length"),
        ({"layout": "abc"}, "layout: the server has [0-9a-f]{24}, client 3 has abc; set the same strategy=, adapter= and adapter.rank"),
        ({"rank": 1}, "rank: the server sends rank 2, client 3 takes at most 1; give it that rank in devices="),
    ],
)
def test_each_difference_is_one_sentence_that_says_what_to_do(own: Passport, change: dict[str, object], words: str) -> None:
    (said,) = own.differences(replace(own, **change), whose="client 3")
    assert re.search(words, said), said


def test_all_differences_are_said_at_once(own: Passport) -> None:
    other = replace(own, base="abc", dtype="float16", wire=2)
    assert [said.partition(":")[0] for said in own.differences(other)] == ["wire", "base", "dtype"]


def test_another_layout_is_said_by_what_only_one_of_them_has(own: Passport) -> None:
    other = passport(image_base(), {"main": START | {f"layer.{k}.query.A": torch.zeros(1, 5) for k in range(3)}}, PIXELS)
    (said,) = own.differences(other)
    assert "only the server has main: layer.*.query.A float32 2x5 (3) and only it has main: layer.*.query.A float32 1x5 (3)" in said
    fewer = passport(image_base(), {"main": {n: t for n, t in START.items() if ".B" not in n}}, PIXELS)
    assert "only the server has main: layer.*.query.B float32 4x2 (3); set" in own.differences(fewer)[0]


def test_layouts_of_the_same_words_are_told_apart_by_their_digests(own: Passport) -> None:
    moved = {name.replace("layer.2", "layer.7"): tensor for name, tensor in START.items()}
    (said,) = own.differences(passport(image_base(), {"main": moved}, PIXELS))
    assert said.startswith(f"layout: the server has {own.layout}, it has ")


def test_rank_and_size_may_differ_as_long_as_the_rank_is_taken(own: Passport) -> None:
    assert own.differences(replace(own, rank=8, examples=100)) == []
    assert own.differences(replace(own, rank=0)) == []


def test_another_dtype_of_the_base_is_another_base_too(own: Passport) -> None:
    other = passport(image_base(dtype=torch.bfloat16), {"main": START}, PIXELS)
    assert [said.partition(":")[0] for said in own.differences(other)] == ["base", "dtype"]


def test_another_head_is_not_another_base(own: Passport) -> None:
    base = image_base()
    torch.nn.init.ones_(base.module.bias)
    assert own.differences(passport(base, {"main": START}, PIXELS)) == []


def test_who_reads_images_in_another_way_is_told_apart_but_not_by_a_last_bit(own: Passport) -> None:
    for spread, alike in ((1.0 + 1e-6, True), (0.5, False)):
        other = passport(image_base(spread=spread), {"main": START}, PIXELS)
        assert (own.reads == other.reads) is alike


def test_who_reads_texts_in_another_way_is_told_apart() -> None:
    one = passport(text_base(), {}, ("a text",))
    assert one == passport(text_base(), {}, ("another",))
    for base in (text_base(vocabulary="of others"), text_base(longest=63)):
        assert one.reads != passport(base, {}, ("a text",)).reads


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"base": 3}, "its base is 3, needed is text"),
        ({"wire": "1"}, "its wire is 1, needed is a whole number"),
        ({"wire": True}, "its wire is True, needed is a whole number"),
        ({"rank": -1}, "its rank is -1, needed is a whole number of at least 0"),
        ({"examples": 1.5}, "its examples is 1.5, needed is a whole number"),
    ],
)
def test_a_fact_of_another_type_is_refused(own: Passport, change: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read_passport(own.facts() | change)


def test_what_an_older_client_does_not_say_is_named(own: Passport) -> None:
    facts = own.facts()
    del facts["base"], facts["rank"]
    with pytest.raises(ValueError, match=r"does not say its base, rank: an older fedpeft"):
        read_passport(facts)


def test_what_a_client_says_moves_no_cursor_and_fills_no_screen(own: Passport) -> None:
    (said,) = own.differences(replace(own, base="\x1b[2J" + "x" * 10_000))
    assert said.isprintable()
    assert len(said) < 600


@pytest.mark.parametrize(("examples", "power"), [(0, 0), (1, 1), (9, 1), (10, 10), (742, 100), (1000, 1000)])
def test_a_size_class_is_a_power_of_ten(examples: int, power: int) -> None:
    assert size_class(examples) == power


def test_a_device_states_its_own_rank() -> None:
    setting = open_setting(load(["clients=4", "cohort=2", "model.epochs=1", "strategy=hetlora", "devices=[2,4]"]))
    assert [setting.passport(client).rank for client in range(4)] == [2, 4, 2, 4]
    assert replace(setting.passport(0), rank=4) == setting.passport(1)
