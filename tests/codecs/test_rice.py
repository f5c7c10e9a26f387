import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.codecs.base import CodecError
from fedpeft.codecs.rice import decode, encode

pytestmark = pytest.mark.fast


def entropy(density: float) -> float:
    """Bits an entry of an even support without signs."""
    return -density * math.log2(density) - (1 - density) * math.log2(1 - density)


def slow(positions: list[list[int]], sizes: list[int]) -> bytes:
    """The wire format written down bit by bit, from its description."""
    blocks: dict[int, list[int]] = {}  # m -> gaps
    head = b""
    for group, size in zip(positions, sizes, strict=True):
        count = len(group)
        while True:
            head += bytes([count % 128 + 128 * (count > 127)])
            count >>= 7
            if not count:
                break
        coded = [at for at in range(size) if at not in set(group)] if 2 * len(group) > size else group
        if coded:
            x, m = (2 * size - len(coded)) / (2 * len(coded)), 1
            while x > m * (2.118 if m == 1 else 1.6712 if m % 3 == 0 else 1.7781):
                m = 2 if m == 1 else m * 4 // 3 if m % 3 == 0 else m * 3 // 2
            blocks.setdefault(m, []).extend(at - before - 1 for before, at in zip([-1, *coded], coded, strict=False))
    planes, quotients = "", ""
    for m, gaps in sorted(blocks.items()):
        low = (m & -m).bit_length() - 1
        for bit in range(low):
            planes += "".join(str(gap >> bit & 1) for gap in gaps)
        if m % 3 == 0:
            high = [(gap >> low) % 3 for gap in gaps]
            planes += "".join(str(int(each > 0)) for each in high) + "".join(str(int(each > 1)) for each in high if each)
        quotients += "".join("0" * (gap // m) + "1" for gap in gaps)
    bits = planes + quotients
    bits += "0" * (-len(bits) % 8)
    return head + bytes(int(bits[at : at + 8], 2) for at in range(0, len(bits), 8))


def flat(groups: list[list[int]], sizes: list[int]) -> np.ndarray:
    starts = np.cumsum([0, *sizes])
    return np.array([at + start for group, start in zip(groups, starts, strict=False) for at in group], np.int64)


@st.composite
def supports(draw) -> tuple[list[list[int]], list[int]]:
    """Groups from empty to full, of up to 400 entries."""
    groups, sizes = [], draw(st.lists(st.sampled_from([0, 1, 2, 7, 64, 400]), max_size=5))
    for size in sizes:
        rng = np.random.default_rng(draw(st.integers(0, 10**6)))
        groups.append(np.flatnonzero(rng.random(size) < draw(st.sampled_from([0, 0.01, 0.1, 0.3, 0.5, 0.9, 1]))).tolist())
    return groups, sizes


@settings(deadline=None, max_examples=200)
@given(support=supports())
def test_a_support_comes_back_and_its_bytes_are_those_of_the_description(support):
    groups, sizes = support
    data = encode(flat(groups, sizes), sizes)
    assert data == slow(groups, sizes)
    assert [part.tolist() for part in decode(memoryview(data), sizes, sum(sizes))] == groups


@settings(deadline=None, max_examples=200)
@given(support=supports(), data=st.data())
def test_what_is_decoded_is_what_would_be_encoded_or_an_error(support, data):
    """So no two payloads are one support, and no position lies outside."""
    groups, sizes = support
    raw = bytearray(encode(flat(groups, sizes), sizes))
    for _ in range(data.draw(st.integers(0, 3))):
        if raw:
            raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        found = [part.tolist() for part in decode(memoryview(bytes(raw)), sizes, sum(sizes))]
    except CodecError:
        return
    assert encode(flat(found, sizes), sizes) == raw


@settings(deadline=None, max_examples=200)
@given(data=st.binary(max_size=40), sizes=st.lists(st.sampled_from([0, 1, 5, 100, 1 << 40]), max_size=4))
def test_random_bytes_are_rising_positions_inside_or_an_error(data, sizes):
    try:
        found = decode(memoryview(data), sizes, 1000)
    except CodecError:
        return
    for part, size in zip(found, sizes, strict=True):
        assert (np.diff(part, prepend=-1) > 0).all()
        assert not len(part) or part[-1] < size


@pytest.mark.parametrize("density", [0.001, 0.01, 0.03, 0.05, 0.1, 0.15, 0.2])
def test_the_size_is_within_a_hundredth_of_the_entropy_of_an_even_support(density):
    entries = 400_000
    support = np.flatnonzero(np.random.default_rng(0).random(entries) < density)
    bound = (entropy(len(support) / entries) * entries + len(support)) / 8  # with signs, which cost a bit each
    assert bound < len(encode(support, [entries])) + len(support) / 8 < 1.01 * bound + 4


@pytest.mark.parametrize("density", [0.67, 0.9, 0.99])
def test_a_full_group_costs_what_an_empty_one_costs(density):
    rng = np.random.default_rng(0)
    inside = rng.random(100_000) < density
    a, b = (len(encode(np.flatnonzero(mask), [100_000])) for mask in (inside, ~inside))
    assert abs(a - b) <= 2


def test_groups_of_unlike_density_cost_less_than_their_sum_would():
    rng = np.random.default_rng(0)
    support = np.flatnonzero(rng.random(200_000) < np.repeat([0.19, 0.01], 100_000))
    assert len(encode(support, [100_000, 100_000])) < 0.85 * len(encode(support, [200_000]))


@pytest.mark.parametrize("at", [0, 1, (1 << 39) + 3, (1 << 40) - 1])
def test_positions_past_32_bits_come_back(at):
    data = encode(np.array([at]), [1 << 40])
    assert decode(memoryview(data), [1 << 40], 1)[0].tolist() == [at]


@pytest.mark.parametrize(
    ("data", "sizes", "most", "fault"),
    [
        (b"", [5], 5, "ends within its counts"),
        (b"\x80\x80\x80", [5], 5, "ends within its counts"),
        (b"\x80" * 12 + b"\x01", [5], 5, "has no end"),
        (b"\x06", [5], 5, "6 positions in a tensor of 5"),
        (b"\x03\x03", [5, 5], 5, "6 positions; the codec keeps at most 5"),
        (b"\x02", [5], 5, "2 positions need"),
        (b"\x02" + b"\xff" * 9, [5], 5, "2 positions need"),
        (b"\x01\x00", [9], 5, "unary part holds 0 gaps"),
        (b"\x01\x03", [9], 5, "unary part holds"),
        (b"\x00\x00", [9], 5, "0 positions need 0 to 0 bits"),
    ],
)
def test_a_payload_that_cannot_be_says_what_is_wrong(data, sizes, most, fault):
    with pytest.raises(CodecError, match=fault):
        decode(memoryview(data), sizes, most)
