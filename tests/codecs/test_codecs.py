"""What every codec must keep. A new preset in `experiments/conf/codec` is picked up; a lossy one must declare its error bound here."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from fedpeft.codecs.base import DTYPES, Codec, Spec, header, layout, parse
from fedpeft.codecs.raw import Half, Raw
from fedpeft.config import build
from fedpeft.tensors import Tensors

pytestmark = pytest.mark.fast
FOLDER = Path(__file__).parents[2] / "experiments" / "conf" / "codec"
VARIANTS = {"half": [{"dtype": "fp16"}]}  # overrides besides a preset's own values
Bound = Callable[[Codec, torch.Tensor], torch.Tensor]  # (codec, values) -> the largest error of each entry


def half_bound(codec: Half, values: torch.Tensor) -> torch.Tensor:
    """Half a unit in the last place (10 or 7 bits after the point, as for normal numbers), or half the smallest number of fp16."""
    bits, tiny = (11, 2.0**-25) if codec.dtype == "fp16" else (8, 2.0**-134)
    return (values.abs() * 2.0**-bits * (1 + 2.0**-10)).clamp(min=tiny)  # the slack: float64 is rounded twice


BOUNDS: dict[str, Bound] = {"half": half_bound}


def codecs() -> list:
    made = []
    for path in sorted(FOLDER.glob("*.yaml")):
        preset = OmegaConf.to_container(OmegaConf.load(path))
        for more in [{}, *VARIANTS.get(path.stem, [])]:
            made.append(pytest.param(path.stem, build(preset | more), id="-".join([path.stem, *map(str, more.values())])))
    return made


every = pytest.mark.parametrize(("name", "codec"), codecs())
kinds = st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.uint8, torch.bool])
shapes = st.lists(st.integers(0, 5), max_size=3)


@st.composite
def some_tensors(draw) -> Tensors:
    rng = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    scale = draw(st.sampled_from([1e-6, 1.0, 1e3]))
    return {
        f"layer.{index}.{part}": (torch.randn(draw(shapes), generator=rng) * scale).to(draw(kinds))
        for index, part in enumerate(draw(st.lists(st.sampled_from(["A", "B", "weight"]), max_size=4)))
    }


@every
@settings(deadline=None, max_examples=60)
@given(tensors=some_tensors())
def test_a_round_trip_keeps_every_bit_or_the_declared_bound(name, codec, tensors):
    back = codec.decode(codec.encode(tensors), layout(tensors))
    assert set(back) == set(tensors)
    for key, tensor in tensors.items():
        got = back[key]
        assert (got.dtype, got.shape) == (tensor.dtype, tensor.shape)
        if codec.lossless or not tensor.is_floating_point():
            assert torch.equal(got, tensor)
        else:
            error = (got.double() - tensor.double()).abs()
            own = tensor.double().abs() * torch.finfo(tensor.dtype).eps  # of the cast back to a coarser dtype
            assert (error <= BOUNDS[name](codec, tensor.double()) + own).all(), error.max()


@every
def test_a_codec_says_whether_it_loses_bits_and_no_preset_can_switch_it(name, codec):
    assert isinstance(codec.lossless, bool)
    assert codec.lossless or name in BOUNDS, f"declare the error bound of {name} in BOUNDS"
    with pytest.raises(TypeError):
        type(codec)(lossless=not codec.lossless)


@every
@settings(deadline=None, max_examples=30)
@given(tensors=some_tensors())
def test_equal_tensors_give_equal_bytes_in_any_order_and_memory_layout(name, codec, tensors):
    shuffled = dict(reversed(tensors.items()))
    strided = {key: torch.stack([tensor, tensor], -1)[..., 0] for key, tensor in tensors.items()}
    assert codec.encode(tensors) == codec.encode(shuffled) == codec.encode(strided)


@every
@settings(deadline=None, max_examples=30)
@given(tensors=some_tensors())
def test_encoding_leaves_the_tensors_alone(name, codec, tensors):
    before = {key: tensor.clone() for key, tensor in tensors.items()}
    codec.encode(tensors)
    assert all(torch.equal(tensors[key], tensor) for key, tensor in before.items())


@every
def test_no_tensors_are_no_bytes_and_come_back(name, codec):
    assert codec.decode(codec.encode({}), ()) == {}


@every
@settings(deadline=None, max_examples=60)
@given(tensors=some_tensors(), data=st.data())
def test_truncated_bytes_are_a_value_error(name, codec, tensors, data):
    whole = codec.encode(tensors)
    if whole:
        at = data.draw(st.integers(0, len(whole) - 1))
        with pytest.raises(ValueError):  # noqa: PT011  each codec says it in its own words
            codec.decode(whole[:at], layout(tensors))


@every
@settings(deadline=None, max_examples=40)
@given(tensors=some_tensors(), more=st.binary(min_size=1, max_size=9))
def test_trailing_bytes_are_a_value_error(name, codec, tensors, more):
    with pytest.raises(ValueError):  # noqa: PT011  each codec says it in its own words
        codec.decode(codec.encode(tensors) + more, layout(tensors))


@every
@settings(deadline=None, max_examples=100)
@given(tensors=some_tensors(), data=st.binary(max_size=300), fits=st.booleans())
def test_random_bytes_are_tensors_of_the_layout_or_a_value_error(name, codec, tensors, data, fits):
    if fits:  # as many bytes as there should be
        size = len(codec.encode(tensors))
        data = (data * (size // max(len(data), 1) + 1))[:size].ljust(size, b"\7")
    specs = layout(tensors)
    try:
        back = codec.decode(data, specs)
    except ValueError:
        return
    assert layout(back) == specs


@every
@pytest.mark.parametrize("shape", [(1 << 40,), (1 << 20, 1 << 20), (3, 1 << 38)])
def test_a_layout_of_terabytes_is_a_value_error_before_anything_is_allocated(name, codec, shape):
    with pytest.raises(ValueError):  # noqa: PT011  each codec says it in its own words
        codec.decode(b"\0" * 100, (Spec("q.A", torch.float32, shape),))


@every
def test_what_was_decoded_owns_its_memory(name, codec):
    tensors = {"q.A": torch.ones(2, 2), "q.B": torch.ones(2)}
    data = bytearray(codec.encode(tensors))
    back = codec.decode(bytes(data), layout(tensors))
    back["q.A"].zero_()
    assert back["q.B"].tolist() == [1, 1]
    assert bytes(data) == codec.encode(tensors)


# Raw and half


def test_raw_bytes_are_the_little_endian_values_in_the_order_of_names():
    tensors = {"b": torch.tensor([1, 256], dtype=torch.int16), "a": torch.tensor([1.0])}
    assert Raw().encode(tensors) == b"\x00\x00\x80\x3f" + b"\x01\x00\x00\x01"


def test_half_halves_floats_and_leaves_integers():
    assert len(Half().encode({"a": torch.zeros(10), "b": torch.zeros(3, dtype=torch.int32)})) == 20 + 12


@pytest.mark.parametrize(("kind", "most"), [("fp16", 65504.0), ("bf16", 3.3895313892515355e38)])
def test_an_entry_too_large_for_half_becomes_the_largest_and_stays_finite(kind, most):
    tensors = {"a": torch.tensor([1e300, -1e300, 1.0], dtype=torch.float64)}
    assert Half(kind).decode(Half(kind).encode(tensors), layout(tensors))["a"].tolist() == [most, -most, 1.0]


@pytest.mark.parametrize("kind", ["fp16", "bf16"])
def test_what_is_not_finite_is_not_made_finite_unseen(kind):
    """`checked` refuses NaN at the server; an infinity has become the largest value, which its norm then shows."""
    tensors = {"a": torch.tensor([float("nan")])}
    assert torch.isnan(Half(kind).decode(Half(kind).encode(tensors), layout(tensors))["a"]).all()


def test_a_kind_of_half_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match=r"codec\.dtype=fp8"):
        Half("fp8")


# The layout


@settings(deadline=None, max_examples=60)
@given(tensors=some_tensors())
def test_a_layout_goes_through_its_header(tensors):
    assert parse(json.loads(header(layout(tensors)))) == layout(tensors)


def test_a_layout_is_sorted_and_knows_its_sizes():
    specs = layout({"b": torch.zeros(2, 3), "a": torch.tensor(1.0, dtype=torch.float64), "c": torch.zeros(0, 7, dtype=torch.int8)})
    assert [(spec.name, spec.entries, spec.nbytes) for spec in specs] == [("a", 1, 8), ("b", 6, 24), ("c", 0, 0)]
    assert replace(specs[0], name="z").name == "z"


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_has_a_name_on_the_wire(dtype):
    assert parse([["a", dtype, [2]]])[0].dtype is DTYPES[dtype]
