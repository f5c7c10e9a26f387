"""Adapters that peft injects: what they train under canonical names, saved as stock peft saves it.

peft's name `base_model.model.<layer>.<part>.default.weight` becomes `<layer>.<part>.weight`; the head is `head.<parameter>`.
"""

import json
from collections.abc import Callable, Mapping, Set
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import save_file
from torch import nn

from fedpeft import seeds
from fedpeft.adapters.base import Adapted, head_parameters, restore, undoing
from fedpeft.models.base import Base
from fedpeft.models.load import quiet

NAME = "default"  # peft's name of the one adapter
TASKS = {"text": "SEQ_CLS", "language": "CAUSAL_LM", "image": None}


def attach(
    base: Base,
    config: peft.PeftConfig,
    seed: int,
    rename: Callable[[str], str] = str,
    scales: Callable[[nn.Module], Mapping[str, float]] = lambda _: {},
) -> Adapted:
    """Puts the adapter of `config` on the base. `rename` makes a canonical name of peft's (without prefix and adapter name).

    Raises `ValueError`, and leaves the base as it was, where peft cannot adapt this model in this way.
    """
    undo = undoing(base)
    own = {id(parameter): name for name, parameter in base.module.named_parameters()}
    try:
        _check_targets(config, base)
        with quiet(), torch.random.fork_rng():
            torch.manual_seed(seeds.seed(seed, purpose="adapter"))
            model = peft.get_peft_model(base.module, config).eval()
        _free_head(base)
        trained = _trained(model, {key for key, name in own.items() if name in base.head})
    except Exception as fault:  # peft raises a dozen kinds; each says in words what it could not do
        undo()
        raise ValueError(
            f"peft cannot put {config.peft_type.value} on this {type(base.module).__name__}: {str(fault).rstrip('. ')}; its layers "
            f"(for adapter.targets, or adapter.options.target_modules) are {', '.join(_layers(base.module))}"
        ) from fault
    found = {own.get(id(parameter)) or rename(_plain(name)): parameter for name, parameter in trained.items()}
    assert len(found) == len(trained), "two tensors of one canonical name"
    start = {name: parameter.detach().clone() for name, parameter in found.items() if id(parameter) in own}  # biases, if peft trains them

    def off() -> None:
        undo()
        restore(base, start)

    parameters = dict(sorted(found.items())) | head_parameters(base)
    return Adapted(base, parameters, off, _saver(model, config, base), scales(base.module), model)


def heads(base: Base) -> list[str]:
    """The layers whose parameters are the head."""
    return sorted({name.rpartition(".")[0] for name in base.head})


def _check_targets(config: peft.PeftConfig, base: Base) -> None:
    """peft passes over a name that fits no layer as long as another one does."""
    targets = getattr(config, "target_modules", None)
    paths = [path for path, _ in base.module.named_modules()]
    for target in sorted(targets) if isinstance(targets, (list, set)) else ():
        if not any(f".{path}".endswith(f".{target}") for path in paths):
            raise ValueError(f"no layer is called {target}")


def _free_head(base: Base) -> None:
    """Takes peft's wrapper off the head, so that it is trained in place as under every other adapter."""
    for path, inner in list(base.module.named_modules()):
        if isinstance(inner, ModulesToSaveWrapper) and any(name.startswith(f"{path}.") for name in base.head):
            base.module.set_submodule(path, inner.original_module)
    if set(base.head) - {name for name, _ in base.module.named_parameters()}:
        raise ValueError("its targets reach the task head, which is trained whole; name other layers")


def _trained(model: nn.Module, head: Set[int]) -> dict[str, nn.Parameter]:
    """What the tuner trains, under peft's names, without the head and without what its layers count as bookkeeping.

    AdaLoRA's `ranknum` wants a gradient as soon as peft has moved it to another device or dtype.
    """
    for inner in model.modules():
        for name in inner.other_param_names if isinstance(inner, BaseTunerLayer) else ():
            held = getattr(inner, name, None)
            if isinstance(held, nn.Module):
                held.requires_grad_(False)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad and id(p) not in head}
    if not trained:
        raise ValueError("no layer is of a kind that it adapts")
    return trained


def _plain(name: str) -> str:
    """peft's name of a tensor without its prefix and the adapter's name."""
    parts = name.removeprefix("base_model.").removeprefix("model.").split(".")
    return ".".join(part for part in parts if part not in (NAME, "modules_to_save"))


def _saver(model: Any, config: peft.PeftConfig, base: Base) -> Callable[[Path], None]:
    """Writes adapter_config.json and adapter_model.safetensors; the head goes in as a module to save, as stock peft expects it."""

    def save(folder: Path) -> None:
        state = peft.get_peft_model_state_dict(model, save_embedding_layers=False)  # else it asks the hub for the vocabulary's size
        own = dict(base.module.named_parameters())
        prefix = "base_model." if config.is_prompt_learning else "base_model.model."
        state |= {prefix + name: own[name] for name in base.head}
        tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        facts = config.to_dict() | {"base_model_name_or_path": base.source, "inference_mode": True, "task_type": TASKS[base.task]}
        if base.head and "modules_to_save" in facts:
            facts["modules_to_save"] = sorted({*(facts["modules_to_save"] or ()), *_wholes(base)})
        if facts["task_type"] is None:
            facts["auto_mapping"] = {"base_model_class": type(base.module).__name__, "parent_library": type(base.module).__module__}
        plain = {name: sorted(value) if isinstance(value, set) else value for name, value in facts.items()}
        (folder / "adapter_config.json").write_text(json.dumps(plain, indent=2, sort_keys=True) + "\n")

    return save


def _wholes(base: Base) -> set[str]:
    """The largest modules that are nothing but head: RoBERTa's `classifier`, not its two layers, for peft wraps it on top of them."""
    others = {name for name, _ in base.module.named_parameters()} - set(base.head)
    found = set()
    for path in heads(base):
        while (parent := path.rpartition(".")[0]) and not any(name.startswith(f"{parent}.") for name in others):
            path = parent
        found.add(path)
    return found


def _layers(module: nn.Module) -> list[str]:
    """The last name of every layer with a matrix, for messages."""
    kinds = (nn.Linear, nn.Embedding)
    paths = {path for path, inner in module.named_modules() if isinstance(inner, kinds) or type(inner).__name__ == "Conv1D"}
    return sorted({path.rpartition(".")[2] for path in paths})
