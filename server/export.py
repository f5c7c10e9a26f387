"""Export: the global model of a run as files that others read, what was added to the base included."""

from pathlib import Path

from fedpeft.adapters.base import HEAD, restore
from fedpeft.adapters.lora import Lora
from fedpeft.adapters.products import save_merged, save_products, with_rank
from fedpeft.config import ConfigError
from fedpeft.lowrank import LowRank, product, total
from fedpeft.messages import Broadcast
from fedpeft.setting import Setting
from fedpeft.tensors import is_head, is_own, only


def export(setting: Setting, adapter: str, sent: Broadcast, folder: Path) -> None:
    """Writes the model of `sent`, whose tensors are of the adapter of that name, to `folder`.

    Where nothing was added to the base and the adapter has a format of its own (LoRA with its alpha, peft's tuners, ours) in that; else,
    and for the adapters between fixed factors, as one plain PEFT LoRA of rank r + R a layer with scale 1.
    """
    adapted = setting.on(adapter)
    if sent.base_delta or (adapted.products and not isinstance(setting.adapters[adapter], Lora)):
        adapted.fill(sent.tensors)
        save_products(setting.base, products(setting, adapter, sent), folder)
    else:
        adapted.export(only(sent.tensors, lambda name: not is_own(name)), folder)


def export_as(setting: Setting, adapter: str, sent: Broadcast, folder: Path, *, rank: int | None, merge: bool) -> float:
    """Writes the model as one PEFT LoRA, cut to `rank` if it is given, or merged into the base as a whole model.

    Gives the relative Frobenius error of the cut over all layers. Raises `ConfigError` for an adapter that adds no products.
    """
    found, error = products(setting, adapter, sent), 0.0
    if rank is not None:
        found, error = with_rank(found, rank)
    if not merge:
        setting.on(adapter).fill(sent.tensors)
        save_products(setting.base, found, folder)
        return error
    setting.off()
    restore(setting.base, {name.removeprefix(HEAD): tensor for name, tensor in only(sent.tensors, is_head).items()})
    try:
        save_merged(setting.base, found, folder)
    finally:
        restore(setting.base, setting.base.start)
    return error


def products(setting: Setting, adapter: str, sent: Broadcast) -> dict[str, LowRank]:
    """What `sent` adds to each layer of the base, in all."""
    layers = setting.on(adapter).products
    if not layers:
        raise ConfigError("this run's adapter adds no low-rank products (LoRA without DoRA does); its adapter/ folder is all there is")
    parts = {layer: [product(sent.tensors, layer)] for layer in sorted(layers)}
    for chunk in sent.base_delta:
        for layer, part in chunk.items():
            parts.setdefault(layer, []).append(part)
    return {layer: total((1.0, part) for part in some) for layer, some in parts.items()}
