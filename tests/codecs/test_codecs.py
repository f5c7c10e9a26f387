"""What every codec must keep. A new preset in `experiments/conf/codec` is picked up; a lossy one must declare its error bound here."""

import hashlib
import json
import tracemalloc
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from fedpeft.codecs.base import DTYPES, Codec, CodecError, Layout, Spec, header, layout, parse
from fedpeft.config import build
from fedpeft.tensors import Tensors

pytestmark = pytest.mark.fast
FOLDER = Path(__file__).parents[2] / "experiments" / "conf" / "codec"
SEED = 2**62 + 1
# Overrides besides a preset's own values.
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "half": [{"dtype": "fp16"}],
    "ternary": [{"scale": "std", "alpha": 2.0}, {"scope": "tensor", "scales": "tensor", "density": 0.5}, {"density": 1.0}],
    "int8": [{"scales": "fp32", "block": 1}],
    "int4": [{"rounding": "nearest", "block": 3}],
    "topk": [{"values": "bf16", "scope": "tensor"}, {"density": 1}],
    "mask": [{"unbiased": True, "values": "bf16"}, {"density": 1}],
}
UNSEALED = {"raw", "half"}  # no checksum: bits that flip are seen by the transport or not at all
Bound = Callable[[Any, Tensors], dict[str, torch.Tensor]]  # (codec, float64 values) -> the largest error of each entry


def half_bound(codec: Any, tensors: Tensors) -> dict[str, torch.Tensor]:
    """Half a unit in the last place (10 or 7 bits after the point, as for normal numbers), or half the smallest number of fp16."""
    bits, tiny = (11, 2.0**-25) if codec.dtype == "fp16" else (8, 2.0**-134)
    # The slack: float64 is rounded twice.
    return {name: (values.abs() * 2.0**-bits * (1 + 2.0**-10)).clamp(min=tiny) for name, values in tensors.items()}


def largest_of(tensors: Tensors) -> float:
    return max((float(values.abs().max()) for values in tensors.values() if values.numel()), default=0.0)


def ternary_bound(codec: Any, tensors: Tensors) -> dict[str, torch.Tensor]:
    """What is dropped loses itself; what is kept moves to the scale: the mean of the kept, or the deviation of all."""
    scale = largest_of(tensors) * codec.alpha * (2 if codec.scale == "std" else 1)
    return {name: values.abs().clamp(min=scale) for name, values in tensors.items()}


def sign_bound(codec: Any, tensors: Tensors) -> dict[str, torch.Tensor]:
    """Between nothing and twice itself, or the mean: a zero becomes that."""
    return {name: values.abs().clamp(min=float(values.abs().mean()) if values.numel() else 0.0) for name, values in tensors.items()}


def dropped_bound(codec: Any, tensors: Tensors) -> dict[str, torch.Tensor]:
    """What is not sent is lost; what is sent is rounded, and scaled by the length of its run where that is asked for."""
    times = 2 / codec.density if getattr(codec, "unbiased", False) else 1
    return {name: values.abs() * (times + 1e-2) for name, values in tensors.items()}


def quantize_bound(codec: Any, tensors: Tensors) -> dict[str, torch.Tensor]:
    """One level of its block, which is at most the tensor's; half of that to the nearest."""
    level = (1 + 2.0**-7) / (127 if codec.bits == 8 else 7) * (0.501 if codec.rounding == "nearest" else 1.001)
    return {name: torch.full_like(values, largest_of({name: values}) * level + 2.0**-100) for name, values in tensors.items()}


BOUNDS: dict[str, Bound] = {
    "half": half_bound,
    "ternary": ternary_bound,
    "sign": sign_bound,
    "topk": dropped_bound,
    "mask": dropped_bound,
    "int8": quantize_bound,
    "int4": quantize_bound,
}


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
@settings(deadline=None, max_examples=40)
@given(tensors=some_tensors())
def test_a_round_trip_keeps_every_bit_or_the_declared_bound(name, codec, tensors):
    back = codec.decode(codec.encode(tensors, seed=SEED), layout(tensors), seed=SEED)
    assert set(back) == set(tensors)
    bounds = {} if codec.lossless else BOUNDS[name](codec, {k: t.double() for k, t in tensors.items() if t.is_floating_point()})
    for key, tensor in tensors.items():
        got = back[key]
        assert (got.dtype, got.shape) == (tensor.dtype, tensor.shape)
        if codec.lossless or not tensor.is_floating_point():
            assert torch.equal(got, tensor)
        else:
            error = (got.double() - tensor.double()).abs()
            own = tensor.double().abs() * torch.finfo(tensor.dtype).eps  # of the cast back to a coarser dtype
            assert (error <= bounds[key] + own).all(), error.max()


