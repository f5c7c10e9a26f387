"""What all tests share: one cache of tiny models, so that each is pre-trained once, examples that repeat, and tiny bases with every kind of
layer an adapter meets: Linear, GPT-2's Conv1D, grouped-query attention, tied embeddings, no square MLP."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

from fedpeft.adapters.base import Adapter
from fedpeft.adapters.lora import Lora
from fedpeft.adapters.sparse import support
from fedpeft.aggregate import weighted_mean
from fedpeft.lowrank import LowRank, product
from fedpeft.messages import Broadcast, Update
from fedpeft.models.base import Base, Examples, Images
from fedpeft.models.load import quiet, tokens
from fedpeft.strategy import Phase, Strategy
from fedpeft.tensors import Tensors, is_own, only, targets

# The same examples in every run: a test that fails, fails again. HYPOTHESIS_PROFILE=explore draws new ones.
settings.register_profile("repeatable", derandomize=True, database=None, deadline=None)
settings.register_profile("explore", max_examples=1000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


@pytest.hookimpl(trylast=True)  # what -m leaves out is out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those that wait for processes come first, so that none is waited for at the end, and each worker of xdist has as many of them.

    What is collected is dealt to xdist's workers in blocks, one after the other (`--dist worksteal`).
    """
    items.sort(key=lambda item: 0 if "e2e" in item.path.parts else 1 if item.get_closest_marker("slow") else 2)
    waiting = sum("e2e" in item.path.parts or item.get_closest_marker("slow") is not None for item in items)
    first, rest, dealt = items[:waiting], items[waiting:], list[pytest.Item]()
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    for worker in range(workers):
        block = (len(items) - len(dealt)) // (workers - worker)
        own = first[worker::workers]
        more = max(block - len(own), 0)
        dealt += own + rest[:more]
        rest = rest[more:]
    items[:] = dealt + rest


