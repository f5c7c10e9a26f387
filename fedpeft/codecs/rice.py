"""Golomb coding of a sparse support: which positions of a vector are set, in nearly the bits that its entropy asks for.

The vector comes in groups (tensors). A group's density is known from its count, and from it alone follows the parameter m, so a group costs
one or two bytes more than its positions. Each gap to the next set position is a quotient gap // m, in unary (zeros and a one), and a
remainder. Rice's parameters are m = 2^c; with 3 * 2^c between them the size, with a sign for each position, is at most 1.0 % above the
entropy of an even support of density up to 0.2 (0.7 % at 0.05, 0.1 and 0.2), where powers of two alone reach 2.2 %; past that at most 3 %.
Where more than half of a group is set, what is not set is coded.

Why tensors: of the updates of LoRA on digits and banking77 that keep the largest of all tensors, the densities differ so much that the size
is 17 to 28 % below the entropy of a support without groups. A group for each row, where that is shorter, would gain 0.3 to 2 % more, blocks
of 128 to 2048 entries no more than that; a parameter measured by the sender, and sent, would lose 0.1 to 5 %.

Wire: the groups' counts (LEB128); then bits, padded with zeros: for each m in rising order and all its groups one plane of bits for each of
the c low bits of the remainders, and for 3 * 2^c a plane for `high > 0` and, of those, one for `high > 1`; at the end all quotients.

Golomb, Run-length encodings, IEEE Trans. Inf. Theory 1966; Rice and Plaunt, IEEE Trans. Commun. Technol. 1971.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedpeft.codecs.base import CodecError

Positions = npt.NDArray[np.int64]
Bits = npt.NDArray[np.uint8]  # one bit each
CHUNK = 1 << 15  # gaps handled together
# Where the mean gap, in units of m, makes the next larger m cheaper on geometric gaps. Computed to 4 digits; they are the wire's, so fixed.
NEXT = {1: 21180, 2: 17781, 3: 16712}  # for m = 1, for other powers of two, for 3 * 2^c; times 10^-4


def encode(positions: Positions, sizes: Sequence[int]) -> bytes:
    """The bytes of rising `positions` in a vector of groups of `sizes` entries."""
    ends = np.cumsum([0, *sizes])
    cuts = np.searchsorted(positions, ends)
    counts = np.diff(cuts).tolist()
    planes: list[Bits] = []
    quotients: list[Bits] = []
    for block in _blocks(sizes, counts):
        gaps = [_gaps(positions[cuts[group] : cuts[group + 1]] - ends[group], sizes[group]) for group in block.groups]
        pieces = [_split(piece, block) for piece in _chunks(gaps)]
        planes += [plane for same in zip(*(rest for _, rest in pieces), strict=True) for plane in same]
        quotients += [unary for unary, _ in pieces]
    bits = np.concatenate([np.zeros(0, np.uint8), *planes, *quotients])
    return b"".join(map(_leb128, counts)) + np.packbits(bits).tobytes()


def decode(data: memoryview, sizes: Sequence[int], most: int) -> list[Positions]:
    """The rising positions in each group; `CodecError` unless `data` is what `encode` makes of at most `most` positions.

    Takes memory for eight times the bytes of `data` and some thirty bytes a position, once the counts are seen to fit into `data`.
    """
    counts, start = _counts(data, sizes, most)
    blocks = _blocks(sizes, counts)
    data = data[start:]
    least = sum(block.count * (block.low + block.three + 1) for block in blocks)
    longest = least + sum(block.count * block.three + block.reach for block in blocks)
    if not least <= 8 * len(data) < longest + 8:
        raise CodecError(f"{sum(counts)} positions need {least} to {longest} bits, the payload holds {8 * len(data)}")
    bits = np.unpackbits(np.frombuffer(data, np.uint8))
    at = 0
    sums = []
    for block in blocks:
        steps, at = _joined(bits, at, block)
        sums.append(steps)
    ones = np.flatnonzero(bits[at:].view(bool))
    total = sum(block.count for block in blocks)
    if len(ones) != total or len(bits) - at - (int(ones[-1]) + 1 if total else 0) >= 8:
        raise CodecError(f"the payload's unary part holds {len(ones)} gaps and its padding; needed are {total} and less than 8 bits")
    found: list[Positions] = [np.zeros(0, np.int64)] * len(sizes)
    done = before = 0
    for block, steps in zip(blocks, sums, strict=True):
        own = ones[done : done + block.count]
        done += block.count
        own -= np.arange(before, before + block.count)
        before += int(own[-1]) + block.count
        if int(own[-1]) > block.reach:
            raise CodecError("the payload's gaps lead past the end of a tensor")
        own *= block.m
        own += steps
        _place(own, block, found)
    return [_others(part, size) if 2 * count > size else part for part, size, count in zip(found, sizes, counts, strict=True)]


@dataclass(frozen=True)
class _Block:
    """The groups of one parameter m = 2^low, or 3 * 2^low if `three`."""

    low: int
    three: bool
    groups: list[int]
    sizes: list[int]
    counts: list[int]  # of what is coded: the positions, or those that are not set

    @property
    def m(self) -> int:
        return (3 if self.three else 1) << self.low

    @property
    def count(self) -> int:
        return sum(self.counts)

    @property
    def reach(self) -> int:
        """The largest sum of quotients."""
        return sum(size // self.m for size in self.sizes)


def _blocks(sizes: Sequence[int], counts: Sequence[int]) -> list[_Block]:
    made: dict[int, _Block] = {}
    for group, (size, count) in enumerate(zip(sizes, counts, strict=True)):
        fewer = min(count, size - count)
        if fewer:
            low, three = _parameter(size, fewer)
            block = made.setdefault((3 if three else 1) << low, _Block(low, three, [], [], []))
            block.groups.append(group)
            block.sizes.append(size)
            block.counts.append(fewer)
    return [made[m] for m in sorted(made)]


def _parameter(size: int, count: int) -> tuple[int, bool]:
    """(c, whether m is 3 * 2^c) of least expected bits; in whole numbers, so that both ends agree."""
    low, three = 0, False
    while (2 * size - count) * 10_000 > 2 * count * ((3 if three else 1) << low) * NEXT[3 if three else 2 if low else 1]:
        # 1, 2, 3, 4, 6, 8, 12, ...
        low, three = (low + 2, False) if three else (low - 1, True) if low else (1, False)
    return low, three


def _gaps(positions: Positions, size: int) -> Positions:
    """How many entries lie before each position and after the one before it; of the rarer kind of positions."""
    gaps = np.diff(_others(positions, size) if 2 * len(positions) > size else positions, prepend=-1)
    gaps -= 1
    return gaps


def _chunks(parts: list[Positions]) -> Iterator[Positions]:
    """The numbers of all parts in pieces that a cache holds: few parts are cut, many small ones joined."""
    whole = parts[0] if len(parts) == 1 else np.concatenate(parts)
    for start in range(0, len(whole), CHUNK):
        yield whole[start : start + CHUNK]


def _split(gaps: Positions, block: _Block) -> tuple[Bits, list[Bits]]:
    """The quotients in unary, and the planes of the remainders."""
    planes = [((gaps >> bit) & 1).astype(np.uint8) for bit in range(block.low)]
    high = gaps >> block.low
    if block.three:
        whole = high // 3
        high -= 3 * whole
        above = high > 0
        planes += [above.view(np.uint8), (high[np.flatnonzero(above)] > 1).view(np.uint8)]
        high = whole
    ends = np.cumsum(high)
    ends += np.arange(len(ends))
    unary = np.zeros(int(ends[-1]) + 1, np.uint8)
    unary[ends] = 1
    return unary, planes


def _joined(bits: Bits, at: int, block: _Block) -> tuple[Positions, int]:
    """Sums of remainder + 1 over a block, whose planes begin at bit `at`, and where they end."""
    n = block.count
    planes = [bits[at + bit * n : at + (bit + 1) * n] for bit in range(block.low + block.three)]
    at += n * len(planes)
    if at > len(bits):
        raise CodecError("the payload ends within its remainders")
    sums = np.empty(n, np.int64)
    carry = 0
    for start in range(0, n, CHUNK):
        rest = np.ones(min(CHUNK, n - start), np.int64)
        for bit, plane in enumerate(planes):
            rest += plane[start : start + CHUNK].astype(np.int64) << bit
        if block.three:
            some = np.flatnonzero(planes[-1][start : start + CHUNK].view(bool))
            second = bits[at : at + len(some)]
            at += len(some)
            if at > len(bits):
                raise CodecError("the payload ends within its remainders")
            rest[some] += second.astype(np.int64) << block.low
        piece = sums[start : start + CHUNK]
        np.cumsum(rest, out=piece)
        piece += carry
        carry = int(piece[-1])
    return sums, at


def _place(ends: Positions, block: _Block, found: list[Positions]) -> None:
    """Cuts the ends of a block's gaps, counted from 1 through all its groups, into the positions of each."""
    done = before = 0
    for group, size, count in zip(block.groups, block.sizes, block.counts, strict=True):
        own = ends[done : done + count]
        done, last = done + count, int(own[-1])
        if last - before > size:
            raise CodecError("the payload's positions lead past the end of a tensor")
        own -= before + 1
        found[group], before = own, last


def _others(positions: Positions, size: int) -> Positions:
    """The positions below `size` that are not among these."""
    rest = np.ones(size, bool)
    rest[positions] = False
    return np.flatnonzero(rest)


def _counts(data: memoryview, sizes: Sequence[int], most: int) -> tuple[list[int], int]:
    """The count of each group, and where they end."""
    counts, at = [], 0
    for size in sizes:
        count = shift = 0
        while True:
            if at == len(data) or shift > 63:
                raise CodecError("the payload ends within its counts, or one has no end")
            count |= (data[at] & 127) << shift
            shift, at = shift + 7, at + 1
            if data[at - 1] < 128:
                break
        if count > size:
            raise CodecError(f"the payload has {count} positions in a tensor of {size} entries")
        counts.append(count)
    if sum(counts) > most:
        raise CodecError(f"the payload has {sum(counts)} positions; the codec keeps at most {most}")
    return counts, at


def _leb128(number: int) -> bytes:
    made = bytearray()
    while number > 127:
        made.append(128 | (number & 127))
        number >>= 7
    made.append(number)
    return bytes(made)
