"""Any tuner of the installed peft, as an adapter: what it trains is read and written under canonical names.

peft's name `base_model.model.<layer>.<part>.default.weight` becomes `<layer>.<part>.weight`; the head is `head.<parameter>`.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
from peft.utils import ModulesToSaveWrapper
from torch import nn

from fedpeft import seeds
from fedpeft.adapters.base import HEAD, Adapted, restore
from fedpeft.models.base import Base
from fedpeft.models.load import quiet

NAME = "default"  # peft's name of the one adapter
TASKS = {"text": "SEQ_CLS", "language": "CAUSAL_LM", "image": None}
PREFIX = "base_model.model."


@dataclass(frozen=True)
class Tuner:
    """`type` is a name of peft's PeftType (IA3, OFT, VERA, ...), `options` the fields of its config."""

    type: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def attach(self, base: Base, seed: int) -> Adapted:
        """Injects the tuner; its random start depends on `seed` alone."""
        return attach(base, config_of(self.type, self.options, base), seed)


def config_of(kind: str, options: Mapping[str, Any], base: Base) -> peft.PeftConfig:
    """peft's config for tuner `kind`, the head excluded from its targets."""
    known = {tuner.name: cls for tuner, cls in peft.PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if kind.upper() not in known:
        raise ValueError(f"adapter.type={kind} is not a tuner of peft {peft.__version__}; there are {', '.join(sorted(known))}")
    cls = known[kind.upper()]
    fields = inspect.signature(cls).parameters
    if wrong := sorted(set(options) - set(fields)):
        raise ValueError(f"adapter.options.{wrong[0]} is not a field of {cls.__name__}; there are {', '.join(sorted(fields))}")
    facts = {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}
    if "exclude_modules" in fields and base.head:
        facts.setdefault("exclude_modules", sorted({name.rpartition(".")[0] for name in base.head}))
    if issubclass(cls, peft.PromptLearningConfig):
        facts.setdefault("task_type", TASKS[base.task])
    return cls(**facts)


def attach(
    base: Base,
    config: peft.PeftConfig,
    seed: int,
    rename: Callable[[str], str] = str,
    scales: Callable[[nn.Module], dict[str, float]] = lambda _: {},
) -> Adapted:
    """Puts the adapter of `config` on the base. `rename` makes a canonical name of peft's (without prefix and adapter name)."""
    start = {name: parameter.detach().clone() for name, parameter in base.module.named_parameters() if name in base.head}
    with quiet(), torch.random.fork_rng():
        torch.manual_seed(seeds.seed(seed, purpose="adapter"))
        try:
            model = peft.get_peft_model(base.module, config)
        except ValueError as fault:
            raise ValueError(f"{fault} Layers of this model: {', '.join(_layers(base.module))}") from fault
    head = {HEAD + name: base.start[name] for name in base.head}
    found: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found[_canonical(name, base, rename)] = parameter
    own = {n: p for n, p in base.module.named_parameters() if n in base.head}
    found |= {HEAD + name: parameter for name, parameter in own.items() if HEAD + name not in found}
    with torch.no_grad():
        for name, tensor in head.items():
            found[name].copy_(tensor)
    ordered = dict(sorted(found.items(), key=lambda item: (item[0].startswith(HEAD), item[0])))

    def undo() -> None:
        if hasattr(model.base_model, "unload"):
            model.unload()
        _unwrap(base.module)
        restore(base, start)
        base.module.requires_grad_(False)

    adapted = Adapted(base, ordered, undo, _saver(model, config, base, ordered), scales(base.module), model)
    return adapted


def _canonical(name: str, base: Base, rename: Callable[[str], str]) -> str:
    plain = name.removeprefix(PREFIX)
    parts = [part for part in plain.split(".") if part not in (NAME, "modules_to_save")]
    plain = ".".join(parts)
    return HEAD + plain if plain in base.head else rename(plain)


def _saver(model: Any, config: peft.PeftConfig, base: Base, parameters: Mapping[str, nn.Parameter]) -> Callable[[Path], None]:
    """Writes adapter_config.json and adapter_model.safetensors; the head goes in as a module to save, as stock peft expects it."""

    def save(folder: Path) -> None:
        state = peft.get_peft_model_state_dict(model)
        for name, parameter in parameters.items():
            if name.startswith(HEAD):
                state[PREFIX + name.removeprefix(HEAD)] = parameter.detach()
        tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
        from safetensors.torch import save_file

        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        facts = config.to_dict() | {"base_model_name_or_path": base.source, "inference_mode": True}
        if base.head and not isinstance(config, peft.PromptLearningConfig):
            facts["modules_to_save"] = sorted({name.rpartition(".")[0] for name in base.head})
        if facts.get("task_type") is None:
            facts["task_type"] = TASKS[base.task]
        cls = type(config)
        cls(**{name: value for name, value in facts.items() if name in inspect.signature(cls).parameters}).save_pretrained(folder)

    return save


def _unwrap(module: nn.Module) -> None:
    for path, inner in list(module.named_modules()):
        if isinstance(inner, ModulesToSaveWrapper):
            parent, _, name = path.rpartition(".")
            setattr(module.get_submodule(parent), name, inner.original_module)


def _layers(module: nn.Module) -> list[str]:
    """The last name of every linear layer, for messages."""
    return sorted(
        {name.rpartition(".")[2] for name, inner in module.named_modules() if hasattr(inner, "weight") and inner.weight.dim() == 2}
    )
