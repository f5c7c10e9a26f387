import zlib

import pytest
import torch

from fedpeft.codecs.base import CodecError, layout
from fedpeft.codecs.quantize import Quantize

pytestmark = pytest.mark.fast


def back(codec: Quantize, tensor: torch.Tensor, seed: int = 0) -> torch.Tensor:
    return codec.decode(codec.encode({"w": tensor}, seed=seed), layout({"w": tensor}), seed=seed)["w"]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("scales", ["bf16", "fp32"])
def test_stochastic_rounding_keeps_the_mean(bits, scales):
    """Over 1500 seeds every entry's mean lies within 5 deviations; to the nearest, it is off by up to half a level."""
    x = torch.tensor([1.0, 0.5, 0.03, -0.011, -0.3337, 0.0, 1e-3, -0.97] * 2)
    codec = Quantize(bits, block=16, scales=scales)
    seeds = 1500
    got = torch.stack([back(codec, x, seed) for seed in range(seeds)]).double()
    deviation = got.std(0) / seeds**0.5
    assert ((got.mean(0) - x.double()).abs() <= 5 * deviation + 1e-6).all()
    assert (got.std(0)[x == 0] == 0).all()
    nearest = back(Quantize(bits, block=16, scales=scales, rounding="nearest"), x).double()
    assert ((nearest - x).abs() > 5 * deviation + 1e-6).any()


def test_the_same_seed_gives_the_same_bytes_and_another_does_not():
    x, codec = {"w": torch.randn(100, generator=torch.Generator().manual_seed(0))}, Quantize(4)
    assert codec.encode(x, seed=5) == codec.encode(x, seed=5) != codec.encode(x, seed=6)


def test_nearest_is_the_nearest_level_of_the_block():
    x = torch.tensor([7.0, -3.4, 3.6, 0.4, 14.0, 1.1, -0.9])
    got = back(Quantize(4, block=4, rounding="nearest"), x)
    assert got.tolist() == [7, -3, 4, 0, 14, 2, 0]  # levels are whole numbers in the first block, even ones in the second


def test_blocks_end_with_their_tensor():
    tensors = {"a": torch.tensor([100.0]), "b": torch.tensor([0.01, 0.02])}
    codec = Quantize(8, block=64, rounding="nearest")
    got = codec.decode(codec.encode(tensors), layout(tensors))
    assert got["b"].tolist() == pytest.approx([0.01, 0.02], rel=0.01)


@pytest.mark.parametrize(("bits", "entries", "want"), [(8, 130, 130 + 3 * 2), (4, 130, 65 + 3 * 2), (4, 131, 66 + 3 * 2), (4, 0, 0)])
def test_the_size_is_scales_and_codes(bits, entries, want):
    assert len(Quantize(bits).encode({"w": torch.ones(entries)})) == 15 + want


def test_every_level_of_four_bits_comes_back():
    x = torch.arange(-7.0, 8.0)
    assert back(Quantize(4, block=15), x).tolist() == x.tolist()


def test_a_block_next_to_nothing_is_zero():
    assert back(Quantize(8), torch.full((3,), 1e-40)).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("bits", "place", "value", "fault"), [(8, 17, 0x80, "no sender makes"), (4, 17, 0x88, "no sender makes"), (4, 18, 0x10, "half byte")]
)
def test_a_code_that_is_not_used_is_an_error(bits, place, value, fault):
    x = {"w": torch.tensor([1.0, 1.0, 1.0])}
    data = bytearray(Quantize(bits).encode(x))
    data[place] = value
    forged = bytes(data[:3]) + zlib.crc32(data[7:]).to_bytes(4, "little") + bytes(data[7:])
    with pytest.raises(CodecError, match=fault):
        Quantize(bits).decode(forged, layout(x))


@pytest.mark.parametrize(("field", "value"), [("bits", 2), ("block", 0), ("scales", "fp16"), ("rounding", "up")])
def test_a_setting_that_cannot_be_is_refused_by_its_name(field, value):
    with pytest.raises(ValueError, match=rf"^{field}={value}"):
        Quantize(**{field: value})
