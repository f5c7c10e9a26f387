"""Any Hugging Face model, from the hub or a local folder, with a fresh head for the task."""

import hashlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch

from fedpeft import seeds
from fedpeft.data.table import Dataset, Table, Task
from fedpeft.models.base import Base, Examples, Images, Tokens

HEADS = ("classifier", "score", "pre_classifier", "classification_head")  # module names of task heads in transformers
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class HuggingFace:
    """`model.id` is a hub id or a local folder; the model class follows from the data's task."""

    id: str | None = None
    revision: str | None = None
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    max_length: int = 128  # tokens kept of a text

    def load(self, dataset: Dataset, *, seed: int, device: torch.device) -> Base:
        """The pre-trained model; what the checkpoint lacks (the head) is drawn from `seed`."""
        if not self.id:
            raise ValueError("model.id is not set: give a Hugging Face id or a local folder, for instance model.id=bert-base-uncased")
        return load(self.id, dataset, seed=seed, device=device, revision=self.revision, dtype=self.dtype, max_length=self.max_length)


def load(
    where: str,
    dataset: Dataset,
    *,
    seed: int,
    device: torch.device,
    revision: str | None = None,
    dtype: str = "fp32",
    max_length: int = 128,
) -> Base:
    """The model at hub id or folder `where` for the task of `dataset`."""
    import transformers

    if dtype not in DTYPES:
        raise ValueError(f"model.dtype={dtype}: needed is one of {', '.join(DTYPES)}")
    kinds = {
        "text": transformers.AutoModelForSequenceClassification,
        "image": transformers.AutoModelForImageClassification,
        "language": transformers.AutoModelForCausalLM,
    }
    sizes: dict[str, Any] = {} if dataset.task == "language" else {"num_labels": len(dataset.classes), "ignore_mismatched_sizes": True}
    with quiet(), torch.random.fork_rng():
        torch.manual_seed(seeds.seed(seed, purpose="head"))
        try:
            module, facts = kinds[dataset.task].from_pretrained(
                where, revision=revision, dtype=DTYPES[dtype], output_loading_info=True, **sizes
            )
            encode, words = encoder(dataset.task, where, module, max_length, revision)
        except OSError as fault:
            raise ValueError(
                f"model.id={where} could not be loaded: {str(fault).splitlines()[0]} Check the id, or give a local folder; "
                "without a network use model=minilm (after `make minilm`) or model=tiny_vit"
            ) from None
    fresh = {name if isinstance(name, str) else name[0] for key in ("missing_keys", "mismatched_keys") for name in facts[key]}
    names = [name for name, _ in module.named_parameters()]
    head = () if dataset.task == "language" else tuple(n for n in names if n in fresh or n.split(".")[0] in HEADS)
    _keep_head_precise(module, head)
    return Base(module.to(device), dataset.task, head, encode, where, device, words)


def encoder(task: Task, where: str, module: Any, max_length: int, revision: str | None = None) -> tuple[Callable[[Table], Examples], str]:
    """What turns a table into examples for this model, and a digest of its vocabulary."""
    import transformers

    if task == "image":
        processor = transformers.AutoImageProcessor.from_pretrained(where, revision=revision)
        side, patch = getattr(module.config, "image_size", None), getattr(module.config, "patch_size", None)
        positions = (side // patch) ** 2 + 1 if isinstance(side, int) and isinstance(patch, int) else 196
        return lambda table: Images(_processed(processor, table), table.labels, positions), ""
    tokenizer = transformers.AutoTokenizer.from_pretrained(where, revision=revision)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    module.config.pad_token_id = tokenizer.pad_token_id
    most = getattr(module.config, "max_position_embeddings", None) or max_length
    if max_length > most:
        raise ValueError(f"model.max_length={max_length} is more than the {most} positions of {where}; lower it")
    typed = getattr(module.config, "type_vocab_size", 0) > 1  # a GPT-2 would add word embeddings for the types
    joined = not typed and not tokenizer.num_special_tokens_to_add(pair=True)  # a decoder's tokenizer puts nothing between two texts

    def encode(table: Table) -> Tokens:
        if isinstance(table.inputs, torch.Tensor):
            raise ValueError(f"the data are images, {where} reads text; choose model=tiny_vit or an image model by model.id=")
        pairs = bool(table.inputs) and isinstance(table.inputs[0], tuple)
        inputs: list[Any] = [tokenizer.eos_token.join(pair) for pair in table.inputs] if pairs and joined else list(table.inputs)
        texts = [list(part) for part in zip(*inputs, strict=True)] if pairs and not joined else [inputs]
        made = tokenizer(*texts, truncation=True, max_length=max_length, return_token_type_ids=pairs and typed, return_attention_mask=False)
        rows = made["input_ids"]
        types = [t for row in made["token_type_ids"] for t in row] if pairs and typed else None
        return tokens(rows, table.labels, tokenizer.pad_token_id, types, predicts=task == "language")

    words = hashlib.blake2b(repr(sorted(tokenizer.get_vocab().items())).encode(), digest_size=12)
    return encode, words.hexdigest()


def tokens(rows: list[list[int]], labels: torch.Tensor, padding: int, types: list[int] | None = None, *, predicts: bool = False) -> Tokens:
    """`Tokens` of Python lists; `types` is flat."""
    short = 2 if predicts else 1
    if any(len(row) < short for row in rows):
        raise ValueError(f"a text has fewer than {short} tokens; drop empty rows from the data")
    ids = torch.tensor([t for row in rows for t in row], dtype=torch.int32)
    ends = torch.tensor([len(row) for row in rows], dtype=torch.long).cumsum(0)
    flat = None if types is None else torch.tensor(types, dtype=torch.int8)
    return Tokens(ids, ends, labels, padding, types=flat, predicts=predicts)


@contextmanager
def quiet() -> Iterator[None]:
    """Silences transformers' notes on newly initialized heads: a fresh head is what we ask for."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()


def _keep_head_precise(module: Any, head: tuple[str, ...]) -> None:
    """The head is trained, so it stays in float32 under a base in half precision, which would lose the steps of training."""
    for path in {name.rpartition(".")[0] for name in head}:
        inner = module.get_submodule(path)
        if inner.weight.dtype in (torch.float16, torch.bfloat16):
            inner.float().register_forward_pre_hook(lambda _, inputs: tuple(x.float() for x in inputs))


def _processed(processor: Any, table: Table) -> torch.Tensor:
    if not isinstance(table.inputs, torch.Tensor):
        raise ValueError("the data are texts, the model reads images; choose model=minilm or a text model by model.id=")
    images = table.inputs if table.inputs.shape[1] == 3 else table.inputs.expand(-1, 3, -1, -1)
    pixels: torch.Tensor = processor(list(images), return_tensors="pt", do_rescale=False)["pixel_values"]
    return pixels
