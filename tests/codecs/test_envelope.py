import numpy as np
import pytest
import torch

from fedpeft.codecs.base import CodecError, layout
from fedpeft.codecs.envelope import HEADER, entropy, finite, opened, packed, sealed, unpacked

pytestmark = pytest.mark.fast
TENSORS = {"b": torch.tensor([1.0, 2.0]), "a": torch.tensor([[3.0]]), "n": torch.tensor([7, 8], dtype=torch.int16)}


def plain(vector: np.ndarray, sizes: list[int]) -> bytes:
    assert (vector.tolist(), sizes) == ([3, 1, 2], [1, 2])
    return vector.tobytes()


def parted(data: memoryview, sizes: list[int]) -> list[np.ndarray]:
    return [part.copy() for part in np.split(np.frombuffer(data, np.float32), np.cumsum(sizes)[:-1])]


def test_floats_go_as_one_vector_by_name_and_integers_as_they_are():
    data = sealed("c", TENSORS, plain)
    assert data[:3] == b"fC\x01"
    assert data[HEADER:] == b"\7\0\10\0" + np.array([3, 1, 2], np.float32).tobytes()
    back = opened("c", data, layout(TENSORS), parted)
    assert all(torch.equal(back[name], tensor) for name, tensor in TENSORS.items())


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda data: data[:10], "does not begin like one of c"),
        (lambda data: b"PK" + data[2:], "does not begin like one of c"),
        (lambda data: data[:2] + b"\x02" + data[3:], "version 2, this side reads 1"),
        (lambda data: data[:-1], "checksum"),
        (lambda data: data + b"\0", "checksum"),
        (lambda data: data[:20] + b"\x55" + data[21:], "checksum"),
    ],
)
def test_what_is_wrong_is_said(change, fault):
    with pytest.raises(CodecError, match=fault):
        opened("c", change(sealed("c", TENSORS, plain)), layout(TENSORS), parted)


def test_another_codec_or_layout_is_said():
    data = sealed("c", TENSORS, plain)
    with pytest.raises(CodecError, match="another codec than d"):
        opened("d", data, layout(TENSORS), parted)
    with pytest.raises(CodecError, match="another layout"):
        opened("c", data, layout(TENSORS | {"a": torch.zeros(1)}), parted)


@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_found_by_its_bits(bad):
    assert not finite(np.array([1, bad], np.float32))
    with pytest.raises(CodecError, match="not finite"):
        unpacked(memoryview(np.array([bad], np.float32).tobytes()), "fp32")


def test_what_is_finite_is():
    most = np.finfo(np.float32).max
    assert finite(np.array([most, -most, 0.0, -0.0, 1e-45], np.float32))
    assert finite(np.zeros(0, np.float32))


@pytest.mark.parametrize(("kind", "want"), [("fp32", [1e30, -0.1]), ("fp16", [65504.0, -0.0999755859375]), ("bf16", [1e30, -0.1])])
def test_values_are_packed_in_their_kind(kind, want):
    data = packed(np.array([1e30, -0.1], np.float32), kind)
    assert len(data) == (8 if kind == "fp32" else 4)
    assert unpacked(memoryview(data), kind).tolist() == pytest.approx(want, rel=2**-8)


def test_entropy_is_that_of_each_tensors_support():
    """2 of 8: 2 log2(8/2) + 6 log2(8/6) = 6.49 bits; all of 3, none of 5, nothing of nothing: no bits; 3 bytes of integers: 24."""
    tensors = {"some": torch.zeros(2, 4), "all": -torch.ones(3), "none": torch.zeros(5), "empty": torch.zeros(0), "n": torch.ones(3).byte()}
    tensors["some"][0, 1], tensors["some"][1, 3] = 1e-30, -2.0
    assert entropy({"some": tensors["some"]}, 0) == pytest.approx(6.490225)
    assert entropy(tensors, 0) == pytest.approx(6.490225 + 24)
    assert entropy(tensors, 1) == pytest.approx(6.490225 + 24 + 5)


def test_entropy_of_one_density_in_all_tensors_is_that_of_the_whole():
    whole = torch.zeros(1000).index_fill(0, torch.arange(0, 1000, 10), 1.0)
    assert entropy({"w": whole}, 1) == pytest.approx(entropy({"a": whole[:400], "b": whole[400:]}, 1)) == pytest.approx(568.996, abs=1e-3)
