"""What a machine can do, measured once: the fixed cost of a pass in tokens, how large a micro-batch may be, how many clients fit a wave.

Kept in the model cache and with the run: another plan rounds otherwise, so a run that goes on must not measure again.
"""

import hashlib
import json
import logging
import os
import platform
import time
from typing import Any

import torch
from filelock import FileLock

from clients.plan import Plan
from clients.prefix import Shortcut
from fedpeft.ledger import write_text
from fedpeft.models.score import losses
from fedpeft.models.tiny import cache
from fedpeft.tensors import Tensors

POOL = 8192  # tokens of a wave's step on a CPU: enough for full micro-batches of every length
MOST = 2048  # padded tokens of a micro-batch on a CPU; speed is flat from 500 and falls past 16,000
GPU_FIRST, GPU_MOST = 8192, 1 << 20  # tokens: where the probe of a GPU begins and ends
SHARE = 0.25  # of the machine's memory that the tensors of all lanes' waves may take
WAVES, FEW = 256_000_000, 8  # bytes that the tensors of waves on a CPU take in all, unless that were fewer than so many clients a wave
LOGITS = 400_000_000  # bytes of a language model's logits, their softmax and its gradient in one micro-batch on a CPU


def measured(way: Shortcut, start: Tensors, *, batch: int, lanes: int = 1) -> Plan:
    """The plan for this model, adapter and machine: from the cache, or measured in less than two seconds."""
    folder = cache()
    folder.mkdir(parents=True, exist_ok=True)
    place = folder / f"plan-{_key(way)}.json"
    with FileLock(f"{place}.lock"):
        if place.exists():
            facts = json.loads(place.read_text())
        else:
            facts = _probe(way, start)
            write_text(place, json.dumps(facts) + "\n")
    return Plan(facts["fixed"], facts["tokens"], _wave(way, start, facts["tokens"], batch, lanes), facts["token_us"])


def _key(way: Shortcut) -> str:
    base = way.stack.adapted.base
    device = (
        torch.cuda.get_device_name(base.device)
        if base.device.type == "cuda"
        else f"{platform.node()} {platform.machine()} {torch.get_num_threads()}"
    )
    layers = sorted((path, sorted(layer._names)) for path, layer in way.stack.layers.items())
    typical = int(way.examples.lengths().double().median())
    text = json.dumps([base.fingerprint, base.task, device, torch.__version__, way.below, way.tail, layers, typical])
    return hashlib.blake2b(text.encode(), digest_size=10).hexdigest()


def _probe(way: Shortcut, start: Tensors) -> dict[str, Any]:
    lengths = way.examples.lengths()
    typical = int(lengths.double().median())
    row = int((lengths - typical).abs().argmin())
    on_gpu = way.stack.adapted.base.device.type == "cuda"
    few, many = 1, max(2, (GPU_FIRST if on_gpu else 512) // typical)
    small, large = (_seconds(way, start, row, count) for count in (few, many))
    each = max((large - small) / ((many - few) * typical), 1e-9)
    fixed = max(small / each - typical, 1.0)
    made = {"fixed": 1 << min(round(fixed).bit_length(), 14), "tokens": _most(way), "token_us": round(1e6 * each, 1)}
    # F is a power of two, which noise seldom changes.
    if on_gpu:
        made["tokens"] = _largest(way, start, row, typical)
    return made


def _most(way: Shortcut) -> int:
    base: Any = way.stack.adapted.base
    words = base.module.config.vocab_size if base.task == "language" else 1
    return int(max(128, min(MOST, LOGITS // (12 * words))))


def _seconds(way: Shortcut, start: Tensors, row: int, count: int) -> float:
    """The fastest of three passes over `count` copies of one example, each with a client of its own or one of four."""
    stack, base = way.stack, way.stack.adapted.base
    rows = torch.full((count,), row)
    best = float("inf")
    with stack.on():
        way.fill(torch.tensor([row]))
        stack.load([start] * min(count, 4))
        owner = torch.arange(count, device=base.device) % min(count, 4)
        for value in stack.clients.values.values():
            value.requires_grad_(value.is_floating_point())
        with way.on():
            for _ in range(3):
                _wait(base.device)
                began = time.perf_counter()
                stack.clients.seat(owner)
                inputs, targets = way.batch(rows)
                losses(base.task, stack.logits(inputs), targets.to(base.device)).sum().backward()
                _wait(base.device)
                best = min(best, time.perf_counter() - began)
                if best > 0.5:
                    break
    return best


def _largest(way: Shortcut, start: Tensors, row: int, typical: int) -> int:
    """Doubles the micro-batch of a GPU while a token gets cheaper by a twentieth and twice the memory would still fit."""
    device = way.stack.adapted.base.device
    tokens, rate = GPU_FIRST, float("inf")
    while tokens <= GPU_MOST:
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        now = _seconds(way, start, row, max(1, tokens // typical)) / tokens
        used = torch.cuda.max_memory_allocated(device) - before
        if now > 0.95 * rate or 2 * used > SHARE * torch.cuda.mem_get_info(device)[0]:
            break
        tokens, rate = 2 * tokens, now
    return max(GPU_FIRST, tokens // 2)


def _wave(way: Shortcut, start: Tensors, tokens: int, batch: int, lanes: int) -> int:
    """Clients at once: enough for a pool of micro-batches, as long as their tensors, gradients and moments fit."""
    base = way.stack.adapted.base
    pool = POOL if base.device.type == "cpu" else 4 * tokens
    by_tokens = -(-pool // max(1, round(batch * float(way.examples.lengths().double().mean()))))
    each = 5 * sum(tensor.nbytes for tensor in start.values())
    memory, side_by_side = SHARE * _memory(base.device), lanes if base.device.type == "cpu" else 1
    fits = int(memory / side_by_side / max(each, 1))
    by_memory = max(min(FEW, fits), int(min(memory, WAVES) / side_by_side / max(each, 1))) if base.device.type == "cpu" else fits
    found = max(1, min(by_tokens, 1 << max(by_memory, 1).bit_length() - 1, 256))
    logging.getLogger("fedpeft").debug("waves of %d clients (%d by tokens, %d by memory)", found, by_tokens, by_memory)
    return found


def _memory(device: torch.device) -> int:
    """All of it, not what is free just now: else a wave would be another tomorrow."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
