"""What all tests share: one cache of tiny models, so that each is pre-trained once, examples that repeat, and tiny bases with every kind of
layer an adapter meets: Linear, GPT-2's Conv1D, grouped-query attention, tied embeddings, no square MLP."""

import os
from collections.abc import Callable

import pytest
import torch
from hypothesis import settings
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

from fedpeft.models.base import Base, Examples, Images
from fedpeft.models.load import quiet, tokens

# The same examples in every run: a test that fails, fails again. HYPOTHESIS_PROFILE=explore draws new ones.
settings.register_profile("repeatable", derandomize=True, database=None, deadline=None)
settings.register_profile("explore", max_examples=1000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


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

    def make(kind: str, dtype: torch.dtype = torch.float64, source: str = "nowhere") -> Base:
        with torch.random.fork_rng(), quiet():
            torch.manual_seed(0)
            module = MADE[kind]()
            for parameter in module.parameters():
                if parameter.dim() == 1:
                    torch.nn.init.normal_(parameter, 1.0, 0.1)
        head = tuple(name for name, _ in module.named_parameters() if name.startswith(("classifier.", "score.")))
        return Base(module.to(dtype), TASK[kind], head, lambda table: table, source)

    return make


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
