"""Small transformers that need no download: made from a config, pre-trained once on the data set's public part, and cached.

They are ordinary Hugging Face models in ordinary folders: stock `from_pretrained` loads them.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from filelock import FileLock
from torch import Tensor

from fedpeft import seeds
from fedpeft.data.table import Dataset, Table
from fedpeft.models.base import Base, Examples, Images
from fedpeft.models.load import quiet, tokens
from fedpeft.models.score import losses


@dataclass(frozen=True)
class TinyViT:
    """A pre-norm vision transformer for small images: 16 patches, width 64, 3 layers by default (102,666 parameters)."""

    width: int = 64
    layers: int = 3
    heads: int = 4
    patches: int = 4  # per side
    epochs: int = 25  # of pre-training on the public images; 0 keeps the random start
    batch: int = 32
    lr: float = 2e-3  # peak of a one-cycle schedule; reached 0.98 on upright digits

    def load(self, dataset: Dataset, *, seed: int, device: torch.device) -> Base:
        """The model pre-trained on `dataset.public`."""
        images = dataset.train.inputs
        if dataset.task != "image" or not isinstance(images, Tensor):
            raise ValueError(f"model=tiny_vit reads images, the data set's task is {dataset.task}; choose model=minilm or model=tiny_llama")
        channels, side = images.shape[1], images.shape[2]
        if side % self.patches or images.shape[3] != side:
            raise ValueError(
                f"model.patches={self.patches} does not divide images of {tuple(images.shape[2:])}; set data.size or model.patches"
            )
        from transformers import ViTConfig, ViTForImageClassification

        config = ViTConfig(
            hidden_size=self.width, num_hidden_layers=self.layers, num_attention_heads=self.heads, intermediate_size=2 * self.width,
            image_size=side, patch_size=side // self.patches, num_channels=channels, num_labels=len(dataset.classes),
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
            initializer_range=0.08,  # the usual 0.02 is for widths of hundreds: 0.82 instead of 0.98 after pre-training
        )  # fmt: skip
        encode = partial(_pixels, positions=self.patches**2 + 1)
        return _base(self, ViTForImageClassification, config, dataset, encode, seed, device, head="classifier.")


@dataclass(frozen=True)
class TinyLlama:
    """A byte-level Llama with grouped-query attention: width 128, 4 layers by default; reads language, or classifies texts."""

    width: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    max_length: int = 160  # bytes kept of a text
    epochs: int = 6  # of pre-training on the public texts; 0 keeps the random start
    batch: int = 16
    lr: float = 2e-3

    def load(self, dataset: Dataset, *, seed: int, device: torch.device) -> Base:
        """The model pre-trained on `dataset.public`, if there is such a part."""
        if dataset.task == "image":
            raise ValueError("model=tiny_llama reads texts, the data set's task is image; choose model=tiny_vit")
        from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

        config = LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=self.width, intermediate_size=3 * self.width, num_hidden_layers=self.layers,
            num_attention_heads=self.heads, num_key_value_heads=self.kv_heads, max_position_embeddings=self.max_length + 2,
            num_labels=max(len(dataset.classes), 2), pad_token_id=PADDING, bos_token_id=START, eos_token_id=END, initializer_range=0.05,
        )  # fmt: skip
        kind, head = (LlamaForCausalLM, None) if dataset.task == "language" else (LlamaForSequenceClassification, "score.")
        return _base(
            self, kind, config, dataset, lambda table: _bytes(table, self.max_length, kind is LlamaForCausalLM), seed, device, head
        )


START, END, PADDING, SEPARATOR, VOCABULARY = 256, 257, 258, 259, 260


def cache() -> Path:
    """Where pre-trained tiny models are kept: $FEDPEFT_CACHE, else the user's cache folder."""
    home = os.environ.get("FEDPEFT_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fedpeft"
    return Path(home)


def _base(
    source: TinyViT | TinyLlama, kind: Any, config: Any, dataset: Dataset, encode: Callable[[Table], Examples], seed: int,
    device: torch.device, head: str | None,
) -> Base:  # fmt: skip
    folder = cache() / _key(source, config, dataset.public, seed)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with quiet(), FileLock(f"{folder}.lock"):  # several processes ask at once; one trains
        if not (folder / "config.json").exists():
            with torch.random.fork_rng():
                torch.manual_seed(seeds.seed(seed, purpose="tiny model"))
                module = kind(config)
            if dataset.public is None or not source.epochs:
                logging.getLogger("fedpeft").warning(
                    "%s keeps its random start: the data have no public part (see data.public_share), or model.epochs=0",
                    type(source).__name__,
                )
            else:
                _pretrain(module, encode(dataset.public), dataset, source, seed)
            made = folder.with_name(folder.name + f".{os.getpid()}")
            module.save_pretrained(made)
            made.rename(folder)
        module = kind.from_pretrained(folder)
    names = tuple(name for name, _ in module.named_parameters() if head and name.startswith(head))
    return Base(module.to(device), dataset.task, names, encode, str(folder), device)


def _key(source: TinyViT | TinyLlama, config: Any, public: Table | None, seed: int) -> str:
    made = hashlib.blake2b(
        json.dumps([type(source).__name__, asdict(source), seed, config.num_labels], sort_keys=True).encode(), digest_size=10
    )
    made.update(f"{torch.__version__} {transformers.__version__} {torch.get_num_threads()} {config.to_json_string()}".encode())
    if public is not None:
        made.update(public.labels.numpy().tobytes())
        made.update(public.inputs.numpy().tobytes() if isinstance(public.inputs, Tensor) else repr(public.inputs).encode())
    return f"{type(source).__name__.lower()}-{made.hexdigest()}"


def _pretrain(module: Any, examples: Examples, dataset: Dataset, source: TinyViT | TinyLlama, seed: int) -> None:
    rng = seeds.generator(seed, purpose="pre-training")
    steps = source.epochs * -(-len(examples) // source.batch)
    optimizer = torch.optim.AdamW(module.parameters(), source.lr, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, source.lr, total_steps=steps)
    module.train()
    for _ in range(source.epochs):
        rows = torch.randperm(len(examples), generator=rng)
        for some in rows.split(source.batch):
            inputs, targets = examples.batch(some)
            optimizer.zero_grad()
            losses(dataset.task, module(**inputs).logits, targets).mean().backward()
            optimizer.step()
            schedule.step()
    module.eval()


def _pixels(table: Table, positions: int) -> Images:
    assert isinstance(table.inputs, Tensor)
    return Images(table.inputs, table.labels, positions)


def _bytes(table: Table, most: int, predicts: bool) -> Examples:
    assert not isinstance(table.inputs, Tensor)
    rows = [[START, *_text(text)[: most - 2], END] for text in table.inputs]
    return tokens(rows, table.labels, PADDING, predicts=predicts)


def _text(text: str | tuple[str, str]) -> list[int]:
    return list(text.encode()) if isinstance(text, str) else [*text[0].encode(), SEPARATOR, *text[1].encode()]
