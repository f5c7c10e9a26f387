"""A low-rank change of a model, wherever it came from, as files that stock Hugging Face loads: one plain LoRA adapter, or the whole model.

`products` maps the path of a linear layer or an embedding in the bare transformers model to what is added to its weight: B @ A, (out, in),
each of a rank of its own; of an embedding (width, words), the transpose of how its weight is stored. The head is the base's own, with the
values it holds now.
"""

import copy
import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors.torch import save_file
from torch import Tensor, nn

from fedpeft.adapters.base import Adapted, is_transposed, layer
from fedpeft.adapters.injected import TASKS, _layers, _wholes
from fedpeft.lowrank import LowRank, distance
from fedpeft.models.base import Base
from fedpeft.models.load import quiet


def save_products(base: Base, products: Mapping[str, LowRank], folder: Path) -> None:
    """Writes `folder` so that `peft.PeftModel.from_pretrained(model, folder)` is the bare model with W0 + B @ A and the base's head.

    The base may carry an adapter meanwhile; only its head is read. A GPT-2 with products on both a Conv1D and a Linear layer, and a model
    with one on tied embeddings, load right too, but peft warns.
    """
    inners = _inners(base.module, products)
    config = _config(base, products, any(is_transposed(inner) for inner in inners.values()))
    own = dict(base.module.named_parameters())
    state: dict[str, Tensor] = {name: own[name] for name in base.head}
    for path, product in products.items():
        a, b = ("embedding_A", "embedding_B") if isinstance(inners[path], nn.Embedding) else ("A.weight", "B.weight")
        state |= {f"{path}.lora_{a}": product.A, f"{path}.lora_{b}": product.B}
    tensors = {f"base_model.model.{name}": tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    facts = {name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n")


@contextmanager
def merged(base: Base, products: Mapping[str, LowRank]) -> Iterator[nn.Module]:
    """The base's own module with W0 + B @ A in its weights, and afterwards the very same weights again.

    The base must be bare: take an adapter off by `Adapted.undo()`, and as that sets the head back to its start too, `restore` the head to
    keep. Raises `ValueError` where a layer is wrapped; hooks and tensors trained in place are not seen. Sums are rounded to the weight's
    dtype. A layer that shares its weight with another is changed alone.
    """
    wrapped = [path for path, inner in base.module.named_modules() if isinstance(getattr(inner, "base_layer", None), nn.Module)]
    if wrapped:
        raise ValueError(f"{wrapped[0]} and {len(wrapped) - 1} more carry an adapter, needed is the bare base; call Adapted.undo() first")
    _inners(base.module, products)
    with Adapted(base, {}, undo=lambda: None, save=lambda _: None).shifted([products]):
        yield base.module


def save_merged(base: Base, products: Mapping[str, LowRank], folder: Path) -> None:
    """Writes the whole model with W0 + B @ A to `folder`, for `AutoModelFor...from_pretrained(folder)`; the base as for `merged`.

    A product on one of two tied layers unties them in the files: `tie_word_embeddings` is false there. The tokenizer is not written.
    """
    model: Any = base.module
    config = model.config
    with merged(base, products):
        model.config = copy.deepcopy(config)  # saving writes into it
        try:
            tied = model.all_tied_weights_keys.items()
            if any(model.get_parameter(one) is not model.get_parameter(other) for one, other in tied):
                model.config.tie_word_embeddings = False
            with quiet():
                model.save_pretrained(folder)
        finally:
            model.config = config


def with_rank(products: Mapping[str, LowRank], rank: int) -> tuple[dict[str, LowRank], float]:
    """The products cut to at most `rank`, each the best of its layer, and |products - cut| / |products| over all layers in Frobenius norm.

    A product whose factors are no wider than `rank` stays as it is.
    """
    if rank < 1:
        raise ValueError(f"rank {rank}: needed is at least 1")
    cut = {path: product if product.rank <= rank else product.truncate(rank) for path, product in products.items()}
    size = math.hypot(*(product.norm() for product in products.values()))
    lost = math.hypot(*(distance(product, cut[path]) for path, product in products.items() if cut[path] is not product))
    return cut, lost / size if size else 0.0


def _inners(module: nn.Module, products: Mapping[str, LowRank]) -> dict[str, nn.Module]:
    """The layers of the products, seen through wrappers. Raises `ValueError` for what is no such layer or does not fit it."""
    if not products:
        raise ValueError("there are no products; needed is one layer at least")
    return {path: _inner(module, path, product) for path, product in products.items()}


def _inner(module: nn.Module, path: str, product: LowRank) -> nn.Module:
    try:
        inner = layer(module, path)
    except AttributeError:
        raise ValueError(
            f"products name {path}, which this {type(module).__name__} lacks; needed are whole paths of the bare model's layers, "
            f"which end in {', '.join(_layers(module))}"
        ) from None
    rows = is_transposed(inner) or isinstance(inner, nn.Embedding)
    weight = getattr(inner, "weight", None)
    if not (rows or isinstance(inner, nn.Linear)) or not isinstance(weight, Tensor):
        raise ValueError(f"products name {path}, a {type(inner).__name__}; needed is a linear layer or an embedding")
    needed = tuple(weight.T.shape if rows else weight.shape)
    if product.shape != needed:
        raise ValueError(f"the product for {path} is {product.shape}, needed is {needed}; is it of the same model?")
    if product.rank < 1:
        raise ValueError(f"the product for {path} has rank 0, needed is at least 1; leave out a layer that does not change")
    return inner


def _config(base: Base, products: Mapping[str, LowRank], transposed: bool) -> peft.LoraConfig:
    """alpha = r for each layer, so that peft's scale alpha / r is 1; r is the largest, for readers that size their buffers by it."""
    most = max(product.rank for product in products.values())
    # peft reads a key as the end of a path, and as a pattern: `^` ties it to the start, too.
    ranks = {f"^{re.escape(path)}": product.rank for path, product in products.items() if product.rank != most}
    kind = type(base.module)
    task = TASKS[base.task]
    config = peft.LoraConfig(
        r=most, lora_alpha=most, rank_pattern=ranks, alpha_pattern=dict(ranks), target_modules=list(products), fan_in_fan_out=transposed,
        modules_to_save=sorted(_wholes(base)) or None, task_type=task, base_model_name_or_path=base.source, inference_mode=True,
        auto_mapping=None if task else {"base_model_class": kind.__name__, "parent_library": kind.__module__},
    )  # fmt: skip
    missed = sorted(path for path in products if not check_target_module_exists(config, path))
    if missed:
        raise ValueError(
            f"products name {missed[0]}, which lies in the task head ({', '.join(config.modules_to_save or ())}); "
            "the head is saved whole, leave it out"
        )
    # A target, too, is the end of a path to peft: `dense` would reach `pooler.dense`. A pattern is compared with the whole.
    reached = [path for path, _ in base.module.named_modules() if path not in products and check_target_module_exists(config, path)]
    config.exclude_modules = "|".join(map(re.escape, reached)) or None
    return config
