"""The wave engine against what frameworks do: one client at a time with stock peft, in one process or two, and a Flower Ray app.

    python -m experiments.benchmarks.engine --data FOLDER_OF_BANKING77 --json engine.json

MiniLM, LoRA r=8 on query and value, texts of banking77 in their real lengths, every client takes the same batches in every variant.
All variants run in turns, several times, in one process tree on the same cores: (a) stock peft in one process of two threads, (b) in two
processes of one thread, the engine in as many lanes as there are cores; for differential privacy also Opacus' hooks in two processes.
Printed are milliseconds a client-step (wall clock of all clients' steps) as median and range, and the median and range of the ratios of
paired turns. `--ray also` adds (c): Flower's simulation engine with an app in the style of Flower's own LLM example (`engine_ray.py`).
"""

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from torch.nn import functional as F

from clients.engine import Engine
from clients.lanes import Lanes
from clients.train import Job, Private, batches
from experiments.benchmarks.engine_ray import compared
from fedpeft import seeds
from fedpeft.adapters.base import Adapted
from fedpeft.adapters.lora import Lora
from fedpeft.config import Options, Training
from fedpeft.data.files import Files
from fedpeft.messages import Broadcast
from fedpeft.models.base import Base, Examples
from fedpeft.models.minilm import MiniLM
from fedpeft.privacy.noise import Secret
from fedpeft.strategy import Phase

LAYERS = {"all layers": range(6), "top 2": (4, 5), "top 1": (5,)}
RATE, HEAD_RATE = 3e-3, 1e-2


