"""Baseline (c) of the engine's benchmark: a Flower simulation on Ray, in the style of Flower's own LLM example, against `fedpeft run`.

Every call loads tokenizer and base model, puts LoRA on it, sets the state, trains with transformers' Trainer and returns the state, as that
example does; `cached` keeps tokenized texts, base and adapter in the actor and steps in a plain loop. Both jobs are whole processes: start,
loading, three rounds of all clients. No model is tested along the way.

    python -m experiments.benchmarks.engine_ray FOLDER_OF_BANKING77 reload|cached CLIENTS STEPS BATCH CORES
"""

import gzip
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

ROUNDS = 3


def compared(folder: Path, clients: int, steps: int, batch: int, cores: int, turns: int = 2) -> dict[str, Any]:
    """Seconds of the jobs and of their warm rounds, in turns, and ratios to ours."""
    seen: dict[str, list[dict[str, float]]] = {"reload": [], "cached": [], "fedpeft": []}
    with tempfile.TemporaryDirectory() as place:
        small = fewer_tests(folder, Path(place))
        for turn in range(turns):
            for how in ("reload", "cached"):
                numbers = map(str, (clients, steps, batch, cores))
                seen[how].append(job([sys.executable, "-m", "experiments.benchmarks.engine_ray", str(small), how, *numbers]))
            run = Path(place) / f"run{turn}"
            ours = [
                sys.executable, "-c", "from fedpeft.cli import main; main()", "run", "model=minilm", "data=banking77", "codec=raw",
                f"data.path={small}", "data.partition.scheme=iid", "adapter.targets=[query,value]",
                f"clients={clients}", f"cohort={clients}", f"rounds={ROUNDS}", f"train.steps={steps}", f"train.batch={batch}",
                "evaluate.every=1000", "evaluate.head_only=false", f"run.dir={run}", f"engine.lanes={cores}", "--quiet",
            ]  # fmt: skip
            whole = job(ours)["job"]
            rounds = [json.loads(line)["round_seconds"] for line in (run / "ledger.jsonl").read_text().splitlines()]
            seen["fedpeft"].append({"job": whole, "warm": statistics.mean(rounds[1:])})
    made: dict[str, Any] = {"seconds": seen, "clients": clients, "steps": steps, "batch": batch, "rounds": ROUNDS}
    for how in ("reload", "cached"):
        for what in ("warm", "job"):
            each = sorted(theirs[what] / ours_[what] for theirs, ours_ in zip(seen[how], seen["fedpeft"], strict=True))
            made[f"{how}, {what}"] = [round(statistics.median(each), 2), round(each[0], 2), round(each[-1], 2)]
    return made


def job(command: list[str]) -> dict[str, float]:
    """Runs a whole job; its seconds, and what it printed as its last line if that is JSON."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment |= {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "FLWR_TELEMETRY_ENABLED": "0"}
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    seconds = time.perf_counter() - began
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    last = (done.stdout.strip().splitlines() or [""])[-1]
    found: dict[str, float] = json.loads(last) if last.startswith("{") else {}
    return found | {"job": seconds}


def fewer_tests(folder: Path, place: Path) -> Path:
    """The data with 32 test texts: what is measured is training."""
    shutil.copy(folder / "train.csv.gz", place / "train.csv.gz")
    with gzip.open(folder / "test.csv.gz", "rt", newline="") as whole, gzip.open(place / "test.csv.gz", "wt", newline="") as part:
        part.writelines(line for number, line in enumerate(whole) if number <= 32)
    return place


def main(folder: str, how: str, clients: int, steps: int, batch: int, cores: int) -> None:
    """One job on Ray."""
    from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
    from flwr.simulation import run_simulation

    client_app, server_app = ClientApp(), ServerApp()
    warm: list[float] = []

    @client_app.train()
    def train(message: Message, context: Context) -> Message:
        import torch

        torch.set_num_threads(1)
        client = int(context.node_config["partition-id"])
        sent: dict[str, Any] = message.content.array_records["state"].to_torch_state_dict()
        state = (trained if how == "cached" else trained_by_trainer)(folder, sent, client, clients, steps, batch)
        return Message(
            RecordDict({"state": ArrayRecord(state), "facts": MetricRecord({"examples": float(steps * batch)})}), reply_to=message
        )

    @server_app.main()
    def serve(grid: Grid, context: Context) -> None:
        while len(nodes := list(grid.get_node_ids())) < clients:
            time.sleep(0.1)
        state = ArrayRecord(start_of(loaded(folder)))
        for round in range(ROUNDS):
            began = time.perf_counter()
            content = RecordDict({"state": state, "config": ConfigRecord({"round": round})})
            replies = list(grid.send_and_receive([Message(content, node, "train") for node in nodes]))
            states = [reply.content.array_records["state"].to_torch_state_dict() for reply in replies if not reply.has_error()]
            if len(states) < clients:
                raise RuntimeError(f"{clients - len(states)} clients failed: {next(r.error.reason for r in replies if r.has_error())}")
            state = ArrayRecord({name: sum(one[name] for one in states) / len(states) for name in states[0]})
            if round:
                warm.append(time.perf_counter() - began)

    resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": {"num_cpus": cores}}
    run_simulation(server_app, client_app, num_supernodes=clients, backend_config=resources)  # type: ignore[arg-type]  # its own example
    print(json.dumps({"warm": statistics.mean(warm)}))


@cache
def texts(folder: str) -> tuple[Any, Any]:
    """The data, which Flower's example keeps too."""
    from fedpeft.data.files import Files

    dataset = Files(path=folder, task="text", text="text", label="label").read(seed=0)
    return dataset, {}


