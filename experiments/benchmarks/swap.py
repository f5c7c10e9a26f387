"""Cost of changing the client on one base model: raw copies into live parameters, against peft's own state-dict calls.

    python -m experiments.benchmarks.swap

MiniLM with LoRA r=8 on query and value, and on all linear layers; read and write of the adapter, without the head. Paired and interleaved:
each repetition times both ways one after the other; printed are medians, ranges, and the median of the paired ratios.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib import metadata

import peft
import torch

from fedpeft.adapters.base import Adapted
from fedpeft.adapters.lora import Lora
from fedpeft.data.table import Dataset, Table
from fedpeft.models.minilm import MiniLM
from fedpeft.tensors import Tensors, is_head, only


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--repeats", type=int, default=30)
    repeats = options.parse_args().repeats
    torch.set_num_threads(1)
    one = Table(("a",), torch.tensor([0]), None)
    base = MiniLM().load(Dataset("text", one, one, ("x", "y")), seed=0, device=torch.device("cpu"))
    facts = {"torch": metadata.version("torch"), "peft": metadata.version("peft"), "machine": platform.machine(), "repeats": repeats}
    for name, targets in (("query,value", ("query", "value")), ("all linear", "all-linear")):
        adapted = Lora(rank=8, targets=targets).attach(base, 0)
        model = adapted.module
        assert model is not None
        tensors = only(adapted.read(), lambda tensor: not is_head(tensor))
        state = {key: value.clone() for key, value in peft.get_peft_model_state_dict(model).items()}

        ours, theirs = interleaved(partial(raw, adapted, tensors), partial(stock, model, state), repeats)
        ratios = sorted(b / a for a, b in zip(ours, theirs, strict=True))
        row = {"targets": name, "raw_ms": spread(ours), "peft_ms": spread(theirs), "ratio": round(statistics.median(ratios), 1)}
        print(json.dumps(row | {"ratio_range": [round(ratios[0], 1), round(ratios[-1], 1)]} | facts))
        adapted.undo()


def raw(adapted: Adapted, tensors: Tensors) -> None:
    """One client in, one out, by copies."""
    adapted.write(tensors)
    adapted.read()


def stock(model: torch.nn.Module, state: Tensors) -> None:
    """The same by peft's calls."""
    peft.set_peft_model_state_dict(model, state)
    peft.get_peft_model_state_dict(model)


def interleaved(one: Callable[[], None], other: Callable[[], None], repeats: int) -> tuple[list[float], list[float]]:
    """Milliseconds of each, taken in turns after one warm-up."""
    one()
    other()
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for place, work in enumerate((one, other)):
            began = time.perf_counter()
            work()
            times[place].append(1000 * (time.perf_counter() - began))
    return times


def spread(times: list[float]) -> list[float]:
    """Median, smallest, largest."""
    return [round(statistics.median(times), 2), round(min(times), 2), round(max(times), 2)]


if __name__ == "__main__":
    main()
