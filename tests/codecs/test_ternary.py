import math
import zlib

import numpy as np
import pytest
import torch

from fedpeft.codecs.base import CodecError, layout
from fedpeft.codecs.ternary import Ternary
from fedpeft.tensors import Tensors

pytestmark = pytest.mark.fast
SIZES = {"b.A": (30, 40), "a.B": (50, 8), "head.weight": (300,)}


def some(seed: int = 0) -> Tensors:
    """Tensors of unlike scale, not in the order of their names."""
    rng = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=rng) * 10.0**-power for power, (name, shape) in enumerate(SIZES.items())}


def flat(tensors: Tensors) -> torch.Tensor:
    return torch.cat([tensors[name].reshape(-1) for name in sorted(tensors)])


def back(codec: Ternary, tensors: Tensors) -> Tensors:
    return codec.decode(codec.encode(tensors), layout(tensors))


def official(tensors: Tensors, density: float, alpha: float) -> torch.Tensor:
    """ComPEFT as its repository computes it: the vector sorted by key, its deviation before pruning (unbiased), a threshold by kthvalue."""
    tau = flat(tensors)
    magnitude = tau.abs()
    threshold = magnitude.kthvalue(len(tau) - int(density * len(tau))).values
    return alpha * tau.std() * torch.sign(tau) * (magnitude >= threshold)


@pytest.mark.parametrize("density", [0.05, 0.1, 0.2, 0.5])
@pytest.mark.parametrize("alpha", [1.0, 3.0])
def test_it_is_the_published_method_but_for_the_last_entry(density, alpha):
    tensors = some()
    ours, theirs = flat(back(Ternary(density, "std", alpha), tensors)), official(tensors, density, alpha)
    q = int(density * len(ours))
    assert (int((ours != 0).sum()), int((theirs != 0).sum())) == (q, q + 1)
    last = flat(tensors).abs().where(theirs != 0, torch.inf).argmin()
    theirs[last] = 0
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


@pytest.mark.parametrize("density", [0.05, 0.2])
def test_the_scale_is_exact_and_the_signs_are_those_of_the_input(density):
    tensors = some()
    tau = flat(tensors)
    for scale, want in (("std", tau.double().std()), ("mean", tau.double().abs().topk(int(density * len(tau))).values.mean())):
        got = flat(back(Ternary(density, scale, 2.0), tensors))
        assert got.unique().tolist() == [-(2 * want).float().item(), 0.0, (2 * want).float().item()]
        assert torch.equal(got.sign()[got != 0], tau.sign()[got != 0])


def test_a_second_round_trip_changes_nothing():
    once = back(Ternary(0.1), some())
    assert all(torch.equal(tensor, once[name]) for name, tensor in back(Ternary(0.1), once).items())


def test_the_mean_is_the_best_scale():
    tensors, codec = some(), Ternary(0.1)
    error = float((flat(back(codec, tensors)) - flat(tensors)).norm())
    for alpha in (0.99, 1.01):
        assert error < float((flat(back(Ternary(0.1, alpha=alpha), tensors)) - flat(tensors)).norm())


@pytest.mark.parametrize(
    ("density", "cosine", "best", "over"), [(0.05, 0.523, 2.338, 0.0100), (0.1, 0.652, 2.063, 0.0130), (0.2, 0.785, 1.755, 0.0200)]
)
def test_on_gaussian_input_size_cosine_and_scale_are_those_of_the_closed_form(density, cosine, best, over):
    tensors = {"w": torch.randn(1_000_000, generator=torch.Generator().manual_seed(0))}
    data = Ternary(density).encode(tensors)
    got = Ternary(density).decode(data, layout(tensors))["w"]
    entropy = -(1 - density) * math.log2(1 - density) - density * math.log2(density / 2)
    assert 1 < 8 * len(data) / (entropy * 1_000_000) < 1 + over
    assert int((got != 0).sum()) == round(density * 1_000_000)
    assert float(torch.cosine_similarity(got.double(), tensors["w"].double(), dim=0)) == pytest.approx(cosine, abs=1.5e-3)
    assert float(got.max()) == pytest.approx(best, rel=5e-3)