@every
def test_a_codec_says_whether_it_loses_bits_and_no_preset_can_switch_it(name, codec):
    assert isinstance(codec.lossless, bool)
    assert codec.lossless or name in BOUNDS, f"declare the error bound of {name} in BOUNDS"
    with pytest.raises(TypeError):
        type(codec)(lossless=not codec.lossless)


@every
@settings(deadline=None, max_examples=15)
@given(tensors=some_tensors())
def test_equal_tensors_give_equal_bytes_in_any_order_and_memory_layout(name, codec, tensors):
    shuffled = dict(reversed(tensors.items()))
    strided = {key: torch.stack([tensor, tensor], -1)[..., 0] for key, tensor in tensors.items()}
    assert codec.encode(tensors, seed=SEED) == codec.encode(shuffled, seed=SEED) == codec.encode(strided, seed=SEED)


@every
@settings(deadline=None, max_examples=15)
@given(tensors=some_tensors())
def test_encoding_leaves_the_tensors_alone(name, codec, tensors):
    before = {key: tensor.clone() for key, tensor in tensors.items()}
    codec.encode(tensors)
    assert all(torch.equal(tensors[key], tensor) for key, tensor in before.items())


@every
def test_no_tensors_come_back(name, codec):
    assert codec.decode(codec.encode({}), ()) == {}


@every
def test_what_was_decoded_owns_its_memory(name, codec):
    tensors = {"q.A": torch.ones(2, 2), "q.B": torch.ones(2)}
    data = bytearray(codec.encode(tensors))
    back = codec.decode(bytes(data), layout(tensors))
    kept = {key: tensor.clone() for key, tensor in back.items()}
    back["q.A"].fill_(7)
    assert torch.equal(back["q.B"], kept["q.B"])
    assert bytes(data) == codec.encode(tensors)
    assert tensors["q.A"].tolist() == [[1, 1], [1, 1]]


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_the_extremes_of_a_dtype_stay_finite(name, codec, dtype):
    info = torch.finfo(dtype)
    tensors = {"w": torch.tensor([info.max, info.min, info.tiny, -info.smallest_normal, 0.0, -0.0, 1.0], dtype=dtype)}
    back = codec.decode(codec.encode(tensors, seed=SEED), layout(tensors), seed=SEED)["w"]
    assert torch.isfinite(back).all()
    assert back.dtype is dtype


@every
@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1), (9,)])
def test_nothing_but_zeros_stays_nothing_but_zeros(name, codec, shape):
    tensors = {"w": torch.zeros(shape), "count": torch.zeros(shape, dtype=torch.int16), "v": torch.zeros(0, 3)}
    back = codec.decode(codec.encode(tensors, seed=SEED), layout(tensors), seed=SEED)
    assert all(torch.equal(back[key], tensor) for key, tensor in tensors.items())


@every
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_what_is_not_finite_is_named_by_its_sender_or_seen_by_its_receiver(name, codec, bad, dtype):
    tensors = {"v": torch.ones(3), "w": torch.tensor([1.0, bad], dtype=dtype)}
    if name in UNSEALED:
        assert codec.lossless or bad == bad or torch.isnan(codec.decode(codec.encode(tensors), layout(tensors))["w"][1])
    else:
        with pytest.raises(CodecError, match=r"w holds an entry that is not finite"):
            codec.encode(tensors)


# Hostile bytes. Whatever arrives: finite tensors of the layout, or a `CodecError`, in little memory.


@every
@settings(deadline=None, max_examples=30)
@given(tensors=some_tensors(), data=st.data())
def test_truncated_bytes_are_a_codec_error(name, codec, tensors, data):
    whole = codec.encode(tensors)
    if whole:
        at = data.draw(st.integers(0, len(whole) - 1))
        with pytest.raises(CodecError):
            codec.decode(whole[:at], layout(tensors))


@every
@settings(deadline=None, max_examples=15)
@given(tensors=some_tensors(), more=st.binary(min_size=1, max_size=9))
def test_trailing_bytes_are_a_codec_error(name, codec, tensors, more):
    with pytest.raises(CodecError):
        codec.decode(codec.encode(tensors) + more, layout(tensors))