@pytest.fixture(scope="session", autouse=True)
def one_thread_and_an_own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    torch.set_num_threads(1)
    base = tmp_path_factory.getbasetemp()
    os.environ["FEDPEFT_CACHE"] = str((base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "fedpeft-cache")


SHAPE = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
TEXT = {"vocab_size": 64, "max_position_embeddings": 48, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GPT2 = {"vocab_size": 64, "n_positions": 48, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_inner": 40} | {
    key: TEXT[key] for key in ("pad_token_id", "bos_token_id", "eos_token_id")
}
IMAGE = {"image_size": 8, "patch_size": 4, "num_channels": 1}
MADE = {
    "bert": lambda: BertForSequenceClassification(BertConfig(**SHAPE, **TEXT, num_labels=3)),
    "roberta": lambda: RobertaForSequenceClassification(RobertaConfig(**SHAPE, **TEXT, num_labels=3)),  # a head of two layers
    "gpt2_classifier": lambda: GPT2ForSequenceClassification(GPT2Config(**GPT2, num_labels=3)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, **TEXT, num_key_value_heads=2)),
    "llama_classifier": lambda: LlamaForSequenceClassification(LlamaConfig(**SHAPE, **TEXT, num_key_value_heads=2, num_labels=3)),
    "vit": lambda: ViTForImageClassification(ViTConfig(**SHAPE, **IMAGE, num_labels=3)),
}
TASK = {"bert": "text", "roberta": "text", "gpt2_classifier": "text", "gpt2": "language", "llama": "language", "vit": "image"} | {
    "llama_classifier": "text"
}


@pytest.fixture
def tiny() -> Callable[..., Base]:
    """The base of a kind in `MADE`, the same weights each time; biases and norms random too, so that none hides a mistake."""

    return _made_tiny


def _made_tiny(kind: str, dtype: torch.dtype = torch.float64, source: str = "nowhere") -> Base:
    with torch.random.fork_rng(), quiet():
        torch.manual_seed(0)
        module = MADE[kind]()
        for parameter in module.parameters():
            if parameter.dim() == 1:
                torch.nn.init.normal_(parameter, 1.0, 0.1)
    head = tuple(name for name, _ in module.named_parameters() if name.startswith(("classifier.", "score.")))
    return Base(module.to(dtype), TASK[kind], head, lambda table: table, source)


@pytest.fixture
def examples() -> Callable[..., Examples]:
    """Twelve random examples for a base; texts have 4 to 8 tokens."""

    def make(base: Base, seed: int = 0) -> Examples:
        rng = torch.Generator().manual_seed(seed)
        labels = torch.randint(3, (12,), generator=rng)
        if base.task == "image":
            return Images(torch.randn(12, 1, 8, 8, generator=rng).to(next(base.module.parameters()).dtype), labels)
        rows = [torch.randint(3, 64, (4 + i % 5,), generator=rng).tolist() for i in range(12)]
        return tokens(rows, labels, padding=0, predicts=base.task == "language")

    return make


@pytest.fixture
def batch(examples) -> Callable[..., dict[str, torch.Tensor]]:
    """The model's arguments for six of them."""
    return lambda base: examples(base).batch(torch.arange(6))[0]


# A federation on paper: clients that move what their phase trains by random amounts, in float64, without data.

SIDES = {"layer.0.query": (7, 11), "layer.0.value": (12, 5), "layer.1.query": (6, 6)}  # out x in
RANK, ALPHA = 3, 4.5
Trained = dict[int, Tensors]  # client -> where it ended, before anything is left out


def paper(dtype: torch.dtype = torch.float64) -> Base:
    """A model of three linear layers, none but one square, and a head."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        module = nn.Module()
        for path, (m, n) in SIDES.items():
            parent = module
            for part in path.split(".")[:-1]:
                if part not in parent._modules:
                    parent.add_module(part, nn.Module())
                parent = parent.get_submodule(part)
            parent.add_module(path.rpartition(".")[2], nn.Linear(n, m, bias=False))
        module.add_module("classifier", nn.Linear(6, 4))
    module.get_output_embeddings = lambda: None
    module.config = SimpleNamespace(model_type="paper", to_dict=dict, use_cache=None)
    return Base(module.to(dtype), "text", ("classifier.weight", "classifier.bias"), lambda table: table, "nowhere")


_STARTS: dict[tuple[str, torch.dtype, str], Tensors] = {}


def _started(kind: str, dtype: torch.dtype, adapter: Adapter) -> Tensors:
    key = (kind, dtype, repr(adapter))
    if key not in _STARTS:
        _STARTS[key] = adapter.attach(paper(dtype) if kind == "paper" else _made_tiny(kind, dtype), 0).read()
    return _STARTS[key]


def starts_of(strategy: Strategy[Any], kind: str = "paper", dtype: torch.dtype = torch.float64) -> dict[str, Tensors]:
    """The start of every adapter of the strategy on a tiny base: LoRA of rank 3 on all linear layers, and what it makes of that."""
    main = Lora(rank=RANK, alpha=ALPHA, targets=tuple(SIDES) if kind == "paper" else "all-linear")
    return {"main": _started(kind, dtype, main)} | {name: _started(kind, dtype, make(main)) for name, make in strategy.adapters.items()}


@dataclass
class OnPaper:
    """A strategy, its state and what its clients keep."""

    strategy: Strategy[Any]
    dtype: torch.dtype = torch.float64
    state: Any = None
    round: int = 0
    memory: dict[tuple[int, str], Tensors] = field(default_factory=dict)
    kind: str = "paper"

    def __post_init__(self) -> None:
        self.starts = starts_of(self.strategy, self.kind, self.dtype)
        if self.state is None:
            self.state = self.strategy.init(self.starts)

    @property
    def phase(self) -> Phase:
        return self.strategy.phase(self.round)

    def start(self, client: int) -> Tensors:
        """Where `client` starts this round: the broadcast, and what it keeps laid over it."""
        kept = self.memory.get((client, self.phase.adapter), {})
        sent = self.strategy.broadcast(self.state, self.round, client).tensors | kept
        rates = {f"rate/{name}": torch.tensor(0.1, dtype=self.dtype) for name in sent if not is_own(name)} if self.phase.rates else {}
        return sent | rates

    def train(self, client: int, *, by: float = 1.0, seed: int | None = None, weight: float | None = None) -> tuple[Update, Tensors]:
        """What `client` sends, and where it ended; what it keeps is kept. Clients with the same `seed` move by the same amounts."""
        phase, start = self.phase, self.start(client)
        rng = torch.Generator().manual_seed(1000 * self.round + (client if seed is None else seed))
        now = {}
        for name, tensor in start.items():
            moves = phase.trains(name) and not is_own(name) and tensor.is_floating_point()
            now[name] = tensor + by * torch.randn(tensor.shape, generator=rng, dtype=tensor.dtype) if moves else tensor
        end = phase.finish(now, start, 5) if phase.finish else now
        self.memory[client, phase.adapter] = only(end, phase.keeps)
        return Update(client, only(end, phase.shares), float(client + 1) if weight is None else weight), now

    def play(self, clients: Sequence[int] = (0, 1, 2), **how: Any) -> tuple[list[Update], Trained]:
        """The updates of `clients`, and where each ended."""
        pairs = [self.train(client, **how) for client in clients]
        return [update for update, _ in pairs], {update.client: now for update, now in pairs}

    def take(self, updates: Iterable[Update], mean: Callable[[Iterable[Update]], Tensors] = weighted_mean) -> None:
        """Ends the round with `updates`."""
        self.state = self.strategy.aggregate(self.state, self.round, updates, mean)
        self.round += 1

    def advance(self, rounds: int) -> "OnPaper":
        """Plays whole rounds of three clients."""
        for _ in range(rounds):
            self.take(self.play()[0])
        return self

    def model(self, client: int | None = None, now: Tensors | None = None) -> Tensors:
        """What the adapter does: the change of every layer's weight (base deltas included), and the tensors that are no part of it.

        Of the broadcast to `client` with what it keeps laid over it, or of tensors `now` on the broadcast's base deltas.
        """
        sent = self.strategy.broadcast(self.state, self.round, client)
        if now is None:
            now = sent.tensors if client is None else self.start(client)
        plain = {name: tensor for name, tensor in now.items() if not is_own(name)}
        return self.changes(plain, sent.base_delta)

    def changes(self, plain: Tensors, delta: Sequence[Mapping[str, LowRank]] = ()) -> Tensors:
        main = self.starts["main"]
        made = {name: tensor for name, tensor in plain.items() if name.rpartition(".")[0] not in targets(main)}
        for layer in targets(main):
            shape = (len(main[f"{layer}.B"]), main[f"{layer}.A"].shape[1])
            if f"{layer}.values" in plain:
                adapter: Any = self.strategy.adapters[self.phase.adapter](Lora(rank=RANK, targets=tuple(SIDES)))
                change = torch.zeros(shape, dtype=self.dtype)
                change.view(-1)[support(0, layer, shape, adapter.of(shape))] = plain[f"{layer}.values"]
            else:
                change = product(plain, layer).dense()
            made[layer] = change + sum(chunk[layer].dense() for chunk in delta if layer in chunk)
        return made


@pytest.fixture
def federation() -> type[OnPaper]:
    return OnPaper


@pytest.fixture
def distance() -> Callable[[Tensors, Tensors], float]:
    """|| a - b || / || b ||, over tensors of the same names."""

    def relative(a: Tensors, b: Tensors) -> float:
        assert set(a) == set(b)
        top = sum(float((a[name] - b[name]).double().square().sum()) for name in b)
        return (top / max(sum(float(tensor.double().square().sum()) for tensor in b.values()), 1e-300)) ** 0.5

    return relative


@pytest.fixture
def mean_of_products() -> Callable[[Sequence[Update], Trained], Tensors]:
    """The weighted mean of the clients' B @ A, formed layer by layer: what an exact method reaches."""

    def ideal(updates: Sequence[Update], trained: Trained) -> Tensors:
        whole = sum(update.weight for update in updates)
        made = {}
        for layer in SIDES:
            made[layer] = sum(
                update.weight / whole * trained[update.client][f"{layer}.B"] @ trained[update.client][f"{layer}.A"] for update in updates
            )
        return made

    return ideal


@pytest.fixture
def start() -> Tensors:
    return {
        name: tensor.clone()
        for name, tensor in _started("paper", torch.float64, Lora(rank=RANK, alpha=ALPHA, targets=tuple(SIDES))).items()
    }


@pytest.fixture
def products() -> Callable[[Broadcast], Tensors]:
    """The change of every layer that a broadcast makes."""
    return lambda sent: {layer: LowRank(sent.tensors[f"{layer}.B"], sent.tensors[f"{layer}.A"]).dense() for layer in SIDES}