def test_tensors_may_have_scales_and_shares_of_their_own():
    tensors = some()
    got = back(Ternary(0.1, "mean", scope="tensor", scales="tensor"), tensors)
    for name, tensor in tensors.items():
        q = max(1, tensor.numel() // 10)
        largest = tensor.double().abs().reshape(-1).topk(q).values
        assert int((got[name] != 0).sum()) == q
        assert got[name].max().item() == largest.mean().float().item()


def test_of_equal_magnitudes_the_first_are_kept():
    tensors = {"w": torch.tensor([1.0, -2.0, 2.0, 2.0, -2.0, 1.0])}
    assert back(Ternary(0.5), tensors)["w"].tolist() == [0, -2, 2, 2, 0, 0]


def test_fewer_entries_than_would_be_kept():
    """What is zero stays zero, and the payload is as long as if all were there, so that no short one asks for much memory."""
    tensors = {"w": torch.zeros(800)}
    tensors["w"][7] = -3.0
    assert back(Ternary(0.5), tensors)["w"].nonzero().tolist() == [[7]]
    assert back(Ternary(0.5), tensors)["w"][7] == -3
    assert len(Ternary(0.5).encode({"w": torch.zeros(800)})) >= 800 * 0.5 / 8


@pytest.mark.parametrize("scale", ["std", "mean"])
def test_one_entry_keeps_its_value(scale):
    assert back(Ternary(0.1, scale), {"w": torch.tensor([[-2.5]])})["w"].tolist() == [[-2.5]]


def test_a_deviation_of_nothing_is_zero_as_published():
    assert back(Ternary(0.5, "std"), {"w": torch.ones(4)})["w"].tolist() == [0, 0, 0, 0]


def test_the_deviation_of_many_chunks_is_that_of_the_whole():
    tensors = {"w": torch.randn(200_000, generator=torch.Generator().manual_seed(0)) + 1000}
    assert back(Ternary(0.01, "std"), tensors)["w"].max().item() == pytest.approx(float(tensors["w"].double().std()), rel=1e-6)


def test_a_scale_past_the_range_of_a_tensor_is_its_largest():
    tensors = {"a": torch.tensor([60000.0, 1.0], dtype=torch.float16), "b": torch.tensor([3e38, 1.0])}
    assert back(Ternary(0.5, alpha=10.0), tensors)["a"].dtype is torch.float16
    got = back(Ternary(0.5, alpha=10.0, scope="tensor"), tensors)
    assert (got["a"].tolist(), got["b"].tolist()) == ([65504, 0], [torch.finfo(torch.float32).max, 0])


def forged(data: bytes) -> bytes:
    return data[:3] + zlib.crc32(data[7:]).to_bytes(4, "little") + data[7:]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), -1.0])
def test_a_scale_that_is_no_size_is_an_error(bad):
    data = bytearray(Ternary(0.5).encode({"w": torch.ones(4)}))
    data[15:19] = np.float32(bad).tobytes()
    with pytest.raises(CodecError, match=r"not finite|below zero"):
        Ternary(0.5).decode(forged(bytes(data)), layout({"w": torch.ones(4)}))


def test_other_settings_or_another_layout_are_an_error():
    data = Ternary(0.5).encode({"w": torch.ones(4)})
    for codec, tensors in ((Ternary(0.25), torch.ones(4)), (Ternary(0.5), torch.ones(2, 2)), (Ternary(0.5), torch.ones(4).double())):
        with pytest.raises(CodecError, match="another codec than Ternary"):
            codec.decode(data, layout({"w": tensors}))


def test_signs_of_nothing_are_an_error():
    data = bytearray(Ternary(1.0).encode({"w": torch.tensor([0.0, 1.0])}))
    data[19] = 0b11000000
    with pytest.raises(CodecError, match="more signs than positions"):
        Ternary(1.0).decode(forged(bytes(data)), layout({"w": torch.ones(2)}))


@pytest.mark.parametrize(
    ("field", "value"), [("density", 0.0), ("scale", "max"), ("alpha", 0.0), ("alpha", math.inf), ("scope", "row"), ("scales", "row")]
)
def test_a_setting_that_cannot_be_is_refused_by_its_name(field, value):
    with pytest.raises(ValueError, match=rf"^{field}={value}"):
        Ternary(**{field: value})


@pytest.mark.parametrize("density", [0.05, 0.1, 0.2])
def test_a_payload_is_within_one_percent_of_its_entropy(density):
    tensors = {name: torch.randn(200_000, generator=torch.Generator().manual_seed(k)) * 2**k for k, name in enumerate("abc")}
    codec = Ternary(density)
    data = codec.encode(tensors)
    assert 1 < 8 * len(data) / codec.entropy(codec.decode(data, layout(tensors))) < 1.01