@cache
def loaded(folder: str) -> tuple[Any, Any]:
    """Base model with LoRA, and the encoded texts."""
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    from fedpeft.models.load import encoder, quiet
    from fedpeft.models.minilm import packaged

    dataset, kept = texts(folder)
    where = str(packaged())
    with quiet():
        torch.manual_seed(0)
        module = transformers.AutoModelForSequenceClassification.from_pretrained(where, num_labels=len(dataset.classes))
    if "examples" not in kept:
        kept["examples"] = encoder("text", where, module, 128)[0](dataset.train)
    model = get_peft_model(module, LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=["query", "value"]))
    return model.eval(), kept["examples"]


def start_of(made: tuple[Any, Any]) -> dict[str, Any]:
    """The adapter and the head."""
    from peft import get_peft_model_state_dict

    state: dict[str, Any] = get_peft_model_state_dict(made[0])
    return state


def trained_by_trainer(folder: str, state: dict[str, Any], client: int, clients: int, steps: int, batch: int) -> dict[str, Any]:
    """One client's call as in Flower's example: everything but the texts is loaded anew."""
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    from fedpeft.models.load import quiet
    from fedpeft.models.minilm import packaged

    dataset, _ = texts(folder)
    table, where = dataset.train, str(packaged())
    rows = torch.randperm(len(table), generator=torch.Generator().manual_seed(0)).chunk(clients)[client]
    with quiet(), tempfile.TemporaryDirectory() as place:
        tokenizer = transformers.AutoTokenizer.from_pretrained(where)
        module = transformers.AutoModelForSequenceClassification.from_pretrained(where, num_labels=len(dataset.classes))
        model = get_peft_model(module, LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=["query", "value"]))
        set_peft_model_state_dict(model, state)
        mine = [
            {**tokenizer(table.inputs[row], truncation=True, max_length=128), "labels": int(table.labels[row])} for row in rows.tolist()
        ]
        facts = transformers.TrainingArguments(
            output_dir=place, max_steps=steps, per_device_train_batch_size=batch, learning_rate=3e-3, lr_scheduler_type="constant",
            report_to=[], disable_tqdm=True, save_strategy="no", logging_strategy="no", use_cpu=True,
        )  # fmt: skip
        collator = transformers.DataCollatorWithPadding(tokenizer)
        transformers.Trainer(model=model, args=facts, train_dataset=mine, data_collator=collator).train()
    ended: dict[str, Any] = get_peft_model_state_dict(model)
    return ended


def trained(folder: str, state: dict[str, Any], client: int, clients: int, steps: int, batch: int) -> dict[str, Any]:
    """One client's call on what the actor keeps: state in, steps with stock peft, state out."""
    import torch
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    model, examples = loaded(folder)
    set_peft_model_state_dict(model, state)
    rows = torch.randperm(len(examples), generator=torch.Generator().manual_seed(0)).chunk(clients)[client]
    descent = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for at in range(steps):
        inputs, labels = examples.batch(rows[(at * batch) % len(rows) :][:batch])
        model(**inputs, labels=labels).loss.backward()
        descent.step()
        descent.zero_grad()
    ended: dict[str, Any] = get_peft_model_state_dict(model)
    return ended


if __name__ == "__main__":
    from experiments.benchmarks.engine_ray import main as imported  # Ray's actors find functions by module, and not in __main__

    imported(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
