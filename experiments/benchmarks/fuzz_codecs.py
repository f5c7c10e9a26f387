"""Hostile bytes for every codec: each input must give finite tensors of its layout or a `CodecError`, and take no memory to speak of.

    python -m experiments.benchmarks.fuzz_codecs --inputs 1000000

Inputs are random bytes and payloads that were cut, lengthened, overwritten or spliced, half of them sealed again with the right checksum
and layout, as somebody who knows the format would. Some claim a layout of other shapes, up to terabytes. The address space is limited to
`--memory` above what the process has at the start, so that an allocation which a payload talks the decoder into fails. Any other outcome
than the two is printed with what repeats it, and the exit code is 1.
"""

import argparse
import hashlib
import json
import platform
import resource
import sys
import time
import traceback
import warnings
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

from fedpeft.codecs.base import DTYPES, Codec, CodecError, Layout, Spec, header, layout
from fedpeft.codecs.mask import Mask
from fedpeft.codecs.quantize import Quantize
from fedpeft.codecs.raw import Half, Raw
from fedpeft.codecs.sign import Sign
from fedpeft.codecs.ternary import Ternary
from fedpeft.codecs.topk import TopK
from fedpeft.tensors import Tensors

HEADER = 15  # bytes of a sealed payload before its body
CODECS: tuple[Codec, ...] = (
    Raw(), Half("bf16"), Half("fp16"), Quantize(8), Quantize(4, scales="fp32", block=3), Sign(), Mask(0.2), Mask(0.5, "bf16", True),
    TopK(0.2), TopK(0.5, "fp16", "tensor"), Ternary(0.1), Ternary(0.4, "std", scope="tensor", scales="tensor"), Ternary(1.0),
)  # fmt: skip
BYTES = (0, 1, 127, 128, 254, 255)


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--inputs", type=int, default=20_000)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--memory", type=int, default=256, help="MiB")
    args = options.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    rng = np.random.default_rng(args.seed)
    pool = [(codec, specs, payloads) for codec in CODECS for specs, payloads in samples(codec, rng)]
    for codec, specs, payloads in pool:
        attempt(codec, payloads[0], specs)  # whatever is loaded on first use is loaded before the limit
    limit(args.memory << 20)
    began, counts = time.perf_counter(), Counter[str]()
    for number in range(args.inputs):
        codec, specs, payloads = pool[int(rng.integers(len(pool)))]
        data, claimed, kind = hostile(codec, specs, payloads, rng)
        outcome = attempt(codec, data, claimed)
        counts[f"{kind}: {outcome.partition(chr(10))[0]}"] += 1
        if outcome not in ("decoded", "CodecError"):
            print(f"input {number} of seed {args.seed}: {codec!r}, {header(claimed)}, {data.hex()}\n{outcome}", flush=True)
    wrong = sum(count for name, count in counts.items() if not name.endswith((": decoded", ": CodecError")))
    facts = {"seed": args.seed, "machine": platform.machine(), "python": platform.python_version()}
    facts |= {name: metadata.version(name) for name in ("numpy", "torch")}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    measured = {"inputs": args.inputs, "failures": wrong, "seconds": round(time.perf_counter() - began), "peak_mib": peak}
    print(json.dumps(measured | {"outcomes": dict(sorted(counts.items()))} | facts))
    return int(wrong > 0)


def samples(codec: Codec, rng: np.random.Generator) -> list[tuple[Layout, list[bytes]]]:
    """Layouts, and payloads of each."""

    def normal(*shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))

    def sets() -> list[Tensors]:
        integers = torch.from_numpy(rng.integers(0, 99, 5))
        return [
            {"w": normal(300)},
            {"a": normal(8, 40), "b": normal(40, 8) * 0.01, "n": integers, "bias": normal(7) * 100},
            {"half": normal(90).half(), "bf": normal(33).bfloat16(), "double": normal(3, 3).double(), "none": torch.zeros(0, 4)},
            {"zero": torch.zeros(200), "one": torch.tensor(2.5)},
            {"flag": integers > 50, "n": integers.int()},
        ]

    many = [sets() for _ in range(4)]
    return [(layout(same[0]), [codec.encode(tensors, seed=1) for tensors in same]) for same in zip(*many, strict=True)]


def hostile(codec: Codec, specs: Layout, payloads: Sequence[bytes], rng: np.random.Generator) -> tuple[bytes, Layout, str]:
    """An input, the layout that is claimed for it, and what was done."""
    data = bytearray(payloads[int(rng.integers(len(payloads)))])
    kind = ("random", "cut", "lengthened", "overwritten", "spliced", "claimed")[int(rng.integers(6))]
    if kind == "random":
        data[HEADER if rng.integers(2) else 0 :] = rng.bytes(int(rng.integers(2 * len(data) + 2)))
    elif kind == "cut":
        data = data[: int(rng.integers(len(data) + 1))]
    elif kind == "lengthened":
        data += rng.bytes(int(rng.integers(1, 40)))
    elif kind == "spliced":
        other = payloads[int(rng.integers(len(payloads)))]
        at = int(rng.integers(len(other) + 1))
        data[at:] = other[int(rng.integers(len(other) + 1)) if rng.integers(2) else at :]
    elif kind == "claimed" and specs:
        specs = tuple(resized(spec, rng) if rng.integers(2) else spec for spec in specs)
    if kind in ("overwritten", "claimed") or not rng.integers(4):
        for _ in range(int(rng.integers(1, 5)) if data else 0):
            at = int(rng.integers(len(data)))
            data[at] = BYTES[int(rng.integers(len(BYTES)))] if rng.integers(2) else data[at] ^ 1 << int(rng.integers(8))
    if not isinstance(codec, Raw | Half) and rng.integers(2):
        return sealed(codec, bytes(data), specs), specs, f"{kind}, sealed"
    return bytes(data), specs, kind


def resized(spec: Spec, rng: np.random.Generator) -> Spec:
    """Another shape or dtype, now and then of terabytes."""
    if not rng.integers(3):
        return replace(spec, dtype=list(DTYPES.values())[int(rng.integers(len(DTYPES)))])
    return replace(spec, shape=tuple(int(side) for side in 2 ** rng.integers(0, (4, 12, 20)[int(rng.integers(3))], int(rng.integers(3)))))


def sealed(codec: Codec, data: bytes, specs: Layout) -> bytes:
    """The body of `data` under a header that fits it."""
    agreed = f"{codec} with seed 1" if isinstance(codec, Mask) else repr(codec)
    rest = hashlib.blake2b(f"{agreed} {header(specs)}".encode(), digest_size=8).digest() + data[HEADER:]
    return b"fC\x01" + zlib.crc32(rest).to_bytes(4, "little") + rest


def attempt(codec: Codec, data: bytes, specs: Layout) -> str:
    """What came of it: decoded, CodecError, or a trace."""
    try:
        back = codec.decode(data, specs, seed=1)
    except CodecError:
        return "CodecError"
    except BaseException:
        return traceback.format_exc()
    if layout(back) != specs:
        return f"decoded as {header(layout(back))}"
    exact = isinstance(codec, Raw | Half)  # which give what is not finite to the server's own check
    bad = [name for name, tensor in back.items() if tensor.is_floating_point() and not (exact or tensor.isfinite().all())]
    return f"decoded, but not finite: {bad}" if bad else "decoded"


def limit(more: int) -> None:
    """No address space past what is used and `more`."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + more, used + more))


if __name__ == "__main__":
    sys.exit(main())