@every
@settings(deadline=None, max_examples=50)
@given(tensors=some_tensors(), data=st.binary(max_size=300), fits=st.booleans())
def test_random_bytes_are_tensors_of_the_layout_or_a_codec_error(name, codec, tensors, data, fits):
    if fits:  # as many bytes as there should be
        size = len(codec.encode(tensors))
        data = (data * (size // max(len(data), 1) + 1))[:size].ljust(size, b"\7")
    specs = layout(tensors)
    try:
        back = codec.decode(data, specs)
    except CodecError:
        return
    assert layout(back) == specs


@every
@settings(deadline=None, max_examples=40)
@given(tensors=some_tensors(), data=st.data())
def test_a_flipped_bit_is_a_codec_error(name, codec, tensors, data):
    whole = bytearray(codec.encode(tensors))
    if name in UNSEALED or not whole:
        return
    bit = data.draw(st.integers(0, 8 * len(whole) - 1))
    whole[bit // 8] ^= 1 << bit % 8
    with pytest.raises(CodecError):
        codec.decode(bytes(whole), layout(tensors))


def forged(codec: Codec, data: bytes, specs: Layout, seed: int) -> bytes:
    """The payload as who knows the format seals it: for any layout, with the checksum of whatever the body is."""
    agreed = f"{codec} with seed {seed}" if type(codec).__name__ == "Mask" else repr(codec)
    rest = hashlib.blake2b(f"{agreed} {header(specs)}".encode(), digest_size=8).digest() + data[15:]
    return data[:3] + zlib.crc32(rest).to_bytes(4, "little") + rest


@every
@settings(deadline=None, max_examples=80)
@given(tensors=some_tensors(), data=st.data())
def test_a_forged_payload_is_finite_tensors_of_the_layout_or_a_codec_error(name, codec, tensors, data):
    if name in UNSEALED:
        return
    whole = bytearray(codec.encode(tensors, seed=SEED))
    for _ in range(data.draw(st.integers(1, 4))):
        match data.draw(st.sampled_from(["set", "cut", "add"])):
            case "set" if len(whole) > 15:
                whole[data.draw(st.integers(15, len(whole) - 1))] = data.draw(st.sampled_from([0, 1, 127, 128, 255]))
            case "cut":
                whole = whole[: data.draw(st.integers(15, max(15, len(whole))))]
            case "add":
                whole += data.draw(st.binary(max_size=9))
    specs = layout(tensors)
    try:
        back = codec.decode(forged(codec, bytes(whole), specs, SEED), specs, seed=SEED)
    except CodecError:
        return
    assert layout(back) == specs
    assert all(torch.isfinite(tensor).all() for tensor in back.values() if tensor.is_floating_point())


@every
@pytest.mark.parametrize("shape", [(1 << 40,), (1 << 20, 1 << 20), (3, 1 << 38)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int8], ids=str)
def test_a_layout_of_terabytes_is_a_codec_error_before_anything_is_allocated(name, codec, shape, dtype):
    specs = (Spec("q.A", dtype, shape),)
    data = b"\0" * 100 if name in UNSEALED else forged(codec, codec.encode({"q.A": torch.ones(100)}), specs, 0)
    tracemalloc.start()
    try:
        with pytest.raises(CodecError):
            codec.decode(data, specs)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


@every
@pytest.mark.parametrize("change", ["whole", "cut", "ones", "zeros"])
def test_decoding_takes_memory_in_proportion_to_the_payload_and_the_layout(name, codec, change):
    tensors = {"w": torch.randn(300, 1000, generator=torch.Generator().manual_seed(0)), "v": torch.ones(20_000)}
    data, specs = codec.encode(tensors), layout(tensors)
    changed = {
        "whole": data,
        "cut": data[: len(data) // 2],
        "ones": data[:40] + b"\xff" * (len(data) - 40),
        "zeros": data[:40].ljust(len(data), b"\0"),
    }
    hostile = changed[change] if name in UNSEALED else forged(codec, changed[change], specs, 0)
    tracemalloc.start()
    try:
        try:
            codec.decode(hostile, specs)
        except CodecError:
            assert change != "whole"
        assert tracemalloc.get_traced_memory()[1] < 10 * len(data) + 24 * sum(spec.entries for spec in specs)
    finally:
        tracemalloc.stop()


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