@dataclass(frozen=True)
class Case:
    """One row group of the table."""

    layers: str
    batch: int
    steps: int
    private: bool = False
    one_process: bool = True  # also the stock loop in one process of two threads


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", required=True, help="folder with banking77's train.csv.gz and test.csv.gz")
    options.add_argument("--clients", type=int, default=64)
    options.add_argument("--turns", type=int, default=3)
    options.add_argument("--cores", type=int, default=2)
    options.add_argument("--quick", action="store_true", help="only 5 steps a call, batch 4")
    options.add_argument("--private", action="store_true", help="only what privacy costs")
    options.add_argument("--ray", choices=("no", "also", "only"), default="no", help="Flower's Ray engine; minutes")
    options.add_argument("--json", type=Path)
    chosen = options.parse_args()
    torch.set_num_threads(1)
    if chosen.ray == "only":
        print(json.dumps(machine(chosen.cores) | compared(Path(chosen.data), chosen.clients, 5, 4, chosen.cores)))
        return
    cases = [Case(layers, 4, 5) for layers in LAYERS] + [Case("all layers", 4, 5, private=True)]
    if chosen.private:
        cases = cases[-1:]
    elif not chosen.quick:
        cases += [Case(layers, 8, 5, one_process=False) for layers in LAYERS] + [Case("all layers", 4, 40, one_process=False)]
    base, examples = opened(chosen.data)
    gemm = ceiling(base)
    each = float(examples.lengths().double().mean())
    table = []
    for case in cases:
        turns = max(1, chosen.turns // 2) if case.steps > 5 else chosen.turns  # long ones
        row = measured(base, examples, case, chosen.clients, turns, chosen.cores)
        if (
            case.layers == "all layers" and not case.private
        ):  # forward and back through every frozen weight: 4 operations a weight and token
            work = 4e-6 * gemm["linear_weights"] * case.batch * each
            row["share_of_gemm"] = {n: round(work / ms[0] / (chosen.cores * gemm["gflops_one_core"]), 2) for n, ms in row["ms"].items()}
        table.append(row)
        print(shown(table[-1]), flush=True)
    result: dict[str, Any] = {"machine": machine(chosen.cores), "clients": chosen.clients, "turns": chosen.turns, "table": table}
    result["gemm"] = gemm | {"tokens_of_an_example": round(each, 1)}
    result["clients_table"] = None if chosen.private else scaling(base, examples, chosen.cores)
    if chosen.ray == "also":
        result["ray"] = compared(Path(chosen.data), chosen.clients, 5, 4, chosen.cores)
        print(json.dumps(result["ray"]), flush=True)
    print(json.dumps({name: result[name] for name in ("machine", "gemm", "clients_table")}))
    if chosen.json:
        chosen.json.write_text(json.dumps(result, indent=2) + "\n")


def opened(folder: str) -> tuple[Base, Examples]:
    """MiniLM and the training texts."""
    dataset = Files(path=folder, task="text", text="text", label="label").read(seed=0)
    base = MiniLM().load(dataset, seed=0, device=torch.device("cpu"))
    return base, base.encode(dataset.train)


def measured(base: Base, examples: Examples, case: Case, clients: int, turns: int, cores: int) -> dict[str, Any]:
    """One case: every variant in turns."""
    adapted = attached(base, case.layers)
    start = adapted.read()
    work = Training(steps=case.steps, batch=case.batch, lr=RATE, head_lr=HEAD_RATE)
    share = torch.randperm(len(examples), generator=torch.Generator().manual_seed(0)).chunk(clients)

    def job(client: int, turn: int) -> Job:
        rng = seeds.generator(0, round=turn, client=client, purpose="batches")
        return Job(client, Broadcast(start), share[client], work, rng)

    def stock(turn: int, mine: Sequence[int]) -> None:
        one_at_a_time(adapted, examples, [job(client, turn) for client in mine])

    def hooked(turn: int, mine: Sequence[int]) -> None:
        opacus(adapted, examples, [job(client, turn) for client in mine])

    engine = Engine(adapted, examples, Options(), groups=share, batch=case.batch, lanes=cores)
    assert engine._wave is not None
    source = Secret()

    def hidden(client: int, turn: int) -> Job:
        plain = job(client, turn)
        return replace(plain, private=Private(1.0, float(case.batch), 0.5, source, lambda rows: list(batches(rows, work, plain.rng))))

    def waves(turn: int, mine: Sequence[int]) -> None:
        engine.train(Phase(), [job(client, turn) for client in mine], round=0)

    def private_waves(turn: int, mine: Sequence[int]) -> None:
        engine.train(Phase(), [hidden(client, turn) for client in mine], round=0)

    size = min(engine.wave, -(-clients // cores))
    lots = [list(range(clients))[at : at + size] for at in range(0, clients, size)]
    halves = [list(range(clients))[lane::cores] for lane in range(cores)]
    variants: dict[str, tuple[Callable[[int, Sequence[int]], None], int, int, list[list[int]]]] = {
        "a: stock, 1 process, 2 threads": (stock, 1, cores, [list(range(clients))]),
        "b: stock, 2 processes": (stock, cores, 1, halves),
        "engine": (waves, cores, 1, lots),
    }
    if case.private or not case.one_process:
        del variants["a: stock, 1 process, 2 threads"]
    if case.private:
        variants |= {"engine, private": (private_waves, cores, 1, lots), "opacus, 2 processes": (hooked, cores, 1, halves)}
    crews = {name: Crew(run, processes, threads) for name, (run, processes, threads, _) in variants.items()}
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(turns + 1):  # the first warms up, and fills the store
        for name, (_, _, _, orders) in variants.items():
            seconds = crews[name].turn(turn, orders)
            if turn:
                times[name].append(1000 * seconds / (clients * case.steps))
    for crew in crews.values():
        crew.close()
    adapted.undo()
    plan = vars(engine._wave.plan) | {"below": engine._wave.way.below, "tail": engine._wave.way.tail}
    ratios = {name: ratio(times[name], times["engine"]) for name in variants if name != "engine"}
    return vars(case) | {"ms": {name: spread(each) for name, each in times.items()}, "times_of_engine": ratios, "plan": plan}


class Crew:
    """The processes of one variant, waiting between its turns."""

    def __init__(self, run: Callable[[int, Sequence[int]], None], processes: int, threads: int) -> None:
        def start(order: tuple[int, list[int]]) -> None:
            torch.set_num_threads(threads)
            run(*order)

        self._pipes: list[Connection] = []
        self._members = []
        context = multiprocessing.get_context("fork")
        for _ in range(processes):
            ours, theirs = context.Pipe()
            member = context.Process(target=serving, args=(start, theirs), daemon=True)
            member.start()
            self._pipes.append(ours)
            self._members.append(member)

    def turn(self, turn: int, orders: list[list[int]]) -> float:
        """Seconds until every order is done; a free process takes the next."""
        began = time.perf_counter()
        waiting, busy = list(orders), []
        for pipe in self._pipes:
            if waiting:
                pipe.send((turn, waiting.pop(0)))
                busy.append(pipe)
        while busy:
            for ready in wait(busy):
                assert isinstance(ready, Connection)
                ready.recv()
                if waiting:
                    ready.send((turn, waiting.pop(0)))
                else:
                    busy.remove(ready)
        return time.perf_counter() - began

    def close(self) -> None:
        """Ends them."""
        for pipe, member in zip(self._pipes, self._members, strict=True):
            pipe.send(None)
            member.join()


def serving(start: Callable[[tuple[int, list[int]]], None], pipe: Connection) -> None:
    """What a process of a crew does."""
    while (order := pipe.recv()) is not None:
        start(order)
        pipe.send(True)


def attached(base: Base, layers: str) -> Adapted:
    """LoRA r=8 on query and value of some layers."""
    numbers = "|".join(map(str, LAYERS[layers]))
    return Lora(rank=8, targets=rf".*layer[.]({numbers})[.].*(query|value)").attach(base, 0)


def one_at_a_time(adapted: Adapted, examples: Examples, jobs: Sequence[Job]) -> None:
    """What a simulation with stock peft does: state in, a new AdamW, steps on the model's own loss, state out."""
    model: Any = adapted.module
    moving = adapted.select(lambda name: True)
    state = get_peft_model_state_dict(model)
    heads = {name: p.detach().clone() for name, p in adapted.parameters.items() if name.startswith("head.")}
    state = {name: value.clone() for name, value in state.items()}
    for job in jobs:
        set_peft_model_state_dict(model, state)
        with torch.no_grad():
            for name, value in heads.items():
                adapted.parameters[name].copy_(value)
        descent = torch.optim.AdamW(groups(moving), weight_decay=0.0)
        for rows in batches(job.rows, job.work, job.rng):
            inputs, labels = examples.batch(rows)
            model(**inputs, labels=labels).loss.backward()
            descent.step()
            descent.zero_grad()
        get_peft_model_state_dict(model)


def opacus(adapted: Adapted, examples: Examples, jobs: Sequence[Job]) -> None:
    """The same with Opacus' hooks: per-example gradients, clipped, summed, noised with torch.randn."""
    from opacus.grad_sample import GradSampleModule

    model, moving = adapted.base.module, adapted.select(lambda name: True)
    for inner in model.modules():
        if isinstance(inner, nn.Dropout):
            inner.p = 0.0
    model.train()  # Opacus records in training mode only
    hooked: Any = GradSampleModule(model, loss_reduction="sum", strict=False)
    start = {name: p.detach().clone() for name, p in moving.items()}
    for job in jobs:
        with torch.no_grad():
            for name, p in moving.items():
                p.copy_(start[name])
        descent = torch.optim.AdamW(groups(moving), weight_decay=0.0)
        for rows in batches(job.rows, job.work, job.rng):
            inputs, labels = examples.batch(rows)
            F.cross_entropy(hooked(**inputs).logits, labels, reduction="sum").backward()
            step_privately(moving, job.work.batch)
            descent.step()
            hooked.zero_grad()
    hooked.to_standard_module()
    model.eval()


def step_privately(moving: dict[str, nn.Parameter], batch: int) -> None:
    """Per-example clipping of all tensors together, and noise."""
    each: dict[str, Any] = {name: p.grad_sample for name, p in moving.items()}  # type: ignore[attr-defined]  # put there by Opacus
    norm = torch.stack([g.flatten(1).square().sum(1) for g in each.values()]).sum(0).sqrt()
    factor = (1.0 / (norm + 1e-6)).clamp(max=1.0)
    for name, p in moving.items():
        p.grad = (torch.einsum("n,n...->...", factor, each[name]) + 0.5 * torch.randn_like(p)) / batch


def groups(moving: dict[str, nn.Parameter]) -> list[dict[str, Any]]:
    """The two learning rates."""
    head = [p for name, p in moving.items() if name.startswith("head.")]
    return [{"params": [p for name, p in moving.items() if not name.startswith("head.")], "lr": RATE}, {"params": head, "lr": HEAD_RATE}]


def ceiling(base: Base) -> dict[str, float]:
    """What one core's matrix product reaches (GFLOP/s, float32, the shapes of MiniLM), and the weights a token passes."""
    rng = torch.Generator().manual_seed(0)
    x, w = torch.randn(1024, 384, generator=rng), torch.randn(1536, 384, generator=rng)
    best = min(timed(lambda: F.linear(x, w)) for _ in range(30))
    weights = sum(m.weight.numel() for m in base.module.modules() if isinstance(m, nn.Linear))
    return {"gflops_one_core": round(2 * x.numel() * w.shape[0] / best / 1e9, 1), "linear_weights": weights}


def timed(run: Callable[[], Tensor]) -> float:
    """Seconds."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def scaling(base: Base, examples: Examples, cores: int) -> list[dict[str, float]]:
    """Seconds of one round of 2 steps of batch 4, for more and more clients."""
    adapted = attached(base, "all layers")
    start = adapted.read()
    work = Training(steps=2, batch=4, lr=RATE, head_lr=HEAD_RATE)
    engine = Engine(adapted, examples, Options(), batch=4)
    size, rows = engine.wave, []

    def run(mine: list[int]) -> int:
        some = [Job(c, Broadcast(start), share[c], work, seeds.generator(0, client=c, purpose="batches")) for c in mine]
        return len(engine.train(Phase(), some, round=0))

    for clients in (10, 100, 1000):
        share = torch.randperm(len(examples), generator=torch.Generator().manual_seed(0)).tensor_split(clients)
        per = min(size, -(-clients // cores))
        lots = [list(range(clients))[at : at + per] for at in range(0, clients, per)]
        with Lanes(lambda lane: run, cores) as lanes:
            list(lanes.map(lots))
            began = time.perf_counter()
            list(lanes.map(lots))
            seconds = time.perf_counter() - began
        rows.append({"clients": clients, "seconds": round(seconds, 2), "ms_client_step": round(1000 * seconds / (2 * clients), 2)})
    adapted.undo()
    return rows


def ratio(times: list[float], engine: list[float]) -> list[float]:
    """Median, smallest and largest of paired ratios: how many times the engine's time."""
    each = sorted(one / other for one, other in zip(times, engine, strict=True))
    return [round(statistics.median(each), 2), round(each[0], 2), round(each[-1], 2)]


def spread(times: list[float]) -> list[float]:
    """Median, smallest, largest."""
    return [round(statistics.median(times), 2), round(min(times), 2), round(max(times), 2)]


def shown(row: dict[str, Any]) -> str:
    """A case as lines of a table."""
    head = f"{row['layers']}, batch {row['batch']}, {row['steps']} steps a call{', private' if row['private'] else ''}  ({row['plan']})"
    lines = [f"  {name:34s} {each[0]:8.2f} ms [{each[1]:.2f}, {each[2]:.2f}]" for name, each in row["ms"].items()]
    lines += [f"  {name:34s} {each[0]:8.2f} x the engine [{each[1]}, {each[2]}]" for name, each in row["times_of_engine"].items()]
    lines += [f"  {name:34s} {share:8.0%} of the cores' matrix product" for name, share in row.get("share_of_gemm", {}).items()]
    return "\n".join([head, *lines])


def machine(cores: int) -> dict[str, Any]:
    """Where the figures come from."""
    names = ("torch", "transformers", "peft", "opacus", "flwr")
    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    return {name: metadata.version(name) for name in names} | {
        "cpu": cpu, "cores_used": cores, "cores": os.cpu_count(), "python": platform.python_version(), "load": os.getloadavg()[0]
    }  # fmt: skip


if __name__ == "__main__":
    main()
