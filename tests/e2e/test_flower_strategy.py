"""FlowerStrategy in an app of stock Flower, plain ClientApp and all, on Flower's own simulation engine."""

import importlib.util
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from flwr.app import Context, Message, RecordDict

from fedpeft.simulation import InProcessGrid

BIN = Path(sys.executable).parent

PROJECT = """
[project]
name = "plain"
version = "1.0.0"
description = "An app of stock Flower"
license = "Apache-2.0"

[tool.flwr.app]
publisher = "someone"

[tool.flwr.app.components]
serverapp = "plain:server"
clientapp = "plain:client"

[tool.flwr.app.config]
strategy = "flexlora"
out = ""
"""

# What a user writes. The server's half is the example of the documentation.
APP = """
import peft
import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from torch import nn

from fedpeft.strategy import Federation
from server.flower import FlowerStrategy, peft_names
from strategies.flexlora import flexlora
from strategies.flora import flora

server = ServerApp()
client = ClientApp()


def model():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3))
    return peft.get_peft_model(base, peft.LoraConfig(r=2, lora_alpha=3, target_modules=["0"], modules_to_save=["2"]))


@server.main()
def main(grid, context):
    run = Federation(rounds=3)
    if context.run_config["strategy"] == "flora":
        strategy = FlowerStrategy(flora(run), names=peft_names(3 / 2), base_delta="send")
    else:
        strategy = FlowerStrategy(flexlora(run), names=peft_names(3 / 2))
    start = ArrayRecord(peft.get_peft_model_state_dict(model()))
    result = strategy.start(grid, start, num_rounds=3)
    made = {"arrays": result.arrays.to_torch_state_dict(), "delta": strategy.base_delta.to_torch_state_dict()}
    made["metrics"] = {round: dict(record) for round, record in result.train_metrics_clientapp.items()}
    made["losses"] = {round: record["loss"] for round, record in result.evaluate_metrics_clientapp.items()}
    torch.save(made, context.run_config["out"])


def received(message):
    here = model()
    peft.set_peft_model_state_dict(here, message.content["arrays"].to_torch_state_dict())
    moved = message.content["base_delta"].to_torch_state_dict() if "base_delta" in message.content else {}
    for name in moved:
        if name.endswith(".B"):
            layer = here.get_base_model().get_submodule(name.split("/", 1)[1].removesuffix(".B"))
            layer.weight.data += moved[name] @ moved[name.removesuffix("B") + "A"]
    return here


def data(context):
    part = int(context.node_config["partition-id"])
    rng = torch.Generator().manual_seed(part)
    return torch.randn(part + 2, 7, generator=rng), torch.randint(3, (part + 2,), generator=rng)


@client.train()
def train(message, context):
    here, (x, y), trains = received(message), data(context), message.content["config"]["fedpeft.trains"]
    for name, parameter in here.named_parameters():
        parameter.requires_grad_(name.replace(".modules_to_save", "").replace(".default", "") in trains)
    optimizer = torch.optim.SGD([p for p in here.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(here(x), y)
        loss.backward()
        optimizer.step()
    metrics = MetricRecord({"num-examples": len(y), "loss": loss.item()})
    return Message(RecordDict({"arrays": ArrayRecord(peft.get_peft_model_state_dict(here)), "metrics": metrics}), reply_to=message)


@client.evaluate()
def evaluate(message, context):
    here, (x, y) = received(message), data(context)
    metrics = MetricRecord({"num-examples": len(y), "loss": nn.functional.cross_entropy(here(x), y).item()})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)
"""


@pytest.fixture
def app(tmp_path: Path) -> Path:
    """The folder of the app."""
    folder = tmp_path / "plain"
    folder.mkdir()
    (folder / "pyproject.toml").write_text(PROJECT)
    (folder / "plain.py").write_text(APP)
    return folder


def here(app: Path, strategy: str) -> dict:
    """What the same app gives over the in-process grid."""
    spec = importlib.util.spec_from_file_location("plain", app / "plain.py")
    assert spec is not None
    assert spec.loader is not None
    plain = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(plain)

    def serve(messages: Sequence[Message]) -> Iterator[Message]:
        for message in messages:
            node = message.metadata.dst_node_id
            yield plain.client(message, Context(1, node, {"partition-id": node - InProcessGrid.FIRST}, RecordDict(), {}))

    out = app / "here.pt"
    with torch.random.fork_rng():
        plain.main(InProcessGrid(serve, 3), Context(1, 1, {}, RecordDict(), {"strategy": strategy, "out": str(out)}))
    return torch.load(out, weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["flexlora", "flora"])
def test_an_app_of_stock_flower_runs_with_our_strategy_and_gives_what_it_gives_in_process(superlink, app, strategy):
    environment, neutral = superlink
    out = app / "there.pt"
    flower = subprocess.run(
        [str(BIN / "flwr"), "run", str(app), "sim", "--stream", "--federation-config", "num-supernodes=3",
         "--run-config", f"strategy='{strategy}' out='{out}'"],
        cwd=neutral, env=environment, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert out.exists(), flower.stdout + flower.stderr
    there, same = torch.load(out, weights_only=True), here(app, strategy)
    assert {round: record["fedpeft.answers"] for round, record in there["metrics"].items()} == {1: 3, 2: 3, 3: 3}
    assert there["losses"][3] < there["losses"][1]
    assert there["losses"] == pytest.approx(same["losses"], abs=1e-5)
    assert bool(there["delta"]) == (strategy == "flora")
    if strategy == "flexlora":
        product = [
            made["arrays"]["base_model.model.0.lora_B.weight"] @ made["arrays"]["base_model.model.0.lora_A.weight"]
            for made in (there, same)
        ]
        assert torch.allclose(*product, atol=1e-5)
