"""A plain Flower app, as its user writes it: a peft model, stock records, and a grid of such clients. For the tests of server/flower.py."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import peft
import pytest
import torch
from flwr.app import ArrayRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

from fedpeft.simulation import InProcessGrid
from server.flower import FlowerStrategy, peft_names

FIRST = InProcessGrid.FIRST
ALPHA = 3.0  # so that no scale is a power of two: bits would hide a mistake
A, B = "base_model.model.q.lora_A.weight", "base_model.model.q.lora_B.weight"
HEAD = "base_model.model.classifier.weight"
NAMES = peft_names(lambda rank: ALPHA / rank)


# A plain Flower app, as its user writes it


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.classifier = nn.Linear(7, 6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(torch.tanh(self.q(x)))


def model(rank: int = 4) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = peft.LoraConfig(r=rank, lora_alpha=ALPHA, target_modules=["q"], modules_to_save=["classifier"])
        return peft.get_peft_model(Tiny(), config)


def start(rank: int = 4, seed: int = 1) -> ArrayRecord:
    """As a user's server has it; B is not zero, so that products count from the first round on."""
    rng = torch.Generator().manual_seed(seed)
    state = peft.get_peft_model_state_dict(model(rank))
    return ArrayRecord({name: torch.randn(tensor.shape, generator=rng) for name, tensor in state.items()})


Spoil = Callable[[Message, RecordDict], RecordDict | Error]


@dataclass
class Plain:
    """A federation of plain clients; the client at partition k has k + 1 examples and trains on them for three steps."""

    nodes: int = 3
    spoil: dict[int, Spoil] = field(default_factory=dict)  # partition -> what becomes of its reply
    order: Callable[[Sequence[Message]], Sequence[Message]] = list  # stock sampling draws the nodes in any order: here they are sorted
    honours: bool = True  # what the config says to train
    sent: list[tuple[int, RecordDict]] = field(default_factory=list)  # (partition, content) of training messages
    replies: list[tuple[int, RecordDict]] = field(default_factory=list)
    judged: list[tuple[int, RecordDict]] = field(default_factory=list)

    def grid(self) -> InProcessGrid:
        app = self.app()

        def serve(messages: Sequence[Message]) -> Iterator[Message]:
            for message in self.order(sorted(messages, key=lambda message: message.metadata.dst_node_id)):
                node = message.metadata.dst_node_id
                yield app(message, Context(1, node, {"partition-id": node - FIRST}, RecordDict(), {}))

        return InProcessGrid(serve, self.nodes)

    def app(self) -> ClientApp:
        app = ClientApp()

        @app.train()
        def train(message: Message, context: Context) -> Message:
            part = int(context.node_config["partition-id"])
            self.sent.append((part, message.content))
            here = self.trained(part, message.content)
            arrays = ArrayRecord(peft.get_peft_model_state_dict(here))
            content: RecordDict | Error = RecordDict(
                {"arrays": arrays, "metrics": MetricRecord({"num-examples": part + 1, "loss": float(part)})}
            )
            if part in self.spoil:
                content = self.spoil[part](message, content)
            if isinstance(content, RecordDict):
                self.replies.append((part, content))
            return Message(content, reply_to=message)

        @app.evaluate()
        def evaluate(message: Message, context: Context) -> Message:
            part = int(context.node_config["partition-id"])
            self.judged.append((part, message.content))
            return Message(RecordDict({"metrics": MetricRecord({"num-examples": part + 1, "loss": float(part)})}), reply_to=message)

        return app

    def trained(self, part: int, content: RecordDict) -> Any:
        state = content["arrays"].to_torch_state_dict()
        here = model(len(state[A]))
        peft.set_peft_model_state_dict(here, state)
        trains = content["config"].get("fedpeft.trains", list(state))
        for name, parameter in here.named_parameters():
            plain = name.replace(".modules_to_save", "").replace(".default", "")
            parameter.requires_grad_(plain in trains or (not self.honours and plain in state))
        rng = torch.Generator().manual_seed(part)
        x, y = torch.randn(part + 1, 7, generator=rng), torch.randint(3, (part + 1,), generator=rng)
        optimizer = torch.optim.SGD([p for p in here.parameters() if p.requires_grad], lr=0.5)
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(here(x), y).backward()
            optimizer.step()
        return here

    def run(self, strategy: Any, rounds: int = 1, arrays: ArrayRecord | None = None) -> Any:
        return strategy.start(self.grid(), start() if arrays is None else arrays, num_rounds=rounds)


def of(strategy: Any, **more: Any) -> FlowerStrategy[Any]:
    return FlowerStrategy(strategy, **{"names": NAMES, "min_train_nodes": 1, "min_evaluate_nodes": 1, "min_available_nodes": 1} | more)


def change(record: ArrayRecord) -> torch.Tensor:
    """What the adapter does to q: s B A, in float64."""
    state = record.to_torch_state_dict()
    return ALPHA / len(state[A]) * state[B].double() @ state[A].double()


def bits(record: ArrayRecord) -> dict[str, bytes]:
    return {name: array.data for name, array in record.items()}


def said(caplog: pytest.LogCaptureFixture, level: int = logging.WARNING) -> str:
    return "\n".join(record.getMessage() for record in caplog.records if record.levelno >= level)
